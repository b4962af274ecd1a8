"""Peak memory of ``ksr upscale`` against the size of its output.

    python -m benchmarks.memory                               # a tiny model of random weights
    python -m benchmarks.memory --model exports/ksr_flash --photo photo.png --scales 2 4 8 16

Each scale runs in a process of its own, and the smaller ones again in a single tile, to show the
memory without tiles.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import pyvips
import torch
import torch.nn.functional as F

from benchmarks.measuring import RESULTS, Cost, run_command, write_results
from ksr_distill.inference import KSRFlashPipeline
from ksr_distill.models import KSRUNet


def make_model(folder: Path) -> Path:
    """Write a student of random weights, small enough that a CPU makes 268 megapixels."""
    torch.manual_seed(0)
    unet = KSRUNet(
        base_channels=4,
        channel_multipliers=(1, 2),
        num_blocks=(1, 1),
        time_embedding_dim=16,
        num_groups=2,
        predict_residual=True,
    )
    KSRFlashPipeline(unet).save_pretrained(folder)
    return folder


def make_photo(path: Path, side: int) -> Path:
    """Write smooth shapes with finer and finer detail."""
    generator = torch.Generator().manual_seed(0)
    octaves = [
        F.interpolate(
            torch.randn(1, 3, 2**k + 1, 2**k + 1, generator=generator), (side, side), mode="bicubic"
        )
        * 0.6**k
        for k in range(1, 8)
    ]
    pixels = torch.stack(octaves).sum(0)[0]
    pixels = ((pixels / pixels.abs().max() + 1) * 127.5).byte().permute(1, 2, 0)
    pyvips.Image.new_from_array(pixels.numpy()).write_to_file(str(path))
    return path


def upscale(
    options: argparse.Namespace, model: Path, photo: Path, scale: float, out: Path, tile: str
) -> Cost:
    """Return the cost of enlarging one picture to a file."""
    return run_command(
        [sys.executable, "-c", "from ksr_distill.cli import main; main()", "upscale",
         str(photo), "-o", str(out), "--model", str(model), "--scale", f"{scale:g}",
         "--tile", tile, "--device", options.device, "--steps", options.steps]
    )  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a model folder; by default a tiny one is made")
    parser.add_argument("--photo", type=Path, help="by default one of 1024×1024 is made")
    parser.add_argument("--side", type=int, default=1024, help="of the photo that is made")
    parser.add_argument("--scales", type=float, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--whole-up-to", type=float, default=4, help="scale made in one tile, too")
    parser.add_argument("--format", default="tif")
    parser.add_argument("--tile", default="1024")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", default="4")
    parser.add_argument("--json", type=Path, default=RESULTS / "memory.json")
    options = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = options.model or make_model(folder / "model")
        photo = options.photo or make_photo(folder / "photo.png", options.side)
        print("| scale | output | peak memory, MB | in one tile | seconds |")
        print("| --- | --- | --- | --- | --- |")
        for scale in options.scales:
            out = folder / f"big{scale:g}.{options.format}"
            cost = upscale(options, model, photo, scale, out, options.tile)
            image = pyvips.Image.new_from_file(str(out))
            row = {"scale": scale, "width": image.width, "height": image.height,
                   "peak_mb": round(cost.peak_mb), "seconds": round(cost.seconds, 1)}  # fmt: skip
            out.unlink()
            if scale <= options.whole_up_to:
                side = str(max(image.width, image.height))
                row["peak_mb_in_one_tile"] = round(
                    upscale(options, model, photo, scale, out, side).peak_mb
                )
                out.unlink()
            rows.append(row)
            print(f"| ×{scale:g} | {image.width}×{image.height} | {row['peak_mb']} "
                  f"| {row.get('peak_mb_in_one_tile', '')} | {cost.seconds:.0f} |",
                  flush=True)  # fmt: skip
            name = "a tiny one of random weights" if options.model is None else options.model.name
            write_results(options.json, {"model": name, "tile_px": int(options.tile), "rows": rows})


if __name__ == "__main__":
    main()
