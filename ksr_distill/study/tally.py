"""Reads a study's votes, maps sides to A and B, and counts them for the statistics."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ksr_distill.study.build import expected_choice
from ksr_distill.study.schema import Pair
from ksr_distill.study.statistics import OUTCOMES, Counts
from ksr_distill.study.store import Store


class Vote(NamedTuple):
    """One vote, by side and by picture.

    Attributes:
        rater: Id; ``name`` is the one that the rater chose.
        left: Which picture was on the left, "a" or "b".
        choice: By side: left, right, both, neither.
        outcome: By picture: a, b, both, neither.
    """

    id: str
    pair: int
    kind: str
    prompt_id: str
    category: str
    rater: str
    name: str
    left: str
    choice: str
    outcome: str
    milliseconds: int
    at: float


class Tally(NamedTuple):
    """A study's pairs and votes, as read at one moment."""

    settings: dict[str, str]
    pairs: list[Pair]
    votes: list[Vote]
    num_undone: int


QUERY = """
SELECT vote.id, vote.pair, kind, prompt_id, category, vote.rater, name, assignment.left,
    choice, milliseconds, at
FROM vote
JOIN pair ON pair.id = vote.pair
JOIN rater ON rater.id = vote.rater
JOIN assignment ON assignment.rater = vote.rater AND assignment.pair = vote.pair
ORDER BY at, vote.id
"""


def read_tally(folder: Path) -> Tally:
    """Return everything the report needs; the study may be served meanwhile."""
    store = Store(folder)
    pairs = [Pair(*row) for row in store.rows("SELECT * FROM pair ORDER BY category, prompt_id")]
    rows = store.rows(QUERY)
    ((num_undone,),) = store.rows("SELECT COUNT(*) FROM undone")
    store.close()
    votes = [Vote._make((*row[:9], outcome_of(row[7], row[8]), *row[9:])) for row in rows]
    return Tally(store.settings, pairs, votes, num_undone)


def outcome_of(left: str, choice: str) -> str:
    """Return the picture that a choice of a side stands for, given which one was on the left."""
    if choice not in ("left", "right"):
        return choice
    return "a" if (choice == "left") == (left == "a") else "b"


def count_votes(pairs: list[Pair], votes: list[Vote]) -> Counts:
    """Return one row of counts for each pair, in the order given; other votes are ignored."""
    row_of = {pair.id: row for row, pair in enumerate(pairs)}
    counts = np.zeros((len(pairs), len(OUTCOMES)), dtype=np.int64)
    for vote in votes:
        if vote.pair in row_of:
            counts[row_of[vote.pair], OUTCOMES.index(vote.outcome)] += 1
    return counts


def passed_check(vote: Vote) -> bool:
    """Return whether an attention check was answered as expected."""
    return vote.choice in expected_choice(vote.kind, vote.left)
