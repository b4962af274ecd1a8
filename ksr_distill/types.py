"""The axis letters of every signature, and the batch that flows through training.

b  samples                    c  channels
h, w  a low-resolution image  H, W  a high-resolution image (H = scale · h)
t  integer timestep           k  critic levels

Images are RGB in [-1, 1], channels first, unless a name ends with ``uint8``.
"""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor


class Batch(NamedTuple):
    """A pair of images. A NamedTuple, because Lightning can move one between devices.

    Attributes:
        hires: The original.
        lowres: The degraded original, smaller by the degradation's scale.
    """

    hires: Float[Tensor, "b 3 H W"]
    lowres: Float[Tensor, "b 3 h w"]


@runtime_checkable
class Denoiser(Protocol):
    """What a sampler needs of a network: an estimate of the clean image."""

    def __call__(
        self,
        x_t: Float[Tensor, "b 3 H W"],
        t: Int[Tensor, " b"],
        lowres: Float[Tensor, "b 3 h w"],
    ) -> Float[Tensor, "b 3 H W"]:
        """Return pred_x_0."""
        ...


@runtime_checkable
class NoiseSource(Protocol):
    """What a sampler needs of randomness: the i-th draw of standard normal noise.

    A function of the index rather than a generator, so that tiles can cut their noise out of one
    picture-wide field, and so that golden vectors can be fed in.
    """

    def __call__(self, draw: int) -> Float[Tensor, "b c H W"]:
        """Return the noise of a draw; a sampler asks for draws 0, 1, 2, … once each, in order."""
        ...


@runtime_checkable
class StepObserver(Protocol):
    """A callback that sees the estimate of every sampling step, and may replace it."""

    def __call__(
        self, step: int, timestep: int, pred_x_0: Float[Tensor, "b 3 H W"], /
    ) -> Float[Tensor, "b 3 H W"] | None:
        """Return a replacement for pred_x_0, or None to keep it; steps are counted from 0."""
        ...
