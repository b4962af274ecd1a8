"""Every change of the study is one, and its row says what its run logged."""

import argparse
import time
from pathlib import Path

import pytest
from hydra.utils import instantiate

from benchmarks import ablations
from benchmarks.modules import composed
from ksr_distill.training.build import chosen_timesteps

CHANGES = ablations.read_changes()
LOGGED = """update,metric,value
50,train/wasserstein_gap,9.0
50,health/paired_auc_head_0,0.9
100,train/wasserstein_gap,0.5
100,health/paired_auc_head_0,0.75
100,val/psnr_y,33.0
100,val/top_octave_power_ratio,0.5
100,val/swd,20.0
100,val/lowres_consistency_psnr,45.0
100,val/checkerboard_peak,1.5
"""


def options(folder, **changes):
    given = {"only": None, "teacher": "mini_x2_teacher", "updates": 100, "shards": "a.tar",
             "val_shards": "b.tar", "validate_every": 50, "also": ["trainer=cpu"],
             "folder": folder, "seeds": 1, "device": "cpu"}  # fmt: skip
    return argparse.Namespace(**{**given, **changes})


def game_of(*overrides):
    """Return the groups of the config that a change may touch, as what reads them checks them."""
    config = composed("+experiment=ksr_flash_mini", *CHANGES["base"].split(), *overrides)
    for group in (config["loss"], config["optim"]):
        for node in group.values():
            if isinstance(node, dict):
                instantiate(node)
    chosen_timesteps(**config["diffusion"])
    keys = ("loss", "optim", "diffusion", "critic", "ema_decay", "num_updates", "seed")
    return {key: config[key] for key in keys}


@pytest.mark.parametrize("name", [name for name in CHANGES["rows"] if name != "base"])
def test_every_row_is_allowed_and_changes_the_game(name):
    assert game_of(*CHANGES["rows"][name].split()) != game_of()


def test_no_two_rows_are_the_same_game():
    games = [str(game_of(*change.split())) for change in CHANGES["rows"].values()]
    assert len(set(games)) == len(games)


def test_runs_are_what_was_asked_for_and_end_with_their_own_change(tmp_path):
    base, run = ablations.runs_of(options(tmp_path, only=["base", "gamma_1"]))
    assert (base.name, run.name) == ("base", "gamma_1")
    assert run.overrides[-2:] == ("loss.critic.penalty_weight=1.0", "name=gamma_1")
    assert {"trainer=cpu", "num_updates=100", "+experiment=ksr_flash_mini"} <= set(run.overrides)
    with pytest.raises(SystemExit, match="--only gamma_7 is not in ablations"):
        ablations.runs_of(options(tmp_path, only=["gamma_7"]))


def test_as_many_runs_at_once_as_devices_and_an_error_is_told(tmp_path, monkeypatch):
    now, most = [], []

    def train(run, device):
        now.append(device)
        most.append(len(now))
        time.sleep(0.05)
        now.remove(device)
        return "error: no such key" if run.name == "gamma_1" else None

    monkeypatch.setattr(ablations, "train", train)
    runs = ablations.runs_of(options(tmp_path))
    ended = {run.name: error for run, _, error in ablations.trained(runs, ["0", "1", "0"])}
    assert ended.keys() == CHANGES["rows"].keys()
    assert [name for name, error in ended.items() if error] == ["gamma_1"]
    assert max(most) == 3


def test_a_row_is_the_last_validation_and_the_end_of_the_game(tmp_path, monkeypatch):
    run = ablations.runs_of(options(tmp_path, only=["base"]))[0]
    run.folder.mkdir()
    (run.folder / "metrics.csv").write_text(LOGGED)
    monkeypatch.setattr(ablations, "last_good_checkpoint", lambda _: Path("update_100.ckpt"))
    monkeypatch.setattr(ablations, "update_of_file", lambda _: 100)
    row = ablations.measured(run, {}, options(tmp_path))
    line = ablations.line_of("base", row, [])
    assert line == "| base | 100 | 33.00 · 0.50 · 20.0 | 1.50 | 0.50 | 0.75 |"
    assert row["curves"]["val/swd"] == [(100, 20.0)]
    assert ablations.heading([]).splitlines()[0].count("|") == line.count("|")


def test_a_run_without_a_checkpoint_is_told(tmp_path):
    run = ablations.runs_of(options(tmp_path, only=["base"]))[0]
    row = ablations.measured(run, {}, options(tmp_path))
    assert ablations.line_of("base", row, []) == "| base | failed: it left no checkpoint |"


def test_rows_keep_the_files_order_and_a_failure_replaces_nothing():
    rows = ablations.with_row({"gamma_1": 1, "no_longer_there": 2}, "base", {"updates": 3})
    assert list(rows) == ["base", "gamma_1", "no_longer_there"]
    assert ablations.with_row(rows, "gamma_1", {"failed": "ended"}) == rows
    assert ablations.with_row(rows, "ar1", {"failed": "ended"})["ar1"] == {"failed": "ended"}
