"""What only a GPU can show: the host never waits for it within an update."""

import pytest
import torch

from ksr_distill.training.settings import CriticTerms
from ksr_distill.types import Batch
from tests.training.conftest import batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(pair: Batch) -> Batch:
    return Batch(*(tensor.cuda() for tensor in pair))


@pytest.mark.parametrize("penalty", ["r1_head", "ar1"])
def test_an_update_never_waits_for_the_device(make_module, penalty):
    terms = CriticTerms(penalty=penalty, penalty_weight=0.1, ar1_sigma=0.01, drift_weight=1e-3)
    module = make_module(critic_terms=terms).cuda()
    batches = [on_gpu(batch(seed)) for seed in range(8)]
    for pair in batches[:4]:  # what is made once may wait
        module.training_step(pair, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for pair in batches[4:]:
            module.training_step(pair, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert module.update == 8


def test_a_value_that_is_read_would_be_noticed(make_module):
    module = make_module().cuda()
    module.training_step(on_gpu(batch()), 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            float(module.last_values["train/loss_critic"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
