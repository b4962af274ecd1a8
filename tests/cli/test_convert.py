"""``ksr convert``: released files in, folders that load out, and back."""

import os
import stat
from functools import cache

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import save_file
from typer.testing import CliRunner

from ksr_distill.cli import app
from ksr_distill.inference import KSRFlashPipeline, KSRTeacherPipeline
from ksr_distill.inference.pictures.rasters import Window
from ksr_distill.inference.refine import refine_latents
from ksr_distill.models import KSRUNet, RefinerContext, RefinerUNet
from ksr_distill.models.movq import decode, encode
from tests.golden import golden_shapes, golden_weights, load_golden


@cache
def released(name):
    return golden_weights(golden_shapes(f"tiny_state_dicts/{name}"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    context = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0)).half()
    context[:, 1:] = context[:, 1:2].clone()
    mask = torch.zeros(1, 8, dtype=torch.int64)
    mask[0, 0] = 1
    torch.save({"unet": released("sr_unet")}, folder / "KandiSuperRes_flash_x2.pt")
    torch.save(released("sr_unet"), folder / "KandiSuperRes.ckpt")
    refiner = {"unet": released("refiner_unet"), "null_embedding": torch.zeros(1, 4)}
    torch.save(refiner, folder / "kandinsky3_flash.pt")
    torch.save(released("movq"), folder / "movq.pt")
    torch.save(context, folder / "context.pt")
    torch.save(mask, folder / "context_mask.pt")
    return folder


