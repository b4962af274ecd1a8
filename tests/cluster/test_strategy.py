"""Many processes compute what one would, and each turn moves only its own gradients."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from processes import Processes
from two_networks import TwoNetworks, die_at, train, write_result

from ksr_distill.training.checkpoint_io import read_manifest
from ksr_distill.training.checkpoints import last_good_checkpoint
from ksr_distill.training.strategy import PerNetworkDDP


def train_and_tell(
    folder: Path,
    *,
    die: tuple[int, str] | None = None,
    with_dummy_backward: bool = True,
    every_updates: int = 100,
    **settings: Any,
) -> None:
    """Train; tell the digest of the end."""
    module = TwoNetworks(**settings)
    if die:
        module.at = die_at(*die)
    if not with_dummy_backward:
        PerNetworkDDP.on_train_start = pl.strategies.DDPStrategy.on_train_start
    told = train(folder / "run", module=module, checkpoint={"every_updates": every_updates})
    write_result(folder / f"result.{module.global_rank}.json", digest=told, update=module.update)


def result(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"result.{rank}.json").read_text())


ACCUMULATE = (1, 2, 4)
BY = ("DDP", "itself")


def tell_gradients(folder: Path) -> None:
    """Make one update for each number of micro-batches; tell each rank's gradients of each turn."""
    for accumulate in ACCUMULATE:
        for by in BY:
            module = TwoNetworks(num_updates=1, global_batch=48, accumulate=accumulate,
                                 reduces_gradients=by == "itself")  # fmt: skip
            train(folder / f"run.{by}.{accumulate}", module=module)
            torch.save(module.gradients, folder / f"{by}.{accumulate}.{module.global_rank}.pt")


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    folders: dict[int, Path] = {}

    def of_rank(world: int, accumulate: int, by: str, rank: int = 0) -> dict[str, Any]:
        if world not in folders:
            folders[world] = tmp_path_factory.mktemp(f"world{world}")
            Processes(world, tell_gradients, folders[world]).succeed()
        return torch.load(folders[world] / f"{by}.{accumulate}.{rank}.pt", weights_only=True)

    return of_rank


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulate", ACCUMULATE)
@pytest.mark.parametrize("by", BY)
def test_any_number_of_processes_has_the_gradient_of_the_whole_batch(
    gradients: Callable[..., dict[str, Any]], world: int, accumulate: int, by: str
) -> None:
    whole = gradients(1, 1, "DDP")
    for rank in range(world):
        for name, gradient in gradients(world, accumulate, by, rank).items():
            torch.testing.assert_close(gradient, whole[name], rtol=0, atol=1e-6)
            assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize(("world", "saved_at"), [(1, 1), (1, 8), (2, 1), (2, 8), (3, 4), (4, 6)])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, world: int, saved_at: int
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    Processes(world, train_and_tell, whole).succeed()
    place = (saved_at, "critic's turn" if saved_at < 8 else "end of the epoch")
    dying = Processes(world, train_and_tell, parts, every_updates=saved_at, die=place)
    assert -signal.SIGKILL in dying.wait()
    assert last_good_checkpoint(parts / "run").stem == f"update-{saved_at:09d}"
    Processes(world, train_and_tell, parts).succeed()
    assert result(parts)["update"] == 8
    assert result(parts)["digest"] == result(whole)["digest"]


def test_a_run_saved_by_its_validation_resumes_exactly(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    Processes(2, train_and_tell, whole).succeed()
    Processes(2, train_and_tell, parts, die=(5, "critic's turn")).wait()
    saved = last_good_checkpoint(parts / "run")
    assert saved.stem == "update-000000003"
    assert read_manifest(saved)["metrics"] == {"val/psnr_y": 1.0}
    Processes(2, train_and_tell, parts).succeed()
    assert result(parts)["digest"] == result(whole)["digest"]


def test_without_the_dummy_backward_three_processes_do_not_resume_exactly(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    Processes(3, train_and_tell, whole, with_dummy_backward=False).succeed()
    die = (4, "critic's turn")
    Processes(3, train_and_tell, parts, with_dummy_backward=False, every_updates=4, die=die).wait()
    Processes(3, train_and_tell, parts, with_dummy_backward=False).succeed()
    assert result(parts)["digest"] != result(whole)["digest"]


def count_reduced_elements(folder: Path) -> None:
    """Tell how many elements each turn reduces, by a hook on every wrapper's buckets."""
    place = ["dummy backward"]
    counts: dict[str, int] = {}
    wrap = PerNetworkDDP._setup_model

    def reduce(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        counts[place[0]] = counts.get(place[0], 0) + bucket.buffer().numel()
        return (
            dist.all_reduce(bucket.buffer(), async_op=True)
            .get_future()
            .then(lambda done: done.value()[0].div_(dist.get_world_size()))
        )

    def counting_wrap(self: PerNetworkDDP, network: torch.nn.Module) -> Any:
        wrapped = wrap(self, network)
        wrapped.register_comm_hook(None, reduce)
        return wrapped

    PerNetworkDDP._setup_model = counting_wrap
    told = {}
    for accumulate in ACCUMULATE:
        counts.clear()
        place[0] = "dummy backward"
        module = TwoNetworks(num_updates=1, global_batch=48, accumulate=accumulate)
        module.at = lambda _, at: place.__setitem__(0, at)
        train(folder / f"run.{accumulate}", module=module)
        told[accumulate] = dict(counts)
    sizes = {
        name: sum(parameter.numel() for parameter in network.parameters())
        for name, network in module.trainable_networks().items()
    }
    write_result(folder / f"result.{module.global_rank}.json", counts=told, sizes=sizes)


def test_a_turn_reduces_exactly_its_networks_parameters_and_only_once(tmp_path: Path) -> None:
    Processes(2, count_reduced_elements, tmp_path).succeed()
    told = result(tmp_path)
    critic, student = told["sizes"]["critic"], told["sizes"]["student"]
    for counts in told["counts"].values():
        assert counts == {
            "dummy backward": critic + student,
            "critic's turn": critic,
            "student's turn": student,
        }
