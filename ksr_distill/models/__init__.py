"""The networks. Exported folders name these module paths, so they must never change."""

# diffusers resolves ["ksr_distill.models", "KSRUNet"] only if this module has ModelMixin as well.
from diffusers import ModelMixin

from ksr_distill.models.critic import Critic, CriticHeads, scores_of_frozen_heads
from ksr_distill.models.refiner import RefinerContext, RefinerUNet
from ksr_distill.models.unet import Encoded, KSRUNet, enlarge, layout_of

__all__ = [
    "Critic",
    "CriticHeads",
    "Encoded",
    "KSRUNet",
    "ModelMixin",
    "RefinerContext",
    "RefinerUNet",
    "enlarge",
    "layout_of",
    "scores_of_frozen_heads",
]
