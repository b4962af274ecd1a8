"""The axis letters of every signature, and the batch that flows through training.

b  samples                    c  channels
h, w  a low-resolution image  H, W  a high-resolution image (H = scale · h)
t  integer timestep           k  critic levels

Images are RGB in [-1, 1], channels first, unless a name ends with ``uint8``.
"""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Batch(NamedTuple):
    """A pair of images. A NamedTuple because Lightning moves it to a device as it is.

    Attributes:
        hires: The original.
        lowres: The degraded original, smaller by the degradation's scale.
    """

    hires: Float[Tensor, "b 3 H W"]
    lowres: Float[Tensor, "b 3 h w"]
