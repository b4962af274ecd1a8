"""Using the models: pipelines here; model folders, jobs, tiling, pictures and devices below.

Names are imported when they are used: importing this package loads neither torch nor diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ksr_distill.inference.model_folders.bundled import find_model
    from ksr_distill.inference.pipeline import KSRFlashPipeline
    from ksr_distill.inference.teacher import KSRTeacherPipeline

HOMES = {
    "KSRFlashPipeline": "ksr_distill.inference.pipeline",
    "KSRTeacherPipeline": "ksr_distill.inference.teacher",
    "find_model": "ksr_distill.inference.model_folders.bundled",
}

__all__ = ["KSRFlashPipeline", "KSRTeacherPipeline", "find_model"]


def __getattr__(name: str) -> object:
    """Import a public name from the module it lives in."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
