"""Baselines, teachers and students behind one interface."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, get_args, runtime_checkable

import PIL.Image
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from ksr_distill.diffusion import sample_teacher, sample_teacher_ddim
from ksr_distill.evaluation.benchmark_images import as_picture
from ksr_distill.evaluation.model_folders import ModelFolder, SamplerName, load_model_folder
from ksr_distill.inference import KSRFlashPipeline
from ksr_distill.levels import from_levels, to_levels
from ksr_distill.models import KSRUNet
from ksr_distill.types import Denoiser

BASELINES: Mapping[str, PIL.Image.Resampling] = {
    "nearest": PIL.Image.Resampling.NEAREST,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "lanczos": PIL.Image.Resampling.LANCZOS,
}
MAX_KEPT_ESTIMATES = 8
ORIGINAL, LOWRES = RESERVED_NAMES = ("original", "lowres")
"""Names of the pictures beside the models' own."""


class Estimate(NamedTuple):
    """A sampler's estimate after one of its steps."""

    step: int
    """Counted from 1."""
    image: UInt8[Tensor, "1 3 H W"]


class Upscaled(NamedTuple):
    """An upscaler's result.

    Attributes:
        share_out_of_range: Of the network's last estimate, before anything is clamped.
        estimates: After some steps, evenly chosen; empty for baselines and for tiled pictures.
    """

    hires: Float[Tensor, "1 3 H W"]
    share_out_of_range: float = 0.0
    estimates: Sequence[Estimate] = ()


@runtime_checkable
class Upscaler(Protocol):
    """What the benchmark compares."""

    @property
    def num_inference_steps(self) -> int | None:
        """Evaluations of the network per picture; None for a baseline."""
        ...

    def __call__(self, lowres: Float[Tensor, "1 3 h w"], *, generator: torch.Generator) -> Upscaled:
        """Return the lowres enlarged, in [-1, 1].

        Args:
            generator: On the CPU, for every random draw; a baseline makes none.
        """
        ...


@dataclass(frozen=True)
class ModelSpec:
    """What to compare, by name.

    Attributes:
        path: A model folder (model_index.json) or a bare U-Net's (config.json).
        sampler: `student` runs the shipped pipeline; `ddim` and `dpm` sample as a teacher. None
            takes what the folder was made for.
        num_inference_steps: None takes the folder's own.
        refine_steps: Of the refiner, after a student.
    """

    name: str
    path: Path
    sampler: str | None = None
    num_inference_steps: int | None = None
    refine_steps: int = 0

    def __post_init__(self) -> None:
        if "/" in self.name or self.name in (*BASELINES, *RESERVED_NAMES):
            raise ValueError(
                f"models.name={self.name!r} cannot name a model: pictures are saved under it; "
                "use another, without a slash"
            )
        if self.sampler not in (None, *get_args(SamplerName)):
            raise ValueError(
                f"models.{self.name}.sampler={self.sampler!r} is unknown; "
                f"use one of {', '.join(get_args(SamplerName))}"
            )
        if self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise ValueError(
                f"models.{self.name}.num_inference_steps={self.num_inference_steps} is below 1; "
                "leave it out for the folder's own"
            )


@dataclass(frozen=True)
class PillowUpscaler:
    """A filter of Pillow's, the usual baseline."""

    method: PIL.Image.Resampling
    scale: int
    num_inference_steps: int | None = None

    def __call__(
        self,
        lowres: Float[Tensor, "1 3 h w"],
        *,
        generator: torch.Generator,  # noqa: ARG002 -- the protocol's; a filter draws nothing
    ) -> Upscaled:
        """Return the lowres resized."""
        picture = as_picture(lowres)
        size = (picture.width * self.scale, picture.height * self.scale)
        pixels = torch.frombuffer(
            bytearray(picture.resize(size, self.method).tobytes()), dtype=torch.uint8
        )
        hires = from_levels(pixels.view(1, size[1], size[0], 3).permute(0, 3, 1, 2))
        return Upscaled(hires.to(lowres.device))


@dataclass(frozen=True)
class StudentUpscaler:
    """A few-step student through the shipped pipeline: its padding, its tiles, its refiner."""

    pipeline: KSRFlashPipeline
    scale: int
    steps: int | None = None
    refine_steps: int = 0

    @property
    def num_inference_steps(self) -> int:
        """The student's steps, without the refiner's."""
        return self.steps or len(self.pipeline.config.student_timesteps)

    def __call__(self, lowres: Float[Tensor, "1 3 h w"], *, generator: torch.Generator) -> Upscaled:
        """Return the lowres enlarged by the model's own scale."""
        height, width = (side * self.scale for side in lowres.shape[-2:])
        recorder = StepRecorder(self.num_inference_steps, height, width)

        def observe(_: object, step: int, __: int, values: Mapping[str, Tensor]) -> None:
            recorder(step, values["pred_x_0"])

        result = self.pipeline(
            (lowres + 1) / 2,
            scale=float(self.scale),
            num_inference_steps=self.steps,
            refine_steps=self.refine_steps,
            generator=generator,
            output_type="pt",
            callback_on_step_end=observe,
        )
        hires = torch.as_tensor(result.images).to(lowres.device)
        return recorder.upscaled(hires * 2 - 1)


