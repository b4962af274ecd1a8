"""The 256 levels of a picture file, and images in [-1, 1]: there and back."""

from jaxtyping import Float, Real
from torch import Tensor


def to_levels(images: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the levels 0 … 255 that a file would hold: clamped and rounded, still floats."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round()


def from_levels(levels: Real[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return levels 0 … 255, integers or floats, as images in [-1, 1]; integers as float32."""
    return levels / 127.5 - 1


def round_to_8_bit(images: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the images as an 8-bit file would keep them."""
    return from_levels(to_levels(images))
