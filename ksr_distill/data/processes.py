"""A ``map`` over worker processes, with results in order."""

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
OrderedMap = Callable[[Callable[[Item], Result], Iterable[Item]], Iterator[Result]]


@contextmanager
def ordered_map(num_workers: int) -> Iterator[OrderedMap]:
    """Yield a ``map`` that works in processes; with 0 of them it is the builtin.

    Processes are spawned: a fork would copy torch's and Pillow's threads half-way.
    """
    if num_workers == 0:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_end_with_parent) as pool:

        def run(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
            waiting: deque[Future[Result]] = deque()
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 4 * num_workers:  # large results must not pile up
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())

        yield run


def _result(future: Future[Result]) -> Result:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a working process was killed, perhaps for memory; start the same command again with "
            "fewer --workers: what is finished is kept"
        ) from error


def _end_with_parent() -> None:
    # A pool's workers outlive a parent that was killed: they hold both ends of their own pipe.
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
