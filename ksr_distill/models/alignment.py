"""Alignment of weights in memory, on which the last bits of a CPU's results depend."""

from torch import nn

CACHE_LINE_BYTES = 64
"""Of a CPU, and torch's own alignment."""


def align_weights(module: nn.Module) -> None:
    """Copy a CPU's weights that are not aligned to a cache line.

    safetensors maps its file into memory, where tensors may start at any address. For unaligned
    ones oneDNN selects other kernels, and a loaded model differs from the saved one by 1e-6
    (measured).
    """
    for parameter in module.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % CACHE_LINE_BYTES:
            parameter.data = parameter.data.clone()
