import pytest
import torch
import torch.nn.functional as F

from ksr_distill.inference import KSRFlashPipeline
from ksr_distill.models import KSRUNet


def make_unet(seed=0, **options):
    torch.manual_seed(seed)
    options = {
        "base_channels": 8,
        "channel_multipliers": (1, 2),
        "num_blocks": (1, 2),
        "time_embedding_dim": 16,
        "num_groups": 4,
    } | options
    return KSRUNet(**options).eval()


@pytest.fixture(scope="session")
def unet():
    return make_unet()


@pytest.fixture
def pipeline(unet):
    pipeline = KSRFlashPipeline(unet)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def model_folder(unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    KSRFlashPipeline(unet).save_pretrained(folder)
    return folder


def photo_like(height, width, seed=0):
    """Smooth shapes with finer and finer detail, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    octaves = (
        F.interpolate(
            torch.randn(1, 3, 2**k + 1, 2**k + 1, generator=generator),
            (height, width),
            mode="bicubic",
        )
        * 0.5**k
        for k in range(1, 6)
    )
    picture = sum(octaves)[0]
    return picture / picture.abs().max()
