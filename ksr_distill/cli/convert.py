"""``ksr convert``."""

import typer


def register(app: typer.Typer) -> None:  # noqa: ARG001 - filled when the command lands
    """Add the command to the console script."""
