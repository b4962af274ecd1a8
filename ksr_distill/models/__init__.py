"""The networks. These module paths are written into every exported folder: public for good."""

# diffusers finds a class by this module's name only where its base class can be seen too.
from diffusers import ModelMixin

from ksr_distill.models.critic import Critic, CriticHeads
from ksr_distill.models.unet import Encoded, KSRUNet

__all__ = ["Critic", "CriticHeads", "Encoded", "KSRUNet", "ModelMixin"]
