"""A checkpoint is whole or not there, checked when it is read, and the last good one survives."""

import contextlib
import copy
import csv
import logging
import os
import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Processes, wait_until
from two_networks import TwoNetworks, die_at, train

from ksr_distill.training.checkpoint_folder import lock_folder, path_of_update
from ksr_distill.training.checkpoint_io import (
    AtomicCheckpointIO,
    PinnedMemory,
    manifest_path,
    manifest_text,
    read_checkpoint,
    read_manifest,
    write_checkpoint,
)
from ksr_distill.training.checkpoints import last_good_checkpoint, lay_out_as_parameters
from ksr_distill.training.history import MetricsCSV

SMALL = {"state_dict": {"weight": torch.arange(600.0)}, "update": 3}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    for update in (3, 6):
        write_checkpoint(SMALL, tmp_path / f"update-{update:09d}.ckpt", {"update": update})
    return tmp_path / "update-000000006.ckpt"


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position // 8] ^= 1 << (position % 8)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damaged", ["checkpoint", "manifest"])
def test_every_one_of_200_flipped_bits_is_noticed_and_the_one_before_is_used(
    saved: Path, damaged: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = saved.with_name("update-000000003.ckpt")
    file = saved if damaged == "checkpoint" else manifest_path(saved)
    whole, draws = file.read_bytes(), random.Random(0)
    for _ in range(200):
        flip_bit(file, draws.randrange(8 * len(whole)))
        assert last_good_checkpoint(saved.parent) == before
        file.write_bytes(whole)
    assert "update-000000006" in caplog.text
    assert last_good_checkpoint(saved.parent) == saved


@pytest.mark.parametrize("damage", ["cut off", "no manifest", "manifest cut off", "manifest of 3"])
def test_a_damaged_pair_is_refused_with_what_is_wrong(saved: Path, damage: str) -> None:
    manifest = manifest_path(saved)
    if damage == "cut off":
        saved.write_bytes(saved.read_bytes()[:-1])
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "manifest cut off":
        manifest.write_text(manifest.read_text()[:40])
    else:
        facts = {"sha256": "0" * 64, "bytes": saved.stat().st_size}
        manifest.write_text(manifest_text(facts))
    with pytest.raises(ValueError, match=r"cut off|manifest"):
        read_checkpoint(saved)
    assert last_good_checkpoint(saved.parent).stem == "update-000000003"


def test_when_no_checkpoint_is_good_the_run_does_not_start_over_by_itself(saved: Path) -> None:
    for path in saved.parent.glob("*.ckpt"):
        flip_bit(path, 800)
    with pytest.raises(ValueError, match="none of the 2 checkpoints is good"):
        last_good_checkpoint(saved.parent)


@pytest.mark.parametrize("text", ["null", "[]", '"text"', "7", "pipe", "folder"])
def test_what_is_no_manifest_is_not_waited_for_and_the_one_before_is_used(
    saved: Path, text: str
) -> None:
    manifest = manifest_path(saved)
    manifest.unlink()
    if text == "pipe":
        os.mkfifo(manifest)
    elif text == "folder":
        manifest.mkdir()
    else:
        manifest.write_text(text)
    assert last_good_checkpoint(saved.parent).stem == "update-000000003"


def test_what_stands_in_the_way_of_a_checkpoint_stops_nothing(tmp_path: Path) -> None:
    Processes(1, _die_after_one, tmp_path).wait()
    folder = tmp_path / "run"
    (folder / "update-best (copy).ckpt").write_bytes(b"copied by hand")
    (folder / "update-000000009.ckpt").mkdir()
    (folder / "x.tmp").mkdir()
    (folder / "last.ckpt").unlink()
    (folder / "last.ckpt").mkdir()
    (folder / "last.ckpt" / "file").touch()
    train(folder, checkpoint={"every_updates": 1, "keep_last": 2})  # 6 is among the best
    names = [path.name for path in folder.glob("update-0*.ckpt")]
    assert sorted(names) == [f"update-{update:09d}.ckpt" for update in (6, 7, 8)]


def test_checkpoints_may_be_links_and_a_link_to_nothing_is_no_start_at_zero(saved: Path) -> None:
    archive = saved.parent / "archive"
    archive.mkdir()
    for path in list(saved.parent.glob("update-*")):
        path.replace(archive / path.name)
        path.symlink_to(archive / path.name)
    assert last_good_checkpoint(saved.parent) == saved
    (archive / saved.name).unlink()
    assert last_good_checkpoint(saved.parent).stem == "update-000000003"
    for path in saved.parent.glob("update-*"):
        path.unlink()
    assert last_good_checkpoint(saved.parent) is None
    (saved.parent / "last.ckpt").symlink_to(saved.name)
    with pytest.raises(
        ValueError, match=r"last\.ckpt points to update-000000006\.ckpt, which is go"
    ):
        last_good_checkpoint(saved.parent)


def test_a_file_system_without_locks_is_said_and_one_that_cannot_be_written_refused(
    tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written here .* run_dir= or name="):
        lock_folder(tmp_path / "file")
    monkeypatch.setattr("fcntl.flock", flock)
    lock_folder(tmp_path).release()
    assert "no locks (Function not implemented)" in caplog.text


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("code_has_run",)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "update-000000001.ckpt"
    write_checkpoint({"state_dict": {}, "evil": Code()}, path, {})
    with pytest.raises(ValueError, match="pickled code would run"):
        read_checkpoint(path)
    with pytest.raises(ValueError, match="weights_only"):
        AtomicCheckpointIO(background_above_mb=1).load_checkpoint(path, weights_only=False)
    with pytest.raises(FileNotFoundError, match="URLs are not read"):
        read_checkpoint(Path("http://127.0.0.1/x.ckpt"))
    assert not (tmp_path / "code_has_run").exists()


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    io = AtomicCheckpointIO(background_above_mb=1)
    with pytest.raises(TypeError, match="checkpoint/ksr/teacher is a PosixPath"):
        io.save_checkpoint({"ksr": {"teacher": tmp_path}}, tmp_path / "update-000000001.ckpt")
    assert not list(tmp_path.iterdir())


def test_a_background_save_holds_the_weights_of_its_moment(tmp_path: Path) -> None:
    io = AtomicCheckpointIO(background_above_mb=0)
    weight = torch.zeros(1000)
    io.save_checkpoint({"state_dict": {"weight": weight}}, tmp_path / "update-000000001.ckpt")
    weight.fill_(1)
    io.wait()
    assert not read_checkpoint(tmp_path / "update-000000001.ckpt")["state_dict"]["weight"].any()


def test_a_validation_does_not_wait_for_a_write_and_its_figure_is_noted_after_it(
    tmp_path: Path, monkeypatch: Any
) -> None:
    may_write, waited = threading.Event(), []

    def write(checkpoint: Any, path: Path, facts: Any) -> None:
        may_write.wait(30)
        write_checkpoint(checkpoint, path, facts)

    def at(module: TwoNetworks, place: str) -> None:
        if place == "critic's turn" and module.update == 3:  # the validation at 3 has ended
            waited.append(list(tmp_path.glob("update-*.ckpt")))
            may_write.set()

    monkeypatch.setattr("ksr_distill.training.checkpoint_io.write_checkpoint", write)
    module = TwoNetworks(num_updates=4)
    module.at = at
    train(tmp_path, module=module, checkpoint={"every_updates": 3, "background_above_mb": 0.0})
    assert waited == [[]]
    assert read_manifest(path_of_update(tmp_path, 3))["metrics"] == {"val/psnr_y": 1.0}
    assert (tmp_path / "best.ckpt").resolve() == path_of_update(tmp_path, 3)


def test_a_validation_that_a_run_was_killed_in_is_made_up_for(tmp_path: Path) -> None:
    validated: list[int] = []

    def die(module: TwoNetworks, place: str) -> None:
        if place == "validation":
            raise KeyboardInterrupt

    def note(module: TwoNetworks, place: str) -> None:
        if place == "validation":
            validated.append(module.update)

    often = {"every_updates": 3}
    whole = train(tmp_path / "whole", checkpoint=often)
    first, again = TwoNetworks(), TwoNetworks()
    first.at, again.at = die, note
    with pytest.raises(SystemExit):
        train(tmp_path / "parts", module=first, checkpoint=often)
    saved = path_of_update(tmp_path / "parts", 3)
    assert last_good_checkpoint(tmp_path / "parts") == saved
    assert not read_manifest(saved)["metrics"]
    assert train(tmp_path / "parts", module=again, checkpoint=often) == whole
    train(tmp_path / "parts", module=again, checkpoint=often)  # it has ended
    assert validated == [3, 6]


def test_a_validation_that_is_made_up_for_leaves_its_updates_other_figures(tmp_path: Path) -> None:
    def log_and_die(module: TwoNetworks, place: str) -> None:
        if place == "end of the update":
            values = {"train/loss": float(module.update), "speed/updates_per_s": 1.0}
            module.loggers[0].log_metrics(values, step=module.update)
        if place == "validation":
            module.loggers[0].log_metrics({"val/swd": 0.5}, step=module.update)
            raise KeyboardInterrupt

    def log(module: TwoNetworks, place: str) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            log_and_die(module, place)

    for at in (log_and_die, log):
        module = TwoNetworks()
        module.at = at
        with pytest.raises(SystemExit) if at is log_and_die else contextlib.nullcontext():
            train(
                tmp_path, module=module, checkpoint={"every_updates": 3},
                trainer={"logger": [MetricsCSV(folder=str(tmp_path))]},
            )  # fmt: skip
    with (tmp_path / "metrics.csv").open() as file:
        rows = [(int(row["update"]), row["metric"]) for row in csv.DictReader(file)]
    assert [update for update, name in rows if name == "train/loss"] == list(range(1, 9))
    assert [update for update, name in rows if name == "speed/updates_per_s"] == list(range(1, 9))
    assert [update for update, name in rows if name == "val/swd"] == [3, 6]


def test_a_foreground_and_a_background_run_end_equal(tmp_path: Path) -> None:
    often = {"every_updates": 1}
    ends = [
        train(tmp_path / str(mb), checkpoint={**often, "background_above_mb": mb})
        for mb in (0.0, 100.0)
    ]
    assert ends[0] == ends[1]


def test_the_newest_and_the_best_stay_and_the_rest_is_pruned(tmp_path: Path) -> None:
    train(
        tmp_path,
        module=TwoNetworks(num_updates=18),
        checkpoint={"every_updates": 2, "keep_last": 2, "keep_best": 1},
    )
    # validation figures: 1 at update 3, 2 at 6, 3 at 9, 4 at 12 (the best), 0 at 15, 1 at 18
    names = sorted(path.name for path in tmp_path.glob("*.ckpt") if not path.is_symlink())
    assert names == [f"update-{update:09d}.ckpt" for update in (12, 16, 18)]
    assert (tmp_path / "last.ckpt").resolve().name == "update-000000018.ckpt"
    assert (tmp_path / "best.ckpt").resolve().name == "update-000000012.ckpt"
    assert len(list(tmp_path.glob("*.json"))) == 3


def test_an_ended_run_given_more_updates_goes_on_as_if_it_had_not_ended(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", module=TwoNetworks(num_updates=8))
    train(tmp_path / "parts", module=TwoNetworks(num_updates=4))
    assert train(tmp_path / "parts", module=TwoNetworks(num_updates=8)) == whole


def test_time_alone_makes_a_save_due(tmp_path: Path) -> None:
    module = TwoNetworks(num_updates=4)
    module.at = lambda *_: time.sleep(0.02)
    train(tmp_path, module=module, checkpoint={"every_minutes": 0.01 / 60, "keep_last": 9})
    assert len(list(tmp_path.glob("update-*.ckpt"))) == 4


def test_what_a_killed_save_left_is_swept_and_what_lies_beyond_is_set_aside(tmp_path: Path) -> None:
    train(tmp_path, module=TwoNetworks(num_updates=2))
    (tmp_path / "update-000000009.ckpt.tmp").write_bytes(b"torn")
    manifest_path(tmp_path / "update-000000009.ckpt").write_text("{}")
    shutil.copy(tmp_path / "update-000000002.ckpt", tmp_path / "update-000000003.ckpt")
    # a finished run does not train, so continue one that is not
    parts = tmp_path / "parts"
    Processes(1, _die_after_one, parts).wait()
    (parts / "run" / "update-000000009.ckpt.tmp").write_bytes(b"torn")
    manifest_path(parts / "run" / "update-000000009.ckpt").write_text("{}")
    (parts / "run" / "update-000000007.ckpt").write_bytes(b"damaged")
    train(parts / "run")
    left = {path.name for path in (parts / "run").iterdir()}
    assert not any(name.endswith(".tmp") or "009" in name for name in left)
    assert "update-000000007.ckpt.aside" in left


def _die_after_one(folder: Path) -> None:
    module = TwoNetworks()
    module.at = die_at(2, "critic's turn")
    train(folder / "run", module=module, checkpoint={"every_updates": 1})


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    module = TwoNetworks()
    module.at = lambda *_: train(tmp_path)
    with pytest.raises(ValueError, match="another run is writing"):
        train(tmp_path, module=module)


def test_optimizer_states_of_parameters_in_another_order_are_refused(tmp_path: Path) -> None:
    Processes(1, _die_after_one, tmp_path).wait()

    class Swapped(TwoNetworks):
        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            first, second = super().configure_optimizers()
            parameters = first.param_groups[0]["params"]
            parameters[2], parameters[3] = parameters[3], parameters[2]
            return [first, second]

    with pytest.raises(ValueError, match=r"optimizer states .*'student\.2\.weight' where"):
        train(tmp_path / "run", module=Swapped())


@pytest.mark.parametrize(
    "formats", [("channels_last", "contiguous_format"), ("contiguous_format", "channels_last")]
)
def test_moments_stay_with_their_weights_when_the_memory_format_changes(
    formats: tuple[str, str],
) -> None:
    def trained(memory_format: str, state: Any = None, updates: int = 2) -> torch.optim.Optimizer:
        weight = torch.nn.Parameter(
            start.clone(memory_format=getattr(torch, memory_format)), requires_grad=True
        )
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        if state is not None:
            optimizer.load_state_dict(copy.deepcopy(state))
            lay_out_as_parameters([optimizer])
        for update in range(updates):
            weight.grad = torch.empty_like(weight).copy_(start.roll(update, 0) ** 2)
            optimizer.step()
        return optimizer

    start = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    saved = trained(formats[0]).state_dict()
    same, other = (trained(f, saved).param_groups[0]["params"][0] for f in formats)
    torch.testing.assert_close(same, other, rtol=0, atol=1e-7)


def test_a_full_disk_keeps_the_last_good_checkpoint_and_training_goes_on(
    tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    train_until = {"module": TwoNetworks(num_updates=6), "checkpoint": {"every_updates": 2}}
    saves = []

    def write(checkpoint: Any, path: Path, facts: Any) -> None:
        saves.append(path)
        if len(saves) == 2:
            raise OSError(28, "No space left on device")
        write_checkpoint(checkpoint, path, facts)

    monkeypatch.setattr("ksr_distill.training.checkpoint_io.write_checkpoint", write)
    with caplog.at_level(logging.ERROR):
        train(tmp_path, **train_until)
    assert "No space left" in caplog.text
    assert "training goes on" in caplog.text
    assert last_good_checkpoint(tmp_path).stem == "update-000000006"


def test_a_run_whose_end_cannot_be_saved_does_not_end_well(
    tmp_path: Path, monkeypatch: Any
) -> None:
    def write(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ksr_distill.training.checkpoint_io.write_checkpoint", write)
    with pytest.raises(OSError, match=r"could not be saved .* free space"):
        train(tmp_path, module=TwoNetworks(num_updates=2))


def save_and_save_again(folder: Path, *, background_above_mb: float) -> None:
    os.environ["TMPDIR"] = "/dev/shm"  # another file system, as node-local disks are on clusters
    io = AtomicCheckpointIO(background_above_mb=background_above_mb)
    state = {"state_dict": {"weight": torch.ones(5_000_000)}}
    for update in range(1, 10_000):
        io.save_checkpoint(state, path_of_update(folder, update), {"update": update})
        io.remove_checkpoint(path_of_update(folder, update - 3))


@pytest.mark.parametrize("num_kills", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_a_save_killed_at_any_point_leaves_a_good_checkpoint(
    tmp_path: Path, num_kills: int
) -> None:
    draws = random.Random(num_kills)
    for i in range(num_kills):
        folder = tmp_path / str(i)
        background = {"background_above_mb": [0, 1e9][i % 2]}
        saving = Processes(1, save_and_save_again, folder, **background)
        wait_until(lambda folder=folder: any(folder.glob("*.ckpt")))
        time.sleep(draws.uniform(0, 0.2))
        saving.kill()
        read_checkpoint(last_good_checkpoint(folder))
        shutil.rmtree(folder)


def test_pinned_memory_holds_a_state_without_rounding_each_tensor_up(tmp_path: Path) -> None:
    shapes = [(40, 40, 3, 3), (7,), (), (0, 3), (20, 50, 3, 3), (3,), (300,)] * 4
    state = {str(i): torch.rand(shape) for i, shape in enumerate(shapes)}
    state["0"] = state["0"].to(memory_format=torch.channels_last)
    state["wide"] = torch.rand(9).expand(5, 9)
    state["half"], state["count"] = torch.rand(33).bfloat16(), torch.arange(5)
    memory = PinnedMemory(block_bytes=2**17, pin=False)
    places = {key: memory.place_for(tensor, key).copy_(tensor) for key, tensor in state.items()}
    for key, tensor in state.items():
        assert torch.equal(places[key], tensor)
        assert memory.place_for(tensor, key) is places[key]
    assert places["0"].stride() == state["0"].stride()
    assert memory.num_bytes < 1.5 * sum(tensor.nbytes for tensor in state.values())
    torch.save(places["7"], tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < state["7"].nbytes + 4000
