"""``ksr export``: a training checkpoint as a model folder."""

from pathlib import Path
from typing import Annotated

import typer

from ksr_distill.cli.errors import one_line_errors


def register(app: typer.Typer) -> None:
    """Add the command to the console script."""
    app.command("export")(export)


@one_line_errors
def export(
    checkpoint: Annotated[Path, typer.Argument(help="outputs/NAME/checkpoints/best.ckpt")],
    out: Annotated[Path, typer.Argument(help="The folder to write; with --original, the file.")],
    original: Annotated[
        bool, typer.Option("--original", help="Write the released .pt layout instead of a folder.")
    ] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Add the half-precision variant.")] = False,
    self_contained: Annotated[
        bool,
        typer.Option("--self-contained", help="Add the code: loads without this package."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Turn a checkpoint's averaged weights into a model folder for `ksr upscale` and diffusers."""
    from ksr_distill.export import export_checkpoint, export_original

    if original:
        export_original(checkpoint, out, overwrite=overwrite)
    else:
        export_checkpoint(
            checkpoint, out, fp16=fp16, self_contained=self_contained, overwrite=overwrite
        )
    typer.echo(out.resolve())
