"""Degradations from hires to lowres: on whole batches, on their device, seeded."""

from ksr_distill.degradation.bicubic import BicubicDegradation
from ksr_distill.degradation.blur import Blur
from ksr_distill.degradation.contract import Degradation
from ksr_distill.degradation.jpeg import JPEGDegradation
from ksr_distill.degradation.noise import Noise
from ksr_distill.degradation.resize import Resize
from ksr_distill.degradation.second_order import DegradationPass, SecondOrderDegradation

__all__ = [
    "BicubicDegradation",
    "Blur",
    "Degradation",
    "DegradationPass",
    "JPEGDegradation",
    "Noise",
    "Resize",
    "SecondOrderDegradation",
]
