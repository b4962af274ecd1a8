"""What diffusers tests of every pipeline, for both of ours.

Left out, because there is nothing to test: prompts and their embeddings, guidance, pictures per
prompt, schedulers. Offloading needs a GPU: ``test_on_gpu.py``.
"""

import inspect
import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers.callbacks import PipelineCallback

from ksr_distill.inference import KSRFlashPipeline, KSRTeacherPipeline
from tests.inference.conftest import photo_like
from tests.inference.whole import whole_pipeline

PICTURES = [photo_like(6, 20, seed) / 2 + 0.5 for seed in range(3)]


def make_teacher():
    return KSRTeacherPipeline(whole_pipeline().sr, num_inference_steps=1)


MAKERS = {"flash": whole_pipeline, "teacher": make_teacher}
OPTIONS = {"flash": {"num_inference_steps": 1, "refine_steps": 1}, "teacher": {}}


@pytest.fixture(scope="module", params=list(MAKERS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pipeline(kind):
    pipeline = MAKERS[kind]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    pipeline.save_pretrained(path)
    return path


@pytest.fixture
def run(kind):
    """Run a pipeline of this kind the way that is most work for it."""

    def run(pipeline, image=PICTURES[0], **options):
        generator = torch.Generator().manual_seed(1)
        options = {"output_type": "np", "generator": generator} | OPTIONS[kind] | options
        return pipeline(image, **options).images

    return run


@pytest.fixture(scope="module")
def flash():
    return whole_pipeline()


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def same(first, second):
    return np.array_equal(first, second)


def test_the_call_takes_what_every_pipeline_takes(pipeline):
    parameters = inspect.signature(pipeline.__call__).parameters
    assert {"image", "generator", "num_inference_steps", "output_type", "return_dict"} <= set(
        parameters
    )


def test_a_saved_and_loaded_pipeline_gives_the_same_pixels(pipeline, folder, run):
    loaded = type(pipeline).from_pretrained(folder)
    assert same(run(loaded), run(pipeline))
    assert {file.suffix for file in folder.rglob("*.*")} == {".json", ".safetensors"}


def test_a_folder_of_the_other_kind_is_refused_with_the_class_that_loads_it(pipeline, folder):
    kinds = {KSRFlashPipeline, KSRTeacherPipeline}
    (other,) = kinds - {type(pipeline)}
    with pytest.raises(ValueError, match=f"load it with {type(pipeline).__name__}"):
        other.from_pretrained(folder)


def test_a_pickle_in_the_place_of_safetensors_is_not_opened(pipeline, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    weights = tmp_path / "model" / "sr" / "diffusion_pytorch_model.safetensors"
    torch.save(pipeline.sr.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(OSError, match=r"no file named diffusion_pytorch_model\.safetensors"):
        type(pipeline).from_pretrained(tmp_path / "model")


def test_a_path_that_is_no_folder_is_not_looked_for_on_the_hub(pipeline, tmp_path):
    with pytest.raises(ValueError, match="nothing is no model folder"):
        type(pipeline).from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "model_index.json holds None, not an object"),
        ([], r"model_index.json holds \[\], not an object"),
        ({"_class_name": []}, r"model_index.json has _class_name=\[\], not the name"),
        ({"_class_name": "X", "sr": ["models"]}, r"sr=\['models'\], not \[library, class\]"),
        ({"_class_name": "X", "scale": 1}, "model_index.json cannot be used: the model's scale=1"),
    ],
)
def test_what_is_no_index_is_refused_by_its_file(pipeline, tmp_path, index, message):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        type(pipeline).from_pretrained(tmp_path)


def test_optional_components_stay_away(flash, tmp_path):
    bare = KSRFlashPipeline(flash.sr)
    bare.save_pretrained(tmp_path)
    assert not (tmp_path / "refiner").exists()
    loaded = KSRFlashPipeline.from_pretrained(tmp_path)
    assert all(getattr(loaded, name) is None for name in KSRFlashPipeline._optional_components)
    images = [
        p(PICTURES[0], generator=seeded(1)[0], output_type="np").images for p in (bare, loaded)
    ]
    assert same(*images)


def test_a_component_can_be_left_out_or_given_on_loading(flash, tmp_path):
    flash.save_pretrained(tmp_path)
    loaded = KSRFlashPipeline.from_pretrained(tmp_path, refiner=None, sr=flash.sr)
    assert loaded.refiner is None
    assert loaded.sr is flash.sr


def test_a_half_precision_variant_lies_beside_and_gives_the_same_pixels(
    kind, run, pipeline, tmp_path
):
    half = MAKERS[kind]()
    half.save_pretrained(tmp_path)
    half.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    names = sorted(file.name for file in (tmp_path / "sr").glob("*.safetensors"))
    assert names == [
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
    ]
    loaded = type(half).from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert {model.dtype for model in loaded.components.values()} == {torch.float16}
    images = run(loaded)
    assert same(images, run(half))
    assert np.abs(images - run(pipeline)).mean() < 1e-2


def test_a_variant_that_is_not_there_is_an_error(pipeline, folder):
    with pytest.raises((OSError, ValueError), match="bf16"):
        type(pipeline).from_pretrained(folder, variant="bf16")


def test_a_dtype_for_each_component(folder, kind, pipeline):
    loaded = type(pipeline).from_pretrained(
        folder, torch_dtype={"sr": torch.bfloat16, "default": torch.float16}
    )
    dtypes = {name: model.dtype for name, model in loaded.components.items()}
    assert dtypes == dict.fromkeys(dtypes, torch.float16) | {"sr": torch.bfloat16}


def test_all_components_move_between_dtypes(kind, run, pipeline):
    moved = MAKERS[kind]()
    for dtype in (torch.bfloat16, torch.float32):
        moved.to(dtype=dtype)
        assert {model.dtype for model in moved.components.values()} == {dtype}
        assert moved.dtype == dtype
    assert np.abs(run(moved) - run(pipeline)).mean() < 0.02  # bf16 has lost digits on the way


def test_all_components_move_between_devices(kind):
    moved = MAKERS[kind]().to("meta")
    assert {model.device.type for model in moved.components.values()} == {"meta"}
    assert moved.device.type == "meta"


@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_of_any_size_gives_as_many_pictures(pipeline, run, size):
    assert run(pipeline, PICTURES[:size]).shape == (size, 12, 40, 3)


def test_a_batch_gives_what_single_pictures_give(pipeline, run):
    together = run(pipeline, PICTURES, generator=seeded(1, 2, 3))
    for image, generator, expected in zip(PICTURES, seeded(1, 2, 3), together, strict=True):
        assert same(run(pipeline, image, generator=generator)[0], expected)


def test_pictures_of_different_sizes_are_a_batch_too(pipeline, run):
    small, large = run(pipeline, [PICTURES[0], photo_like(14, 8) / 2 + 0.5])
    assert (small.shape, large.shape) == ((12, 40, 3), (28, 16, 3))


def test_a_generator_decides_everything(pipeline, run):
    first = run(pipeline)
    assert same(run(pipeline), first)
    assert not same(run(pipeline, generator=seeded(2)[0]), first)
    assert same(run(pipeline, generator=seeded(1)), first)


def test_a_tuple_holds_what_the_output_holds(pipeline, run, kind):
    (images,) = pipeline(
        PICTURES[0], generator=seeded(1)[0], output_type="np", return_dict=False, **OPTIONS[kind]
    )
    assert same(images, run(pipeline))


def test_output_types_are_one_picture(pipeline, run):
    as_np, as_pt, (pil,) = (run(pipeline, output_type=kind) for kind in ("np", "pt", "pil"))
    assert same(as_pt.permute(0, 2, 3, 1).numpy(), as_np)
    assert same(np.asarray(pil), np.round(as_np[0] * 255).astype(np.uint8))


def test_components_make_another_pipeline(pipeline, run):
    again = type(pipeline)(**pipeline.components)
    assert all(getattr(again, name) is model for name, model in pipeline.components.items())
    assert set(pipeline.components) == set(again.components)
    again.register_to_config(**{k: v for k, v in pipeline.config.items() if k[0] != "_"})
    assert same(run(again), run(pipeline))


def test_a_pipeline_is_made_of_another(flash, run, pipeline):
    again = type(pipeline).from_pipe(pipeline)
    assert same(run(again), run(pipeline))
    other_scale = type(pipeline).from_pipe(pipeline, scale=4)
    assert other_scale.config.scale == 4
    assert KSRTeacherPipeline.from_pipe(flash).sr is flash.sr


def test_the_progress_bar_ends_where_it_should(kind, run, capsys):
    pipeline = MAKERS[kind]()
    pipeline.set_progress_bar_config(disable=False)
    options = {"tile_px": 32, "overlap_px": 0} if kind == "flash" else {}
    run(pipeline, [PICTURES[0], PICTURES[1]], **options)
    total = {"flash": 2 * (2 + 2), "teacher": 2}[kind]  # two tiles wide, in two passes
    assert f"{total}/{total}" in capsys.readouterr().err
    pipeline.set_progress_bar_config(disable=True)
    run(pipeline, **options)
    assert capsys.readouterr().err == ""


def test_attention_slicing_changes_nothing(flash):
    options = {"num_inference_steps": 1, "refine_steps": 1, "output_type": "np"}
    expected = flash(PICTURES[0], generator=seeded(1)[0], **options).images
    sliced = whole_pipeline()
    sliced.enable_attention_slicing()
    images = sliced(PICTURES[0], generator=seeded(1)[0], **options).images
    assert np.abs(images - expected).max() < 1e-4


def test_weights_are_read_only_inside_their_own_layer(kind, run, pipeline):
    """What sequential offloading needs: outside its layer's call a weight is not there."""
    offloaded = MAKERS[kind]()
    offloaded.set_progress_bar_config(disable=True)
    for name in {"sr", "refiner", "movq"} & set(offloaded.components):
        cpu_offload(getattr(offloaded, name), execution_device=torch.device("cpu"))
    assert {p.device.type for p in offloaded.sr.parameters()} == {"meta"}
    assert np.abs(run(offloaded) - run(pipeline)).max() < 1e-3


def called_back(pipeline, callback, **options):
    return pipeline(
        PICTURES[0],
        generator=seeded(1)[0],
        output_type="np",
        callback_on_step_end=callback,
        **options,
    ).images


def test_a_callback_is_shown_what_it_asks_for(flash):
    for wanted in ([], ["pred_x_0"], flash._callback_tensor_inputs):
        seen = []

        def look(pipe, step, timestep, tensors, seen=seen):
            seen.append((step, timestep, sorted(tensors)))
            return tensors

        called_back(flash, look, callback_on_step_end_tensor_inputs=wanted)
        assert seen == [(i, t, wanted) for i, t in enumerate((979, 729, 479, 229))]
    with pytest.raises(ValueError, match=r"has \['latents'\]; known are \['pred_x_0'\]"):
        called_back(flash, look, callback_on_step_end_tensor_inputs=["latents"])


def test_what_a_callback_returns_is_taken(flash):
    def grey_at_the_end(pipe, step, timestep, tensors):
        if step == pipe.num_timesteps - 1:
            return {"pred_x_0": torch.zeros_like(tensors["pred_x_0"])}
        return tensors

    for options in ({}, {"num_inference_steps": 2}, {"tile_px": 32, "scale": 3}):
        images = called_back(flash, grey_at_the_end, **options)
        assert same(images, np.full_like(images, 0.5))


def test_what_a_callback_returns_early_is_what_the_next_step_starts_from(flash):
    def forget(pipe, step, timestep, tensors):
        return {"pred_x_0": torch.zeros_like(tensors["pred_x_0"])} if step == 2 else None

    expected = called_back(flash, None)
    assert not same(called_back(flash, forget), expected)
    assert same(called_back(flash, lambda *_: None), expected)


def test_a_callback_object_names_its_own_tensors(flash):
    class Inverted(PipelineCallback):
        tensor_inputs = ["pred_x_0"]  # noqa: RUF012 - as diffusers' own write it

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            is_last = step_index == pipeline.num_timesteps - 1
            sign = -1 if is_last else 1
            return {"pred_x_0": sign * callback_kwargs["pred_x_0"]}

    callback = Inverted(cutoff_step_ratio=1.0)
    images = called_back(flash, callback, callback_on_step_end_tensor_inputs=[])
    np.testing.assert_allclose(images, 1 - called_back(flash, None), atol=1e-6)


def test_the_index_names_classes_by_their_public_rooms(folder, pipeline):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == type(pipeline).__name__
    rooms = {value[0] for value in index.values() if isinstance(value, list) and len(value) == 2}
    assert rooms <= {"ksr_distill.models", "diffusers"}
