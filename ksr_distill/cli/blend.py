"""``ksr blend``: the student between two, nearer to the one or to the other."""

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
            help="A student's model folder, say the faithful one, or the name of a model that "
            "comes with the package."
        ),
    ],
    second: Annotated[
        str, typer.Argument(help="Another's of the same teacher, say the sharp one.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    share: Annotated[float, typer.Option(help="Of the second, 0 … 1.")] = 0.5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Blend two students of one teacher by weight: fidelity against detail, without training."""
    from ksr_distill.export import blend_students
    from ksr_distill.inference.model_folders.bundled import find_model

    one, other = find_model(first, argument="FIRST"), find_model(second, argument="SECOND")
    blend_students(one, other, out, share=share, overwrite=overwrite)
    typer.echo(out.resolve())
