"""FSDP2: the weights lie in shards, and everything else is as if they were whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Processes
from real_run import digest_of_run, run_train
from test_faults import spoil

from ksr_distill.config import check_strategy
from ksr_distill.data.packing import pack_folder
from ksr_distill.data.sources import PackOptions
from ksr_distill.training.checkpoint_io import read_checkpoint
from ksr_distill.training.checkpoints import last_good_checkpoint
from ksr_distill.training.sharding import PerNetworkFSDP


def run_and_tell_shares(folder: Path, **run: Any) -> None:
    """Train with a batch of NaN in the third update; tell which share of each network is held."""
    spoil(range(2, 3))
    configure = PerNetworkFSDP.configure_ddp

    def configure_and_tell(self: PerNetworkFSDP) -> None:
        configure(self)
        shares = {}
        for name in ("student", "student_ema", "critic.trunk", "critic.heads"):
            whole = list(self.lightning_module.get_submodule(name).parameters())
            held = [getattr(weight, "to_local", lambda w=weight: w)() for weight in whole]
            shares[name] = sum(t.numel() for t in held) / sum(t.numel() for t in whole)
        (folder / f"shares.{self.global_rank}.json").write_text(json.dumps(shares))

    PerNetworkFSDP.configure_ddp = configure_and_tell
    run_train(folder, **run)


@pytest.fixture(scope="module")
def val_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three pictures: two for the first rank, one for the second."""
    folder = tmp_path_factory.mktemp("val")
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        (folder / "photos").mkdir(exist_ok=True)
        Image.fromarray(noise).save(folder / "photos" / f"{number}.png")
    options = PackOptions(0.0, (), 1, 0.0, None, 3)
    pack_folder(folder / "photos", folder, options, num_workers=0, on_progress=lambda *_: None)
    return f"{folder}/train-*.tar"


def assert_equal_state(one: Any, other: Any, place: str = "") -> None:
    """Compare two trees of tensors to 1e-6."""
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, msg=lambda m: f"{place}: {m}")
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key, value in one.items():
            assert_equal_state(value, other[key], f"{place}/{key}")
    elif isinstance(one, list):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal_state(a, b, f"{place}/{i}")


def state_of(folder: Path) -> dict[str, Any]:
    end = read_checkpoint(last_good_checkpoint(folder / "run" / "checkpoints"))
    return {"weights": end["state_dict"], "moments": end["optimizer_states"]}


@pytest.fixture(scope="module")
def settings(files: Path, val_shards: str) -> dict[str, Any]:
    """With accumulation, and a validation whose batches two ranks share unevenly.

    Heads of two channels a group: with one, a bias before the norm has a gradient of zero, and Adam
    makes whole steps of its rounding errors.
    """
    changes = (
        "critic.head_channels=16", "data.micro_batch_size=1", "validate_every=4", "log_every=1",
        "trainer.val_check_interval=4", f"data.val_shards={val_shards}", "data.val_crop_px=64",
        "data.val_batch_size=1", "data.num_val_pictures=3",
        "callbacks.checkpoint.every_updates=4",
    )  # fmt: skip
    return {"files": files, "num_updates": 6, "changes": changes}


@pytest.fixture(scope="module")
def sharded(settings: dict[str, Any]) -> dict[str, Any]:
    more = ("trainer.strategy=fsdp", "gradient_checkpointing=true")
    return {**settings, "changes": (*settings["changes"], *more)}


@pytest.fixture(scope="module")
def finished(sharded: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    Processes(2, run_and_tell_shares, folder, **sharded).succeed(120)
    return folder


def test_shards_and_recomputed_activations_train_as_one_whole_process_does(
    settings: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    Processes(1, run_and_tell_shares, tmp_path, **settings).succeed(120)
    assert_equal_state(state_of(tmp_path), state_of(finished))
    assert state_of(finished)["weights"]["skipped_updates"].tolist() == [1, 1]
    norms = [gradient_norms(folder) for folder in (tmp_path, finished)]
    assert len(norms[0]) == 11  # the student's first turn is the second update
    assert norms[0] == pytest.approx(norms[1], rel=1e-5, nan_ok=True)


def test_a_process_holds_its_share_of_every_large_network(finished: Path) -> None:
    for rank in range(2):
        shares = json.loads((finished / f"shares.{rank}.json").read_text())
        assert shares.pop("critic.heads") == 1
        assert all(0.4 < share < 0.6 for share in shares.values()), shares


def gradient_norms(folder: Path) -> dict[str, float]:
    """Return the figures that are of the whole batch: losses are those of a rank's micro-batch."""
    rows = (folder / "run" / "metrics.csv").read_text().splitlines()
    parts = [row.split(",") for row in rows if "_gradient_norm," in row]
    return {f"{name} at {update}": float(value) for update, name, value in parts}


@pytest.mark.slow
def test_a_killed_sharded_run_continues_bit_for_bit_and_one_process_continues_it_as_well(
    settings: dict[str, Any], sharded: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    Processes(2, run_and_tell_shares, two, **sharded, die=(5, "turn")).wait(120)
    assert last_good_checkpoint(two / "run" / "checkpoints").stem == "update-000000004"
    shutil.copytree(two, one)
    Processes(2, run_and_tell_shares, two, **sharded, attempt=1).succeed(120)
    assert digest_of_run(two) == digest_of_run(finished)
    Processes(1, run_and_tell_shares, one, **settings, attempt=1).succeed(120)
    assert_equal_state(state_of(one), state_of(finished))


@pytest.mark.parametrize(
    ("strategy", "world_size", "changes", "remedy"),
    [
        ("ddp", 2, {}, "use auto .* or fsdp"),
        ("fsdp", 1, {}, "use trainer=auto"),
        ("fsdp", 2, {"compile_networks": "networks"}, "use compile_networks=false"),
        ("fsdp", 2, {"cuda_graphs": True}, "use cuda_graphs=false"),
    ],
)
def test_what_cannot_be_sharded_is_refused_with_what_to_use(
    strategy: str, world_size: int, changes: dict[str, Any], remedy: str
) -> None:
    plain = {"compile_networks": False, "cuda_graphs": False}
    config = {"trainer": {"strategy": strategy}, **plain, **changes}
    with pytest.raises(ValueError, match=remedy):
        check_strategy(config, world_size=world_size)
