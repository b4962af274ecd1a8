import logging
import os
import shutil
import signal
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ksr_distill.data.index import read_index
from ksr_distill.data.reader import ShardDataset
from ksr_distill.training.datamodule import ShardDataModule
from tests.data.conftest import NUM_PHOTOS
from tests.data.test_reader import flip_bit

BATCH = 8


class NoisyHalf:
    scale = 2

    def __call__(self, hires, *, generator):
        lowres = torch.nn.functional.avg_pool2d(hires, 2)
        return lowres + torch.randn(lowres.shape, generator=generator)


def make(shards, *, rank=0, world_size=1, **changes):
    """The datamodule of one rank; shards are a folder or a pattern."""
    pattern = shards if isinstance(shards, str) else f"{shards}/train-*.tar"
    settings = {
        "shards": pattern,
        "val_shards": pattern,
        "degradation": NoisyHalf(),
        "seed": 1,
        "num_updates": 6,
        "crop_px": 16,
        "flip_prob": 0.5,
        "transpose_prob": 0.0,
        "batch_size": BATCH,
        "micro_batch_size": None,
        "num_val_pictures": 9,
        "val_crop_px": 16,
        "val_batch_size": 2,
        "val_side_multiple": 8,
        "corrupt_budget": 2,
        "num_workers": 0,
        "prefetch_updates": 2,
        "worker_start_method": None,
        "timeout_s": 60,
        "window_shards": 2,
    }
    datamodule = ShardDataModule(**{**settings, **changes})
    datamodule.trainer = SimpleNamespace(world_size=world_size, global_rank=rank)
    datamodule.setup("fit")
    return datamodule


def updates(shards, world_size=1, start=0, stop=6, **changes):
    """The global batch of each update, put together from all ranks."""
    shares = []
    for rank in range(world_size):
        datamodule = make(shards, rank=rank, world_size=world_size, num_updates=stop, **changes)
        datamodule.start_update = start
        shares.append(list(datamodule.train_dataloader()))
    return {
        parts[0].update: (
            torch.cat([part.positions for part in parts]),
            torch.cat([part.hires_uint8 for part in parts]),
        )
        for parts in zip(*shares, strict=True)
    }


def assert_equal_updates(one, other):
    assert one.keys() == other.keys()
    for update, (positions, crops) in one.items():
        assert torch.equal(positions, other[update][0])
        assert torch.equal(crops, other[update][1])


def test_an_update_has_the_same_samples_on_any_number_of_ranks_and_workers(shards):
    alone = updates(shards)
    positions = torch.cat([positions for positions, _ in alone.values()])
    assert positions.tolist() == list(range(6 * BATCH))
    for world_size, num_workers in ((2, 2), (4, 1), (8, 0)):
        assert_equal_updates(alone, updates(shards, world_size, num_workers=num_workers))


def test_each_sample_is_seen_once_an_epoch_when_the_ranks_change_between_restarts(shards):
    alone = updates(shards)
    pieces = updates(shards, 1, 0, 1) | updates(shards, 2, 1, 3, num_workers=2)
    pieces |= updates(shards, 4, 3, 4, num_workers=1) | updates(shards, 8, 4, 6)
    assert_equal_updates(alone, pieces)
    datamodule = make(shards)
    positions = torch.cat([positions for positions, _ in pieces.values()]).tolist()
    epochs = {}
    for place in map(datamodule.plan.locate, positions):
        epochs.setdefault(place.epoch, []).append((place.shard, place.member))
    assert len(epochs[0]) == len(set(epochs[0])) == NUM_PHOTOS
    assert len(epochs[1]) == len(set(epochs[1])) == NUM_PHOTOS


def test_spawned_workers_read_the_same(shards):
    spawned = updates(shards, stop=2, num_workers=1, worker_start_method="spawn")
    assert_equal_updates(updates(shards, stop=2), spawned)


