"""Who moves when, what they see, and that every draw is a function of (seed, update)."""

import pytest
import torch

from ksr_distill.training.settings import CriticTerms, StudentTerms
from tests.training.conftest import adamw, batch, game


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()} | {
        f"trunk.{name}": value.clone() for name, value in module.critic.trunk.state_dict().items()
    }


def moved(before, after, prefix):
    return any(not torch.equal(before[k], after[k]) for k in before if k.startswith(prefix))


def forward_passes(module, micro_batches):
    return [module.forward_pass(m, with_gradient=False) for m in micro_batches]


def test_critics_turn_moves_the_heads_and_nothing_else(make_module):
    module = make_module()
    micro_batches = module.prepare(batch())
    before = weights(module)
    module.critic_turn(micro_batches, forward_passes(module, micro_batches))
    after = weights(module)
    assert moved(before, after, "critic.heads.")
    assert not moved(before, after, "student.")
    assert not moved(before, after, "student_ema.")
    assert not moved(before, after, "trunk.")


def test_students_turn_moves_student_and_average_and_nothing_else(make_module):
    module = make_module()
    module.training_step(batch(), 0)  # takes the terms' measure
    micro_batches = module.prepare(batch())
    before = weights(module)
    module.student_turn(micro_batches, None)
    after = weights(module)
    assert moved(before, after, "student.")
    assert moved(before, after, "student_ema.")
    assert not moved(before, after, "critic.heads.")
    assert not moved(before, after, "trunk.")
    assert all(p.grad is None for p in module.critic.trunk.parameters())


def test_students_gradient_never_reaches_the_heads(make_module):
    module = make_module()
    module.student_turn(module.prepare(batch()), None)
    assert all(p.grad is None for p in module.critic.heads.parameters())


def test_student_waits_for_the_critics_warmup_and_its_share_of_turns(make_module):
    module = make_module(game=game(critic_warmup_updates=2, critic_updates_per_student=3))
    turns = []
    for update in range(8):
        before = module.student_updates
        module.training_step(batch(update), update)
        turns.append(module.student_updates - before)
    assert turns == [0, 0, 0, 0, 1, 0, 0, 1]
    assert module.network_updates["critic"] == 8


def test_first_student_turn_only_takes_the_measure(make_module):
    module = make_module()
    before = weights(module)
    module.training_step(batch(), 0)
    assert not moved(before, weights(module), "student.")
    module.training_step(batch(1), 1)
    assert moved(before, weights(module), "student.")


def test_sharing_the_graph_between_the_turns_changes_no_weight(make_module):
    shared, apart = make_module(), make_module()
    for update in range(3):
        shared.training_step(batch(update), update)
        micro_batches = apart.prepare(batch(update))
        values = apart.critic_turn(micro_batches, forward_passes(apart, micro_batches))
        apart.end_update(values | apart.student_turn(micro_batches, None))
    ours, theirs = shared.state_dict(), apart.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_micro_batches_give_the_gradient_of_the_whole_batch(make_module, monkeypatch):
    whole, parts = make_module(), make_module()
    parts.micro_batches_per_update = 2
    gradients = {}
    for update in range(3):
        # The same draws for both: those of the parts, side by side.
        micro_batches = parts.prepare(batch(update))
        for module, given in ((whole, [join(micro_batches)]), (parts, micro_batches)):
            steps = gradients_at_steps(module, monkeypatch)
            values = module.critic_turn(given, forward_passes(module, given))
            module.end_update(values | module.student_turn(given, None))
            gradients[module] = steps
        for name in ("critic", "student"):
            ours, theirs = gradients[whole][name], gradients[parts][name]
            assert (ours - theirs).abs().max() < 1e-6 * max(1, ours.abs().max()), name
            assert update == 0 or ours.abs().max() > 0
        parts.load_state_dict(whole.state_dict())  # the optimisers amplify rounding


def gradients_at_steps(module, monkeypatch):
    """Record each network's gradient when its optimiser steps."""
    seen, step = {}, type(module).step

    def recording(name):
        network = module.trainable_networks()[name]
        seen[name] = torch.cat([p.grad.flatten().clone() for p in network.parameters()])
        return step(module, name)

    monkeypatch.setattr(module, "step", recording)
    return seen


def join(micro_batches):
    first = micro_batches[0]
    tensors = {
        name: torch.cat([getattr(m, name) for m in micro_batches])
        for name in ("x_0", "lowres", "x_t", "t", "critic_eps", "critic_t")
    }
    return type(first)(**tensors, timestep=first.timestep, penalty_draw=None)


