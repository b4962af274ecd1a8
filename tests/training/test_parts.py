"""Parts of the training: rates, averages, balance, AUC, curves."""

import csv

import pytest
import torch

from ksr_distill.training.balance import GradientBalance
from ksr_distill.training.build import chosen_timesteps, distillation_module
from ksr_distill.training.ema import ema_decay, update_ema
from ksr_distill.training.history import MetricsCSV
from ksr_distill.training.monitors import auc, score_health
from ksr_distill.training.settings import StudentTerms
from tests.training.conftest import adamw, game


def test_rate_rises_stays_and_falls_to_zero():
    optim = adamw(learning_rate=0.8, warmup_updates=3, decay_share=0.5)
    assert [optim.rate(n, 0.0) for n in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert optim.rate(9, 0.5) == pytest.approx(0.8)
    assert optim.rate(9, 0.75) == pytest.approx(0.4)
    assert optim.rate(9, 1.0) == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -1.0}, "optim.*.learning_rate=-1.0"),
        ({"learning_rate": float("nan")}, "optim.*.learning_rate=nan"),
        ({"betas": (0.9, 1.0)}, "optim.*.betas"),
        ({"clip_norm": 0.0}, "optim.*.clip_norm=0.0"),
    ],
)
def test_settings_refuse_wrong_ranges_by_key(changes, message):
    with pytest.raises(ValueError, match="is not allowed; use") as error:
        adamw(**changes)
    assert message in str(error.value)


def test_simulation_probability_ramps_between_its_ends():
    ramp = game(backward_simulation_prob=0.8, backward_simulation_ramp=(10, 20))
    assert [ramp.simulation_prob(u) for u in (0, 10, 15, 20, 99)] == [0, 0, 0.4, 0.8, 0.8]


def test_a_range_of_log_snr_that_its_timesteps_would_cut_off_is_refused():
    game(critic_log_snr=(3.0, 9.0), critic_timesteps=(0, 999))
    with pytest.raises(ValueError, match=r"critic_timesteps=\[1, 65\] is not.*use \[11, 456\], wh"):
        game(critic_log_snr=(-2.0, 6.0), critic_timesteps=(1, 65))
    with pytest.raises(ValueError, match=r"use \[1, 21\], which loss.game.critic_log_snr=\[5.0"):
        game(critic_log_snr=(5.0, 9.0), critic_timesteps=(6, 172))


def test_a_student_without_terms_is_refused():
    with pytest.raises(ValueError, match="one weight > 0"):
        StudentTerms(adversarial=0.0, l1=0.0, feature_matching=0.0, lowres_consistency=0.0,
                     balance=True, balance_floor=0.0)  # fmt: skip


def test_average_moves_by_one_minus_decay_and_not_when_skipped():
    average, network = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(average.weight, 1.0)
    torch.nn.init.constant_(network.weight, 3.0)
    update_ema(average, network, decay=0.75, moved=torch.tensor(0.0))
    assert average.weight.item() == 1.0
    update_ema(average, network, decay=0.75, moved=torch.tensor(1.0))
    assert average.weight.item() == 1.5


def test_decay_of_the_average_rises_to_its_end():
    assert [ema_decay(n, 0.999) for n in (0, 90)] == pytest.approx([0.1, 0.91])
    assert ema_decay(10**6, 0.999) == 0.999


def test_balanced_terms_push_by_their_weights_whatever_their_scale():
    image = torch.randn(2, 3, 4, 4, requires_grad=True)
    target = torch.randn(2, 3, 4, 4)
    balance = GradientBalance({"small": 1.0, "large": 0.5, "off": 0.0}, enabled=True, floor=0.0)

    def losses():
        return {"small": 1e-6 * (image - target).square().mean(),
                "large": 1e6 * (image + target).abs().mean()}  # fmt: skip

    push, measure = balance.push(losses(), image)
    assert push.abs().max() == 0  # the first turn measures
    balance.end_turn([measure])
    both, _ = balance.push(losses(), image)
    alone = GradientBalance({"small": 1.0}, enabled=True, floor=0.0)
    alone.end_turn([alone.push({"small": losses()["small"]}, image)[1]])
    small, _ = alone.push({"small": losses()["small"]}, image)
    # Unit: the gradient of a mean L1, whose norm per image is 1/√N.
    assert small.flatten(1).square().sum(1).mean().sqrt().item() == pytest.approx(
        48**-0.5 / 2, rel=1e-4
    )
    large = (both - small).flatten(1).square().sum(1).mean().sqrt().item()
    assert large == pytest.approx(0.5 * 48**-0.5 / 2, rel=1e-3)


def test_a_fading_term_is_not_blown_up_beyond_the_floor():
    image = torch.randn(2, 3, 4, 4, requires_grad=True)

    def pushes(floor: float) -> list[float]:
        balance = GradientBalance({"fading": 1.0}, enabled=True, floor=floor)
        norms = []
        for turn in range(400):
            loss = {"fading": (1.0 if turn < 20 else 0.01) * image.square().mean()}
            push, measure = balance.push(loss, image)
            norms.append(push.norm().item())
            balance.end_turn([measure])
        return norms

    free, floored = pushes(0.0), pushes(0.3)
    assert free[-1] > 0.1 * free[10]  # what is left of it comes back to full strength
    assert floored[-1] == pytest.approx(floored[10] * 0.01 / 0.3, rel=0.02)


def test_auc_counts_pairs_and_halves_ties():
    real, fake = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0])
    assert auc(real, fake).item() == pytest.approx((1 + 1.5 + 2) / 6)
    assert auc(real, real).item() == pytest.approx(0.5)


def test_paired_auc_sees_a_difference_that_content_hides():
    content = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 100
    values = score_health([content + 1.0], [content])
    assert values["health/paired_auc_head_0"].item() == 1.0
    assert values["health/auc_head_0"].item() == pytest.approx(0.5, abs=0.01)
    assert score_health([content], [content])["health/paired_auc_head_0"].item() == 0.5


def test_curves_go_on_after_a_resume_without_rows_from_a_lost_future(tmp_path):
    first = MetricsCSV(folder=str(tmp_path))
    for update in (10, 20, 30):
        first.log_metrics({"train/loss": update / 10}, step=update)
    resumed = MetricsCSV(folder=str(tmp_path))
    resumed.log_metrics({"train/loss": 7.0}, step=20)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows == [["update", "metric", "value"], ["10", "train/loss", "1"],
                    ["20", "train/loss", "7"]]  # fmt: skip


def test_named_timesteps_replace_the_evenly_spread_ones():
    assert chosen_timesteps(4, None) == (979, 729, 479, 229)
    assert chosen_timesteps(4, [979, 479, 29]) == (979, 479, 29)


@pytest.mark.parametrize("wrong", [[], [900, 100], [979, 979], [979, -1], [979, 29.0], "979"])
def test_timesteps_that_do_not_fall_from_pure_noise_are_refused(wrong):
    with pytest.raises(ValueError, match=r"diffusion\.timesteps=.* that fall from 979 to 0"):
        chosen_timesteps(4, wrong)


@pytest.mark.parametrize("width", [0, 4, -8])
def test_heads_of_a_width_that_has_no_groups_are_refused_by_key(width):
    with pytest.raises(ValueError, match=f"critic.head_channels={width} is not allowed; use a mul"):
        distillation_module(
            teacher="t", dropout=0.0, head_channels=width, normalise_features=True,
            num_inference_steps=4, timesteps=None, channels_last=False,
            gradient_checkpointing=False, seed=0,
        )  # fmt: skip
