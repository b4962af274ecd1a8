"""Preemption: all ranks save together at the end of an update, and the job is requeued.

Lightning's own requeue saves inside the signal handler. Two ranks 0.15 s apart deadlocked 4 of 4
times, preemption with a grace time lost 5 of 5 runs, and between the two turns it saved
weights that no uninterrupted run has (docs/reliability.md). Here the handler only notes the signal.
"""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

from ksr_distill.training.checkpoints import RunCheckpoint, callbacks_of
from ksr_distill.training.strategy import HostAgreement
from ksr_distill.training.watchdog import StallWatchdog

log = logging.getLogger(__name__)

EXIT_PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: run the same command again to continue."""

# Slurm sends USR1 before the time limit (--signal=USR1@…), or USR2 to jobs of submitit; preemption
# and scancel send TERM.
ASKS_TO_REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)


def slurm_job(environment: Mapping[str, str]) -> str | None:
    """Return the id of our batch job as scontrol takes it; None outside Slurm and in a shell."""
    job = environment.get("SLURM_JOB_ID")
    if job is None or environment.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else job


class PreemptionGuard(Checkpoint):
    """Handles USR1, USR2, TERM. A Checkpoint, so that Lightning calls it after other callbacks."""

    def __init__(self, *, stay_alive_s: float | int) -> None:
        """Make the guard.

        Args:
            stay_alive_s: How long to wait, after the save, until Slurm ends the process. If it
                exits by itself within the partition's grace time, its job counts as completed and
                is not requeued.
        """
        self.stay_alive_s = stay_alive_s
        self._received = 0
        self._before: dict[int, Any] = {}
        self._held: set[int] = set()

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received = max(self._received, number)

    def _listen(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            previous = signal.signal(number, self._note)
            self._before.setdefault(number, previous)
        # train.py holds back what would end it before anyone listens.
        self._held |= signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers) & set(numbers)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Install the handlers early: by default a signal ends a process that is still loading.

        Lightning's own TERM handler is kept out: it broadcasts inside the handler, which hangs when
        the ranks are at different points, and before the first update it would exit with 0, as if
        the run had finished.
        """
        if stage == "fit":
            _checkpoint_of(trainer)
            cast(Any, trainer)._signal_connector.register_signal_handlers = lambda: None
            self._listen(*ASKS_TO_REQUEUE, signal.SIGTERM)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the ranks' agreement."""
        self._agreement = HostAgreement(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Ask all ranks whether any of them was signalled; if so, save and exit together."""
        [received] = self._agreement.largest(self._received)
        if received:
            self._leave(trainer, signal.Signals(received))

    def _leave(self, trainer: pl.Trainer, received: signal.Signals) -> None:
        for watchdog in callbacks_of(trainer, StallWatchdog):
            watchdog.stop()
        saved = self._save(trainer)
        trainer.strategy.barrier("preemption")
        job = slurm_job(os.environ)
        if job is None:
            log.warning("%s: %s; the same command continues", received.name, saved)
            raise SystemExit(EXIT_PREEMPTED)
        if received in ASKS_TO_REQUEUE:
            is_requeued = trainer.strategy.broadcast(trainer.is_global_zero and requeue(job))
            if not is_requeued:
                raise SystemExit(EXIT_PREEMPTED)
        log.warning("%s: %s; job %s waits for Slurm to end it", received.name, saved, job)
        self._wait_for_the_end(received)
        raise SystemExit(EXIT_PREEMPTED)

    def _save(self, trainer: pl.Trainer) -> str:
        try:
            return f"saved {_checkpoint_of(trainer).save_and_wait(trainer)}"
        except OSError as error:
            log.error("%s", error)
            return str(error)

    def _wait_for_the_end(self, received: signal.Signals) -> None:
        end = time.monotonic() + self.stay_alive_s
        while time.monotonic() < end:
            if received in ASKS_TO_REQUEUE and self._received == signal.SIGTERM:
                return  # the requeue has begun; waiting for KILL would only cost time
            time.sleep(0.1)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the former handlers."""
        self._give_back()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Restore the former handlers."""
        self._give_back()

    def _give_back(self) -> None:
        # Block them first: a signal after the last save must not fail a run that has finished.
        signal.pthread_sigmask(signal.SIG_BLOCK, self._held)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        self._held.clear()
        self._received = 0


def _checkpoint_of(trainer: pl.Trainer) -> RunCheckpoint:
    for callback in callbacks_of(trainer, RunCheckpoint):
        return callback
    raise ValueError(
        "callbacks.preemption needs callbacks.checkpoint: without it a preempted run is lost; add "
        "callbacks.checkpoint, or remove callbacks.preemption"
    )


def requeue(job: str) -> bool:
    """Ask Slurm to start this job again; return whether it will. Says what to do if not."""
    try:
        answer = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        log.error("no scontrol here (in a container?): submit job %s again by hand", job)
        return False
    if answer.returncode:
        log.error("scontrol requeue %s: %s; submit it again", job, answer.stderr.strip())
    return answer.returncode == 0
