import itertools

import numpy as np
import pytest

from ksr_distill.data import plan as plan_module
from ksr_distill.data.plan import SamplePlan, UpdateSampler, draw_crop, permutation

UNEVEN = [3, 0, 5, 1, 7, 2, 4]
EPOCH = sum(UNEVEN)


def make_plan(num_members=UNEVEN, seed=5, window_shards=2):
    return SamplePlan(num_members, seed=seed, window_shards=window_shards)


def places(plan, positions):
    return [(place.shard, place.member) for place in map(plan.locate, positions)]


@pytest.mark.parametrize("window_shards", [1, 2, 3, 100])
def test_every_sample_comes_once_an_epoch_in_another_order_each(window_shards):
    plan = make_plan(window_shards=window_shards)
    everything = {(s, m) for s, count in enumerate(UNEVEN) for m in range(count)}
    epochs = [places(plan, range(e * EPOCH, (e + 1) * EPOCH)) for e in range(4)]
    assert all(set(epoch) == everything and len(epoch) == EPOCH for epoch in epochs)
    assert all(a != b for a, b in itertools.combinations(epochs, 2))
    assert plan.locate(EPOCH).epoch == 1


def test_shards_come_in_another_order_each_epoch():
    plan = make_plan([10] * 6, window_shards=1)
    orders = [tuple(plan.locate(60 * e + 10 * i).shard for i in range(6)) for e in range(5)]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len(set(orders)) > 3


def test_the_order_is_a_function_of_the_seed_and_does_not_depend_on_what_was_asked_before():
    ordered = places(make_plan(), range(3 * EPOCH))
    asked_backwards = places(make_plan(), reversed(range(3 * EPOCH)))[::-1]
    assert ordered == asked_backwards
    assert ordered != places(make_plan(seed=6), range(3 * EPOCH))


def test_a_window_keeps_few_shards_open():
    plan = make_plan([10] * 20, window_shards=4)
    for start in range(0, 200, 40):
        assert len({shard for shard, _ in places(plan, range(start, start + 40))}) == 4


def test_the_first_position_of_20000_shards_permutes_the_shards_and_one_window(monkeypatch):
    drawn = []

    def counted(count, *entropy):
        drawn.append(count)
        return permutation(count, *entropy)

    monkeypatch.setattr(plan_module, "permutation", counted)
    plan = make_plan([1000] * 20_000, window_shards=16)
    plan.locate(7_654_321)
    assert drawn == [20_000, 16_000]
    list(map(plan.locate, range(7_654_321, 7_654_421)))
    assert drawn == [20_000, 16_000], "the next positions cost nothing"


def test_permutations_stay_what_they_were():
    """Numbers of today: another numpy that changes them would break every resume."""
    assert permutation(8, 1, 2, 3).tolist() == [1, 2, 4, 6, 5, 0, 7, 3]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_share_each_update_and_leave_nothing_out(world_size):
    samplers = [
        UpdateSampler(
            batch_size=16, rank=rank, world_size=world_size, start_update=3, num_updates=7
        )
        for rank in range(world_size)
    ]
    assert all(len(sampler) == 4 for sampler in samplers)
    for update, shares in enumerate(zip(*samplers, strict=True), 3):
        assert list(itertools.chain(*shares)) == list(range(update * 16, (update + 1) * 16))


def test_micro_batches_are_the_same_however_many_ranks_share_them():
    """The contract: micro-batch m is the i-th of its rank, m = rank · accumulate + i."""
    cut = []
    for world_size, accumulate in ((1, 8), (2, 4), (4, 2), (8, 1)):
        micro_batches = {}
        for rank in range(world_size):
            sampler = UpdateSampler(
                batch_size=16, rank=rank, world_size=world_size, start_update=0, num_updates=3
            )
            share = np.array_split(list(sampler)[2], accumulate)
            micro_batches |= {rank * accumulate + i: s.tolist() for i, s in enumerate(share)}
        cut.append([micro_batches[m] for m in range(8)])
    assert all(other == cut[0] for other in cut)


def test_crops_lie_inside_reach_every_edge_and_depend_on_seed_and_position_alone():
    crops = [
        draw_crop(p, seed=1, width=12, height=10, crop_px=8, flip_prob=0.5, transpose_prob=0.2)
        for p in range(500)
    ]
    assert {crop.left for crop in crops} == set(range(5))
    assert {crop.top for crop in crops} == set(range(3))
    assert 200 < sum(crop.is_flipped for crop in crops) < 300
    assert 70 < sum(crop.is_transposed for crop in crops) < 130
    assert 30 < sum(crop.is_transposed and crop.is_flipped for crop in crops) < 70
    again = draw_crop(77, seed=1, width=12, height=10, crop_px=8, flip_prob=0.5, transpose_prob=0.2)
    assert again == crops[77]
    never = [
        draw_crop(p, seed=1, width=9, height=9, crop_px=8, flip_prob=0.0, transpose_prob=0.0)
        for p in range(99)
    ]
    assert not any(crop.is_flipped or crop.is_transposed for crop in never)


def test_a_substitute_is_of_the_same_epoch_and_always_the_same():
    plan = make_plan()
    for position in range(0, 3 * EPOCH, 5):
        places = [plan.substitute(position, attempt) for attempt in (1, 2, 3)]
        assert all(place.epoch == position // EPOCH for place in places)
        assert places == [make_plan().substitute(position, attempt) for attempt in (1, 2, 3)]
