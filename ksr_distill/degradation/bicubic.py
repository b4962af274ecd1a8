"""Bicubic reduction: what the super-resolution benchmarks call "BI"."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ksr_distill.degradation.contract import check_scale, check_sides, in_full_precision
from ksr_distill.levels import round_to_8_bit


def reduce_bicubic(images: Float[Tensor, "b c H W"], scale: int) -> Float[Tensor, "b c h w"]:
    """Return the images reduced by an antialiased cubic filter, unclamped.

    The kernel is Keys' with a = -0.5, widened by the scale, as in Pillow's BICUBIC and MATLAB's
    imresize. Without ``antialias`` PyTorch samples four pixels with a = -0.75: another picture.
    """
    height, width = images.shape[-2:]
    return F.interpolate(
        images, size=(height // scale, width // scale), mode="bicubic", antialias=True
    )


@dataclass(frozen=True)
class BicubicDegradation:
    """Bicubic reduction and nothing else; draws nothing.

    Attributes:
        scale: Hires side divided by lowres side.
        quantise: Round to the 256 levels of a file, so that training sees what users will have.
    """

    scale: int
    quantise: bool = True

    def __post_init__(self) -> None:
        check_scale(self.scale)

    @torch.no_grad()
    def __call__(
        self,
        hires: Float[Tensor, "b 3 H W"],
        *,
        generator: torch.Generator,  # noqa: ARG002 -- the contract's; nothing is drawn here
    ) -> Float[Tensor, "b 3 h w"]:
        """Return the reduced images in [-1, 1]."""
        check_sides(hires, self.scale)
        with in_full_precision(hires.device):
            lowres = reduce_bicubic(hires.float(), self.scale)
        return round_to_8_bit(lowres) if self.quantise else lowres.clamp(-1, 1)
