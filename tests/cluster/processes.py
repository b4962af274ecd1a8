"""Several processes that train together, forked from one server that has imported torch already."""

import atexit
import multiprocessing
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(
    rank: int, world: int, port: int, folder: Path, work: Callable[..., Any], kwargs: Any
) -> None:
    log = (folder / f"log.{rank}.txt").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    warnings.filterwarnings("ignore")
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test", OMP_NUM_THREADS="1",
    )  # fmt: skip
    if world == 1:
        del os.environ["TORCHELASTIC_RUN_ID"]
    code = 0
    try:
        work(folder, **kwargs)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except Exception:  # noqa: BLE001, whatever it was, the log tells it
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Processes:
    """`world` processes running `work(folder, **kwargs)`, as torchrun would start them."""

    def __init__(self, world: int, work: Callable[..., Any], folder: Path, **kwargs: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["two_networks", "real_run", "train"])
        port = free_port()
        self.all: list[ForkServerProcess] = []
        for rank in range(world):
            arguments = (rank, world, port, folder, work, kwargs)
            self.all.append(context.Process(target=_run, args=arguments))
            self.all[-1].start()
        atexit.register(self.kill)  # not daemons, for these may have no loader workers

    def wait(self, timeout: float = 60) -> list[int]:
        """Return the exit codes. When time runs out, everything is killed and the logs are told."""
        end = time.monotonic() + timeout
        for process in self.all:
            process.join(max(0.0, end - time.monotonic()))
        late = [rank for rank, process in enumerate(self.all) if process.is_alive()]
        if late:
            self.kill()
            raise TimeoutError(f"ranks {late} did not end in {timeout} s\n{self.logs()}")
        return [process.exitcode or 0 for process in self.all]

    def succeed(self, timeout: float = 60) -> None:
        codes = self.wait(timeout)
        assert not any(codes), f"exit codes {codes}\n{self.logs()}"

    def kill(self) -> None:
        for process in self.all:
            process.kill()
        for process in self.all:
            process.join()

    def logs(self) -> str:
        return "\n".join(p.read_text() for p in sorted(self.folder.glob("log.*.txt")))


def wait_until(condition: Callable[[], bool], timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout} s")
        time.sleep(0.01)
