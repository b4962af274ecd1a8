"""Shows mistakes of users as one line; tracebacks are for bugs."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def one_line_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Return the command with ValueError and OSError shown as ``error: …`` and exit code 1."""

    @wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError) as error:
            sys.stderr.write("error: " + " ".join(str(error).split()) + "\n")
            raise SystemExit(1) from error

    return guarded
