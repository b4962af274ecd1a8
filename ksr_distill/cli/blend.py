"""``ksr blend``: interpolate the weights of two students."""

from pathlib import Path
from typing import Annotated

import typer

from ksr_distill.cli.errors import one_line_errors


def register(app: typer.Typer) -> None:
    """Add the command to the console script."""
    app.command("blend")(blend)


@one_line_errors
def blend(
    first: Annotated[
        str,
        typer.Argument(
            help="A student's model folder, e.g. of a faithful one, or the name of a shipped model."
        ),
    ],
    second: Annotated[
        str, typer.Argument(help="Another student of the same teacher, e.g. a sharp one.")
    ],
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    share: Annotated[float, typer.Option(help="Weight of the second, 0 … 1.")] = 0.5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Interpolate the weights of two students of one teacher, to trade fidelity for detail."""
    from ksr_distill.export import blend_students
    from ksr_distill.inference.model_folders.bundled import find_model

    one, other = find_model(first, argument="FIRST"), find_model(second, argument="SECOND")
    blend_students(one, other, out, share=share, overwrite=overwrite)
    typer.echo(out.resolve())
