"""Base pictures for a study: one per prompt, from any diffusers text-to-image folder."""

import hashlib
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image, PngImagePlugin

from ksr_distill.model_json import read_object
from ksr_distill.randomness import Stream, generator_for
from ksr_distill.study.basket import Prompt

RECIPE_KEY = "ksr_study_recipe"


class Recipe(NamedTuple):
    """What determines a picture, apart from its prompt; written into each picture.

    Attributes:
        model: The model folder's name.
        call: Further arguments of the pipeline's call, such as num_inference_steps.
    """

    model: str
    seed: int
    call: dict[str, int | float | str]

    def of(self, prompt: Prompt) -> str:
        """Return the recipe of one picture as JSON."""
        return json.dumps({**self._asdict(), "prompt": prompt.text}, sort_keys=True)


def load_text_to_image(
    folder: Path, *, dtype: torch.dtype, device: str, trust_remote_code: bool = False
) -> Callable[..., Any]:
    """Return the folder's pipeline; nothing is downloaded.

    Args:
        trust_remote_code: Run the folder's own ``pipeline.py``, if its model_index.json names one.

    Raises:
        ValueError: The folder holds no pipeline, or one that takes no prompt.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{folder}: no model_index.json in it; give a diffusers model folder")
    name = read_object(index).get("_class_name")
    if isinstance(name, str) and not hasattr(diffusers, name):
        raise ValueError(f"{index}: diffusers {diffusers.__version__} has no {name}; update it")
    try:
        pipe = DiffusionPipeline.from_pretrained(
            folder,
            torch_dtype=dtype,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
    except ImportError as error:
        raise ValueError(
            f"{folder}: needs a package that is not installed ({error}); "
            "pip install 'ksr-distill[generate]'"
        ) from error
    if "prompt" not in inspect.signature(type(pipe).__call__).parameters:
        raise ValueError(
            f"{folder}: {type(pipe).__name__} takes no prompt; give a text-to-image one"
        )
    pipe.set_progress_bar_config(disable=True)
    return cast(Callable[..., Any], pipe.to(device))


def picture_generator(seed: int, prompt_id: str) -> torch.Generator:
    """Return the generator for one id, which depends neither on other pictures nor on a device."""
    number = int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:8])
    return generator_for(seed, Stream.STUDY, number)


def generate_pictures(
    pipe: Callable[..., Any],
    prompts: list[Prompt],
    out: Path,
    *,
    recipe: Recipe,
    on_picture: Callable[[], None] = lambda: None,
) -> int:
    """Write ID.png for every prompt that has none yet, and return how many were made.

    Each picture is written atomically, so a killed run leaves no damaged ones.

    Raises:
        ValueError: A picture is there already, but made from another prompt, seed or model.
    """
    out.mkdir(parents=True, exist_ok=True)
    missing = [
        prompt for prompt in prompts if not _is_made(out / f"{prompt.id}.png", prompt, recipe)
    ]
    for _ in range(len(prompts) - len(missing)):
        on_picture()
    for prompt in missing:
        generator = picture_generator(recipe.seed, prompt.id)
        picture = pipe(prompt.text, generator=generator, **recipe.call).images[0]
        _write_whole(picture, out / f"{prompt.id}.png", recipe.of(prompt))
        on_picture()
    return len(missing)


def _is_made(path: Path, prompt: Prompt, recipe: Recipe) -> bool:
    if not path.exists():
        return False
    try:
        with Image.open(path) as picture:
            made = picture.info.get(RECIPE_KEY)
    except OSError as error:
        raise ValueError(f"{path}: is no picture ({error}); delete it and run again") from error
    if made != recipe.of(prompt):
        raise ValueError(
            f"{path}: made by {made or 'another program'}, now asked for {recipe.of(prompt)}; "
            "choose another folder, or delete it to make it anew"
        )
    return True


def _write_whole(picture: Image.Image, path: Path, recipe: str) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_itxt(RECIPE_KEY, recipe)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        picture.save(file, format="PNG", pnginfo=text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
