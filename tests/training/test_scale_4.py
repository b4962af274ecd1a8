"""×4 from photos to a picture: the same commands, with scale=4."""

import numpy as np
import PIL.Image
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from typer.testing import CliRunner

import train
from ksr_distill.cli import app
from ksr_distill.inference import KSRFlashPipeline
from tests.cluster.real_run import ROOT, make_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder)
    return f"{folder}/shards/train-*.tar"


def trained(experiment, folder, shards, *overrides):
    """Train for two updates and return what `ksr export` makes of it."""
    overrides = [
        f"+experiment={experiment}", f"run_dir={folder}", f"data.shards={shards}", "num_updates=2",
        "validate_every=2", "log_every=1", "data.crop_px=32", "data.batch_size=2",
        "data.num_workers=0", "callbacks.speed.count_flops=false", "compile_networks=false",
        "trainer=cpu", "+trainer.enable_progress_bar=false", "+trainer.enable_model_summary=false",
        *overrides,
    ]  # fmt: skip
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = OmegaConf.to_container(compose("train", overrides), resolve=True)
    train.train(config, is_sweep=False)
    exported = folder / "export"
    checkpoint = folder / "checkpoints" / "last.ckpt"
    result = CliRunner().invoke(app, ["export", str(checkpoint), str(exported)])
    assert result.exit_code == 0, result.stderr
    return exported


def test_a_teacher_and_a_student_of_4_are_trained_exported_and_used(shards, tmp_path):
    small = ["model.base_channels=8", "model.stem_channels=8", "model.num_groups=4",
             "model.num_blocks=[1,1,1]"]  # fmt: skip
    teacher = trained("ksr_teacher_mini_x4", tmp_path / "teacher", shards, *small)
    student = trained(
        "ksr_flash_mini_x4", tmp_path / "student", shards, f"teacher={teacher}",
        "critic.head_channels=8", "loss.game.critic_warmup_updates=1",
        "loss.game.late_timesteps_updates=0", "loss.game.backward_simulation_ramp=[0,1]",
    )  # fmt: skip
    assert KSRFlashPipeline.from_pretrained(student).config.scale == 4
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "photo.png")
    arguments = ["upscale", str(tmp_path / "photo.png"), "--model", str(student), "--scale", "4"]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, result.stderr
    assert "in 1 pass" in result.stderr
    assert PIL.Image.open(tmp_path / "photo_x4.png").size == (112, 80)
