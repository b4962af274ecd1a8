"""Every experiment composes and passes the checks; every mistake is one line before any model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from ksr_distill import config as checks
from ksr_distill.config import check_train_config
from ksr_distill.data.packing import pack_folder
from ksr_distill.data.sources import PackOptions
from ksr_distill.evaluation import distributions, metrics
from ksr_distill.models import KSRUNet
from ksr_distill.overrides import check_overrides

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
GROUPS = {"model", "critic", "degradation", "loss", "trainer", "logger"}
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    unet = KSRUNet(8, channel_multipliers=(1, 2, 2), num_blocks=(1, 1, 1), num_groups=4)
    unet.save_pretrained(folder / "sr")
    return folder


def folder_with_index(folder, teacher, **index):
    """A pipeline's folder: a teacher's U-Net, and what model_index.json says beside it."""
    shutil.copytree(teacher, folder)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "KSR", **index}))
    return folder


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"scale": 4}, "was trained for scale=4, this run has scale=2; give a teacher of"),
        ({"scale": 2, "student_timesteps": [979]}, "is a student (KSR); give the teacher's"),
    ],
)
def test_only_a_teacher_of_the_runs_scale_is_distilled(index, message, teacher, tmp_path):
    folder = folder_with_index(tmp_path / "t", teacher, **index)
    with pytest.raises(ValueError, match="teacher=") as error:
        check_train_config(composed("+experiment=ksr_flash", f"teacher={folder}"))
    assert message in str(error.value)
    check_train_config(composed("+experiment=ksr_teacher", f"teacher={folder}"))


def test_a_damaged_teacher_is_named(teacher, tmp_path):
    folder = folder_with_index(tmp_path / "t", teacher, scale=2)
    check_train_config(composed("+experiment=ksr_flash", f"teacher={folder}"))
    for name, content, message in (
        ("model_index.json", "[]", r"holds \[\], not an object; copy the model folder again"),
        ("sr/config.json", "{", r"is damaged: .* line 1 column 2 .* copy the model folder again"),
    ):
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name} {message}"):
            check_train_config(composed("+experiment=ksr_flash", f"teacher={folder}"))
    (folder / "sr" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no U-Net of ours"):
        check_train_config(composed("+experiment=ksr_flash", f"teacher={folder}"))


def test_the_smallest_crops_are_those_that_the_metrics_can_measure():
    assert checks.MIN_CROP_PX == metrics.CHECKERBOARD_TILE_PX
    assert checks.MIN_VAL_CROP_PX == distributions.MIN_SIDE_PX


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["run_dir=outputs/test", "data.shards=none.tar", *overrides])
    return OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_passes_the_checks(experiment, teacher):
    config = composed(f"+experiment={experiment}", f"teacher={teacher}")
    check_train_config(config)
    assert config["name"].startswith(("ksr_", "quickstart/"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_is_a_short_delta(experiment):
    lines = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    assert len(lines) <= 35


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_repeats_no_value_that_it_inherits(experiment):
    own = OmegaConf.to_container(OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml"))
    overrides = []
    for entry in own.pop("defaults", []):
        if isinstance(entry, dict):
            overrides += [
                f"{key.removeprefix('override /')}={value}" for key, value in entry.items()
            ]
        elif entry != "_self_":
            overrides.append(f"+experiment={entry}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        inherited = leaves(OmegaConf.to_container(compose("train", overrides)))
    repeated = [key for key, value in leaves(own).items() if inherited.get(key) == value]
    assert repeated == []


def leaves(tree, prefix=""):
    """Values of nested dicts by dotted key."""
    found = {}
    for key, value in tree.items():
        is_node = isinstance(value, dict)
        found |= leaves(value, f"{prefix}{key}.") if is_node else {f"{prefix}{key}": value}
    return found


@pytest.mark.parametrize(
    ("group", "option"),
    [
        (path.parent.name, path.stem)
        for path in sorted(CONF.glob("*/*.yaml"))
        if path.parent.name in GROUPS and path.stem != "denoising"  # that is a teacher's
    ],
)
def test_every_option_of_every_group_composes(group, option, teacher):
    check_train_config(composed("+experiment=ksr_flash", f"teacher={teacher}", f"{group}={option}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.crop_px=250"], "data.crop_px=250 is not a multiple of 4"),
        (["data.crop_px=28"], "data.crop_px=28 is too small to look for checkerboards"),
        (["num_updates=0"], "num_updates=0 is not allowed; use a whole number"),
        (["num_updates=1e3"], "num_updates=1000.0 is not allowed"),
        (["data.val_shards=v.tar", "data.val_crop_px=32"], "data.val_crop_px=32 is too small"),
        (["data.val_shards=v.tar", "num_updates=9"], "validate_every=500 is more than num_updates"),
        (
            ["data.val_shards=v.tar", "data.val_crop_px=66"],
            "not a multiple of 4 (the U-Net's stride and scale); use 64",
        ),
        (["data.val_shards=v.tar", "data.val_crop_px=57", "scale=3", "data.crop_px=96"], "use 60"),
        (
            ["data.val_shards=v.tar", "data.val_crop_px=null", "data.val_side_multiple=2"],
            "data.val_side_multiple=2 is not a multiple of 4",
        ),
        (["num_updates=500"], "the student never change; use a shorter warm-up"),
        (["num_updates=501", "loss.game.critic_updates_per_student=2"], "alone for the first 501"),
        (["teacher=nowhere"], "teacher=nowhere does not exist; give a folder"),
        (["teacher=null"], "teacher=null: a distillation needs a teacher"),
        (["callbacks.health._target_=os.system"], "callbacks.health._target_=os.system"),
        (["data._target_=torch.load"], "may not be instantiated"),
        (["~callbacks.checkpoint"], "callbacks.checkpoint is removed"),
        (["callbacks.checkpoint=null"], "callbacks.checkpoint is removed"),
        (["run_dir=''"], "run_dir='' is no folder of its own"),
        (["name=''"], "name='' is no folder of its own"),
        (["trainer.precision=16-mixed"], "trainer.precision='16-mixed' is not allowed"),
        (["trainer.devices=two"], "trainer.devices='two' is not allowed; use auto"),
        (["gradient_checkpointing=true"], "cuda_graphs=true with gradient_checkpointing=true"),
        (["+trainer.max_steps=3"], "trainer.max_steps=3 would end a run as if it had finished"),
    ],
)
def test_what_groups_cannot_know_is_refused_by_key(overrides, message, teacher):
    with pytest.raises(ValueError, match=" ") as error:
        check_train_config(composed("+experiment=ksr_flash", f"teacher={teacher}", *overrides))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.student.learning_rat=1e-4", "did you mean optim.student.learning_rate?"),
        ("sead=1", "sead is no key of the config; did you mean seed?"),
        ("+optim.student.lrr=1", "a plus adds a key that nobody reads"),
        ("+experiment=ksr_flsh", "ksr_flsh"),
        ("degradation=bicubik", "bicubik"),
        ("loss.game.critic_warmup=3", "loss.game.critic_warmup_updates"),
        ("data.shards={a", "quote values with braces"),
        ("data.shards=~/shards/train.tar", "spaces or ~ twice: 'key="),
    ],
)
def test_typos_are_answered_in_one_line_with_the_nearest_key(override, message):
    arguments = ["+experiment=ksr_flash", "teacher=x", override]
    if override.startswith("+experiment"):
        arguments = arguments[1:]
    with pytest.raises(ValueError, match=" ") as error:
        check_overrides("train", arguments, CONF)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


NODES = ("model", "critic", "data", "degradation", "diffusion", "loss", "optim", "trainer",
         "callbacks", "logger")  # fmt: skip
TYPOS = [
    *(f"{group}=no_such_option" for group in (*NODES, "+sweep", "+launcher", "+experiment")),
    *(f"{group}.no_such_key=1" for group in NODES),
]


@pytest.mark.parametrize("typo", [
    *(pytest.param(typo, marks=pytest.mark.slow) for typo in TYPOS), "+sweep=no_such_option",
    "trainer.no_such_key=1",
])  # fmt: skip
def test_a_typo_in_any_group_is_answered_in_one_line(typo):
    arguments = [typo] if "experiment" in typo else ["+experiment=ksr_flash", "teacher=x", typo]
    with pytest.raises(ValueError, match="no_such_") as error:
        check_overrides("train", arguments, CONF)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", [[], ["data.crop_px=64"], ["-m", "seed=1,2"]])
def test_without_an_experiment_there_is_a_list_of_them(arguments):
    with pytest.raises(ValueError, match=r"name is missing.*\+experiment= with one of ksr_flash, "):
        check_overrides("train", arguments, CONF)
    check_overrides("train", [*arguments, "--help"], CONF)
    check_overrides("train", [*arguments, "name=mine"], CONF)


def test_hydras_own_options_are_no_overrides():
    arguments = ["+experiment=ksr_flash", "teacher=x", "data.shards=y"]
    check_overrides("train", ["--cfg", "job", *arguments], CONF)
    check_overrides("train", [*arguments, "-c", "all", "-p", "model"], CONF)


def test_an_unknown_experiment_is_answered_without_the_search_path():
    with pytest.raises(ValueError, match="Available options") as error:
        check_overrides("train", ["+experiment=ksr_flsh"], CONF)
    assert "provider" not in str(error.value)


@pytest.mark.parametrize(
    ("experiment", "override", "message"),
    [
        ("ksr_flash", "model=tiny", "a student has its teacher's network: choose another teacher="),
        ("ksr_flash", "model.dropout=0.0", "a student has its teacher's network"),
        (
            "ksr_flash",
            "optim.teacher.learning_rate=1e-3",
            "drop it, or use optim.critic, optim.student",
        ),
        ("ksr_flash", "loss.distance=l1", "loss.distance; drop it, or use loss.critic"),
        ("ksr_teacher", "diffusion.num_inference_steps=2", "does not read diffusion.num_inference"),
        ("ksr_teacher", "critic=tiny", "does not read critic; drop it"),
    ],
)
def test_an_override_that_would_change_nothing_is_refused(experiment, override, message):
    with pytest.raises(ValueError, match="would change nothing") as error:
        check_overrides("train", [f"+experiment={experiment}", override], CONF)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("experiment", "override"),
    [
        ("ksr_teacher", "model=tiny"),
        ("ksr_flash", "critic=tiny"),
        ("ksr_flash", "loss=kandinsky31"),
        ("ksr_flash", "optim.critic.learning_rate=1e-3"),
        ("ksr_flash", "diffusion.num_inference_steps=1,2"),
    ],
)
def test_an_override_that_changes_the_run_passes(experiment, override):
    check_overrides("train", [f"+experiment={experiment}", override], CONF)


def test_a_model_named_for_another_scale_is_refused():
    arguments = ["+experiment=ksr_teacher_mini", "model=mini_x4"]
    with pytest.raises(ValueError, match="model=mini_x4 is for scale=4, and scale is 2"):
        check_overrides("train", arguments, CONF)
    check_overrides("train", [*arguments, "scale=4"], CONF)
    check_overrides("train", ["+experiment=ksr_teacher_mini", "model=medium_x2"], CONF)


def test_a_layout_may_be_trained_for_a_scale_that_is_given():
    four = ["+experiment=ksr_teacher_mini_x4", "model=medium_x2"]
    with pytest.raises(ValueError, match="give scale=2 as well, or scale=4 if that is meant"):
        check_overrides("train", four, CONF)
    check_overrides("train", [*four, "scale=4"], CONF)
    check_overrides("train", ["+experiment=ksr_teacher", "model=ksr_x4", "-m", "scale=2,4"], CONF)


def test_sweeps_pass_the_check_of_overrides():
    arguments = ["-m", "+experiment=ksr_flash", "diffusion.num_inference_steps=1,2"]
    check_overrides("train", arguments, CONF)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.shards=/none/*.tar"], "data.shards='/none/*.tar' matches nothing"),
        (["loss=denoising"], "loss.game is not set by the chosen loss, which trains a teacher"),
        (["loss.critic.penalty=r2"], "loss.critic.penalty='r2' is not allowed"),
        (["optim.student.learning_rate=1e-4x"], "optim.student.learning_rate='1e-4x' is not"),
    ],
)
def test_train_ends_with_one_line_and_no_traceback(arguments, message, teacher, shards, tmp_path):
    command = [
        sys.executable, str(ROOT / "train.py"), "+experiment=quickstart_flash", "name=none",
        f"teacher={teacher}", f"data.shards={shards}", "data.crop_px=32", *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False,
                         env=environment)  # fmt: skip
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in run.stderr


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    values = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(values).save(folder / "0.png")
    options = PackOptions(0.0, (), 1, 0.0, None, 3)
    pack_folder(folder, folder / "shards", options, num_workers=0, on_progress=lambda *_: None)
    return folder / "shards" / "train-*.tar"


def test_stride_comes_from_the_teacher_not_from_the_model_group(teacher, tmp_path):
    config = json.loads((teacher / "sr" / "config.json").read_text())
    config["channel_multipliers"] = [1, 1, 1, 1, 1]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="multiple of 16"):
        check_train_config(
            composed("+experiment=ksr_flash", f"teacher={tmp_path}", "data.crop_px=264")
        )