@dataclass(frozen=True)
class TeacherUpscaler:
    """A teacher in many steps, the picture in one piece (`dpm`: in the released windows)."""

    unet: KSRUNet
    scale: int
    sampler: str
    num_inference_steps: int

    @torch.no_grad()
    def __call__(self, lowres: Float[Tensor, "1 3 h w"], *, generator: torch.Generator) -> Upscaled:
        """Return a sample, unclamped."""
        height, width = (side * self.scale for side in lowres.shape[-2:])
        padded = _pad(lowres, multiple=self.unet.stride)
        shape = (1, 3, *(side * self.scale for side in padded.shape[-2:]))
        start = torch.randn(shape, generator=generator).to(lowres.device)
        recorder = StepRecorder(self.num_inference_steps, height, width)
        sample = sample_teacher_ddim if self.sampler == "ddim" else sample_teacher
        hires = sample(
            recorder.watch(self.unet),
            padded,
            start=start,
            num_inference_steps=self.num_inference_steps,
        )
        return recorder.upscaled(hires[..., :height, :width])


@dataclass
class StepRecorder:
    """Keeps estimates of the whole picture; of a tiled picture it keeps none."""

    num_steps: int
    height: int
    width: int
    estimates: list[Estimate] = field(default_factory=list)
    share_out_of_range: float = 0.0

    def __call__(self, step: int, pred_x_0: Float[Tensor, "b 3 H W"]) -> None:
        """Record the estimate after a step, counted from 0."""
        is_last = (step + 1) % self.num_steps == 0
        if is_last:
            self.share_out_of_range = float((pred_x_0.abs() > 1).float().mean())
        covers = pred_x_0.shape[-2] >= self.height and pred_x_0.shape[-1] >= self.width
        stride = -(-self.num_steps // MAX_KEPT_ESTIMATES)
        if pred_x_0.shape[0] == 1 and covers and (is_last or step % stride == 0):
            cropped = pred_x_0[..., : self.height, : self.width].float()
            self.estimates.append(Estimate(step + 1, to_levels(cropped).byte().cpu()))

    def watch(self, denoise: Denoiser) -> Denoiser:
        """Return the denoiser with every estimate recorded."""
        calls = 0

        def watched(x_t: Tensor, t: Tensor, lowres: Tensor) -> Tensor:
            nonlocal calls
            pred_x_0 = denoise(x_t, t, lowres)
            self(calls, pred_x_0)
            calls += 1
            return pred_x_0

        return watched

    def upscaled(self, hires: Float[Tensor, "1 3 H W"]) -> Upscaled:
        """Return the result with the recorded estimates."""
        return Upscaled(hires, self.share_out_of_range, tuple(self.estimates))


def build_baseline(name: str, *, scale: int) -> Upscaler:
    """Return a baseline by its name.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in BASELINES:
        raise ValueError(f"baselines has {name!r}; allowed are {', '.join(BASELINES)}")
    return PillowUpscaler(BASELINES[name], scale)


def build_upscalers(
    specs: Sequence[ModelSpec], *, scale: int, device: torch.device, half: bool
) -> dict[str, Upscaler]:
    """Return the models by name; a folder that several of them share is loaded once.

    Args:
        half: On a GPU, run students in half precision, as `ksr upscale` does.

    Raises:
        ValueError: If a folder is no model's, or made for another scale.
    """
    folders: dict[Path, ModelFolder] = {}
    upscalers: dict[str, Upscaler] = {}
    for spec in specs:
        if spec.name in upscalers:
            raise ValueError(f"models has two entries called {spec.name}; give one another name")
        path = spec.path.resolve()
        if path not in folders:
            folders[path] = load_model_folder(spec.path, scale=scale, device=device, half=half)
        upscalers[spec.name] = build_upscaler(spec, folders[path], scale=scale)
    return upscalers


def build_upscaler(spec: ModelSpec, folder: ModelFolder, *, scale: int) -> Upscaler:
    """Return an upscaler that samples a loaded folder as the entry says.

    Raises:
        ValueError: If the folder cannot be sampled that way.
    """
    sampler = spec.sampler or folder.sampler
    if sampler is None:
        raise ValueError(
            f"models.{spec.name}.sampler is not set, and {spec.path} is a bare U-Net that does not "
            f"say; use one of {', '.join(get_args(SamplerName))}"
        )
    if sampler == "student":
        return StudentUpscaler(
            folder.pipeline, scale, spec.num_inference_steps, refine_steps=spec.refine_steps
        )
    if spec.refine_steps:
        raise ValueError(
            f"models.{spec.name}.refine_steps={spec.refine_steps} needs sampler=student"
        )
    steps = spec.num_inference_steps or folder.num_inference_steps
    if steps is None:
        raise ValueError(
            f"models.{spec.name}.num_inference_steps is not set; {sampler} needs a number"
        )
    return TeacherUpscaler(folder.pipeline.sr, scale, sampler, steps)


def _pad(lowres: Float[Tensor, "1 3 h w"], *, multiple: int) -> Float[Tensor, "1 3 h2 w2"]:
    """Return the lowres, reflected at its right and bottom up to a multiple of the stride."""
    down, right = (-side % multiple for side in lowres.shape[-2:])
    return F.pad(lowres, (0, right, 0, down), mode="reflect")
