"""Every random draw is a function of a few integers.

A run that is killed and started again must draw what it would have drawn. So nobody keeps a
generator's state: whoever draws makes a generator from (seed, stream, update, …) and uses it up.
"""

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """Which kind of draw: two kinds never share a generator, so adding one changes no other."""

    INITIALISATION = 0
    STUDENT_TIMESTEP = 1
    DEGRADATION = 2
    TURN = 3
    PREVIEW = 4
    CROP = 5
    SHARD_ORDER = 6
    INFERENCE = 7
    EVALUATION = 8
    STUDY = 9


def generator_for(*entropy: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that depends on these integers alone, whatever was drawn before.

    Args:
        entropy: Non-negative integers, e.g. (seed, Stream.TURN, update, micro_batch). All bits
            count (numpy's SeedSequence mixes them), so neighbouring updates share nothing.
        device: Where the draws are made. CPU and CUDA give different numbers for one seed.
    """
    seed = int(np.random.SeedSequence(list(entropy)).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device=device).manual_seed(seed)
