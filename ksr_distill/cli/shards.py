"""``ksr shards``: from a folder of photos to what training reads."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ksr_distill.cli.errors import one_line_errors

NUM_LISTED = 20  # skipped files or problems shown; all of them are in the shards' indexes

shards = typer.Typer(no_args_is_help=True, help="Pack photos for training, check and look at them.")

Pattern = Annotated[
    list[str], typer.Argument(help="Shards: paths, braces as in train-{000000..000007}.tar, globs.")
]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Processes; the number of CPU cores if not given.")
]


def register(app: typer.Typer) -> None:
    """Add the command to the console script."""
    app.add_typer(shards, name="shards")


@shards.command()
@one_line_errors
def pack(
    folder: Annotated[Path, typer.Argument(help="Photos, in any depth of folders.")],
    out: Annotated[Path, typer.Argument(help="Where the shards go.")],
    val_fraction: Annotated[
        float | None,
        typer.Option(help="Share of files kept for validation, by hash of their path.  [0.05]"),
    ] = None,
    val_match: Annotated[
        list[str] | None,
        typer.Option(help="Instead: files for validation, e.g. 'held_out/*'; may be repeated."),
    ] = None,
    min_side_px: Annotated[
        int, typer.Option(min=1, help="Leave out pictures with a shorter side than this.")
    ] = 1,
    min_sharpness: Annotated[
        float,
        typer.Option(min=0, help="Leave out pictures (or tiles) below this variance of Laplacian."),
    ] = 0.0,
    tile_px: Annotated[
        int | None, typer.Option(min=8, help="Cut pictures to tiles: small crops then read fast.")
    ] = None,
    shard_files: Annotated[int, typer.Option(min=1, help="Files per shard.")] = 512,
    workers: Workers = None,
) -> None:
    """Pack a folder of photos into shards. Start it again if it was killed: it goes on."""
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
    )
    with progress("Packing") as on_progress:
        report = pack_folder(
            folder, out, options, num_workers=num_processes(workers), on_progress=on_progress
        )
    if report.skipped:
        show_pairs(f"Left out ({len(report.skipped)})", ("file", "why"), report.skipped)
    for split, pattern in report.patterns.items():
        typer.echo(f"{split}: {report.num_pictures[split]} pictures")
        typer.echo(pattern)


def num_processes(workers: int | None) -> int:
    """Return how many processes were asked for, or one for each core this process may use."""
    return len(os.sched_getaffinity(0)) if workers is None else workers


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar with the time left on stderr; yield what moves it: (done, in all)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show_pairs(title: str, columns: tuple[str, str], rows: list[tuple[str, str]]) -> None:
    """Print a table of two columns, its beginning only if it is long."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for row in rows[:NUM_LISTED]:
        table.add_row(*row)
    if len(rows) > NUM_LISTED:
        table.add_row("…", f"and {len(rows) - NUM_LISTED} more")
    Console(stderr=True).print(table)
