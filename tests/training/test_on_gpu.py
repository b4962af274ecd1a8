"""What only a GPU can show: no update waits for it; graphs learn what eager updates do."""

from contextlib import contextmanager

import pytest
import torch

from ksr_distill.training.settings import CriticTerms
from ksr_distill.types import Batch
from tests.training.conftest import adamw, batch, game

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@contextmanager
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(pair: Batch) -> Batch:
    return Batch(*(tensor.cuda() for tensor in pair))


@pytest.mark.parametrize("penalty", ["r1_head", "ar1"])
def test_an_update_never_waits_for_the_device(make_module, penalty):
    terms = CriticTerms(penalty=penalty, penalty_weight=0.1, ar1_sigma=0.01, drift_weight=1e-3)
    module = make_module(critic_terms=terms).cuda()
    batches = [on_gpu(batch(seed)) for seed in range(8)]
    for pair in batches[:4]:  # what is made once may wait
        module.training_step(pair, 0)
    with waiting_is_an_error():
        for pair in batches[4:]:
            module.training_step(pair, 0)
    assert module.update == 8


def test_a_value_that_is_read_would_be_noticed(make_module):
    module = make_module().cuda()
    module.training_step(on_gpu(batch()), 0)
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchronizing"):
        float(module.last_values["train/loss_critic"])


GAMES = [
    ("r1_head", {}),
    ("ar1", {}),
    ("wgan_gp_head", {}),
    ("r1_head", {"critic_warmup_updates": 3, "critic_updates_per_student": 2}),
]


@pytest.mark.parametrize(("penalty", "changes"), GAMES)
def test_replayed_updates_learn_what_eager_ones_do(make_module, penalty, changes):
    terms = CriticTerms(penalty=penalty, penalty_weight=0.1, ar1_sigma=0.01, drift_weight=1e-3)
    start, eager, replayed = (
        make_module(
            critic_terms=terms, game=game(**changes), cuda_graphs=graphs,
            student_optim=adamw(learning_rate=1e-4), critic_optim=adamw(learning_rate=1e-4),
        ).cuda()
        for graphs in (False, False, True)
    )  # fmt: skip
    replayed.make_graph_runner()
    for update in range(24):
        for module in (eager, replayed):
            module.training_step(on_gpu(batch(update)), update)
    names = {name for s in replayed.graphs.sequences.values() for name in s.pieces}
    assert names == {"roll-out", "forward", "critic", "student"}
    assert replayed.last_outputs.timestep == eager.last_outputs.timestep
    for part in ("student.", "student_ema.", "critic.heads."):
        apart, moved = (distance(eager, other, part) for other in (replayed, start))
        assert apart < 0.02 * moved, f"{part} {apart / moved:.2g} of the way apart"


def distance(one, other, part):
    a, b = one.state_dict(), other.state_dict()
    squares = [(a[n] - b[n]).double().square().sum() for n in a if n.startswith(part)]
    return float(torch.stack(squares).sum().sqrt())


def test_a_replayed_update_never_waits_for_the_device(make_module):
    module = make_module(cuda_graphs=True).cuda()
    module.make_graph_runner()
    batches = [on_gpu(batch(seed)) for seed in range(24)]
    for pair in batches[:20]:
        module.training_step(pair, 0)
    with waiting_is_an_error():
        for pair in batches[20:]:
            module.training_step(pair, 0)
