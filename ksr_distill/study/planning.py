"""How many votes a study needs: before it starts, and from what it has measured."""

import math
from collections import Counter
from statistics import NormalDist
from typing import NamedTuple

from ksr_distill.study.basket import Prompt
from ksr_distill.study.statistics import LEVEL

POWER = 0.8
# The announcement of KandiSuperRes Flash: 28 % and 15 % decided, so 43 % of the votes count.
ANNOUNCED_DECIDED = 0.43


class Assumptions(NamedTuple):
    """What must be assumed before the first vote.

    Attributes:
        difference: Share that prefers B minus share that prefers A, in (0, 1].
        decided: Share of votes for either side, in (0, 1]; at least the difference.
        agreement: Correlation of two raters' votes on one pair, in [0, 1]: the more they agree, the
            less a second vote on the same pair adds.
    """

    difference: float = 0.13
    decided: float = ANNOUNCED_DECIDED
    agreement: float = 0.3

    def check(self) -> None:
        """Raise ValueError unless the three can be true together."""
        if not 0 < self.difference <= self.decided <= 1:
            raise ValueError(
                f"difference {self.difference:g} with {self.decided:g} of the votes decided is "
                "impossible; need 0 < difference <= decided <= 1"
            )
        if not 0 <= self.agreement <= 1:
            raise ValueError(f"agreement {self.agreement:g} is outside [0, 1]; 0.3 is usual")


def vote_variance(assumed: Assumptions) -> float:
    """Return the variance of one vote's score: +1 for B, −1 for A, 0 for both or neither."""
    return assumed.decided - assumed.difference**2


def effective_votes(num_prompts: int, votes_per_pair: int, agreement: float) -> float:
    """Return how many independent votes the clustered ones are worth (Kish's design effect)."""
    return num_prompts * votes_per_pair / (1 + (votes_per_pair - 1) * agreement)


def half_width(num_prompts: int, votes_per_pair: int, assumed: Assumptions) -> float:
    """Return half the width of the difference's 95 % interval, as a share."""
    votes = effective_votes(num_prompts, votes_per_pair, assumed.agreement)
    return NormalDist().inv_cdf(1 - LEVEL / 2) * math.sqrt(vote_variance(assumed) / votes)


def decidable_difference(standard_error: float, *, num_comparisons: int = 1) -> float:
    """Return the true difference that is found four times out of five.

    Args:
        standard_error: Of the measured difference.
        num_comparisons: Categories tested together; Holm's strictest level is LEVEL divided by it.
    """
    normal = NormalDist()
    return standard_error * (
        normal.inv_cdf(1 - LEVEL / 2 / num_comparisons) + normal.inv_cdf(POWER)
    )


def independent_votes_needed(assumed: Assumptions, *, num_comparisons: int = 1) -> float:
    """Return how many independent votes decide the assumed difference with power 0.8."""
    per_vote = decidable_difference(1.0, num_comparisons=num_comparisons)
    return vote_variance(assumed) * (per_vote / assumed.difference) ** 2


def votes_per_pair_needed(
    num_prompts: int, assumed: Assumptions, *, num_comparisons: int = 1
) -> int | None:
    """Return the votes per pair that decide the assumed difference; None if no number does."""
    needed = independent_votes_needed(assumed, num_comparisons=num_comparisons) / num_prompts
    if needed <= 1:
        return 1
    room = 1 - needed * assumed.agreement
    return math.ceil(needed * (1 - assumed.agreement) / room - 1e-9) if room > 0 else None


def prompts_needed(assumed: Assumptions, *, num_comparisons: int = 1) -> int:
    """Return the prompts below which no number of votes per pair can decide the difference."""
    needed = independent_votes_needed(assumed, num_comparisons=num_comparisons)
    return math.floor(needed * assumed.agreement) + 1


def plan_lines(prompts: list[Prompt], votes_per_pair: int, assumed: Assumptions) -> list[str]:
    """Return what the planned votes can decide, as sentences for people."""
    assumed.check()
    sizes = Counter(prompt.category for prompt in prompts)
    groups = [("overall", len(prompts), 1)]
    spans = {"smallest category": min(sizes.values()), "largest category": max(sizes.values())}
    if len(set(spans.values())) == 1:
        spans = {"each category": spans["smallest category"]}
    if len(sizes) > 1:
        groups += [(name, size, 1) for name, size in spans.items()]
        groups += [
            (f"{name}, Holm over {len(sizes)}", size, len(sizes)) for name, size in spans.items()
        ]
    lines = [
        f"Planned: {len(prompts)} pairs in {len(sizes)} categories, {votes_per_pair} vote(s) per "
        f"pair, {len(prompts) * votes_per_pair} votes.",
        f"Assumed: {100 * assumed.decided:g} % of the votes prefer a side, raters correlate "
        f"{assumed.agreement:g} on a pair, the true difference is "
        f"{100 * assumed.difference:g} points.",
    ]
    return lines + [_group_line(*group, votes_per_pair, assumed) for group in groups]


def _group_line(
    name: str, size: int, num_comparisons: int, votes_per_pair: int, assumed: Assumptions
) -> str:
    one, planned = (100 * half_width(size, votes, assumed) for votes in (1, votes_per_pair))
    widths = f"±{one:.1f} points with one vote each"
    if votes_per_pair > 1:
        widths += f", ±{planned:.1f} with {votes_per_pair}"
    needed = votes_per_pair_needed(size, assumed, num_comparisons=num_comparisons)
    if needed is None:
        least = prompts_needed(assumed, num_comparisons=num_comparisons)
        verdict = f"no number of votes decides it; needs at least {least} prompts"
    else:
        verdict = f"needs {needed} vote(s) per pair"
        if needed > votes_per_pair:
            verdict += f", more than the planned {votes_per_pair}"
    return f"{name} ({size} prompts): {widths}; {verdict}."
