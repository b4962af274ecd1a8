"""The console script ``ksr``. Every command imports what it needs when it runs."""

from importlib import import_module

import typer

app = typer.Typer(
    name="ksr",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def ksr() -> None:
    """Distil few-step super-resolution models, and enlarge pictures with them."""


# One module a command group; each has `register(app)` and imports nothing heavy at its top.
COMMAND_MODULES = ("shards", "convert", "export", "blend", "upscale", "study", "doctor")

for _name in COMMAND_MODULES:
    import_module(f"ksr_distill.cli.{_name}").register(app)


def main() -> None:
    """Run the console script."""
    app()
