"""The interface of all degradations."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Degradation(Protocol):
    """Makes a plausible low-resolution input of a high-resolution image."""

    @property
    def scale(self) -> int:
        """Hires side divided by lowres side."""
        ...

    def __call__(
        self, hires: Float[Tensor, "b 3 H W"], *, generator: torch.Generator
    ) -> Float[Tensor, "b 3 h w"]:
        """Return the degraded images, on the tensor's device and without gradient.

        Args:
            hires: Images in [-1, 1]; sides are multiples of the scale.
            generator: Where every random draw comes from, on the device of the images. The same
                seed gives the same result.
        """
        ...


def check_scale(scale: int) -> None:
    """Refuse a scale that is no enlargement.

    Raises:
        ValueError: If the scale is below 1.
    """
    if scale < 1:
        raise ValueError(f"degradation.scale={scale} is below 1; use 2 or 4")


def check_sides(hires: Float[Tensor, "b 3 H W"], scale: int) -> None:
    """Refuse images that the scale does not divide.

    Raises:
        ValueError: If a side is not a multiple of the scale.
    """
    height, width = hires.shape[-2:]
    if height % scale or width % scale:
        raise ValueError(
            f"hires is {width}x{height} px, not a multiple of degradation.scale={scale}; "
            f"crop it to {width // scale * scale}x{height // scale * scale}"
        )


def in_full_precision(device: torch.device) -> torch.autocast:
    """Return a context without autocast: bf16 cannot represent all 256 levels."""
    return torch.autocast(device.type, enabled=False)
