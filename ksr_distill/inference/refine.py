"""The refiner stage: encode a picture, add a little noise, take it away again, decode.

Kandinsky 3.0 Flash as KandiSuperRes Flash uses it: one step at t = 229, or two (479, 229) for a
larger change. The noise added at 229 hides fine detail alone, so the picture keeps its content.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import VQModel
from jaxtyping import Float, Shaped
from torch import Tensor

from ksr_distill.diffusion import NoiseSchedule, student_timesteps
from ksr_distill.inference.devices.memory import ACCELERATED_MOVQ_PER_PX, peak_bytes
from ksr_distill.inference.pictures.rasters import Window
from ksr_distill.inference.tiling.noise import PlaceNoise
from ksr_distill.inference.tiling.tiles import AxisPlan, TilePlan, plan_tiles
from ksr_distill.models.movq import decode, downscale_factor, encode
from ksr_distill.models.refiner import RefinerContext, RefinerUNet
from ksr_distill.types import NoiseSource

MAX_REFINE_STEPS = 2

REFINER_SCHEDULE = NoiseSchedule("cosine")
"""One for all tiles: its tables are copied to the device once, and a copy waits for the device."""

LARGEST_LATENT_TILE = 352
"""Side of the released refiner's tiles (KandiSuperRes): 2816 px of the picture."""

MOVQ_TILE_PX = 1088
MOVQ_OVERLAP_PX = 128
"""MoVQ's tiles: near the released 1024 px, and two of them with their overlap make 2048 px."""


def refine_timesteps(refine_steps: int) -> tuple[int, ...]:
    """Return the refiner's timesteps: none, (229,) or (479, 229), the ends of its own four."""
    if not 0 <= refine_steps <= MAX_REFINE_STEPS:
        raise ValueError(f"refine_steps={refine_steps} is not one of 0, 1, 2")
    return student_timesteps(4)[4 - refine_steps :]


@torch.no_grad()
def refine_latents(
    refiner: RefinerUNet,
    latents: Float[Tensor, "b c h w"],
    *,
    tokens: Float[Tensor, "one n d"],
    mask: Shaped[Tensor, "b n"] | None = None,
    timesteps: Sequence[int],
    draw_noise: NoiseSource,
) -> Float[Tensor, "b c h w"]:
    """Return the latents after noising to each timestep and estimating the clean latents.

    x_t = q(z), z ← (x_t - s_t·ε̂) / a_t (KandiSuperRes; DDPM, arXiv:2006.11239, eq. 4 inverted).

    Args:
        latents: Float32, both sides a multiple of ``refiner.stride``.
        tokens: The projected context, one for the batch or one each.
        mask: 1 keeps a token; None keeps all.
        draw_noise: Draw i is the noise of step i.
    """
    tokens = tokens.to(latents.device, refiner.dtype).expand(latents.shape[0], -1, -1)
    for i, timestep in enumerate(timesteps):
        t = torch.full((latents.shape[0],), timestep, device=latents.device)
        x_t = REFINER_SCHEDULE.add_noise(latents, draw_noise(i), t)
        eps = refiner(x_t.to(refiner.dtype), t, tokens, mask).sample.float()
        latents = (x_t - REFINER_SCHEDULE.noise(t) * eps) / REFINER_SCHEDULE.signal(t)
    return latents


