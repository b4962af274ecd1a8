"""Planning: the announcement's numbers, and what they cannot decide."""

import pytest

from ksr_distill.study.basket import Prompt
from ksr_distill.study.planning import (
    Assumptions,
    decidable_difference,
    effective_votes,
    half_width,
    plan_lines,
    prompts_needed,
    votes_per_pair_needed,
)

ANNOUNCED = Assumptions(difference=0.13, decided=0.43, agreement=0.3)


def test_one_vote_each_gives_12_6_points_in_a_category_and_2_7_overall():
    # 1.96 · sqrt((0.43 − 0.13²) / n)
    assert 100 * half_width(100, 1, ANNOUNCED) == pytest.approx(12.6, abs=0.05)
    assert 100 * half_width(2100, 1, ANNOUNCED) == pytest.approx(2.7, abs=0.05)


def test_votes_of_raters_who_always_agree_add_nothing():
    assert effective_votes(100, 9, agreement=1.0) == pytest.approx(100)
    assert effective_votes(100, 9, agreement=0.0) == pytest.approx(900)


def test_the_needed_votes_just_suffice():
    needed = votes_per_pair_needed(100, ANNOUNCED)
    assert needed == 4  # by hand: 191.9 independent votes; 100·4/(1+3·0.3) = 210, 100·3/1.6 = 187
    for votes, is_enough in ((needed - 1, False), (needed, True)):
        error = half_width(100, votes, ANNOUNCED) / 1.959964
        assert (decidable_difference(error) <= ANNOUNCED.difference) is is_enough


def test_more_prompts_are_asked_for_where_no_number_of_votes_helps():
    assert votes_per_pair_needed(100, ANNOUNCED, num_comparisons=21) is None
    least = prompts_needed(ANNOUNCED, num_comparisons=21)
    assert votes_per_pair_needed(least - 1, ANNOUNCED, num_comparisons=21) is None
    assert votes_per_pair_needed(least, ANNOUNCED, num_comparisons=21) is not None


def test_the_announcements_basket_is_told_what_it_can_decide():
    basket = [Prompt(str(index), "x", f"c{index % 21}") for index in range(2100)]
    overall, category, corrected = plan_lines(basket, 1, ANNOUNCED)[2:]
    assert "±2.7 points with one vote each; needs 1 vote(s)" in overall
    assert "±12.6 points with one vote each; needs 4 vote(s) per pair, more than" in category
    assert "Holm over 21" in corrected
    assert "no number of votes" in corrected


@pytest.mark.parametrize(
    "wrong", [(0.0, 0.4, 0.3), (0.5, 0.4, 0.3), (0.1, 1.2, 0.3), (0.1, 0.4, 2)]
)
def test_assumptions_that_cannot_be_true_together_are_refused(wrong):
    with pytest.raises(ValueError, match=r"impossible|outside"):
        Assumptions(*wrong).check()
