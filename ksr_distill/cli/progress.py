"""Progress bars of long commands, with the time left, on stderr."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from ksr_distill.inference.jobs.estimate import Estimate
    from ksr_distill.inference.jobs.planning import Job
    from ksr_distill.inference.pictures.reading import Picture


@contextmanager
def counting_bar(title: str, total: int | None = None) -> Iterator[Callable[..., Any]]:
    """Show a bar; yield its update: ``move(advance=1)``, or ``move(completed=…, total=…)``."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield partial(bars.update, bars.add_task(title, total=total))


class Stopped(Exception):  # noqa: N818 -- not an error: the user asked for it
    """Ends the work of another thread on a picture, after Ctrl-C."""


class _Lines(logging.Handler):
    """Prints each log record as one line."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())


class UpscaleProgress:
    """The output of ``ksr upscale``: a bar for tiles, one for pictures, and a line for each event.

    Warnings that the package logs are printed as such lines.
    """

    def __init__(self, num_pictures: int) -> None:
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._pictures = self._bars.add_task(
            "pictures", total=num_pictures, visible=num_pictures > 1
        )
        self._tiles = self._bars.add_task("tiles", total=None)
        self._handler = _Lines(self._say)
        self._is_stopped = False

    def __enter__(self) -> "UpscaleProgress":
        logging.getLogger("ksr_distill").addHandler(self._handler)
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()
        logging.getLogger("ksr_distill").removeHandler(self._handler)

    def planned(self, job: "Job", picture: "Picture", estimate: "Estimate") -> None:
        """Print the plan of a picture, and the warnings about its file."""
        self._say(f"{job.source.name}: {picture.width}×{picture.height} → {estimate.in_words()}")
        for note in picture.notes:
            self._say(f"warning: {job.source} {note}")
        self._bars.reset(self._tiles, total=estimate.num_tiles, description=job.source.name)

    def stop(self) -> None:
        """Stop the other threads at their next tile; a file that is being written is finished."""
        self._is_stopped = True

    def tile_done(self) -> None:
        """Advance the tiles' bar.

        Raises:
            Stopped: After ``stop``.
        """
        if self._is_stopped:
            raise Stopped
        self._bars.advance(self._tiles)

    def picture_done(self) -> None:
        """Advance the pictures' bar."""
        self._bars.advance(self._pictures)

    def failed(self, job: "Job", error: Exception) -> None:
        """Print a picture's error in one line."""
        text = " ".join(str(error).split())
        prefix = "" if str(job.source) in text or str(job.target) in text else f"{job.source}: "
        self._say(f"error: {prefix}{text}")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False)
