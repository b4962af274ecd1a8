"""MoVQ, the refiner's autoencoder: diffusers' VQModel, used without its codebook."""

from typing import Any

import torch
from diffusers import VQModel
from jaxtyping import Float
from torch import Tensor

MOVQ_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "vq_embed_dim": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_type": "spatial",
    "block_out_channels": (256, 512, 512, 1024),
    "down_block_types": ("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
    # The released file has no codebook: one entry, never looked up. No factor scales the latents.
    "num_vq_embeddings": 1,
    "scaling_factor": 1.0,
}
"""The released ``movq.pt`` (270.6 M parameters) as a VQModel."""


def downscale_factor(movq: VQModel) -> int:
    """Return how many pixels a side one latent stands for: 8 for the released model."""
    return 2 ** (len(movq.config.block_out_channels) - 1)


@torch.no_grad()
def encode(movq: VQModel, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
    """Return the image's latents, not quantised, in float32.

    Args:
        image: In [-1, 1]; both sides a multiple of ``downscale_factor``. Computed in movq's dtype.
    """
    return movq.encode(image.to(movq.dtype)).latents.float()


@torch.no_grad()
def decode(movq: VQModel, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
    """Return the latents' image, in float32 and unclamped.

    Without ``force_not_quantize`` diffusers snaps every latent to the codebook, which the released
    file does not have: the picture is then wrong without a warning (error 5.0, measured).
    """
    return movq.decode(latents.to(movq.dtype), force_not_quantize=True).sample.float()
