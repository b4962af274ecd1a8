"""Ends a run that hangs, with a message that names the rank and what it is doing.

A watchdog thread on every rank writes a heartbeat into the run's folder, so that the first one to
give up can tell which ranks are behind, and a lost rank from a waiting one.
"""

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

log = logging.getLogger(__name__)

EXIT_STALLED = 70
"""EX_SOFTWARE of sysexits.h."""

STARTING = "is loading weights or data"
LOADER = "waits for its loader (data.num_workers, the shards' file system) or for a save"
UPDATE = "is inside an update (its own, or waiting for another rank)"
VALIDATION = "is inside validation"
ENDING = "is ending after an error"


class StallWatchdog(Callback):
    """Ends the process when there was no progress for too long."""

    def __init__(self, folder: str | Path, *, timeout_s: float | int) -> None:
        """Make the watchdog.

        Args:
            folder: Of the heartbeats, one small file per rank; on a file system all ranks share.
            timeout_s: Without an update or a validation batch for this long, the run ends. Less
                than the strategy's timeout, so that this message comes first.
        """
        self.folder = Path(folder)
        self.timeout_s = timeout_s
        self.beat_s = min(timeout_s / 5, 15.0)
        self._rank, self._world = 0, 1
        self._now = (0, STARTING)
        self._since = time.monotonic()
        self._stopped = threading.Event()

    def _at(self, place: str, update: int | None = None) -> None:
        self._now = (self._now[0] if update is None else update, place)
        self._since = time.monotonic()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin to watch."""
        if stage != "fit":
            return
        self._rank, self._world = trainer.global_rank, trainer.world_size
        self._stopped.clear()
        self._at(STARTING)
        self.folder.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._watch, name="stall-watchdog", daemon=True).start()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the first batch."""
        self._at(LOADER)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """An update begins."""
        self._at(UPDATE, batch_idx)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Wait for the next batch."""
        # Of the next update, or it would look as if this rank were behind those still in this one.
        self._at(LOADER, batch_idx + 1)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation begins."""
        self._at(VALIDATION)

    @override
    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Note the progress."""
        self._at(VALIDATION)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the next batch."""
        self._at(LOADER)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop watching."""
        self.stop()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """When a collective fails, say which ranks are gone: its own error names a socket.

        With several processes the watch goes on: moving networks off a device, or closing NCCL, may
        wait for a lost rank for ever.
        """
        if self._world > 1 and isinstance(exception, RuntimeError):
            log.error("%s", self.state_of_ranks())
        if self._world > 1 and isinstance(exception, Exception):
            self._at(ENDING)
        else:
            self.stop()

    def stop(self) -> None:
        """Stop watching: the run is over, or waits on purpose."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(self.beat_s):
            still = time.monotonic() - self._since
            self._beat()
            if still > self.timeout_s:
                self._give_up(still)

    def _beat(self) -> None:
        told = {"host": socket.gethostname(), "pid": os.getpid(), **self._mine()}
        file = self._file(self._rank)
        temporary = file.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(told))
            temporary.replace(file)  # atomic: a rank whose file is incomplete would look gone
        except OSError as error:  # a full disk must not silence the watchdog
            log.debug("no heartbeat: %s", error)

    def _mine(self) -> dict[str, Any]:
        update, place = self._now
        return {"update": update, "place": place, "time": time.time()}

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"

    def _give_up(self, still: float) -> None:
        sys.stderr.write(
            f"error: rank {self._rank}: nothing has moved for {still:.0f} s "
            f"(callbacks.stall.timeout_s={self.timeout_s:g}); {self.state_of_ranks()}. "
            "The same command continues from the last checkpoint\n"
        )
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        os._exit(EXIT_STALLED)

    def state_of_ranks(self) -> str:
        """Return who is behind or gone, from all heartbeats; the others are only counted."""
        beats = {rank: self._read(rank) for rank in range(self._world)}
        beats[self._rank] = self._mine()
        gone = [rank for rank, beat in beats.items() if not self._is_alive(beat)]
        alive = {rank: beat for rank, beat in beats.items() if rank not in gone}
        progress = {r: (beat["update"], beat["place"] == UPDATE) for r, beat in alive.items()}
        behind = [rank for rank in alive if progress[rank] == min(progress.values())]
        told = [f"rank {rank} is gone" for rank in gone[:4]]
        told += [
            f"rank {rank} {alive[rank]['place']} at update {alive[rank]['update']}"
            for rank in behind[:4]
        ]
        return f"{', '.join(told)} ({len(gone)} gone, {len(behind)} behind, of {self._world})"

    def _read(self, rank: int) -> dict[str, Any]:
        try:
            return json.loads(self._file(rank).read_text())
        except (OSError, ValueError):
            return {}

    def _is_alive(self, beat: dict[str, Any]) -> bool:
        if not beat:
            return False
        if beat.get("host") == socket.gethostname():
            return Path(f"/proc/{beat['pid']}").exists() or not Path("/proc").exists()
        return time.time() - beat["time"] < 3 * self.beat_s + 30
