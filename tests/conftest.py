"""What holds for every test: no network, no prompts, one thread, no state kept between them."""

import os

# Before anything imports wandb, huggingface_hub or torch.
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_shared_randomness():
    """A test that forgets its generator must not depend on the tests before it."""
    torch.manual_seed(0)
