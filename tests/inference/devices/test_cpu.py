import subprocess
import sys

import pytest
import torch

from ksr_distill.inference.devices import cpu
from ksr_distill.inference.model_folders.loading import load_pipeline

CPU = torch.device("cpu")


def psnr(ours, theirs):
    return -10 * (ours - theirs).square().mean().log10()


def enlarged(pipeline):
    lowres = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    return pipeline(lowres, generator=generator, output_type="pt").images


def test_half_precision_of_a_cpu_is_used_where_it_has_it_and_not_where_it_has_not(
    monkeypatch, model_folder
):
    for has_it, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(cpu, "multiplies_bf16", lambda has_it=has_it: has_it)
        assert load_pipeline(model_folder, device=CPU).sr.dtype == dtype
        assert load_pipeline(model_folder, device=CPU, fp32=True).sr.dtype == torch.float32


def test_half_precision_of_a_cpu_changes_no_picture_that_anyone_could_tell(
    monkeypatch, model_folder
):
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: True)
    half = enlarged(load_pipeline(model_folder, device=CPU))
    full = enlarged(load_pipeline(model_folder, device=CPU, fp32=True))
    assert not torch.equal(half, full)
    assert psnr(half, full) > 45


def test_tiles_in_bf16_are_kept_finer_than_bf16(monkeypatch, model_folder):
    """A bfloat16 just below 1 is half a level of an 8-bit picture from its neighbour."""
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: True)
    pipeline = load_pipeline(model_folder, device=CPU)
    assert pipeline.passes(2, seed=0)[0].dtype == torch.float16


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_keeping_memory_is_safe_to_ask_for_anywhere(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    cpu.keep_freed_memory()
    cpu.return_freed_memory()


KEEPS_THEN_RETURNS = """
from ksr_distill.inference.devices import cpu

def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

cpu.keep_freed_memory()
before = resident_mb()
block = bytearray(b"x") * (200 << 20)
del block
kept = resident_mb() - before
cpu.return_freed_memory()
print(kept, resident_mb() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's memory")
def test_memory_is_kept_for_the_next_tile_and_returned_when_asked():
    told = subprocess.run(
        [sys.executable, "-c", KEEPS_THEN_RETURNS], check=True, capture_output=True, text=True
    )
    kept, after = map(int, told.stdout.split())
    assert kept > 150
    assert after < 50
