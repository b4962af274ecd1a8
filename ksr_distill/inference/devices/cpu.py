"""Speed on a CPU: detection of bfloat16 instructions, and settings of malloc."""

import ctypes
import sys

import torch

KEPT_BYTES = 1 << 30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""


def multiplies_bf16() -> bool:
    """Return whether this CPU has instructions for bfloat16 products (AVX512-BF16, or AMX).

    They double the rate of convolutions: 366 GFLOP/s instead of 192 on two cores of an EPYC 9004
    (measured). Without them bfloat16 is emulated, slower than float32. A four-step picture is
    61 to 64 dB from float32's (six of Set14, measured).
    """
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def keep_freed_memory() -> None:
    """Let malloc keep freed blocks of up to a gigabyte for the next tensors.

    glibc returns large blocks to the system at once, which zeroes them page by page when they are
    wanted again: a fifth of the time at tiles of 1088 px (measured). Only for a program of our own:
    it is a setting of the whole process. Elsewhere than on glibc it does nothing.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def return_freed_memory() -> None:
    """Return the memory kept by malloc to the system, before other work begins.

    Writing a large picture takes 100 MB of libvips' own; on top of kept memory that would be the
    peak (measured at 16384×16384). Elsewhere than on glibc it does nothing.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library of this process, if it is glibc."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
