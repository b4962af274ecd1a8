"""The teacher's pass: windows over a large tile, averaged after each of its steps."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ksr_distill.diffusion import sample_teacher, window_views
from ksr_distill.inference.devices.memory import free_memory_bytes, weight_bytes
from ksr_distill.inference.pictures.rasters import Window
from ksr_distill.inference.tiling.noise import PlaceNoise
from ksr_distill.inference.tiling.passes import is_out_of_memory
from ksr_distill.models import KSRUNet

logger = logging.getLogger(__name__)

FEATURE_MAPS_AT_ONCE = 16
"""Memory of one view, in feature maps of the first level. The released pipeline's peak at 2048²
is 17.7 GB, weights and all (one H200): 16.5 such maps of 128 channels in half precision."""

SHARE_OF_FREE_MEMORY = 0.8

CANVAS_BYTES_PER_PX = 200
"""Of a tile's pixel, whatever the windows: the sample, the sums, the solvers' earlier estimates,
the enlarged source (3 channels of float32 each) and the integers that noise is made of."""


@dataclass(frozen=True)
class TeacherPass:
    """DPM-Solver steps on each tile, in windows that are averaged after every step.

    A tile is far larger than a window: most pictures are one tile, and then the result is
    MultiDiffusion's (arXiv:2302.08113). Larger ones are blended from finished tiles, so that the
    memory has a bound and the disk can hold what is done.

    Attributes:
        view_batch_size: Windows denoised at once; null means what the free memory holds.
        dtype: In which finished tiles are kept: the averages are float32.
    """

    denoise: KSRUNet
    num_inference_steps: int
    noise: PlaceNoise
    factor: int
    align: int
    device: torch.device
    window_px: int
    stride_px: int
    view_batch_size: int | None = None
    dtype: torch.dtype = field(default=torch.float32)
    largest_tile_px: int = 4096

    @property
    def stage(self) -> int:
        """Which pass of the job this is."""
        return self.noise.stage

    @property
    def widest_overlap_px(self) -> None:
        """No bound of its own."""

    def __call__(
        self, tiles: Float[Tensor, "b 3 h w"], windows: Sequence[Window]
    ) -> Float[Tensor, "b 3 H W"]:
        """Return the enlarged tiles, one after the other: each has many windows of its own."""
        return torch.cat(
            [self._sample(tile[None], window) for tile, window in zip(tiles, windows, strict=True)]
        )

    def _sample(self, lowres: Float[Tensor, "1 3 h w"], window: Window) -> Tensor:
        """Return the sample; where memory runs out after all, with half the views at once."""
        start = self.noise.draw(0, window, device=self.device)[None]
        views = {"window_px": self.window_px, "stride_px": self.stride_px}
        num_views = len(window_views(window.height, window.width, **views))
        batch = min(self.view_batch_size or self.affordable_views(), num_views)
        while True:
            try:
                return sample_teacher(
                    self.denoise,
                    lowres.to(self.device),
                    start=start,
                    num_inference_steps=self.num_inference_steps,
                    view_batch_size=batch,
                    **views,
                )
            except RuntimeError as error:
                if not is_out_of_memory(error) or batch == 1:
                    raise
            batch //= 2
            logger.warning("out of memory: going on with view_batch_size=%d", batch)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def affordable_views(self) -> int:
        """Return how many windows the device's free memory holds at once.

        A CPU gains nothing by a batch and would round otherwise, so it takes them one by one.
        """
        if self.device.type != "cuda":
            return 1
        free_bytes = free_memory_bytes(self.device)
        return views_that_fit(free_bytes, bytes_per_view=self.bytes_per_view(self.window_px))

    def bytes_per_view(self, window_px: int) -> int:
        """Return what the network takes for one window of this size."""
        maps = FEATURE_MAPS_AT_ONCE * self.denoise.level_channels[0] * self.denoise.dtype.itemsize
        return maps * window_px**2

    def working_bytes(self, tile_px: int, batch: int) -> int:  # noqa: ARG002 - one after the other
        """Return about what the weights and a tile need, with one window at once."""
        view = self.bytes_per_view(min(tile_px, self.window_px))
        return weight_bytes([self.denoise]) + view + CANVAS_BYTES_PER_PX * tile_px**2


def views_that_fit(free_bytes: int, *, bytes_per_view: int) -> int:
    """Return the number of windows whose feature maps fit into the free memory; at least one."""
    return max(1, int(SHARE_OF_FREE_MEMORY * free_bytes) // bytes_per_view)
