"""``ksr shards``: pack photos into the shards that training reads, check and preview them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ksr_distill.cli.errors import one_line_errors

if TYPE_CHECKING:
    from torch import Tensor

NUM_LISTED = 20  # skipped files or problems shown; all of them are in the shards' indexes

shards = typer.Typer(no_args_is_help=True, help="Pack photos into shards, check and preview them.")

Pattern = Annotated[
    list[str], typer.Argument(help="Shards: paths, braces as in train-{000000..000007}.tar, globs.")
]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes; by default one per CPU core.")]


def register(app: typer.Typer) -> None:
    """Add the command to the console script."""
    app.add_typer(shards, name="shards")


@shards.command()
@one_line_errors
def pack(
    folder: Annotated[Path, typer.Argument(help="Photos, also in subfolders.")],
    out: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    val_fraction: Annotated[
        float | None,
        typer.Option(help="Share of files kept for validation, by hash of their path.  [0.05]"),
    ] = None,
    val_match: Annotated[
        list[str] | None,
        typer.Option(help="Or: patterns of files for validation, e.g. 'held_out/*'; repeatable."),
    ] = None,
    min_side_px: Annotated[
        int, typer.Option(min=1, help="Leave out pictures with a shorter side than this.")
    ] = 1,
    min_sharpness: Annotated[
        float,
        typer.Option(min=0, help="Leave out pictures (or tiles) below this variance of Laplacian."),
    ] = 0.0,
    tile_px: Annotated[
        int | None, typer.Option(min=8, help="Cut pictures into tiles: small crops read faster.")
    ] = None,
    reduced_to: Annotated[
        list[float] | None,
        typer.Option(
            help="Pack each training photo also at this share of its size, e.g. 0.7; repeatable."
        ),
    ] = None,
    shard_files: Annotated[int, typer.Option(min=1, help="Files per shard.")] = 512,
    workers: Workers = None,
) -> None:
    """Pack a folder of photos into shards; run it again to continue after an interruption."""
    from ksr_distill.data.packing import pack_folder
    from ksr_distill.data.sources import PackOptions

    if val_match and val_fraction is not None:
        raise ValueError("--val-match and --val-fraction both choose validation files; give one")
    options = PackOptions(
        val_fraction=0.0 if val_match else 0.05 if val_fraction is None else val_fraction,
        val_patterns=tuple(val_match or ()),
        min_side_px=min_side_px,
        min_sharpness=min_sharpness,
        tile_px=tile_px,
        shard_files=shard_files,
        reduced_to=tuple(reduced_to or ()),
    )
    with progress("Packing") as on_progress:
        report = pack_folder(
            folder, out, options, num_workers=num_processes(workers), on_progress=on_progress
        )
    if report.skipped:
        show_pairs(f"Left out ({len(report.skipped)})", ("file", "why"), report.skipped)
    for split, pattern in report.patterns.items():
        key = {"train": "data.shards", "val": "data.val_shards"}[split]
        quoted = f"'\"{pattern}\"'" if "{" in pattern else pattern  # for the shell and for Hydra
        typer.echo(f"{report.num_pictures[split]} pictures: {key}={quoted}")
    if options.val_fraction and "val" not in report.patterns:
        typer.echo(
            f"none held out: --val-fraction {options.val_fraction} chose no picture of so few, and "
            "a training without data.val_shards writes no best.ckpt; pack anew with a larger one"
        )
    typer.echo(str(out))


@shards.command()
@one_line_errors
def check(pattern: Pattern, workers: Workers = None) -> None:
    """Verify every checksum and decode every picture; exit 1 if anything is damaged."""
    from ksr_distill.data.checking import check_shards
    from ksr_distill.data.patterns import expand_shards

    paths = expand_shards(pattern, key="PATTERN")
    with progress("Checking shards") as on_progress:
        report = check_shards(paths, num_workers=num_processes(workers), on_progress=on_progress)
    rows = [
        (str(shard.shard), f"{len(shard.contents)} pictures, {len(shard.problems)} problems")
        for shard in report.shards
    ]
    show_pairs(
        "Shards", ("shard", "found"), sorted(rows, key=lambda row: row[1].endswith(" 0 problems"))
    )
    problems = [
        (f"{shard.shard.name}: {key}", what)
        for shard in report.shards
        for key, what in shard.problems
    ]
    if problems:
        show_pairs(f"Problems ({len(problems)})", ("where", "what"), problems)
    if report.duplicates:
        show_pairs(
            f"Same content ({len(report.duplicates)})", ("one", "two"), list(report.duplicates)
        )
    num_pictures = sum(len(shard.contents) for shard in report.shards)
    num_bytes = sum(shard.num_bytes for shard in report.shards)
    typer.echo(
        f"{len(paths)} shards, {num_pictures} pictures, {num_bytes / 1e6:.1f} MB, "
        f"{len(report.duplicates)} duplicates, {len(problems)} problems"
    )
    if problems:
        raise typer.Exit(1)


@shards.command()
@one_line_errors
def preview(
    pattern: Pattern,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .png file to write.")],
    degradation: Annotated[
        Path | None,
        typer.Option(help="A file of conf/degradation, e.g. second_order.yaml.  [bicubic]"),
    ] = None,
    scale: Annotated[int, typer.Option(min=2, help="Hires side / lowres side.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the training.")] = 0,
    crop_px: Annotated[int, typer.Option(min=8, help="Side of the crops.")] = 256,
    pairs: Annotated[int, typer.Option(min=1, help="Number of pairs.")] = 16,
) -> None:
    """Write a contact sheet of a training's first pairs, lowres | hires."""
    from ksr_distill.data.patterns import expand_shards
    from ksr_distill.data.preview import make_contact_sheet

    if crop_px % scale:
        fitting = crop_px // scale * scale
        raise ValueError(f"--crop-px={crop_px} is not a multiple of --scale={scale}; use {fitting}")
    sheet = make_contact_sheet(
        expand_shards(pattern, key="PATTERN"),
        load_degradation(degradation, scale),
        num_pairs=pairs,
        crop_px=crop_px,
        seed=seed,
        pairs_per_row=2,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output)
    typer.echo(str(output))


def load_degradation(file: Path | None, scale: int) -> Callable[..., "Tensor"]:
    """Return the degradation that a file of conf/degradation describes; bicubic without a file."""
    if file is None:
        from ksr_distill.degradation import BicubicDegradation

        return BicubicDegradation(scale)
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from ksr_distill.config import check_targets

    config = OmegaConf.create({"scale": scale, "degradation": OmegaConf.load(file)})
    OmegaConf.resolve(config)
    check_targets({"degradation": OmegaConf.to_container(config.degradation)})
    return instantiate(config.degradation, _convert_="all")


def num_processes(workers: int | None) -> int:
    """Return the given number, or the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if workers is None else workers


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar with the time left on stderr; yield its update, a function of (done, total)."""
    from ksr_distill.cli.progress import counting_bar

    with counting_bar(title) as move:
        yield lambda done, total: move(completed=done, total=total)


def show_pairs(title: str, columns: tuple[str, str], rows: list[tuple[str, str]]) -> None:
    """Print a table of two columns and at most NUM_LISTED rows."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for row in rows[:NUM_LISTED]:
        table.add_row(*row)
    if len(rows) > NUM_LISTED:
        table.add_row("…", f"and {len(rows) - NUM_LISTED} more")
    Console(stderr=True).print(table)
