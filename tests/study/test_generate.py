"""Generating: a tiny real diffusers pipeline, killed, resumed and asked twice."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image

from ksr_distill.study.basket import Prompt
from ksr_distill.study.generate import Recipe, generate_pictures, load_text_to_image

PROMPTS = [Prompt("p0", "a cat", "a"), Prompt("p1", "рыба", "a"), Prompt("p2", "x", "y")]
RECIPE = Recipe("tiny", seed=3, call={"num_inference_steps": 2})

# A text-to-image pipeline without a text encoder: the prompt's bytes are the condition.
PIPELINE = """
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class TinyTextToImage(DiffusionPipeline):
    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt, generator=None, num_inference_steps=3):
        sample = randn_tensor((1, 3, 16, 16), generator=generator, device=self.device)
        condition = torch.tensor([sum(prompt.encode()) % 7], device=self.device)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            eps = self.unet(sample, t, class_labels=condition).sample
            sample = self.scheduler.step(eps, t, sample, generator=generator).prev_sample
        pixels = (sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return ImagePipelineOutput(images=self.numpy_to_pil(pixels))
"""


def tiny_unet(**options: object) -> UNet2DModel:
    return UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
        **options,
    )


def import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "pipeline.py").write_text(PIPELINE)
    tiny = import_file(folder / "pipeline.py").TinyTextToImage
    torch.manual_seed(0)
    tiny(tiny_unet(num_class_embeds=7), DDPMScheduler()).save_pretrained(folder)
    del sys.modules["pipeline"]
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", "TinyTextToImage"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def pipe(model) -> DiffusionPipeline:
    return load_text_to_image(model, dtype=torch.float32, device="cpu", trust_remote_code=True)


def pictures_in(folder: Path) -> dict[str, bytes]:
    return {path.name: np.asarray(Image.open(path)).tobytes() for path in folder.iterdir()}


def test_every_prompt_gets_its_picture_under_its_id(pipe, tmp_path):
    assert generate_pictures(pipe, PROMPTS, tmp_path, recipe=RECIPE) == 3
    pictures = pictures_in(tmp_path)
    assert set(pictures) == {"p0.png", "p1.png", "p2.png"}
    assert len(set(pictures.values())) == 3


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(pipe, tmp_path):
    class Killed(BaseException):
        pass

    made = []

    def kill_after_two() -> None:
        made.append(1)
        if len(made) == 2:
            raise Killed

    with pytest.raises(Killed):
        generate_pictures(pipe, PROMPTS, tmp_path / "a", recipe=RECIPE, on_picture=kill_after_two)
    (tmp_path / "a" / "p2.png.partial").write_bytes(b"cut short")
    assert generate_pictures(pipe, PROMPTS, tmp_path / "a", recipe=RECIPE) == 1
    assert generate_pictures(pipe, PROMPTS, tmp_path / "a", recipe=RECIPE) == 0
    generate_pictures(pipe, PROMPTS[::-1], tmp_path / "b", recipe=RECIPE)
    assert pictures_in(tmp_path / "a") == pictures_in(tmp_path / "b")


def test_a_picture_depends_on_the_seed_and_the_id(pipe, tmp_path):
    same_text = [Prompt("p0", "a cat", "c"), Prompt("p9", "a cat", "c")]
    generate_pictures(pipe, same_text, tmp_path / "a", recipe=RECIPE)
    generate_pictures(pipe, same_text, tmp_path / "b", recipe=RECIPE._replace(seed=4))
    pictures = [*pictures_in(tmp_path / "a").values(), *pictures_in(tmp_path / "b").values()]
    assert len(set(pictures)) == 4


@pytest.mark.parametrize(
    ("prompts", "recipe"),
    [
        ([Prompt("p0", "a dog", "a")], RECIPE),
        (PROMPTS, RECIPE._replace(seed=4)),
        (PROMPTS, RECIPE._replace(call={})),
        (PROMPTS, RECIPE._replace(model="other")),
    ],
)
def test_pictures_of_two_recipes_never_mix_in_one_folder(pipe, tmp_path, prompts, recipe):
    generate_pictures(pipe, PROMPTS[:1], tmp_path, recipe=RECIPE)
    before = pictures_in(tmp_path)
    with pytest.raises(ValueError, match=r"p0.png: made by .* now asked for"):
        generate_pictures(pipe, prompts, tmp_path, recipe=recipe)
    assert pictures_in(tmp_path) == before


def test_a_file_that_is_no_picture_is_named(pipe, tmp_path):
    (tmp_path / "p0.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"p0.png: is no picture"):
        generate_pictures(pipe, PROMPTS, tmp_path, recipe=RECIPE)


def test_a_folders_own_code_runs_only_when_trusted(model):
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_text_to_image(model, dtype=torch.float32, device="cpu")


def test_a_model_that_takes_no_prompt_is_refused(tmp_path):
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="DDPMPipeline takes no prompt"):
        load_text_to_image(tmp_path, dtype=torch.float32, device="cpu")
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("DDPMPipeline", "NobodyKnowsPipeline"))
    with pytest.raises(ValueError, match="has no NobodyKnowsPipeline; update"):
        load_text_to_image(tmp_path, dtype=torch.float32, device="cpu")
    index.write_text("null")
    with pytest.raises(ValueError, match=r"model_index.json holds None, not an object"):
        load_text_to_image(tmp_path, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=r"no model_index.json"):
        load_text_to_image(tmp_path / "unet", dtype=torch.float32, device="cpu")


def test_a_stable_diffusion_folder_with_its_text_encoder_makes_pictures(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the [generate] extra")
    # CLIP's smallest vocabulary: every byte, as itself and as a word's end.
    codes = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in codes + list(range(256, 256 + 256 - len(codes)))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    text_config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        layers_per_block=1,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text_config),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tmp_path, model_max_length=32),
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "model")
    pipe = load_text_to_image(tmp_path / "model", dtype=torch.float32, device="cpu")
    assert generate_pictures(pipe, PROMPTS, tmp_path / "out", recipe=RECIPE) == 3
    assert len(set(pictures_in(tmp_path / "out").values())) == 3
