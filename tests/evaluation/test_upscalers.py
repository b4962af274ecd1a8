import json

import numpy as np
import PIL.Image
import pytest
import torch

from ksr_distill.diffusion import sample_teacher_ddim
from ksr_distill.evaluation.benchmark_images import as_picture
from ksr_distill.evaluation.upscalers import (
    ModelSpec,
    StepRecorder,
    build_baseline,
    build_upscalers,
)
from ksr_distill.inference import KSRFlashPipeline
from ksr_distill.randomness import generator_for
from tests.evaluation.conftest import photo, tiny_unet

CPU = torch.device("cpu")


def build(*specs, scale=2):
    return build_upscalers(specs, scale=scale, device=CPU, half=False)


def as_file(image):
    return ((image.clamp(-1, 1) + 1) * 127.5).round().byte()


@pytest.mark.parametrize("name", ["nearest", "bicubic", "lanczos"])
def test_a_baseline_is_pillows_filter(name):
    lowres = photo(24, 16)
    filter_ = PIL.Image.Resampling[name.upper()]
    expected = np.asarray(as_picture(lowres).resize((32, 48), filter_))
    result = build_baseline(name, scale=2)(lowres, generator=generator_for(0))
    assert np.array_equal(as_file(result.hires)[0].permute(1, 2, 0).numpy(), expected)


def test_an_unknown_baseline_names_the_known_ones():
    with pytest.raises(ValueError, match="'cubic'; allowed are nearest, bicubic, lanczos"):
        build_baseline("cubic", scale=2)


def test_a_student_gives_what_the_shipped_pipeline_gives(student_folder):
    lowres = photo(24, 19)
    upscaler = build(ModelSpec("student", student_folder))["student"]
    result = upscaler(lowres, generator=generator_for(1))
    pipeline = KSRFlashPipeline.from_pretrained(student_folder)
    (expected,) = pipeline(
        (lowres + 1) / 2, scale=2.0, generator=generator_for(1), output_type="pt"
    ).images
    torch.testing.assert_close(result.hires[0], expected * 2 - 1)
    assert upscaler.num_inference_steps == 4


def test_the_estimates_of_a_student_end_with_its_result(student_folder):
    upscaler = build(ModelSpec("s", student_folder, num_inference_steps=3))["s"]
    result = upscaler(photo(24, 19), generator=generator_for(2))
    assert [estimate.step for estimate in result.estimates] == [1, 2, 3]
    assert torch.equal(result.estimates[-1].image, as_file(result.hires))
    assert not torch.equal(result.estimates[0].image, as_file(result.hires))


def test_a_teacher_is_ddim_from_the_same_start(teacher_folder):
    lowres = photo(24, 16)
    upscaler = build(ModelSpec("t", teacher_folder, "ddim", 3))["t"]
    result = upscaler(lowres, generator=generator_for(3))
    start = torch.randn(1, 3, 48, 32, generator=generator_for(3))
    expected = sample_teacher_ddim(tiny_unet(), lowres, start=start, num_inference_steps=3)
    torch.testing.assert_close(result.hires, expected)
    assert [estimate.step for estimate in result.estimates] == [1, 2, 3]


def test_a_teachers_folder_says_how_it_is_sampled(teacher_folder):
    upscaler = build(ModelSpec("t", teacher_folder))["t"]
    assert (upscaler.sampler, upscaler.num_inference_steps) == ("dpm", 5)
    result = upscaler(photo(13, 11), generator=generator_for(4))
    assert result.hires.shape == (1, 3, 26, 22)


def test_a_bare_unet_must_say_how_it_is_sampled(tmp_path):
    tiny_unet().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bare U-Net that does not say; use one of student"):
        build(ModelSpec("bare", tmp_path))
    assert build(ModelSpec("bare", tmp_path, "ddim", 1))["bare"].num_inference_steps == 1


def test_a_folder_of_half_precision_files_alone_is_loaded(tmp_path):
    pipeline = KSRFlashPipeline(sr=tiny_unet())
    pipeline.sr.half()
    pipeline.save_pretrained(tmp_path, variant="fp16")
    upscaler = build(ModelSpec("half", tmp_path))["half"]
    assert upscaler.pipeline.sr.dtype == torch.float32


def test_a_folder_is_loaded_once_for_all_its_entries(student_folder):
    upscalers = build(
        ModelSpec("a", student_folder, num_inference_steps=1), ModelSpec("b", student_folder)
    )
    assert upscalers["a"].pipeline is upscalers["b"].pipeline


def test_many_steps_are_recorded_sparsely_and_the_last_always():
    recorder = StepRecorder(num_steps=100, height=4, width=4)
    for step in range(100):
        recorder(step, torch.full((1, 3, 4, 4), 1.5 if step == 99 else 0.0))
    steps = [estimate.step for estimate in recorder.estimates]
    assert len(steps) <= 9
    assert steps[-1] == 100
    assert recorder.share_out_of_range == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "euler"}, "sampler='euler' is unknown; use one of student, ddim, dpm"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 is below 1"),
        ({"name": "a/b"}, "'a/b' cannot name a model"),
        ({"name": "original"}, "'original' cannot name a model"),
        ({"name": "bicubic"}, "'bicubic' cannot name a model"),
    ],
)
def test_entries_that_cannot_be_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ModelSpec(**{"name": "m", "path": tmp_path, **options})


def test_folders_that_do_not_fit_are_refused(student_folder, tmp_path):
    with pytest.raises(ValueError, match=r"enlarges by 2, the benchmark is ×4.*or scale=2 with"):
        build(ModelSpec("s", student_folder), scale=4)
    with pytest.raises(ValueError, match="missing is not there; give what `ksr export` made"):
        build(ModelSpec("s", tmp_path / "missing"))
    with pytest.raises(ValueError, match=r"has neither model_index\.json nor config\.json"):
        build(ModelSpec("s", tmp_path))
    with pytest.raises(ValueError, match="two entries called s"):
        build(ModelSpec("s", student_folder), ModelSpec("s", student_folder))
    with pytest.raises(ValueError, match="refine_steps=1 needs sampler=student"):
        build(ModelSpec("s", student_folder, "ddim", 1, refine_steps=1))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_index\.json is damaged"):
        build(ModelSpec("s", tmp_path))
    (tmp_path / "model_index.json").write_text("null")
    with pytest.raises(ValueError, match=r"model_index\.json holds None, not an object"):
        build(ModelSpec("s", tmp_path))


def test_damaged_weights_are_one_line(tmp_path):
    tiny_unet().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "base_channels": 16}))
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        build(ModelSpec("s", tmp_path, "ddim", 1))
    assert "\n" not in str(error.value)
