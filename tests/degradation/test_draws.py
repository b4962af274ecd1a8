import torch

from ksr_distill.degradation.draws import bernoulli, categorical, uniform, uniform_integers
from ksr_distill.randomness import generator_for

CPU = torch.device("cpu")


def test_categories_come_in_their_shares_and_order():
    drawn = categorical(20_000, (0.1, 0.6, 0.3), device=CPU, generator=generator_for(0))
    shares = drawn.bincount().double() / 20_000
    assert torch.allclose(shares, torch.tensor([0.1, 0.6, 0.3]).double(), atol=0.015)


def test_a_category_of_share_zero_never_comes():
    drawn = categorical(5_000, (0.0, 1.0, 0.0), device=CPU, generator=generator_for(0))
    assert (drawn == 1).all()


def test_ranges_are_kept_and_reached():
    numbers = uniform(5_000, 0.2, 3.0, device=CPU, generator=generator_for(0))
    assert 0.2 <= numbers.min() < 0.21
    assert 2.99 < numbers.max() < 3.0
    whole = uniform_integers(5_000, 30, 33, device=CPU, generator=generator_for(0))
    assert whole.unique().tolist() == [30, 31, 32, 33]


def test_probabilities_zero_and_one_are_certain():
    assert not bernoulli(5_000, 0.0, device=CPU, generator=generator_for(0)).any()
    assert bernoulli(5_000, 1.0, device=CPU, generator=generator_for(0)).all()
