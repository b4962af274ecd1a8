"""`--fast`: the networks with fused kernels and Winograd convolutions on an NVIDIA GPU.

Nothing is compiled per size: functions run the networks from the modules' own weights, so any
picture size works at once, and parameters, names and saved folders do not change.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from diffusers import VQModel
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from jaxtyping import Float
from torch import Tensor

from ksr_distill.inference.acceleration import movq as fast_movq
from ksr_distill.inference.acceleration import operations
from ksr_distill.inference.acceleration.refiner import refiner_forward
from ksr_distill.inference.acceleration.unet import unet_forward
from ksr_distill.inference.devices.layout import lay_out
from ksr_distill.models import KSRUNet, RefinerUNet

MEASURES_CONVOLUTIONS = False
"""Whether cuDNN times its algorithms at the first call of each shape. Its own choice is as fast
(measured), and a picture of a new size does not wait for it, which took longer than the picture."""


def can_accelerate(device: torch.device) -> bool:
    """Return whether a device runs the kernels: an NVIDIA GPU with tensor cores, and Triton."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and find_spec("triton") is not None
    )


def why_kernels_fail(device: torch.device) -> str | None:
    """Return why Triton cannot build and run a kernel here; None where it can.

    It calls a C compiler, and needs Python's headers: many machines that run PyTorch lack them.
    """
    pixels = torch.zeros(1, 8, 8, 16, device=device, dtype=torch.float16).permute(0, 3, 1, 2)
    try:
        with torch.cuda.device(device):
            operations.add(pixels, None)
    except Exception as error:  # noqa: BLE001 - a compiler's, a driver's or Triton's own
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return None


def accelerate(*networks: KSRUNet | RefinerUNet | VQModel) -> None:
    """Make networks use the fast operations from now on, in channels-last layout.

    The weights' dtype decides which: float16 all kernels, bfloat16 those of the norms, float32
    none. ``restore`` undoes it.
    """
    lay_out(*networks, memory_format=torch.channels_last)
    for network in networks:
        network.__dict__["is_accelerated"] = True
        if isinstance(network, VQModel):
            _bind(network, "encode", apply_forward_hook(_guarded(_encode, VQModel.encode)))
            _bind(network, "decode", apply_forward_hook(_guarded(_decode, VQModel.decode)))
        elif isinstance(network, KSRUNet):
            _bind(network, "forward", _guarded(unet_forward, KSRUNet.forward))
        else:
            _bind(network, "forward", _guarded(refiner_forward, RefinerUNet.forward))


def restore(*networks: KSRUNet | RefinerUNet | VQModel) -> None:
    """Undo ``accelerate``."""
    for network in networks:
        for name in ("encode", "decode", "forward", "is_accelerated"):
            network.__dict__.pop(name, None)
    lay_out(*networks, memory_format=torch.contiguous_format)


def _bind(network: torch.nn.Module, name: str, function: Callable[..., Any]) -> None:
    setattr(network, name, MethodType(function, network))


def _guarded(fast: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return the fast function for its network's device, and the plain one where it cannot work.

    diffusers' sequential offload keeps weights on the meta device and fills them in for each call
    of a layer, but the fast functions call no layers: they read the weights.
    """

    @wraps(plain)
    def run(network: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        weight = next(network.parameters())
        if weight.is_meta:
            return plain(network, *args, **kwargs)
        cudnn = torch.backends.cudnn
        before, cudnn.benchmark = cudnn.benchmark, MEASURES_CONVOLUTIONS
        try:
            # Triton launches on the current device, whatever its tensors' is.
            with torch.cuda.device(weight.device) if weight.is_cuda else nullcontext():
                return fast(network, *args, **kwargs)
        finally:
            cudnn.benchmark = before

    return run


def _encode(movq: VQModel, x: Float[Tensor, "b 3 H W"]) -> VQEncoderOutput:
    return VQEncoderOutput(latents=fast_movq.encode(movq, x))


def _decode(
    movq: VQModel, h: Float[Tensor, "b c h w"], *, force_not_quantize: bool
) -> DecoderOutput:
    if not force_not_quantize:
        raise ValueError("force_not_quantize=False; this MoVQ has no codebook, use True")
    return DecoderOutput(sample=fast_movq.decode(movq, h))