def test_a_degradation_is_drawn_alike_however_ranks_share_the_micro_batches(shards):
    degraded = []
    for world_size in (1, 2, 4):
        parts = []
        for rank in range(world_size):
            datamodule = make(shards, rank=rank, world_size=world_size, micro_batch_size=2)
            assert datamodule.accumulate == 4 // world_size
            batch = list(datamodule.train_dataloader())[3]
            parts.append(datamodule.on_after_batch_transfer(batch, 0))
        degraded.append(torch.cat([part.lowres for part in parts]))
        hires = torch.cat([part.hires for part in parts])
    assert hires.dtype == torch.float32
    assert -1 <= hires.min() < -0.9 < 0.9 < hires.max() <= 1
    assert all(torch.equal(lowres, degraded[0]) for lowres in degraded)


def test_other_updates_and_micro_batches_draw_another_degradation(shards):
    datamodule = make(shards, micro_batch_size=2)
    batch = next(iter(datamodule.train_dataloader()))
    same = batch._replace(hires_uint8=batch.hires_uint8[:1].expand(BATCH, -1, -1, -1))
    lowres = datamodule.on_after_batch_transfer(same, 0).lowres
    assert not torch.equal(lowres[:2], lowres[2:4])
    later = datamodule.on_after_batch_transfer(same._replace(update=1), 0).lowres
    assert not torch.equal(lowres, later)


def test_validation_is_shared_out_whole_and_always_the_same(shards):
    def validate(world_size):
        shown = {}
        for rank in range(world_size):
            datamodule = make(shards, rank=rank, world_size=world_size, batch_size=6)
            for batch in datamodule.val_dataloader():
                pair = datamodule.on_after_batch_transfer(batch, 0)
                for i, picture in enumerate(batch.pictures):
                    assert picture not in shown
                    shown[picture] = pair.lowres[i]
        return shown

    alone, shared = validate(1), validate(3)
    assert alone.keys() == shared.keys() == set(range(9))
    assert all(torch.equal(alone[picture], shared[picture]) for picture in alone)
    assert make(shards, val_shards=None).val_dataloader() == []


def test_damaged_pictures_are_logged_up_to_the_budget_and_then_stop_the_run(
    shards, tmp_path, caplog
):
    folder = shutil.copytree(shards, tmp_path / "damaged")
    damaged = [(folder / "train-000000.tar", 0), (folder / "train-000001.tar", 1)]
    for shard, member in damaged:
        flip_bit(shard, read_index(shard).members[member].offset + 50)
    with caplog.at_level(logging.WARNING):
        datamodule = make(folder, num_workers=1)
        assert len(list(datamodule.train_dataloader())) == 6
    keys = [read_index(shard).members[member].key for shard, member in damaged]
    assert len(datamodule.budget.seen) == 2
    assert all(sum(key in record.message for record in caplog.records) == 1 for key in keys)
    with pytest.raises(ValueError, match=r"data.corrupt_budget=1 is used up: train-0.*checks") as e:
        list(make(folder, corrupt_budget=1).train_dataloader())
    assert any(key in str(e.value) for key in keys)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": "nowhere/train-*.tar"}, r"data.shards='nowhere.*matches nothing.*pack"),
        ({"val_shards": "nowhere/val.tar"}, r"data.val_shards='nowhere/val.tar' matches nothing"),
        ({"crop_px": 42}, r"data.crop_px=42 is larger than the smallest picture, .*40.*at most 40"),
        ({"val_crop_px": 64}, r"data.val_crop_px=64 is larger than .*--min-side-px 64"),
        ({"crop_px": 17}, "data.crop_px=17 is not a multiple of scale=2; use 16"),
        ({"batch_size": 9}, r"data.batch_size=9 cannot be shared by 2.*of 2, such as 8"),
        ({"micro_batch_size": 3}, r"micro-batches of 3 .*use a multiple of 6, such as 6"),
        ({"val_crop_px": None}, r"data.val_batch_size=2 with data.val_crop_px=null.*use"),
        ({"num_val_pictures": 1}, r"gives 1 pictures for 2 processes.*give more"),
    ],
)
def test_what_cannot_work_is_one_line_before_a_model_is_built(shards, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(**{"shards": f"{shards}/train-*.tar", **changes}, world_size=2)
    assert "\n" not in str(caught.value)


def test_a_stalled_loader_stops_the_run_with_a_message(shards, monkeypatch):
    monkeypatch.setattr(ShardDataset, "__getitem__", lambda *_: time.sleep(3600))
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"data.timeout_s=1: no batch came for update 0"):
        list(make(shards, num_workers=1, timeout_s=1).train_dataloader())
    assert time.monotonic() - start < 20


