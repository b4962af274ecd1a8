import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from ksr_distill.inference import KSRFlashPipeline, KSRTeacherPipeline
from ksr_distill.inference.model_folders.self_contained import add_code, one_file
from ksr_distill.models import RefinerContext
from ksr_distill.models.weights import (
    movq_from_released,
    refiner_from_released,
    sr_unet_from_released,
)
from tests.golden import golden_shapes, golden_weights

LOAD_WITHOUT_THE_PACKAGE = """
import sys
for missing in ("ksr_distill", "jaxtyping", "pyvips", "jinja2"):
    sys.modules[missing] = None  # an import fails as if it were not installed
import numpy as np
import torch
from diffusers import DiffusionPipeline

torch.set_num_threads(1)
for folder, options in ((sys.argv[1], {"refine_steps": 1}), (sys.argv[2], {})):
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    generator = torch.Generator().manual_seed(1)
    image = torch.linspace(0, 1, 3 * 12 * 16).reshape(3, 12, 16)
    images = pipeline(image, generator=generator, output_type="np", **options).images
    np.save(folder + ".npy", images)
"""


def released(name):
    return golden_weights(golden_shapes(f"tiny_state_dicts/{name}"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("self_contained")
    flash = KSRFlashPipeline(
        sr=sr_unet_from_released(released("sr_unet")),
        refiner=refiner_from_released(released("refiner_unet")),
        movq=movq_from_released(released("movq")),
        context=RefinerContext(dim=64),
    )
    teacher = KSRTeacherPipeline(sr=flash.sr, num_inference_steps=2)
    for pipeline, name in ((flash, "flash"), (teacher, "teacher")):
        pipeline.save_pretrained(folder / name)
        add_code(folder / name)
    return folder / "flash", folder / "teacher"


def test_without_this_package_diffusers_gives_the_same_pixels(folders, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_THE_PACKAGE, *map(str, folders)],
        cwd=tmp_path,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "Expected types" not in ran.stderr

    image = torch.linspace(0, 1, 3 * 12 * 16).reshape(3, 12, 16)
    for folder, pipeline_class, options in (
        (folders[0], KSRFlashPipeline, {"refine_steps": 1}),
        (folders[1], KSRTeacherPipeline, {}),
    ):
        pipeline = pipeline_class.from_pretrained(folder)  # and ours needs no trust_remote_code
        generator = torch.Generator().manual_seed(1)
        images = pipeline(image, generator=generator, output_type="np", **options).images
        assert np.array_equal(images, np.load(f"{folder}.npy"))


def test_code_is_not_run_unless_it_is_trusted(folders):
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folders[0])


def test_two_meanings_of_one_name_are_refused(monkeypatch):
    sources = {
        "ksr_distill.a": "from ksr_distill.b import X\nY = 1\n",
        "ksr_distill.b": "X = Y = 2\n",
    }
    monkeypatch.setattr("ksr_distill.inference.model_folders.self_contained._source", sources.get)
    monkeypatch.setattr(
        "ksr_distill.inference.model_folders.self_contained.home_of", lambda package, name: package
    )
    with pytest.raises(ValueError, match=r"ksr_distill\.b and ksr_distill\.a both define Y"):
        one_file(["ksr_distill.a"], what="Code")