def encode_in_tiles(movq: VQModel, picture: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
    """Return the latents of a picture of any size, float32; tiles where MoVQ needs them.

    Args:
        picture: In [-1, 1]; both sides multiples of 8 latents' worth of pixels.
    """
    factor = downscale_factor(movq)
    height, width = picture.shape[-2:]
    plan = _plan(height, width, factor)
    blended = _reduced(plan, factor)
    return _blend(lambda i: encode(movq, _part(picture, plan.window(i))), blended)


def decode_in_tiles(movq: VQModel, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
    """Return the picture of latents of any size, float32 and unclamped."""
    factor = downscale_factor(movq)
    height, width = (side * factor for side in latents.shape[-2:])
    plan = _plan(height, width, factor)
    windows = _reduced(plan, factor)
    return _blend(lambda i: decode(movq, _part(latents, windows.window(i))), plan)


def match_low_frequencies(
    picture: Float[Tensor, "b 3 H W"], reference: Float[Tensor, "b 3 H W"], *, cell_px: int
) -> Float[Tensor, "b 3 H W"]:
    """Return the picture with the reference's colours, averaged over cells, and its own detail.

    Tiles cannot drift apart in colour when each is matched to the one picture that all came from.

    Args:
        cell_px: Detail that is finer than this stays the picture's own.
    """
    drift = F.avg_pool2d(reference - picture, cell_px, ceil_mode=True)
    return picture + F.interpolate(drift, picture.shape[-2:], mode="bilinear")


@dataclass(frozen=True)
class RefinerPass:
    """The refiner's work on a batch of tiles; a pass that keeps the size.

    Attributes:
        timesteps: From ``refine_timesteps``.
        noise: Of this pass; drawn for the latents' places.
        colour_cell_px: Match colours to the input over cells of this size; null leaves them.
        stage: Which pass of the job this is.
        dtype: In which finished tiles are kept.
    """

    refiner: RefinerUNet
    movq: VQModel
    context: RefinerContext
    timesteps: Sequence[int]
    noise: PlaceNoise
    device: torch.device
    colour_cell_px: int | None = None
    dtype: torch.dtype = torch.float32
    factor: int = 1

    @property
    def stage(self) -> int:
        """Which pass of the job this is."""
        return self.noise.stage

    @property
    def align(self) -> int:
        """What the corners and sides of tiles must be multiples of, in pixels."""
        return self.refiner.stride * downscale_factor(self.movq)

    @property
    def largest_tile_px(self) -> int:
        """What the refiner was used for: larger pictures are cut."""
        return LARGEST_LATENT_TILE * downscale_factor(self.movq)

    @property
    def widest_overlap_px(self) -> None:
        """No bound of its own."""

    def working_bytes(self, tile_px: int, batch: int) -> int:
        """Return about what the weights and MoVQ's decoder need, in tiles of its own size."""
        return peak_bytes(
            [self.refiner, self.movq, self.context],
            px=batch * min(tile_px, MOVQ_TILE_PX) ** 2,
            channels=self.movq.config.block_out_channels[0],
            dtype=self.dtype,
            device=self.device,
            accelerated_per_px=ACCELERATED_MOVQ_PER_PX,
        )

    def __call__(
        self, tiles: Float[Tensor, "b 3 h w"], windows: Sequence[Window]
    ) -> Float[Tensor, "b 3 h w"]:
        """Return the refined tiles.

        A CPU takes them one by one, for the reason that ``SuperResolutionPass`` gives.
        """
        if self.device.type == "cpu" and len(windows) > 1:
            return torch.cat(
                [self(tile[None], [window]) for tile, window in zip(tiles, windows, strict=True)]
            )
        picture = tiles.to(self.device)
        latents = encode_in_tiles(self.movq, picture)
        latents = refine_latents(
            self.refiner,
            latents,
            tokens=self.context.tokens,
            timesteps=self.timesteps,
            draw_noise=self._noise_source(windows, channels=latents.shape[1]),
        )
        refined = decode_in_tiles(self.movq, latents)
        if self.colour_cell_px is not None:
            refined = match_low_frequencies(refined, picture, cell_px=self.colour_cell_px)
        return refined.to(self.dtype)

    def _noise_source(self, windows: Sequence[Window], channels: int) -> NoiseSource:
        factor = downscale_factor(self.movq)
        latent_windows = [_divided(window, factor) for window in windows]
        return self.noise.source(latent_windows, channels=channels, device=self.device)


def _plan(height: int, width: int, factor: int) -> TilePlan:
    return plan_tiles(height, width, tile_px=MOVQ_TILE_PX, overlap_px=MOVQ_OVERLAP_PX, align=factor)


def _reduced(plan: TilePlan, factor: int) -> TilePlan:
    """Return the pixels' plan as the latents' plan."""

    def reduced(axis: AxisPlan) -> AxisPlan:
        starts = tuple(start // factor for start in axis.starts)
        return AxisPlan(axis.length // factor, axis.tile // factor, axis.overlap // factor, starts)

    return TilePlan(reduced(plan.rows), reduced(plan.columns))


def _divided(window: Window, factor: int) -> Window:
    return Window(
        window.top // factor, window.left // factor, window.height // factor, window.width // factor
    )


def _part(image: Tensor, window: Window) -> Tensor:
    rows = slice(window.top, window.top + window.height)
    return image[..., rows, window.left : window.left + window.width]


def _blend(compute: Callable[[int], Tensor], plan: TilePlan) -> Tensor:
    """Return all tiles of the plan as one tensor, summed in their order."""
    tile = compute(0)
    if len(plan) == 1:
        return tile
    total = tile.new_zeros(*tile.shape[:2], plan.rows.length, plan.columns.length)
    for index in range(len(plan)):
        row, column = divmod(index, len(plan.columns.starts))
        tile = tile if index == 0 else compute(index)
        # Copied without waiting: the device is still busy with the tile.
        own_rows = plan.rows.weights(row).to(tile.device, non_blocking=True)
        own_columns = plan.columns.weights(column).to(tile.device, non_blocking=True)
        _part(total, plan.window(index)).add_(own_rows[:, None] * own_columns * tile)
    return total