def convert(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def converted(*arguments):
    result = convert(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "Loading" not in result.stderr
    return result.stdout.splitlines()[-1]


def refused(*arguments):
    """Return the one line that a refused command writes."""
    result = convert(*arguments)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    return result.stderr


@torch.no_grad()
def test_a_converted_unet_equals_the_released_code(files, tmp_path):
    path = converted("sr-unet", files / "KandiSuperRes_flash_x2.pt", tmp_path / "sr")
    golden, _ = load_golden("sr_unet")
    out = KSRUNet.from_pretrained(path)(golden["x"], golden["time"], golden["lowres"])
    assert path == str(tmp_path / "sr")
    assert (out - golden["out"]).abs().max() < 1e-4


@torch.no_grad()
def test_a_converted_refiner_equals_the_released_code(files, tmp_path):
    path = converted("refiner", files / "kandinsky3_flash.pt", tmp_path / "refiner")
    golden, _ = load_golden("refiner_unet")
    refiner = RefinerUNet.from_pretrained(path)
    out = refiner(golden["x"], golden["time"], golden["context"], golden["context_mask"]).sample
    assert (out - golden["out"]).abs().max() < 1e-4


def test_a_converted_movq_equals_the_released_code(files, tmp_path):
    path = converted("movq", files / "movq.pt", tmp_path / "movq")
    golden, _ = load_golden("movq")
    movq = VQModel.from_pretrained(path)
    assert (encode(movq, golden["image"]) - golden["latents"]).abs().max() < 1e-5
    assert (decode(movq, golden["latents"]) - golden["decoded"]).abs().max() < 2e-4


def test_the_context_is_one_token_with_and_without_its_mask(files, tmp_path):
    context = torch.load(files / "context.pt", weights_only=True)
    for name, options in (("a", ()), ("b", ("--mask", files / "context_mask.pt"))):
        path = converted("context", files / "context.pt", tmp_path / name, *options)
        tokens = RefinerContext.from_pretrained(path).tokens
        assert torch.equal(tokens, context[:, :1].float())


@pytest.fixture(scope="module")
def flash_folder(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("flash") / "pipeline"
    released_files = {
        "--sr": "KandiSuperRes_flash_x2.pt",
        "--refiner": "kandinsky3_flash.pt",
        "--movq": "movq.pt",
        "--context": "context.pt",
    }
    options = [part for option, name in released_files.items() for part in (option, files / name)]
    return converted("flash", *options, out, "--fp16")


def test_the_whole_pipeline_equals_a_chain_of_its_parts(flash_folder):
    pipeline = KSRFlashPipeline.from_pretrained(flash_folder)
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    passes = pipeline.passes(2, seed=7, refine_steps=1)

    sharp = passes[0](image * 2 - 1, [Window(0, 0, 64, 96)])
    refined = decode(
        pipeline.movq,
        refine_latents(
            pipeline.refiner,
            encode(pipeline.movq, sharp),
            tokens=pipeline.context.tokens,
            timesteps=(229,),
            draw_noise=passes[1].noise.source([Window(0, 0, 8, 12)], channels=4),
        ),
    )

    assert torch.equal(passes[1](sharp, [Window(0, 0, 64, 96)]), refined)


def test_the_half_precision_variant_loads_beside_the_full_one(flash_folder):
    halves = KSRFlashPipeline.from_pretrained(
        flash_folder, variant="fp16", torch_dtype={"default": torch.float16, "movq": torch.float32}
    )
    assert (halves.sr.dtype, halves.refiner.dtype) == (torch.float16, torch.float16)
    assert halves.movq.dtype == torch.float32
    whole = KSRFlashPipeline.from_pretrained(flash_folder)
    for ours, theirs in zip(halves.sr.parameters(), whole.sr.parameters(), strict=True):
        assert torch.allclose(ours.float(), theirs, rtol=1e-3, atol=1e-6)


def test_a_pipeline_without_a_refiner_is_whole(files, tmp_path):
    path = converted("flash", "--sr", files / "KandiSuperRes_flash_x2.pt", tmp_path / "out")
    pipeline = KSRFlashPipeline.from_pretrained(path)
    assert pipeline.refiner is None
    image = torch.rand(3, 10, 12)
    assert pipeline(image, output_type="np").images.shape == (1, 20, 24, 3)


def test_a_refiner_without_its_parts_is_refused(files, tmp_path):
    line = refused("flash", tmp_path / "out", "--sr", files / "KandiSuperRes_flash_x2.pt",
                   "--movq", files / "movq.pt")  # fmt: skip
    assert "--refiner, --context missing" in line
    assert not (tmp_path / "out").exists()


def test_our_own_folders_serve_as_parts(files, tmp_path):
    student = converted("flash", "--sr", files / "KandiSuperRes_flash_x2.pt", tmp_path / "student")
    movq = converted("movq", files / "movq.pt", tmp_path / "movq")
    path = converted("flash", tmp_path / "out", "--sr", student, "--movq", movq, "--refiner",
                     files / "kandinsky3_flash.pt", "--context", files / "context.pt")  # fmt: skip
    assert KSRFlashPipeline.from_pretrained(path).refiner is not None
    assert "holds a VQModel, not a KSRUNet" in refused("flash", "--sr", movq, tmp_path / "other")


def test_a_teacher_knows_its_scale_by_its_released_name(files, tmp_path):
    path = converted("teacher", files / "KandiSuperRes.ckpt", tmp_path / "x4")
    assert KSRTeacherPipeline.from_pretrained(path).config.scale == 4
    path = converted("teacher", files / "KandiSuperRes.ckpt", tmp_path / "x2", "--scale", 2)
    assert KSRTeacherPipeline.from_pretrained(path).config.scale == 2


@pytest.mark.parametrize(
    ("kind", "file", "name"),
    [
        ("sr-unet", "KandiSuperRes_flash_x2.pt", "sr_unet"),
        ("refiner", "kandinsky3_flash.pt", "refiner_unet"),
        ("movq", "movq.pt", "movq"),
    ],
)
def test_there_and_back_gives_the_released_file(files, tmp_path, kind, file, name):
    folder = converted(kind, files / file, tmp_path / "folder")
    back = torch.load(converted("original", folder, tmp_path / "back.pt"), weights_only=True)
    back = back if name == "movq" else back["unet"]
    assert back.keys() == released(name).keys()
    assert all(torch.equal(back[key], value) for key, value in released(name).items())


def test_a_refiner_goes_back_with_the_null_embedding_that_the_released_code_asks_for(
    files, tmp_path, caplog
):
    folder = converted("refiner", files / "kandinsky3_flash.pt", tmp_path / "folder")
    converted("original", folder, tmp_path / "bare.pt")
    assert "has no null_embedding, which the released code asks for" in caplog.text
    options = ("--null-embedding", files / "kandinsky3_flash.pt")
    path = converted("original", folder, tmp_path / "back.pt", *options)
    assert torch.load(path, weights_only=True)["null_embedding"].shape == (1, 4)

    sr = files / "KandiSuperRes_flash_x2.pt"
    line = refused("original", folder, tmp_path / "other.pt", "--null-embedding", sr)
    assert f"{sr}: has no null_embedding; give the released" in line
    unet = converted("sr-unet", sr, tmp_path / "sr")
    assert "belongs to a refiner" in refused("original", unet, tmp_path / "other.pt", *options)
    assert not (tmp_path / "other.pt").exists()


def test_groups_that_a_file_cannot_tell_are_told(files, tmp_path, caplog):
    file, options = files / "KandiSuperRes.ckpt", ("--num-groups", 16)
    folder = converted("sr-unet", file, tmp_path / "folder", *options)
    converted("original", folder, tmp_path / "back.pt")
    assert "has 16 groups in its group norms, which the file cannot say" in caplog.text
    caplog.clear()
    converted("original", converted("sr-unet", file, tmp_path / "usual"), tmp_path / "usual.pt")
    assert not caplog.text


def test_half_precision_stays_half_there_and_back(tmp_path):
    halves = {name: value.half() for name, value in released("sr_unet").items()}
    torch.save({"unet": halves}, tmp_path / "half.pt")
    folder = converted("sr-unet", tmp_path / "half.pt", tmp_path / "folder")
    path = converted("original", folder, tmp_path / "back.pt")
    back = torch.load(path, weights_only=True)["unet"]
    assert all(torch.equal(back[name], value) for name, value in halves.items())
    assert {value.dtype for value in back.values()} == {torch.float16}


def test_components_of_a_pipeline_go_back_too(flash_folder, tmp_path):
    path = converted("original", flash_folder, tmp_path / "m.pt", "--component", "movq")
    assert torch.load(path, weights_only=True).keys() == released("movq").keys()
    line = refused("original", flash_folder, tmp_path / "c.pt", "--component", "context")
    assert "a RefinerContext has no released layout" in line


def test_what_exists_is_replaced_only_on_request_and_whole(files, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    line = refused("movq", files / "movq.pt", out)
    assert "exists already; give another name, or --overwrite" in line
    assert (out / "mine.txt").read_text() == "mine"
    line = refused("movq", files / "movq.pt", out, "--overwrite")
    assert "is no model folder, which --overwrite replaces" in line
    assert (out / "mine.txt").read_text() == "mine"
    (out / "mine.txt").rename(out / "config.json")
    converted("movq", files / "movq.pt", out, "--overwrite")
    assert (out / "config.json").read_text() != "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    line = refused("original", out, tmp_path / "out", "--overwrite")
    assert "is a folder; give the name of a file in it" in line


@pytest.mark.parametrize("damage", ["wrong shape", "code", "truncated", "half precision overflow"])
def test_a_bad_file_leaves_nothing_behind(files, tmp_path, damage):
    weights, options, out = dict(released("sr_unet")), (), tmp_path / "folder" / "out"
    file = tmp_path / "bad.pt"
    if damage == "wrong shape":
        weights["out_conv.bias"] = torch.zeros(4)
        file, expected = tmp_path / "bad.safetensors", "out_conv.bias is (4,), not (3,)"
        save_file(weights, file)
    elif damage == "code":
        torch.save({"unet": weights, "hook": os.system}, file)
        expected = "holds a pickled object with code (posix.system)"
    elif damage == "truncated":
        torch.save(weights, file)
        file.write_bytes(file.read_bytes()[:-100])
        expected = "truncated"
    else:
        weights["out_conv.bias"] = torch.full((3,), 1e6)
        torch.save(weights, file)
        options, expected = ("--fp16",), "conv_out.bias has values beyond 65504"

    line = refused("sr-unet", file, out, *options)

    assert expected in line
    assert list(tmp_path.rglob("folder/*")) == []


def test_a_full_disk_leaves_nothing_behind(files, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusers.models.modeling_utils.safetensors.torch.save_file", fail)
    assert "No space left on device" in refused("movq", files / "movq.pt", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_kind_says_which_command_to_use(files, tmp_path):
    line = refused("sr-unet", files / "movq.pt", tmp_path / "out")
    assert "looks like the released MoVQ; use `ksr convert movq`" in line
    line = refused("movq", tmp_path / "nowhere.pt", tmp_path / "out")
    assert "nowhere.pt" in line


def test_everybody_may_read_what_was_written(files, tmp_path):
    converted("movq", files / "movq.pt", tmp_path / "out")
    umask = os.umask(0)
    os.umask(umask)
    for file in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask


def test_groups_and_heads_can_be_given(files, tmp_path):
    path = converted("refiner", files / "kandinsky3_flash.pt", tmp_path / "out",
                     "--num-groups", 16, "--head-dim", 32)  # fmt: skip
    config = RefinerUNet.from_pretrained(path).config
    assert (config.groups, config.attention_head_dim) == (16, 32)
    assert "num_groups=5 does not divide" in refused(
        "sr-unet", files / "KandiSuperRes.ckpt", tmp_path / "other", "--num-groups", 5
    )
