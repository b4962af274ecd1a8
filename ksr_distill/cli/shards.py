"""``ksr shards``."""

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the console script."""
