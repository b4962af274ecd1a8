"""Run the path, each command echoed before it runs; an interrupted run continues."""

import sys

import typer

from ksr_distill.quickstart.ledger import Ledger
from ksr_distill.quickstart.path import FOLDER, Command, commands, copy_photos
from ksr_distill.quickstart.processes import (
    CommandFailedError,
    CommandInterruptedError,
    run_measured,
)


def main() -> int:
    """Run what is not done yet and return the exit code."""
    ledger = Ledger(FOLDER / "progress.json")
    try:
        copy_photos()
        for command in commands():
            run_once(command, ledger)
    except CommandInterruptedError:
        typer.echo("\ninterrupted; make quickstart continues from here", err=True)
        return 130
    except (CommandFailedError, OSError, ValueError) as error:
        typer.echo(f"error: {error}; what is done is kept, make quickstart continues", err=True)
        return 1
    typer.echo(str((FOLDER / "report.html").resolve()))
    return 0


def run_once(command: Command, ledger: Ledger) -> None:
    """Run a command unless it is done, and write down what it took."""
    if ledger.is_done(command):
        typer.echo(f"# done before: {' '.join(command)}")
        return
    typer.echo(f"\n$ {' '.join(command)}")
    try:
        usage = run_measured(command)
    except (CommandFailedError, CommandInterruptedError) as stop:
        ledger.add(command, stop.usage, is_done=False)
        raise
    ledger.add(command, usage, is_done=True)
    typer.echo(f"# {usage.seconds:.0f} s, {usage.peak_rss_gb:.2f} GB")


if __name__ == "__main__":
    sys.exit(main())
