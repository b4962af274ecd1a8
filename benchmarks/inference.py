"""Time and memory from 1K to 2K, and how close the result is to float32.

    python -m benchmarks.inference                        # full size, a few minutes on an H200
    python -m benchmarks.inference --tiny                 # seconds on a CPU
    python -m benchmarks.inference --stage sr --profile   # one stage's kernels

``as shipped`` is the released code's way: float16 U-Nets, float32 MoVQ, plain modules. ``ours`` is
what ``ksr upscale`` does on a GPU. Weights are random, and the same in all rows. TFLOP/s count the
operations of the plain algorithm, so that a stage that needs fewer may exceed the machine's rate.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate.hooks import remove_hook_from_module
from diffusers import VQModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import (
    RESULTS,
    matmul_rate,
    phase,
    time_calls,
    wait_for,
    write_results,
)
from benchmarks.profiling import print_profile
from ksr_distill.inference import KSRFlashPipeline, acceleration
from ksr_distill.inference.acceleration import accelerate, can_accelerate, operations, restore
from ksr_distill.inference.devices.offload import take_turns
from ksr_distill.inference.pictures.rasters import Window
from ksr_distill.inference.refine import (
    RefinerPass,
    decode_in_tiles,
    encode_in_tiles,
    refine_latents,
)
from ksr_distill.inference.tiling.passes import SuperResolutionPass
from ksr_distill.models import KSRUNet, RefinerContext, RefinerUNet
from ksr_distill.models.movq import MOVQ_CONFIG

SCALE = 2
TINY_UNET = {"base_channels": 8, "channel_multipliers": (1, 2), "num_blocks": (1, 1),
             "num_groups": 4, "time_embedding_dim": 16}  # fmt: skip
TINY_REFINER = {"block_out_channels": (64, 64), "layers_per_block": 2, "time_embedding_dim": 32,
                "cross_attention_dim": 64, "groups": 4, "attention_head_dim": 16}  # fmt: skip
TINY_MOVQ = {"block_out_channels": (32, 32),
             "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
             "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")}  # fmt: skip


class Bench:
    """A pipeline of random weights and one picture, run in several ways."""

    def __init__(self, device: torch.device, *, tiny: bool) -> None:
        self.device = device
        self.side = 32 if tiny else 1024
        self.half = torch.float16 if device.type == "cuda" else torch.float32
        self.pipe = make_pipeline(device, tiny=tiny)
        self.pictures = [photo_like(self.side, seed=seed) for seed in range(4)]
        sr, refiner = self.pipe.passes(SCALE, seed=0, refine_steps=1)
        self.sr = cast(SuperResolutionPass, sr)
        self.refiner = cast(RefinerPass, refiner)
        side = SCALE * self.side
        self.windows = [Window(0, 0, side, side)]
        self.lowres = (self.pictures[0] * 2 - 1)[None].to(device)
        self.large = F.interpolate(self.lowres, scale_factor=float(SCALE), mode="bilinear")
        with torch.no_grad():
            self.latents = encode_in_tiles(self.pipe.movq, self.large)

    def whole(self, pictures: list[Tensor] | Tensor | None = None) -> Tensor:
        """Return enlarged pictures from the whole pipeline, as a user calls it."""
        return self.pipe(
            self.pictures[0] if pictures is None else pictures,
            SCALE,
            refine_steps=1,
            generator=torch.Generator().manual_seed(0),
            tile_px=SCALE * self.side,
            output_type="pt",
        ).images

    @property
    def stages(self) -> dict[str, Callable[[], object]]:
        """Each stage on its own, with its noise and without gradients, as in the pipeline."""
        refiner = self.refiner
        draw_noise = refiner._noise_source(self.windows, channels=self.latents.shape[1])
        calls: dict[str, Callable[[], object]] = {
            "sr": lambda: self.sr(self.lowres, self.windows),
            "encode": lambda: encode_in_tiles(self.pipe.movq, self.large),
            "refine": lambda: refine_latents(
                self.pipe.refiner, self.latents, tokens=self.pipe.context.tokens,
                timesteps=refiner.timesteps, draw_noise=draw_noise,
            ),
            "decode": lambda: decode_in_tiles(self.pipe.movq, self.latents),
        }  # fmt: skip
        return {name: torch.no_grad()(call) for name, call in calls.items()}

    def cast(self, dtype: torch.dtype, movq_dtype: torch.dtype) -> None:
        """Convert the networks; all weights are representable in float16, so this is exact."""
        for network in (self.pipe.sr, self.pipe.refiner, self.pipe.context):
            nn.Module.to(network, dtype)
        nn.Module.to(self.pipe.movq, movq_dtype)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def as_shipped(self) -> None:
        """Run the plain modules, as the released code does."""
        restore(self.pipe.sr, self.pipe.refiner, self.pipe.movq)
        self.cast(self.half, torch.float32)

    def ours(self) -> None:
        """Run the fast operations; without a GPU they are plain torch."""
        self.cast(self.half, self.half)
        accelerate(self.pipe.sr, self.pipe.refiner, self.pipe.movq)

    def measure(
        self, reference: Tensor, flops: dict[str, float], *, repeats: int
    ) -> dict[str, Any]:
        """Return seconds and peak memory of the whole and of each stage, and the PSNR."""
        decibels = psnr(self.whole(), reference)
        rows: dict[str, Any] = {}
        for name, call in {"whole": self.whole, **self.stages}.items():
            times = time_calls(call, calls=1, repeats=repeats, device=self.device)  # type: ignore[arg-type]
            rows[name] = {"seconds": times.seconds, "spread": times.spread,
                          "host_seconds": times.host_seconds, "peak_gb": times.peak_gb}  # fmt: skip
            rows[name]["tflops"] = flops[name] / times.seconds / 1e12
        rows["whole"]["psnr_db"] = decibels
        return rows

    def count(self) -> dict[str, float]:
        """Return the floating-point operations of each stage's plain modules."""
        flops = {}
        for name, call in self.stages.items():
            with FlopCounterMode(display=False) as counter:
                call()
            flops[name] = float(counter.get_total_flops())
        flops["whole"] = sum(flops.values())
        return flops