def test_a_killed_worker_stops_the_run_with_a_message(shards, monkeypatch):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ShardDataset, "__getitem__", die)
    with pytest.raises(ChildProcessError, match=r"a loader worker died .*lower data\.num"):
        list(make(shards, num_workers=1).train_dataloader())


def test_signals_of_slurm_do_not_end_a_worker(shards, monkeypatch):
    original = ShardDataset.__getitem__

    def signalled(self, position):
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            os.kill(os.getpid(), number)
        return original(self, position)

    monkeypatch.setattr(ShardDataset, "__getitem__", signalled)
    assert len(list(make(shards, num_workers=1).train_dataloader())) == 6


def test_an_error_in_a_worker_keeps_its_one_line(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "damaged")
    datamodule = make(folder, num_workers=1)
    for path in folder.glob("train-*.tar"):
        os.truncate(path, 0)
    with pytest.raises(ValueError, match=r"train-00000\d.tar: .*in a row") as caught:
        list(datamodule.train_dataloader())
    assert "\n" not in str(caught.value)


class Recorder(LightningModule):
    """Notes which update and which crops came."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {}

    def training_step(self, batch, batch_idx):
        self.seen[batch_idx] = batch.lowres.sum().item()
        return self.weight * batch.lowres.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(shards, folder, *, start_update=0, checkpoint=None):
    folder.mkdir(exist_ok=True)
    datamodule = make(shards)
    datamodule.trainer = None
    datamodule.start_update = start_update
    module = Recorder()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1)],
    )
    trainer.fit(module, datamodule, ckpt_path=checkpoint)
    return module.seen


@pytest.mark.filterwarnings("error:You're resuming from a checkpoint")
def test_lightning_resumes_in_the_middle_of_an_epoch_as_if_nothing_had_happened(shards, tmp_path):
    whole = fit(shards, tmp_path)
    assert list(whole) == list(range(6))
    checkpoint = tmp_path / "epoch=0-step=4.ckpt"
    resumed = fit(shards, tmp_path / "again", start_update=4, checkpoint=checkpoint)
    assert resumed == {update: whole[update] for update in (4, 5)}
    with pytest.raises(
        ValueError, match="start_update=0, but the checkpoint continues at update 4"
    ):
        fit(shards, tmp_path / "wrong", checkpoint=checkpoint)


def test_starting_a_loader_moves_no_global_random_state(shards):
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(make(shards, num_workers=1).train_dataloader())
    assert torch.equal(before, torch.get_rng_state())


def test_another_order_of_the_samples_is_said_when_a_run_is_continued(shards, caplog):
    def loader(**changes):
        return make(shards, **changes).train_dataloader()

    state = loader(batch_size=4).state_dict()
    loader(batch_size=4).load_state_dict(state)
    assert "another order" not in caplog.text
    loader(batch_size=8).load_state_dict(state)
    assert "data.batch_size=4" in caplog.text
    assert "this run has data.batch_size=8" in caplog.text


def test_validation_on_shards_that_are_trained_on_is_said(shards, tmp_path, caplog):
    link = tmp_path / "val.tar"
    link.symlink_to(shards / "train-000000.tar")
    shutil.copy(shards / "train-000000.index.json", tmp_path / "val.index.json")
    make(f"{shards}/train-00000[1-9].tar", val_shards=str(link))
    assert not caplog.text
    make(shards, val_shards=str(link))
    assert "1 of data.val_shards are among data.shards, such as" in caplog.text
