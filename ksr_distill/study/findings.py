"""What the votes show, what they cannot decide, and which raters to check."""

import math
from collections import Counter, defaultdict
from statistics import median
from typing import NamedTuple

import numpy as np

from ksr_distill.study.planning import decidable_difference
from ksr_distill.study.schema import Pair
from ksr_distill.study.statistics import (
    LEVEL,
    OUTCOMES,
    A,
    B,
    Counts,
    Interval,
    Summary,
    alpha_interval,
    fair_coin_p_value,
    holm,
    rng_for,
    summarise,
)
from ksr_distill.study.tally import Tally, Vote, count_votes, passed_check

# With fewer votes a rater's habits are not flagged.
MIN_VOTES_FOR_HABIT = 20
ONE_ANSWER_SHARE = 0.95
FAST_SECONDS = 1.0
NUM_DISPUTED = 12


class Category(NamedTuple):
    """One category's summary and its p-value after Holm's correction over all categories."""

    name: str
    summary: Summary
    holm_p_value: float

    @property
    def is_decided(self) -> bool:
        """Whether the preference survives the correction."""
        return self.holm_p_value < LEVEL


class RaterCheck(NamedTuple):
    """One rater's habits.

    Attributes:
        left: Votes for the left side, out of ``sided``; sides were drawn at random.
        side_p_value: Of no side bias, Holm-corrected over raters.
        flags: Reasons to check this rater; empty for nearly everyone.
    """

    name: str
    num_votes: int
    left: int
    sided: int
    side_p_value: float
    most_used: str
    most_used_share: float
    median_seconds: float
    checks_failed: int
    checks_given: int
    flags: list[str]


class Disputed(NamedTuple):
    """A pair on which raters contradict each other."""

    pair: Pair
    counts: dict[str, int]


class Findings(NamedTuple):
    """Everything the report shows."""

    overall: Summary
    categories: list[Category]
    agreement: Interval
    num_repeated: int
    raters: list[RaterCheck]
    side_left: int
    side_total: int
    side_p_value: float
    without_flagged: Summary | None
    disputed: list[Disputed]
    num_pairs: int
    num_short: int
    verdicts: list[str]


def find(tally: Tally, *, seed: int = 0) -> Findings:
    """Return the findings; the same votes and seed give the same numbers.

    Raises:
        ValueError: Nobody has voted on a pair yet.
    """
    pairs = [pair for pair in tally.pairs if pair.kind == "pair"]
    votes = [vote for vote in tally.votes if vote.kind == "pair"]
    counts = count_votes(pairs, votes)
    overall = summarise(counts, rng_for(seed, 1))
    categories = summarise_categories(pairs, counts, seed)
    raters = check_raters(tally.votes)
    flagged = {rater.name for rater in raters if rater.flags}
    kept = count_votes(pairs, [vote for vote in votes if vote.name not in flagged])
    left, sided = count_sides(votes)
    findings = Findings(
        overall=overall,
        categories=categories,
        agreement=alpha_interval(counts, rng_for(seed, 3)),
        num_repeated=int((counts.sum(1) > 1).sum()),
        raters=raters,
        side_left=left,
        side_total=sided,
        side_p_value=fair_coin_p_value(left, sided),
        without_flagged=summarise(kept, rng_for(seed, 4)) if flagged and kept.any() else None,
        disputed=most_disputed(pairs, counts),
        num_pairs=len(pairs),
        num_short=int((counts.sum(1) < int(tally.settings["votes_per_pair"])).sum()),
        verdicts=[],
    )
    return findings._replace(verdicts=verdicts(findings, tally.settings))


def summarise_categories(pairs: list[Pair], counts: Counts, seed: int) -> list[Category]:
    """Return the categories that have votes, by name; an empty list if there is only one."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, pair in enumerate(pairs):
        if counts[row].any():
            rows[pair.category].append(row)
    if len({pair.category for pair in pairs}) < 2:
        return []
    names = sorted(rows)
    summaries = [
        summarise(counts[rows[name]], rng_for(seed, 2, index)) for index, name in enumerate(names)
    ]
    adjusted = holm([summary.p_value for summary in summaries])
    return [Category(*values) for values in zip(names, summaries, adjusted, strict=True)]


def count_sides(votes: list[Vote]) -> tuple[int, int]:
    """Return votes for the left side, and votes for either side."""
    used = Counter(vote.choice for vote in votes)
    return used["left"], used["left"] + used["right"]


def check_raters(votes: list[Vote]) -> list[RaterCheck]:
    """Return every rater's habits, flagged ones first."""
    by_name: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        by_name[vote.name].append(vote)
    names = sorted(by_name)
    judged = {name: [vote for vote in by_name[name] if vote.kind == "pair"] for name in names}
    p_values = holm([fair_coin_p_value(*count_sides(judged[name])) for name in names])
    checks = [
        _check_rater(name, judged[name], by_name[name], p_value)
        for name, p_value in zip(names, p_values, strict=True)
    ]
    return sorted(checks, key=lambda check: (not check.flags, check.name))


