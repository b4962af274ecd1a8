"""What only a GPU can show: half precision, offloading, memory that really runs out."""

import logging

import numpy as np
import PIL.Image
import pytest
import torch
from typer.testing import CliRunner

from ksr_distill.cli import app
from ksr_distill.inference import KSRFlashPipeline, KSRTeacherPipeline, teacher_pass
from ksr_distill.inference.acceleration import can_accelerate, operations
from ksr_distill.inference.devices import memory
from ksr_distill.inference.devices.memory import free_memory_bytes, largest_fitting_tile
from ksr_distill.inference.model_folders import loading
from ksr_distill.inference.model_folders.loading import load_pipeline, runs_fast
from tests.inference.conftest import photo_like
from tests.inference.whole import whole_pipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"


@pytest.fixture(autouse=True)
def exact_arithmetic():
    """The same kernels every time, and no TF32: differences are then the code's."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    whole_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def on_gpu():
    return whole_pipeline().to(DEVICE)


def picture(height=24, width=40):
    return photo_like(height, width) / 2 + 0.5


def pixels(pipeline, image=None, **options):
    options = {"generator": torch.Generator().manual_seed(3), "output_type": "pt"} | options
    return pipeline(picture() if image is None else image, **options).images


@pytest.mark.parametrize("refine_steps", [0, 1, 2])
def test_a_gpu_gives_what_a_cpu_gives(on_gpu, refine_steps):
    expected = pixels(whole_pipeline(), refine_steps=refine_steps)
    torch.testing.assert_close(
        pixels(on_gpu, refine_steps=refine_steps), expected, atol=1e-3, rtol=0
    )


def test_a_generator_of_the_gpu_will_do(on_gpu):
    first, second = (
        pixels(on_gpu, generator=torch.Generator(DEVICE).manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("movq_dtype", ["half", "float32"])
def test_half_precision_is_near_full_precision(folder, dtype, movq_dtype):
    half = KSRFlashPipeline.from_pretrained(folder, torch_dtype=dtype).to(DEVICE)
    half.set_progress_bar_config(disable=True)
    if movq_dtype == "float32":
        half.movq.to(torch.float32)
    difference = pixels(half, refine_steps=1) - pixels(whole_pipeline(), refine_steps=1)
    assert 0 < difference.abs().mean() < (0.01 if dtype == torch.float16 else 0.05)


def test_a_folder_is_loaded_in_half_precision_unless_told_otherwise(folder):
    pipeline = load_pipeline(folder, device=torch.device(DEVICE))
    assert pipeline.sr.dtype == pipeline.refiner.dtype == torch.float16
    assert pipeline.movq.dtype in (torch.float16, torch.float32)  # by what the device is good at
    assert {model.device.type for model in (pipeline.sr, pipeline.movq)} == {DEVICE}
    full = load_pipeline(folder, device=torch.device(DEVICE), fp32=True)
    assert full.sr.dtype == full.refiner.dtype == full.movq.dtype == torch.float32


def test_a_loaded_folder_gives_nearly_what_full_precision_gives(folder):
    pipeline = load_pipeline(folder, device=torch.device(DEVICE))
    options = {"tile_px": 64, "overlap_px": 16, "refine_steps": 1}
    image = picture(48, 72)
    expected = pixels(whole_pipeline(), image, **options)
    assert (pixels(pipeline, image, **options) - expected).abs().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("batch", [2, 3, 7])
def test_any_batch_of_tiles_gives_the_same_pixels(on_gpu, batch, dtype):
    on_gpu.to(dtype)
    options = {"tile_px": 32, "overlap_px": 8, "refine_steps": 1}
    one = pixels(on_gpu, **options)
    difference = (pixels(on_gpu, tile_batch_size=batch, **options) - one).abs()
    if dtype == torch.float32:
        assert difference.max() < 1e-4
    else:  # the kernels differ by rounding, the refiner of random weights makes 45 times of it
        assert difference.mean() < 5e-3


@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_changes_no_pixel_and_leaves_the_gpu(on_gpu, how):
    expected = pixels(on_gpu, refine_steps=1)
    offloaded = whole_pipeline()
    getattr(offloaded, how)(device=DEVICE)
    for _ in range(2):
        assert torch.equal(pixels(offloaded, refine_steps=1), expected)
        for name in ("sr", "refiner", "movq"):
            devices = {p.device.type for p in getattr(offloaded, name).parameters()}
            assert devices <= {"cpu", "meta"}, name


def test_networks_that_do_not_fit_together_take_turns(folder, on_gpu, monkeypatch, caplog):
    monkeypatch.setattr(loading, "free_memory_bytes", lambda device: 1000)
    with caplog.at_level(logging.WARNING):
        pipeline = load_pipeline(folder, device=torch.device(DEVICE), fp32=True)
    assert "the networks take turns on the GPU" in caplog.text
    assert pipeline.sr.device.type == "cpu"
    assert torch.equal(pixels(pipeline, refine_steps=1), pixels(on_gpu, refine_steps=1))
    assert pipeline.sr.device.type == "cpu"


@pytest.fixture
def limited_memory():
    """Return a function that lets this process allocate only so many bytes more."""
    total = torch.cuda.get_device_properties(0).total_memory

    def limit(num_bytes):
        torch.cuda.empty_cache()
        allowed = torch.cuda.memory_reserved() + num_bytes
        torch.cuda.set_per_process_memory_fraction(allowed / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def peak_bytes(run):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_reserved() - before


def test_memory_that_runs_out_halves_the_batch_and_then_the_tile(on_gpu, limited_memory, caplog):
    image, options = picture(256, 256), {"overlap_px": 16, "num_inference_steps": 1}
    needed = peak_bytes(lambda: pixels(on_gpu, image, tile_px=128, **options))
    assert peak_bytes(lambda: pixels(on_gpu, image, tile_px=512, **options)) > 3 * needed
    limited_memory(2 * needed)
    with caplog.at_level(logging.WARNING):
        result = pixels(on_gpu, image, tile_px=512, tile_batch_size=2, **options)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "out of memory: going on with 1 tile of 512 px at once"
    assert lines[1] == "out of memory: going on with 1 tile of 256 px at once"
    tile_px = int(lines[-1].split()[-4])
    expected = pixels(on_gpu, image, tile_px=tile_px, **options)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


def test_the_tile_follows_from_the_free_memory(on_gpu, monkeypatch):
    first = on_gpu.passes(2, seed=0)[0]
    device = torch.device(DEVICE)
    assert largest_fitting_tile(first, device) == 2048
    for tile_px in (1024, 512, 256):
        free = int(first.working_bytes(tile_px, 1) / 0.8) + 1
        monkeypatch.setattr(memory, "free_memory_bytes", lambda _, free=free: free)
        assert largest_fitting_tile(first, device) == tile_px


def test_what_torch_keeps_for_its_next_tensors_is_free():
    device = torch.device(DEVICE)
    torch.cuda.empty_cache()
    before = free_memory_bytes(device)
    torch.empty(1 << 30, dtype=torch.uint8, device=device)
    assert torch.cuda.memory_reserved(device) >= 1 << 30
    assert free_memory_bytes(device) > before - (1 << 29)


@pytest.fixture
def teacher():
    teacher = KSRTeacherPipeline(whole_pipeline().sr, window_px=64, stride_px=48).to(DEVICE)
    teacher.set_progress_bar_config(disable=True)
    return teacher


def test_the_batch_of_views_changes_no_pixel_of_the_teacher(teacher):
    image = picture(80, 100)
    one = pixels(teacher, image, view_batch_size=1)
    for batch in (4, 100, None):
        together = pixels(teacher, image, view_batch_size=batch)
        torch.testing.assert_close(together, one, atol=1e-4, rtol=0)


def test_the_views_follow_from_the_free_memory(teacher, monkeypatch):
    (only_pass,) = teacher.passes(2, seed=0)
    assert only_pass.affordable_views() > 100  # tiny views on a large GPU
    free = int(3.5 * only_pass.bytes_per_view(64) / 0.8)
    monkeypatch.setattr(teacher_pass, "free_memory_bytes", lambda _: free)
    assert only_pass.affordable_views() == 3


def test_memory_that_runs_out_halves_the_views(teacher, limited_memory, caplog):
    image, options = picture(256, 256), {"num_inference_steps": 1}
    few, many = (
        peak_bytes(lambda n=n: pixels(teacher, image, view_batch_size=n, **options))
        for n in (4, 100)
    )
    assert many > 3 * few
    expected = pixels(teacher, image, view_batch_size=4, **options)
    limited_memory(few + few // 2)  # much less than many: cuDNN makes do with less than it takes
    with caplog.at_level(logging.WARNING):
        result = pixels(teacher, image, view_batch_size=100, **options)
    assert "out of memory: going on with view_batch_size=" in caplog.text
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


@pytest.fixture
def photo(tmp_path):
    image = (picture().permute(1, 2, 0) * 255).round().byte().numpy()
    PIL.Image.fromarray(image).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def upscaled(model, photo, name, *options):
    pytest.importorskip("pyvips")
    out = photo.with_name(name)
    command = ["upscale", str(photo), "-o", str(out), "--model", str(model), *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    return np.asarray(PIL.Image.open(out)).astype(int)


def test_the_command_line_gives_on_a_gpu_what_it_gives_on_a_cpu(folder, photo):
    options = ("--scale", "3", "--refine-steps", "1", "--tile", "64")
    expected = upscaled(folder, photo, "cpu.png", *options, "--device", "cpu", "--fp32")
    exact = upscaled(folder, photo, "cuda.png", *options, "--device", DEVICE, "--fp32")
    assert np.abs(exact - expected).max() <= 1
    half = upscaled(folder, photo, "half.png", *options, "--tile-batch", "3")
    assert np.abs(half - expected).mean() < 3


def test_the_command_line_runs_a_teacher(teacher, photo, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")
    expected = upscaled(tmp_path / "teacher", photo, "cpu.png", "--device", "cpu", "--fp32")
    exact = upscaled(tmp_path / "teacher", photo, "cuda.png", "--device", DEVICE, "--fp32")
    assert np.abs(exact - expected).max() <= 1


@pytest.mark.skipif(not can_accelerate(torch.device(DEVICE)), reason="needs Triton's kernels")
def test_kernels_are_used_where_they_can_be_built(folder, monkeypatch, caplog):
    assert runs_fast(torch.device(DEVICE))
    assert not caplog.records

    def broken(*_, **__):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(operations, "_add", broken)
    assert not runs_fast(torch.device(DEVICE))
    assert "RuntimeError: Failed to find C compiler." in caplog.text
    assert "Please" not in caplog.text


@pytest.mark.skipif(not can_accelerate(torch.device(DEVICE)), reason="needs Triton's kernels")
@pytest.mark.parametrize("side", [24, 57])
def test_the_fast_way_is_near_full_precision(folder, side):
    fast = load_pipeline(folder, device=torch.device(DEVICE), fast=True)
    assert fast.sr.dtype == fast.movq.dtype == torch.float16
    image = picture(side, side + 6)
    options = {"tile_px": 64, "overlap_px": 16, "refine_steps": 1}
    expected = pixels(whole_pipeline(), image, **options)
    assert (pixels(fast, image, **options) - expected).abs().mean() < 0.01
