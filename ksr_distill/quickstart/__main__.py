"""Run the quickstart's commands, each echoed before it runs; an interrupted run continues."""

import argparse
import sys

import typer

from ksr_distill.quickstart import path
from ksr_distill.quickstart.comparison import write_comparison
from ksr_distill.quickstart.ledger import Ledger
from ksr_distill.quickstart.processes import (
    CommandFailedError,
    CommandInterruptedError,
    run_measured,
)
from ksr_distill.quickstart.results import (
    add_commands,
    add_enlarged_photo,
    add_usage,
    merge_curves,
)


def main() -> int:
    """Run what is not done yet and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ksr_distill.quickstart")
    parser.add_argument(
        "--train-teacher", action="store_true",
        help="train a small teacher first, instead of using the shipped one",
    )  # fmt: skip
    teacher = None if parser.parse_args().train_teacher else path.shipped_teacher()
    trains_teacher = teacher is None
    if trains_teacher:
        typer.echo("# a small teacher is trained and distilled, instead of the shipped one")
        teacher = path.TRAINED_TEACHER
    ledger = Ledger(path.FOLDER / "progress.json")
    try:
        path.copy_photos()
        begin = [path.pack(), *(path.train_teacher() if trains_teacher else ())]
        for command in (*begin, *path.distil(teacher)):
            run_once(command, ledger)
        runs = {"student": path.STUDENT} | ({"teacher": path.TEACHER} if trains_teacher else {})
        merge_curves({run: folder / "metrics.csv" for run, folder in runs.items()}, path.CURVES)
        run_once(path.evaluate(teacher), ledger)
        report(ledger, teacher=path.in_words(teacher))
    except CommandInterruptedError:
        typer.echo("\ninterrupted; make quickstart continues from here", err=True)
        return 130
    except (CommandFailedError, OSError, ValueError) as error:
        typer.echo(f"error: {error}; what is done is kept, make quickstart continues", err=True)
        return 1
    typer.echo(str(path.REPORT.resolve()))
    return 0


def run_once(command: path.Command, ledger: Ledger) -> None:
    """Run a command unless it is done, and record its time and memory."""
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


def report(ledger: Ledger, *, teacher: str) -> None:
    """Complete the report, and print a summary."""
    summary = add_usage(path.METRICS, ledger)
    usage = f"{summary['seconds']:.0f} s and {summary['peak_rss_gb']:.2f} GB for all commands"
    add_enlarged_photo(path.REPORT, path.PHOTO, path.ENLARGED, usage=usage)
    add_commands(path.REPORT, ledger, teacher=teacher)
    write_comparison(path.compared_pictures(), path.COMPARED_PLACE, path.COMPARISON)
    typer.echo(f"\n{usage}; on photos that nothing was trained on:")
    for name, values in summary.items():
        if isinstance(values, dict):
            psnr, ratio = values["psnr_y"], values["top_octave_power_ratio"]
            typer.echo(f"{name:<10} {psnr:6.2f} dB PSNR-Y, top-octave power ratio {ratio:.3f}")


if __name__ == "__main__":
    sys.exit(main())
