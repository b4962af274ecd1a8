"""Silences the warnings and tips of Lightning that do not apply to our runs, one by one."""

import logging
import warnings

WARNINGS = (
    r".*in eval mode at the start of training",  # frozen trunk and average: on purpose
    r".*`srun` command is available",  # a single process or torchrun inside a Slurm job, on purpose
    r".*isinstance\(treespec, LeafSpec\)",  # between Lightning and torch
)
LINES = (
    "TPU available",
    "💡 Tip",
    "`Trainer.fit` stopped: `max_epochs=1` reached",  # the loader counts updates
)


def silence_hints() -> None:
    """Filter these messages out; everything else that Lightning logs stays."""
    for words in WARNINGS:
        warnings.filterwarnings("ignore", message=words)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logger = logging.getLogger(name)
        if _is_of_use not in logger.filters:
            logger.addFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(LINES)