def _check_rater(name: str, judged: list[Vote], votes: list[Vote], p_value: float) -> RaterCheck:
    left, sided = count_sides(judged)
    used = Counter(vote.choice for vote in judged).most_common(1)
    most_used, times = used[0] if used else ("none", 0)
    seconds = median(vote.milliseconds for vote in votes) / 1000
    given = [vote for vote in votes if vote.kind != "pair"]
    failed = sum(not passed_check(vote) for vote in given)
    enough = len(judged) >= MIN_VOTES_FOR_HABIT
    share = times / max(1, len(judged))
    reasons = {
        "prefers the left side" if 2 * left > sided else "prefers the right side": p_value < LEVEL,
        f"answers {most_used} nearly always": enough and share >= ONE_ANSWER_SHARE,
        "answers within a second": enough and seconds < FAST_SECONDS,
        "fails attention checks": failed >= 2 and failed * 3 > len(given),
    }
    return RaterCheck(
        name=name,
        num_votes=len(judged),
        left=left,
        sided=sided,
        side_p_value=p_value,
        most_used=most_used,
        most_used_share=share,
        median_seconds=seconds,
        checks_failed=failed,
        checks_given=len(given),
        flags=[reason for reason, holds in reasons.items() if holds],
    )


def most_disputed(pairs: list[Pair], counts: Counts) -> list[Disputed]:
    """Return the pairs with votes for both sides, the most even and most voted first."""
    contradiction = np.minimum(counts[:, A], counts[:, B])
    order = np.lexsort((counts.sum(1), -np.abs(counts[:, A] - counts[:, B]), contradiction))[::-1]
    return [
        Disputed(pairs[row], dict(zip(OUTCOMES, counts[row].tolist(), strict=True)))
        for row in order[:NUM_DISPUTED].tolist()
        if contradiction[row]
    ]


def points(share: float) -> str:
    """Return a difference of shares in points, signed."""
    return f"{100 * share:+.1f}"


def verdicts(findings: Findings, settings: dict[str, str]) -> list[str]:
    """Return what the data can and cannot decide, as sentences."""
    lines = [_overall_verdict(findings.overall, settings)]
    lines += _category_verdicts(findings.categories)
    if findings.num_repeated:
        lines.append(_agreement_verdict(findings))
    else:
        lines.append("No pair has two votes, so how far raters agree cannot be said.")
    if findings.side_p_value < LEVEL:
        lines.append(
            f"Raters as a whole favour a side (left {findings.side_left} of "
            f"{findings.side_total}); balanced sides keep this out of the difference, but it "
            "hides small preferences."
        )
    if findings.without_flagged:
        changed = _interval(findings.without_flagged.difference)
        lines.append(f"Without the flagged raters the difference is {changed}.")
    if findings.num_short:
        lines.append(
            f"{findings.num_short} of {findings.num_pairs} pairs have fewer votes than planned; "
            "stopping when the result looks good makes these intervals too narrow."
        )
    return lines


def _interval(interval: Interval) -> str:
    low, high = points(interval.low), points(interval.high)
    return f"{points(interval.estimate)} points [{low}, {high}]"


def _overall_verdict(overall: Summary, settings: dict[str, str]) -> str:
    difference, label_a, label_b = overall.difference, settings["label_a"], settings["label_b"]
    interval = _interval(difference)
    if overall.p_value < LEVEL:
        better = label_b if difference.estimate > 0 else label_a
        return f"Decided: raters prefer {better}; {label_b} minus {label_a} is {interval}."
    found = 100 * decidable_difference(overall.standard_error)
    return (
        f"Not decided: {label_b} minus {label_a} is {interval}. A true difference of "
        f"{found:.1f} points would have been found four times out of five; a smaller one may exist."
    )


def _category_verdicts(categories: list[Category]) -> list[str]:
    if not categories:
        return []
    decided = [category for category in categories if category.is_decided]
    names = ", ".join(
        f"{category.name} ({points(category.summary.difference.estimate)})" for category in decided
    )
    lines = [
        f"Decided after Holm's correction: {names or 'no category'}; "
        f"{len(decided)} of {len(categories)}."
    ]
    if len(decided) < len(categories):
        typical = median(category.summary.standard_error for category in categories)
        half_width = 1.96 * typical
        found = decidable_difference(typical, num_comparisons=len(categories))
        lines.append(
            f"Not decided: {len(categories) - len(decided)} of {len(categories)} categories, which "
            f"does not mean equal: a typical category's interval is ±{100 * half_width:.1f} "
            f"points, and only a true difference of {100 * found:.0f} points would be found there "
            "four times out of five. Do not rank categories by their estimates."
        )
    return lines


def _agreement_verdict(findings: Findings) -> str:
    alpha = findings.agreement
    if math.isnan(alpha.estimate):
        return "All repeated votes are the same answer, so agreement beyond chance is undefined."
    return (
        f"Raters agree beyond chance by Krippendorff's alpha {alpha.estimate:.2f} "
        f"[{alpha.low:.2f}, {alpha.high:.2f}] on {findings.num_repeated} pairs (1 is perfect, 0 is "
        "chance)."
    )
