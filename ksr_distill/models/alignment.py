"""Where weights lie in memory, which decides the last bits of a result."""

from torch import nn

CACHE_LINE_BYTES = 64
"""Of a CPU, and torch's own alignment."""


def align_weights(module: nn.Module) -> None:
    """Move weights that lie at odd addresses of a CPU.

    safetensors maps a file, and its tensors begin where they begin; oneDNN then takes other
    kernels, and a loaded model differs from the saved one by 1e-6 (measured).
    """
    for parameter in module.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % CACHE_LINE_BYTES:
            parameter.data = parameter.data.clone()
