"""Whole runs of train.py: killed at any update they end the same; exports hold their average."""

import shutil

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from typer.testing import CliRunner

import train
from ksr_distill.cli import app
from ksr_distill.data.packing import pack_folder
from ksr_distill.data.sources import PackOptions
from ksr_distill.diffusion import NoiseSchedule, noise_from, sample_few_steps
from ksr_distill.export import averaged_unet, export_checkpoint, model_card, read_checkpoint
from ksr_distill.inference import KSRFlashPipeline, KSRTeacherPipeline
from ksr_distill.models import KSRUNet
from ksr_distill.training.base import UpdateModule
from tests.cluster.real_run import ROOT, digest_of_run, make_shards, make_teacher

NUM_UPDATES = 5
EXPERIMENTS = {
    "quickstart_teacher": ["model.base_channels=8", "model.num_groups=4"],
    "quickstart_flash": ["critic.head_channels=8", "loss.game.critic_warmup_updates=1",
                         "loss.game.backward_simulation_ramp=[0,2]"],
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    make_shards(folder)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (folder / "large").mkdir()
    Image.fromarray(noise).save(folder / "large" / "0.png")
    options = PackOptions(0.0, (), 1, 0.0, None, 3)
    pack_folder(folder / "large", folder / "val", options, num_workers=0,
                on_progress=lambda *_: None)  # fmt: skip
    make_teacher(folder)
    return folder


def run(experiment, folder, files, *more):
    """Do what `python train.py +experiment=…` does."""
    overrides = [
        f"+experiment={experiment}", f"run_dir={folder}/run",
        *([f"teacher={files}/teacher"] if "flash" in experiment else []),
        f"data.shards={files}/shards/train-*.tar", f"data.val_shards={files}/val/train-*.tar",
        f"num_updates={NUM_UPDATES}", "validate_every=4", "log_every=1", "data.crop_px=32",
        "data.batch_size=2", "data.num_workers=0", "data.val_crop_px=64", "data.num_val_pictures=1",
        "callbacks.checkpoint.every_updates=2", "callbacks.speed.count_flops=false",
        "+trainer.enable_progress_bar=false", "+trainer.enable_model_summary=false",
        *EXPERIMENTS[experiment], *more,
    ]  # fmt: skip
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = OmegaConf.to_container(compose("train", overrides), resolve=True)
    train.train(config, is_sweep=False)


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """An uninterrupted run of each experiment."""
    folders = {name: tmp_path_factory.mktemp(name) for name in EXPERIMENTS}
    for name, folder in folders.items():
        run(name, folder, files)
    return folders


class KilledError(Exception):
    """Stands for a death between two instructions of an update."""


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("update", [1, 2, 3])
def test_a_run_that_dies_at_any_update_ends_bit_for_bit_the_same(
    experiment, update, finished, files, tmp_path, monkeypatch
):
    end_update = UpdateModule.end_update

    def dies(module, values):
        if module.update == update:
            raise KilledError
        end_update(module, values)

    monkeypatch.setattr(UpdateModule, "end_update", dies)
    with pytest.raises(KilledError):
        run(experiment, tmp_path, files)
    monkeypatch.undo()
    run(experiment, tmp_path, files)
    assert digest_of_run(tmp_path) == digest_of_run(finished[experiment])
    curves = [(f / "run" / "metrics.csv").read_text() for f in (tmp_path, finished[experiment])]
    ours, theirs = ([r for r in c.splitlines() if ",train/" in r] for c in curves)
    assert ours == theirs


@pytest.mark.parametrize(
    ("experiment", "change", "told"),
    [
        ("quickstart_teacher", "scale=4", "made with scale=2, this run has 4"),
        ("quickstart_teacher", "seed=7", "made with seed=0, this run has 7"),
        ("quickstart_flash", "scale=4", "made with scale=2, this run has 4"),
        ("quickstart_flash", "diffusion.num_inference_steps=1", "this run has [979]"),
        ("quickstart_teacher", "model.predict_residual=false", "model.predict_residual=True"),
        ("quickstart_teacher", "model.num_groups=8", "model.num_groups=4, this run has 8"),
        ("quickstart_flash", "critic.normalise_features=false", "normalise_features=True, this"),
        ("quickstart_flash", "loss.student.l1=0.0", "'l1', 'feature_matching', 'lowres"),
    ],
)
def test_a_run_does_not_go_on_as_another_kind_of_model(
    experiment, change, told, finished, files, tmp_path
):
    shutil.copytree(finished[experiment], tmp_path, dirs_exist_ok=True)
    before = checkpoint_of(tmp_path).resolve()
    with pytest.raises(ValueError, match="the checkpoint was made with") as error:
        run(experiment, tmp_path, files, change, f"num_updates={NUM_UPDATES + 1}")
    assert told in str(error.value)
    assert checkpoint_of(tmp_path).resolve() == before


def test_the_logged_rate_is_that_of_the_update_beside_it(finished):
    rows = (finished["quickstart_flash"] / "run" / "metrics.csv").read_text().splitlines()
    rates = {(u, name): float(v) for u, name, v in (r.split(",") for r in rows[1:])}
    logged = [
        [rates[str(u), f"train/{who}_learning_rate"] for u in range(1, NUM_UPDATES + 1)]
        for who in ("critic", "student")
    ]
    assert logged[0] == pytest.approx([1e-3 * n / 6 for n in (1, 2, 3, 4, 5)])
    falling = [1, 1, 1, 1, 2 / 3, 1 / 3]  # over the last 60 % of the five
    moves = [3e-5 * n / 6 * falling[n + 1] for n in (1, 2, 3, 4)]
    assert logged[1] == pytest.approx([0.0, *moves])


def test_a_figure_that_no_validation_logs_is_refused_before_the_first_update(files, tmp_path):
    monitor = "callbacks.checkpoint.monitor=val/pnsr_y"
    with pytest.raises(ValueError, match=r"val/pnsr_y. is not among .*use one of val/psnr"):
        run("quickstart_teacher", tmp_path, files, monitor)
    assert not (tmp_path / "run" / "metrics.csv").exists()
    other = "callbacks.checkpoint.monitor=val/teacher_5/swd"
    run("quickstart_teacher", tmp_path, files, other, "num_updates=4")
    assert checkpoint_of(tmp_path).with_name("best.ckpt").exists()


def test_a_run_that_is_not_validated_says_that_nothing_is_best(files, tmp_path, caplog):
    run("quickstart_teacher", tmp_path, files, "data.val_shards=null", "num_updates=1")
    assert "data.val_shards is not given: nothing is validated" in caplog.text
    assert checkpoint_of(tmp_path).exists()
    assert not checkpoint_of(tmp_path).with_name("best.ckpt").exists()


def checkpoint_of(folder):
    return folder / "run" / "checkpoints" / "last.ckpt"


@torch.no_grad()
def few_steps(network, lowres):
    generator = torch.Generator().manual_seed(0)
    return sample_few_steps(
        network, lowres, timesteps=(979, 729, 479, 229), schedule=NoiseSchedule(),
        draw_noise=noise_from(generator, (1, 3, 32, 32), device="cpu"),
    )  # fmt: skip


def test_exported_student_gives_the_pixels_of_the_checkpoints_average(finished, tmp_path):
    path = checkpoint_of(finished["quickstart_flash"])
    export_checkpoint(path, tmp_path / "out", fp16=True, self_contained=False, overwrite=False)
    pipeline = KSRFlashPipeline.from_pretrained(tmp_path / "out")
    state = read_checkpoint(path)["state_dict"]
    lowres = torch.rand(1, 3, 16, 16) * 2 - 1
    unet = KSRUNet.from_config(pipeline.sr.config)
    unet.load_state_dict(
        {k.removeprefix("student_ema."): v for k, v in state.items() if "student_ema." in k}
    )
    ours, theirs = (few_steps(network, lowres) for network in (unet.eval(), pipeline.sr))
    assert torch.equal(ours, theirs)
    assert pipeline.config.student_timesteps == [979, 729, 479, 229]
    raw = {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")}
    assert any(not torch.equal(raw[k], v) for k, v in unet.state_dict().items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| psnr_y |" in card
    assert (tmp_path / "out" / "preview.png").exists()


def test_exported_teacher_is_a_teachers_pipeline(finished, tmp_path):
    path = checkpoint_of(finished["quickstart_teacher"])
    export_checkpoint(path, tmp_path / "out", fp16=False, self_contained=False, overwrite=False)
    teacher = KSRTeacherPipeline.from_pretrained(tmp_path / "out")
    expected = averaged_unet(read_checkpoint(path)).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in teacher.sr.state_dict().items())


def test_original_layout_comes_back_by_the_map_with_the_same_pixels(files, tmp_path):
    # The released layout has no residual prediction; so a distillation of a teacher without it.
    run("quickstart_flash", tmp_path, files)
    path = checkpoint_of(tmp_path)
    runner = CliRunner()
    out = tmp_path / "released.pt"
    assert runner.invoke(app, ["export", str(path), str(out), "--original"]).exit_code == 0
    convert = ["convert", "sr-unet", str(out), str(tmp_path / "back"), "--num-groups", "4"]
    assert runner.invoke(app, convert).exit_code == 0
    export_checkpoint(path, tmp_path / "out", fp16=False, self_contained=False, overwrite=False)
    ours = KSRUNet.from_pretrained(tmp_path / "out", subfolder="sr")
    back = KSRUNet.from_pretrained(tmp_path / "back")
    expected = averaged_unet(read_checkpoint(path)).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in back.state_dict().items())
    x_t, t, lowres = torch.randn(1, 3, 32, 32), torch.tensor([479]), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(ours(x_t, t, lowres), back(x_t, t, lowres))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is no file"), (b"not a checkpoint", "cannot be read as a checkpoint"),
     ({"state_dict": {}}, "was not written by train.py")],
)  # fmt: skip
def test_what_is_no_checkpoint_is_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "x.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    result = CliRunner().invoke(app, ["export", str(path), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_card_tells_the_figures_of_its_own_weights_or_after_which_update_they_are(
    files, tmp_path
):
    run("quickstart_teacher", tmp_path, files, "validate_every=2",
        "optim.teacher.warmup_updates=0", "optim.teacher.learning_rate=0.02")  # fmt: skip
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    figures = {
        int(update): float(value)
        for update, name, value in (row.split(",") for row in rows)
        if name == "val/psnr_y"
    }
    assert f"{figures[2]:.4g}" != f"{figures[4]:.4g}"
    last = checkpoint_of(tmp_path)
    for path, updates, when in ((last.with_name("update-000000004.ckpt"), 4, ""),
                                (last, 5, " after 4 updates")):  # fmt: skip
        checkpoint = read_checkpoint(path)
        assert checkpoint["ksr"]["update"] == updates
        card = model_card(checkpoint, path, None)
        assert f"| psnr_y | {figures[4]:.4g} |" in card
        assert f"the averaged network{when}:" in card


def test_a_card_tells_the_figures_of_before_the_run_was_continued(files, tmp_path):
    run("quickstart_teacher", tmp_path, files)
    run("quickstart_teacher", tmp_path, files, f"num_updates={NUM_UPDATES + 1}")
    last = checkpoint_of(tmp_path)
    card = model_card(read_checkpoint(last), last, None)
    assert f"after {NUM_UPDATES + 1} updates;" in card
    assert "the averaged network after 4 updates:" in card
    assert "| psnr_y | " in card
