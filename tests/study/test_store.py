"""The store: leases, sides, undo and repeated requests, with a clock under our control."""

import sqlite3
import uuid
from collections import Counter
from itertools import pairwise

import pytest

from ksr_distill.study.store import RefusedError, Store


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_store(make_study, clock):
    stores = []

    def make(*args, **plan) -> Store:
        stores.append(Store(make_study(*args, **plan), clock=clock))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def new_id() -> str:
    return uuid.uuid4().hex


def next_pair(store: Store, rater: str) -> int | None:
    queue = store.queue(rater, 1)
    return queue[0].pair.id if queue else None


def vote_all(store: Store, rater: str, choice: str = "left") -> list[int]:
    voted = []
    while (pair := next_pair(store, rater)) is not None:
        store.vote(rater, new_id(), pair, choice, 1500)
        voted.append(pair)
    return voted


def all_votes(store: Store) -> list[tuple]:
    return store.rows("SELECT * FROM vote")


def test_two_raters_never_hold_one_pair_and_every_pair_gets_its_one_vote(open_store):
    store = open_store(9, votes_per_pair=1)
    raters = [store.add_rater(name) for name in ("ann", "bob")]
    held = [{item.pair.id for item in store.queue(rater, 3)} for rater in raters]
    assert not held[0] & held[1]
    given = [vote_all(store, rater) for rater in raters]
    assert sorted(given[0] + given[1]) == list(range(1, 10))


def test_a_pair_gets_as_many_votes_as_planned_each_by_another_rater(open_store):
    store = open_store(5, votes_per_pair=3)
    for name in ("ann", "bob", "cid", "dan"):
        vote_all(store, store.add_rater(name))
    assert set(Counter(row[1] for row in all_votes(store)).values()) == {3}
    assert len({(row[1], row[2]) for row in all_votes(store)}) == 15


def test_pairs_get_their_first_vote_before_any_gets_its_second(open_store):
    store = open_store(6, votes_per_pair=2)
    ann, bob = store.add_rater("ann"), store.add_rater("bob")
    for rater in (ann, bob):
        for _ in range(3):
            store.vote(rater, new_id(), next_pair(store, rater), "both", 900)
    assert len({row[1] for row in all_votes(store)}) == 6


def test_an_abandoned_pair_goes_to_another_rater_when_its_lease_ends(open_store, clock):
    store = open_store(1, votes_per_pair=1, lease_seconds=60)
    ann, bob = store.add_rater("ann"), store.add_rater("bob")
    assert next_pair(store, ann) == 1
    assert next_pair(store, bob) is None
    clock.now += 61
    assert next_pair(store, bob) == 1
    assert next_pair(store, ann) is None  # it is bob's now


def test_a_late_vote_is_kept_because_a_person_looked(open_store, clock):
    store = open_store(1, votes_per_pair=1, lease_seconds=60)
    ann, bob = store.add_rater("ann"), store.add_rater("bob")
    next_pair(store, ann)
    clock.now += 61
    next_pair(store, bob)
    assert store.vote(bob, new_id(), 1, "left", 900) == "stored"
    assert store.vote(ann, new_id(), 1, "right", 900) == "stored"


def test_loading_again_shows_the_same_pairs_on_the_same_sides(open_store, clock):
    store = open_store(9, lease_seconds=60)
    ann = store.add_rater("ann")
    first = store.queue(ann, 3)
    assert store.queue(ann, 3) == first
    clock.now += 1000  # even after the lease, while nobody else took them
    assert store.queue(ann, 3) == first


def test_sides_are_balanced_per_rater_and_per_pair(open_store):
    store = open_store(24, votes_per_pair=4)
    for name in ("ann", "bob", "cid", "dan"):
        vote_all(store, store.add_rater(name))
    sides = store.rows("SELECT rater, pair, left FROM assignment")
    for rater in {row[0] for row in sides}:
        lefts = Counter(row[2] for row in sides if row[0] == rater)
        assert abs(lefts["a"] - lefts["b"]) <= 2
    even = [Counter(row[2] for row in sides if row[1] == pair)["a"] == 2 for pair in range(1, 25)]
    assert sum(even) > 12  # 9 of 24 by coins alone


def test_sides_look_random_to_the_rater(open_store):
    store = open_store(80, votes_per_pair=1)
    ann = store.add_rater("ann")
    vote_all(store, ann)
    query = "SELECT left FROM assignment WHERE rater = ? ORDER BY position"
    sides = "".join(row[0] for row in store.rows(query, ann))
    changes = sum(one != other for one, other in pairwise(sides))
    assert 22 < changes < 70


def test_raters_see_pairs_in_different_orders(open_store):
    store = open_store(12, votes_per_pair=5)
    orders = {tuple(vote_all(store, store.add_rater(name))) for name in ("ann", "bob", "cid")}
    assert len(orders) == 3


