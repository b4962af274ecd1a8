"""Lightning's hints that nobody can act on in a run of ours: silenced, each by its own words."""

import logging
import warnings

WARNINGS = (
    r".*in eval mode at the start of training",  # frozen trunk and average: on purpose
    r".*`srun` command is available",  # torchrun or one process on a Slurm node: a choice
    r".*isinstance\(treespec, LeafSpec\)",  # between Lightning and torch
)
LINES = (
    "TPU available",
    "💡 Tip",
    "`Trainer.fit` stopped: `max_epochs=1` reached",  # the loader counts updates
)


def silence_hints() -> None:
    """Drop them; whatever else Lightning says still comes through."""
    for words in WARNINGS:
        warnings.filterwarnings("ignore", message=words)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logger = logging.getLogger(name)
        if _is_of_use not in logger.filters:
            logger.addFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(LINES)
