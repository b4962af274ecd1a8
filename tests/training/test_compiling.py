"""Compilation changes neither names nor what is learned, and only what was asked for."""

import pytest
import torch

from ksr_distill.models.blocks import ResNetBlock
from ksr_distill.models.norms import GroupNorm
from ksr_distill.training import compiling
from tests.training.conftest import batch


@pytest.fixture
def compiled(monkeypatch):
    """Note what the compiler is given, and run it as it is: shape checks cannot be compiled."""
    given = []

    def note(function, **options):
        given.append((function, options))
        return function

    monkeypatch.setattr(torch, "compile", note)
    for part in (ResNetBlock, GroupNorm):
        monkeypatch.setattr(part, "compile", note)
    return given


@pytest.mark.parametrize("way", ["networks", "blocks", "norms"])
def test_every_way_plays_the_same_game(make_module, compiled, way):
    ours, plain = make_module(compile_networks=way), make_module()
    for update in range(2):
        ours.training_step(batch(update), update)
        plain.training_step(batch(update), update)
    assert compiled
    assert all(options["dynamic"] is False for _, options in compiled)
    a, b = ours.state_dict(), plain.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_blocks_are_those_of_student_and_trunk_but_not_of_the_average(make_module, compiled):
    module = make_module(compile_networks="blocks")
    given = {id(function) for function, _ in compiled}

    def blocks(network):
        return {id(part) for part in network.modules() if isinstance(part, ResNetBlock)}

    assert blocks(module.student) | blocks(module.critic.trunk) <= given
    assert not blocks(module.student_ema) & given


def test_a_way_that_does_not_exist_is_refused(make_module):
    with pytest.raises(ValueError, match="compile_networks=True is not allowed; use false, netw"):
        make_module(compile_networks=True)


@pytest.mark.parametrize("way", ["blocks", "norms"])
def test_room_for_all_kinds_of_blocks_and_none_is_cut_for_ddp(make_module, compiled, way):
    config = torch._dynamo.config
    config.recompile_limit, config.optimize_ddp = 8, True
    make_module(compile_networks=way)
    assert config.recompile_limit >= compiling.KINDS_OF_BLOCKS
    assert config.optimize_ddp is False
