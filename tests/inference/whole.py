"""A whole pipeline of tiny networks, with the weights that the golden vectors were made with."""

from functools import cache

import torch

from ksr_distill.inference import KSRFlashPipeline
from ksr_distill.models import RefinerContext
from ksr_distill.models.weights import (
    movq_from_released,
    refiner_from_released,
    sr_unet_from_released,
)
from tests.golden import golden_shapes, golden_weights


@cache
def released(name):
    return golden_weights(golden_shapes(f"tiny_state_dicts/{name}"))


def whole_pipeline():
    """SR U-Net, refiner, MoVQ and context; every call makes networks of its own."""
    weights = {
        name: {key: value.clone() for key, value in released(name).items()}
        for name in ("sr_unet", "refiner_unet", "movq")
    }
    context = RefinerContext(dim=64)
    torch.nn.init.normal_(context.tokens, generator=torch.Generator().manual_seed(0))
    pipeline = KSRFlashPipeline(
        sr=sr_unet_from_released(weights["sr_unet"]),
        refiner=refiner_from_released(weights["refiner_unet"]),
        movq=movq_from_released(weights["movq"]),
        context=context,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