def test_attention_checks_come_once_each_at_places_that_cannot_be_foreseen(open_store):
    store = open_store(20, votes_per_pair=3, num_checks=3, check_every=4)
    checks = {row[0] for row in store.rows("SELECT id FROM pair WHERE kind <> 'pair'")}
    assert len(checks) == 6
    places = set()
    for name in ("ann", "bob", "cid"):
        seen = vote_all(store, store.add_rater(name))
        assert len(seen) == len(set(seen))
        assert len(checks & set(seen)) >= 4  # 20 pairs in stretches of 5
        places.add(tuple(index for index, pair in enumerate(seen) if pair in checks))
    assert len(places) > 1


def test_a_rater_stops_at_the_planned_number_of_votes(open_store):
    store = open_store(9, votes_per_rater=4)
    assert len(vote_all(store, store.add_rater("ann"))) == 4


def test_the_same_vote_sent_again_is_stored_once(open_store):
    store = open_store()
    ann = store.add_rater("ann")
    pair, vote_id = next_pair(store, ann), new_id()
    for _ in range(3):
        assert store.vote(ann, vote_id, pair, "left", 900) == "stored"
    assert len(all_votes(store)) == 1


def test_a_vote_that_was_taken_back_does_not_return_when_its_request_is_repeated(open_store):
    store = open_store()
    ann = store.add_rater("ann")
    pair, vote_id = next_pair(store, ann), new_id()
    store.vote(ann, vote_id, pair, "left", 900)
    for _ in range(2):
        store.undo(ann, vote_id)
    assert store.vote(ann, vote_id, pair, "left", 900) == "undone"
    assert not all_votes(store)


def test_undo_brings_back_one_pair_after_another_on_the_same_sides(open_store):
    store = open_store(9)
    ann = store.add_rater("ann")
    shown, ids = [], [new_id() for _ in range(3)]
    for vote_id in ids:
        shown.append(store.queue(ann, 3)[0])
        store.vote(ann, vote_id, shown[-1].pair.id, "both", 900)
    for vote_id, item in zip(reversed(ids), reversed(shown), strict=True):
        assert store.last_vote(ann) == (vote_id, item)
        store.undo(ann, vote_id)
        assert store.queue(ann, 3)[0] == item
    assert store.last_vote(ann) is None


def test_undo_shows_its_pair_even_before_one_that_was_left_open(open_store, clock):
    store = open_store(2, votes_per_pair=1, lease_seconds=60)
    ann, bob = store.add_rater("ann"), store.add_rater("bob")
    left_open, vote_id = next_pair(store, ann), new_id()
    clock.now += 61
    while next_pair(store, bob) != left_open:  # bob may draw the other one first
        bob = store.add_rater(new_id())
        clock.now += 61
    judged = next_pair(store, ann)
    assert judged != left_open
    store.vote(ann, vote_id, judged, "left", 900)
    clock.now += 61  # bob has gone: the first pair is open again
    store.undo(ann, vote_id)
    assert next_pair(store, ann) == judged


def refuse(status: int):
    return pytest.raises(RefusedError, check=lambda error: error.status == status)


def test_nothing_is_stored_of_a_vote_that_is_refused(open_store):
    store = open_store(9)
    ann, bob = store.add_rater("ann"), store.add_rater("bob")
    pair, bobs, vote_id = next_pair(store, ann), next_pair(store, bob), new_id()
    store.vote(ann, vote_id, pair, "left", 900)
    with refuse(404):
        store.vote(ann, new_id(), 999, "left", 900)  # no such pair
    with refuse(404):
        store.vote(ann, new_id(), bobs, "left", 900)  # never shown to ann
    with refuse(409):
        store.vote(ann, new_id(), pair, "right", 900)  # a second opinion
    with refuse(409):
        store.vote(ann, vote_id, pair, "right", 900)  # the same id, another choice
    with refuse(409):
        store.vote(bob, vote_id, bobs, "left", 900)  # somebody else's id
    with refuse(404):
        store.undo(bob, vote_id)
    with refuse(409):
        store.add_rater("Ann")
    assert [row[:4] for row in all_votes(store)] == [(vote_id, pair, ann, "left")]


def test_the_database_itself_refuses_what_the_page_could_not_have_sent(open_store):
    store = open_store()
    ann = store.add_rater("ann")
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
        store.rows("INSERT INTO vote VALUES (?, 1, ?, 'left', 5, 0)", new_id(), ann)
    pair = next_pair(store, ann)
    with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
        store.rows("INSERT INTO vote VALUES (?, ?, ?, 'banana', 5, 0)", new_id(), pair, ann)


def test_a_folder_that_is_no_study_is_named(tmp_path):
    with pytest.raises(ValueError, match="make a study by ksr study build"):
        Store(tmp_path)
    (tmp_path / "study.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(ValueError, match="not a study's database"):
        Store(tmp_path)
