"""The networks. These module paths are written into every exported folder: public for good."""

from ksr_distill.models.critic import Critic, CriticHeads
from ksr_distill.models.unet import Encoded, KSRUNet

__all__ = ["Critic", "CriticHeads", "Encoded", "KSRUNet"]
