"""The benchmark of saving saves what a run saves, and tells what it cost."""

import json

import pytest
import torch

from benchmarks import checkpointing

TINY = ["model=tiny", "critic=tiny"]


def test_the_state_is_that_of_a_distillation():
    module = checkpointing.make_module(TINY, torch.device("cpu"))
    student, heads = (
        sum(weight.nbytes for weight in network.parameters())
        for network in (module.student, module.critic.heads)
    )
    state = checkpointing.state_of(module)
    # Weights, average and two moments of the student; weights and two moments of the heads.
    assert checkpointing.bytes_of(state) == pytest.approx(4 * student + 3 * heads, rel=0.01)
    assert all(o["state"] for o in state["optimizer_states"])


def test_both_ways_are_measured(tmp_path):
    checkpointing.main([*TINY, "--json", str(tmp_path / "it.json"), "--folder", str(tmp_path)])
    told = json.loads((tmp_path / "it.json").read_text())
    assert [row["mode"] for row in told["rows"]] == ["foreground", "background"]
    assert all(row["on_disk_s"] >= row["pause_s"] > 0 for row in told["rows"])
    assert told["state_gb"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["it.json"]