def make_pipeline(device: torch.device, *, tiny: bool) -> KSRFlashPipeline:
    """Return a pipeline whose random weights give outputs with the contrast of a photo."""
    torch.manual_seed(0)
    with torch.device(device):
        sr = KSRUNet(**(TINY_UNET if tiny else {})).eval()  # type: ignore[arg-type]
        refiner = RefinerUNet(**(TINY_REFINER if tiny else {})).eval()  # type: ignore[arg-type]
        movq = VQModel(**(MOVQ_CONFIG | (TINY_MOVQ if tiny else {}))).eval()
        context = RefinerContext(refiner.config.cross_attention_dim)
    for network in (sr, refiner, movq, context):
        draw_weights(network)
    calibrate(sr, refiner, movq, context.tokens)
    for network in (sr, refiner, movq, context):
        nn.Module.half(network).float()
    pipe = KSRFlashPipeline(sr, refiner, movq, context)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def draw_weights(network: nn.Module) -> None:
    """Draw weights that keep the scale of their inputs, as trained ones do.

    PyTorch's initialisation shrinks each convolution's output by √3; the refiner then amplifies a
    rounding error 24-fold, with these weights twofold (measured on a narrower one). Queries and
    keys are smaller, so that attention stays broad: at full size it otherwise picks single ones out
    of 16 000 tokens, and the error grows with the picture (2.3 at 128 px, 4.1 at 1024; so 2.0).
    """
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2:
            is_factor = name.endswith(("norm.weight", "norm1.weight", "norm2.weight",
                                       "norm_1.weight", "norm_2.weight", "norm_layer.weight",
                                       "norm_out.weight", "conv_y.bias"))  # fmt: skip
            nn.init.normal_(parameter, mean=float(is_factor), std=0.1)
        elif name.endswith(("to_q.weight", "to_k.weight")):
            nn.init.normal_(parameter, std=0.3 * parameter[0].numel() ** -0.5)
        elif "context_mlp" in name or "time_projection" in name or "conv_y" in name:
            nn.init.normal_(parameter, std=0.1 * parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


@torch.no_grad()
def calibrate(sr: KSRUNet, refiner: RefinerUNet, movq: VQModel, tokens: Tensor) -> None:
    """Scale the last layers: standard deviation 0.4 for pictures in [-1, 1], 1 for the others."""
    x = torch.randn(1, 3, 64, 64, device=tokens.device)
    t = torch.tensor([479], device=tokens.device)

    def scale(layer: nn.Conv2d, output: Tensor, spread: float) -> None:
        layer.weight *= spread / output.std()
        if layer.bias is not None:
            layer.bias.copy_((layer.bias - output.mean((0, 2, 3))) * (spread / output.std()))

    scale(sr.conv_out, sr(x, t, x[..., ::2, ::2]), 0.4)
    scale(movq.quant_conv, movq.encode(x).latents, 1.0)
    latents = torch.randn(1, 4, 16, 16, device=tokens.device)
    scale(refiner.conv_out, refiner(latents, t, tokens).sample, 1.0)
    scale(movq.decoder.conv_out, movq.decode(latents, force_not_quantize=True).sample, 0.4)


def photo_like(side: int, *, seed: int) -> Tensor:
    """Return smooth shapes with finer and finer detail, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    octaves = [
        F.interpolate(
            torch.randn(1, 3, 2**k + 1, 2**k + 1, generator=generator), (side, side), mode="bicubic"
        )
        * 0.6**k
        for k in range(1, 8)
    ]
    picture = torch.stack(octaves).sum(0)[0]
    return picture / picture.abs().max() / 2 + 0.5


def psnr(picture: Tensor, reference: Tensor) -> float:
    """Return the peak signal-to-noise ratio of pictures in [0, 1], in dB, 120 at most."""
    return float(-10 * (picture - reference).square().mean().clamp(min=1e-12).log10())


@contextmanager
def exact_float32() -> Iterator[None]:
    """Disable TF32, so that float32 products are not rounded."""
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def first_call(device: torch.device, *, tiny: bool) -> float:
    """Return the seconds of a process's first picture, without building the models."""
    bench = Bench(device, tiny=tiny)
    bench.ours()
    wait_for(device)
    start = time.perf_counter()
    bench.whole()
    return time.perf_counter() - start


def first_call_elsewhere(options: argparse.Namespace) -> float:
    """Return ``first_call`` of a new process, which finds the kernels compiled here on disk."""
    command = [sys.executable, "-m", "benchmarks.inference", "--first-call"]
    command += ["--tiny"] if options.tiny else []
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(process.stdout.splitlines()[-1])


def in_turns(bench: Bench) -> dict[str, float]:
    """Return seconds and peak memory with one network at a time on the device."""
    networks = (bench.pipe.sr, bench.pipe.refiner, bench.pipe.movq)
    take_turns(bench.pipe, bench.device)
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    bench.whole()
    times = time_calls(bench.whole, calls=1, repeats=2, device=bench.device)  # type: ignore[arg-type]
    for network in networks:
        remove_hook_from_module(network)
        network.to(bench.device)
    return {"seconds": times.seconds, "peak_gb": times.peak_gb}


def run(bench: Bench, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield all results so far after each part, the most important parts first."""
    results: dict[str, Any] = {"matmul_tflops": matmul_rate(bench.device) / 1e12}
    rate = results["matmul_tflops"]
    print(f"bf16 matrix products: {rate:.0f} TFLOP/s")
    with phase("float32 reference"), exact_float32():
        reference = bench.whole()
    bench.as_shipped()
    with phase("operations counted"):
        flops = bench.count()
    results["tera_operations"] = {name: count / 1e12 for name, count in flops.items()}
    bench.ours()
    with phase("ours, first call here"):
        times = time_calls(bench.whole, calls=1, repeats=1, device=bench.device)  # type: ignore[arg-type]
    results |= {"cold_call_seconds": times.seconds, "cold_call_peak_gb": times.peak_gb}
    with phase("ours"):
        ours = bench.measure(reference, flops, repeats=options.repeats)
    print_table("ours", ours, rate)
    results |= {"seconds": ours["whole"]["seconds"], "sr_seconds": ours["sr"]["seconds"],
                "peak_gb": ours["whole"]["peak_gb"], "psnr_db": ours["whole"]["psnr_db"],
                "ours": ours}  # fmt: skip
    yield results
    bench.as_shipped()
    with phase("as shipped"):
        results["as_shipped"] = bench.measure(reference, flops, repeats=2)
    print_table("as shipped", results["as_shipped"], rate)
    results["baseline_seconds"] = results["as_shipped"]["whole"]["seconds"]
    yield results
    bench.ours()
    with phase("batch of 4 pictures"):
        bench.whole()
        times = time_calls(
            lambda: bench.whole(bench.pictures),  # type: ignore[arg-type, return-value]
            calls=1,
            repeats=2,
            device=bench.device,
        )
    results["batch_seconds_per_picture"] = times.seconds / len(bench.pictures)
    if options.profile:
        for name, call in bench.stages.items():
            print(f"--- {name}")
            print_profile(call, calls=1, device=bench.device, top=16)  # type: ignore[arg-type]
    acceleration.MEASURES_CONVOLUTIONS = not acceleration.MEASURES_CONVOLUTIONS
    for name, call in bench.stages.items():
        call()
        times = time_calls(call, calls=1, repeats=3, device=bench.device)  # type: ignore[arg-type]
        results[f"{name}_other_algorithms_seconds"] = times.seconds
        print(f"{name}, cuDNN's algorithms chosen the other way: {times.seconds:.4f} s")
    acceleration.MEASURES_CONVOLUTIONS = not acceleration.MEASURES_CONVOLUTIONS
    with phase("networks in turns"):
        results["in_turns"] = in_turns(bench)
    print(f"batch of 4: {results['batch_seconds_per_picture']:.3f} s a picture; "
          f"networks in turns: {results['in_turns']}")  # fmt: skip
    yield results
    with phase("first call of a new process"):
        results["first_call_seconds"] = first_call_elsewhere(options)
    print(f"first call with warm caches: {results['first_call_seconds']:.1f} s")
    yield results
    operations.WINOGRAD_CHANNELS, usual = 1 << 20, operations.WINOGRAD_CHANNELS
    with phase("ours, all convolutions by cuDNN"):
        results["ours_cudnn_alone"] = bench.measure(reference, flops, repeats=2)
    operations.WINOGRAD_CHANNELS = usual
    print_table("ours, cuDNN alone", results["ours_cudnn_alone"], rate)
    yield results


def print_table(way: str, stages: dict[str, dict[str, Any]], rate: float) -> None:
    """Print the stages of one way."""
    print("| | stage | seconds | TFLOP/s | of the matmul rate | peak, GB | dB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, row in stages.items():
        decibels = f"{row['psnr_db']:.1f}" if "psnr_db" in row else ""
        print(f"| {way} | {name} | {row['seconds']:.4f} | {row['tflops']:.0f} | "
              f"{row['tflops'] / rate:.0%} | {row['peak_gb']:.1f} | {decibels} |",
              flush=True)  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny networks, for a CPU")
    parser.add_argument(
        "--stage", choices=("whole", "sr", "encode", "refine", "decode"), help="time this alone"
    )
    parser.add_argument("--profile", action="store_true", help="print the stages' kernels too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--first-call", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=RESULTS / "inference.json")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    if options.first_call:
        print(first_call(device, tiny=options.tiny))
        return
    with phase("models made"):
        bench = Bench(device, tiny=options.tiny)
    if options.stage:
        bench.ours()
        calls = {"whole": bench.whole, **bench.stages}
        call = calls[options.stage]
        call()
        if options.profile:
            print_profile(call, calls=1, device=device)  # type: ignore[arg-type]
        times = time_calls(call, calls=1, repeats=options.repeats, device=device)  # type: ignore[arg-type]
        print(json.dumps({"stage": options.stage, **times._asdict()}))
        return
    if device.type == "cuda" and not can_accelerate(device):
        raise SystemExit("error: this GPU or its torch lacks Triton; nothing to compare")
    for results in run(bench, options):
        write_results(options.json, results)


if __name__ == "__main__":
    main()
