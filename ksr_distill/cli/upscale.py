"""``ksr upscale``: enlarge a picture or a folder of them."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ksr_distill.cli.errors import one_line_errors

if TYPE_CHECKING:
    from ksr_distill.inference.jobs.planning import Job
    from ksr_distill.inference.jobs.upscale import Upscaler


def register(app: typer.Typer) -> None:
    """Add the command to the console script."""
    app.command("upscale")(upscale)


@one_line_errors
def upscale(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A picture, or a folder of them.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="A file, or a folder for the same tree. Default: photo_x2.jpg beside IN.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A model folder (ksr export, ksr convert flash or teacher), or the name of a "
            "shipped model. Default: the shipped student of the scale."
        ),
    ] = None,
    scale: Annotated[float, typer.Option("-s", "--scale", help="Any number ≥ 1.")] = 2.0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps. Default: the model's own.")
    ] = None,
    refine_steps: Annotated[int, typer.Option(help="Refiner steps after each pass: 0, 1, 2.")] = 0,
    match_colours: Annotated[
        bool, typer.Option("--match-colours", help="Keep coarse colours through the refiner.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the noise.")] = 0,
    tile: Annotated[
        int | None, typer.Option(min=1, help="Tile side, px. Default: what fits in memory.")
    ] = None,
    overlap: Annotated[int | None, typer.Option(min=0, help="Px blended between tiles.")] = None,
    tile_batch: Annotated[int, typer.Option(min=1, help="Tiles per batch.")] = 1,
    format_name: Annotated[
        str | None, typer.Option("--format", help="png, jpg, webp, tif or dz (DeepZoom).")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="8 or 16. Default: as IN.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.")] = None,
    fp32: Annotated[bool, typer.Option("--fp32", help="Full precision.")] = False,
    fast: Annotated[
        bool | None,
        typer.Option(
            "--fast/--no-fast", help="Triton kernels in float16. Default: where the GPU runs them."
        ),
    ] = None,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Skip pictures that have an output.")
    ] = False,
    shard: Annotated[
        str, typer.Option(help="i/n: this process's share of a folder, or of one picture's tiles.")
    ] = "0/1",
    compare: Annotated[
        bool, typer.Option("--compare", help="Write report.html: sliders, before and after.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan.")] = False,
    max_megapixels: Annotated[float, typer.Option(help="Refuse larger sources.")] = 120.0,
) -> None:
    """Enlarge a picture, or a folder of them; huge pictures are never loaded whole."""
    from ksr_distill.inference.devices.cpu import keep_freed_memory
    from ksr_distill.inference.jobs.compare import write_comparison
    from ksr_distill.inference.jobs.estimate import measure_speed
    from ksr_distill.inference.jobs.planning import Shard, default_out, parse_shard, plan_jobs
    from ksr_distill.inference.jobs.upscale import Settings, Upscaler
    from ksr_distill.inference.model_folders.bundled import default_student, find_model
    from ksr_distill.inference.model_folders.loading import load_pipeline, pick_device, runs_fast

    if bits not in (None, 8, 16):
        raise ValueError(f"--bits {bits} is not one of 8, 16")
    out = out or default_out(source, scale, name=format_name)
    folder = default_student(scale) if model is None else find_model(model)
    part = parse_shard(shard)
    jobs = plan_jobs(source, out, name=format_name)
    if source.is_dir():
        jobs, part = jobs[part.index :: part.count], Shard()
    skipped = [job for job in jobs if skip_existing and job.target.exists()]
    jobs = [job for job in jobs if job not in skipped]
    keep_freed_memory()
    chosen = pick_device(device)
    if fast is None:
        fast = not fp32 and runs_fast(chosen)
    upscaler = Upscaler(
        load_pipeline(folder, device=chosen, fp32=fp32, fast=fast),
        Settings(
            scale=scale,
            seed=seed,
            num_inference_steps=steps,
            refine_steps=refine_steps,
            match_colours=match_colours,
            tile_px=tile,
            overlap_px=overlap,
            tile_batch_size=tile_batch,
            bits=bits,
            max_megapixels=max_megapixels,
        ),
        shard=part,
        measure=measure_speed,
        is_dry_run=dry_run,
    )
    upscaler.check()
    # With --fast the host is idle enough to read the next picture and write the last one meanwhile.
    at_once = 2 if fast and part.count == 1 else 1
    done = _run_all(upscaler, jobs, num_skipped=len(skipped), at_once=at_once)
    finished = [*done, *skipped]
    if finished and not dry_run:
        target = out if source.is_dir() else finished[0].target
        if compare and part.index == 0:
            report = (out if source.is_dir() else target.parent) / "report.html"
            write_comparison(finished, report)
            typer.echo(report.resolve())
        if part.index == 0 or skipped:  # shard 0 writes the file that the others share
            typer.echo(target.resolve())
    if len(done) < len(jobs):
        raise SystemExit(1)


def _run_all(
    upscaler: "Upscaler", jobs: "list[Job]", *, num_skipped: int, at_once: int = 1
) -> "list[Job]":
    """Run every job, even if others fail; return those that succeeded."""
    from concurrent.futures import ThreadPoolExecutor

    from ksr_distill.cli.progress import Stopped, UpscaleProgress

    def run(job: "Job") -> bool:
        try:
            upscaler.run(job, progress)
        except (ValueError, OSError) as error:
            progress.failed(job, error)
            return False
        except Stopped:
            return False
        finally:
            progress.picture_done()
        return True

    with UpscaleProgress(len(jobs)) as progress:
        if at_once > 1 and len(jobs) > 1:
            with ThreadPoolExecutor(at_once) as pool:
                try:
                    went_well = list(pool.map(run, jobs))
                except KeyboardInterrupt:
                    progress.stop()
                    raise
        else:
            went_well = [run(job) for job in jobs]
    done = [job for job, is_done in zip(jobs, went_well, strict=True) if is_done]
    if num_skipped or len(jobs) > 1:
        failed = len(jobs) - len(done)
        sys.stderr.write(f"{len(done)} done, {num_skipped} skipped, {failed} failed\n")
    return done
