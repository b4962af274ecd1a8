import PIL.Image
import pytest
import torch

from ksr_distill.evaluation.benchmark_images import as_picture
from ksr_distill.inference import KSRFlashPipeline
from ksr_distill.inference.teacher import KSRTeacherPipeline
from ksr_distill.models import KSRUNet
from ksr_distill.randomness import generator_for


def photo(height=80, width=64, seed=0):
    """Smooth shapes with some detail: enough for every metric to say something."""
    generator = generator_for(seed)
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=generator) * 1.6 - 0.8
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    detail = 0.1 * torch.randn(1, 3, height, width, generator=generator)
    return (smooth + detail).clamp(-1, 1)


def write_pair(folder, name, hires, scale=2):
    folder.mkdir(exist_ok=True)
    picture = as_picture(hires)
    picture.save(folder / f"{name}_HR.png")
    size = (picture.width // scale, picture.height // scale)
    picture.resize(size, PIL.Image.Resampling.BICUBIC).save(folder / f"{name}_LR.png")


@pytest.fixture
def pairs(tmp_path):
    folder = tmp_path / "pairs"
    for seed, name in enumerate(("bird", "house", "sea")):
        write_pair(folder, name, photo(seed=seed))
    return folder


def tiny_unet():
    torch.manual_seed(0)
    unet = KSRUNet(
        base_channels=8,
        channel_multipliers=(1, 1, 2),
        num_blocks=(1, 1, 2),
        time_embedding_dim=16,
        num_groups=4,
        predict_residual=True,
    )
    torch.nn.init.normal_(unet.conv_out.weight, std=0.02)
    return unet.eval()


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "student"
    KSRFlashPipeline(sr=tiny_unet()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "teacher"
    KSRTeacherPipeline(sr=tiny_unet()).save_pretrained(folder)
    return folder