def test_draws_are_functions_of_seed_and_update_alone(make_module):
    first, second = make_module(), make_module()
    for update in range(3):
        first.training_step(batch(update), update)
    torch.rand(7)  # whatever the global generator did in between
    second.update, second.network_updates = 3, dict(first.network_updates)
    a, b = first.prepare(batch(9))[0], second.prepare(batch(9))[0]
    assert a.timestep == b.timestep
    assert torch.equal(a.critic_eps, b.critic_eps)
    assert torch.equal(a.critic_t, b.critic_t)
    second.update = 4
    assert not torch.equal(a.critic_eps, second.prepare(batch(9))[0].critic_eps)


def test_first_timestep_is_pure_noise_and_later_ones_keep_the_picture(make_module):
    module = make_module(game=game(backward_simulation_prob=0.0))
    seen = {}
    for update in range(40):
        module.update = update
        (m,) = module.prepare(batch())
        flat = torch.stack([m.x_t.flatten(), m.x_0.flatten()])
        seen[m.timestep] = torch.corrcoef(flat)[0, 1].item()
    assert set(seen) == {979, 729, 479, 229}
    assert abs(seen[979]) < 0.1
    assert seen[229] > 0.4


def test_backward_simulation_starts_from_the_students_own_estimate(make_module):
    module = make_module()
    micro_batch = next(module.micro_batches(batch()))[0]
    real, own = (
        module.prepare_micro_batch(
            micro_batch, torch.Generator().manual_seed(5), index=3, simulates=simulates
        )
        for simulates in (False, True)
    )
    assert not torch.equal(real.x_t, own.x_t)
    assert not own.x_t.requires_grad


def test_early_updates_draw_the_later_timesteps_only(make_module):
    module = make_module(game=game(late_timesteps_updates=1000))
    drawn = set()
    for module.update in range(30):
        drawn.add(module.prepare(batch())[0].timestep)
    assert drawn == {479, 229}


def test_critic_looks_at_real_and_fake_with_the_same_noise(make_module):
    module = make_module()
    (m,) = module.prepare(batch())
    same = module.critic_features(m.x_0, m)
    again = module.critic_features(m.x_0.clone(), m)
    assert all(torch.equal(a, b) for a, b in zip(same, again, strict=True))
    assert m.critic_t.min() >= 11
    assert m.critic_t.max() <= 456


@pytest.mark.parametrize("penalty", ["r1_head", "wgan_gp_head", "ar1", "none"])
def test_every_penalty_plays(make_module, penalty):
    terms = CriticTerms(penalty=penalty, penalty_weight=1.0, ar1_sigma=0.01, drift_weight=0.0)
    module = make_module(critic_terms=terms)
    before = weights(module)
    module.training_step(batch(), 0)
    assert moved(before, weights(module), "critic.heads.")
    value = module.last_values["train/gradient_penalty"].item()
    assert (value == 0) == (penalty == "none")


def test_the_faithful_preset_is_adversarial_alone(make_module):
    terms = StudentTerms(adversarial=1.0, l1=0.0, feature_matching=0.0, lowres_consistency=0.0,
                         balance=False, balance_floor=0.0)  # fmt: skip
    module = make_module(student_terms=terms)
    before = weights(module)
    module.training_step(batch(), 0)
    assert moved(before, weights(module), "student.")
    assert "train/l1" not in module.last_values


def test_a_batch_of_nans_moves_nobody_and_is_counted(make_module):
    module = make_module()
    for update in range(2):
        module.training_step(batch(update), update)
    before = weights(module)
    norms = module.balance.norms()
    steps = [[s["step"].item() for s in o.optimizer.state.values()] for o in module.optimizers()]
    bad = batch(2)
    bad.hires[0, 0, 0, 0] = float("nan")
    module.training_step(bad, 2)
    after = weights(module)
    assert not moved(before, after, "student")
    assert not moved(before, after, "critic")
    assert torch.allclose(norms, module.balance.norms(), rtol=1e-5)
    assert steps == [
        [s["step"].item() for s in o.optimizer.state.values()] for o in module.optimizers()
    ]
    assert module.skipped_updates.tolist() == [1, 1]
    module.training_step(batch(3), 3)
    assert module.skipped_in_a_row.tolist() == [0, 0]
    assert all(torch.isfinite(v).all() for v in module.state_dict().values())


def test_critic_learns_to_tell_noise_from_pictures(make_module):
    module = make_module(
        game=game(critic_warmup_updates=1000, critic_log_snr=(4.0, 6.0)),
        critic_optim=adamw(learning_rate=1e-2),
    )
    gaps = []
    for update in range(80):
        module.training_step(batch(update, size=8), update)
        gaps.append(module.last_values["train/wasserstein_gap"].item())
    assert abs(gaps[0]) < 0.05
    assert sum(gaps[-5:]) / 5 > 0.15
