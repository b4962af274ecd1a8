import pickle
import random
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from ksr_distill.models.released_files import read_content, read_state_dict, read_tensor
from tests.golden import golden_shapes, golden_weights


@pytest.fixture(scope="module")
def weights():
    return golden_weights(golden_shapes("tiny_state_dicts/sr_unet"))


class Code:
    """What a hostile file holds: unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def assert_same(read, weights):
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], value) for name, value in weights.items())


@pytest.mark.parametrize("key", ["unet", "state_dict", None])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_torch_files_are_read_with_and_without_a_key_around(weights, tmp_path, key, is_zip):
    path = tmp_path / "model.ckpt"
    content = {key: weights, "null_embedding": torch.zeros(2)} if key else weights
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    assert_same(read_state_dict(path, "sr-unet"), weights)


def test_safetensors_are_read_whatever_the_name(weights, tmp_path):
    save_file(weights, tmp_path / "model.pt")
    assert_same(read_state_dict(tmp_path / "model.pt", "sr-unet"), weights)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_does_not_run(weights, tmp_path, is_zip):
    path, proof = tmp_path / "model.pt", tmp_path / "it_ran"
    torch.save({"unet": weights, "extra": Code(proof)}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(
        ValueError, match=r"a pickled object with code \(_?io\.open\), which is never"
    ):
        read_content(path)
    assert not proof.exists()


def test_a_bare_pickle_with_code_does_not_run(tmp_path):
    path, proof = tmp_path / "model.pt", tmp_path / "it_ran"
    path.write_bytes(pickle.dumps(Code(proof)))
    with pytest.raises(ValueError, match=r"model\.pt"):
        read_content(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("content", "look"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        (b"It was a dark and stormy night.\n", "a text file \\('It was a dark"),
        ("Straße".encode() * 400, "a text file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG picture"),
        (b"\xff\xd8\xff\xe0" + bytes(99), "a JPEG picture"),
        (bytes(4096), "no weight file"),
        (b"\x80\x02" + bytes(99), "a damaged checkpoint, or none at all"),
        ((64).to_bytes(8, "little") + b'{"a":', "damaged or truncated safetensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_weight_file_is_told_by_its_look(tmp_path, content, look):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\.pt is {look}|model\.pt {look}|{look}"):
        read_content(path)


def test_a_plain_zip_is_told(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("photo.jpg", b"x")
    with pytest.raises(ValueError, match="a zip archive of 1 files, not a weight file"):
        read_content(tmp_path / "model.pt")


def test_a_folder_is_told(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        read_content(tmp_path)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("share", [0.3, 0.99])
def test_a_truncated_file_is_told(weights, tmp_path, suffix, share):
    path = tmp_path / f"model.{suffix}"
    (torch.save if suffix == "pt" else save_file)(weights, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="truncated"):
        read_content(path)


def test_a_flipped_bit_is_noticed(weights, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(weights, path)
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="does not match its checksum"):
        read_content(path)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("seed", range(40))
def test_damage_anywhere_is_an_error_about_the_file(tmp_path, seed, is_zip):
    path = tmp_path / "model.pt"
    torch.save({"a.weight": torch.ones(3)}, path, _use_new_zipfile_serialization=is_zip)
    draw = random.Random(seed)
    damaged = bytearray(path.read_bytes())
    for _ in range(3):
        damaged[draw.randrange(len(damaged))] = draw.randrange(256)
    path.write_bytes(damaged[: draw.randrange(len(damaged))] if seed % 3 == 0 else damaged)

    with pytest.raises(ValueError, match=r"model\.pt"):
        read_state_dict(path, "sr-unet")


@pytest.mark.parametrize(
    ("name", "look"), [("refiner_unet", "the released refiner"), ("movq", "the released MoVQ")]
)
def test_another_released_model_is_told(tmp_path, name, look):
    shapes = golden_shapes(f"tiny_state_dicts/{name}")
    torch.save({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt looks like {look}.*; use `ksr convert"):
        read_state_dict(tmp_path / "x.pt", "sr-unet")


def test_our_own_weights_are_told(tmp_path):
    ours = {"conv_in.weight": torch.zeros(1), "down_levels.0.0.conv_1.weight": torch.zeros(1)}
    save_file(ours, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="this package's KSRUNet, which need no conversion"):
        read_state_dict(tmp_path / "x.safetensors", "sr-unet")


@pytest.mark.parametrize("extra", [None, random.Random(0)], ids=["tensors alone", "with objects"])
def test_a_lightning_checkpoint_is_told(tmp_path, extra):
    checkpoint = {
        "pytorch-lightning_version": "2.6.0",
        "state_dict": {"student.conv_in.weight": torch.zeros(1)},
        "callbacks": extra,
    }
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="looks like a Lightning checkpoint; use `ksr export`"):
        read_state_dict(tmp_path / "last.ckpt", "sr-unet")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({"unet": [1]}, "its state dict is a list"),
        ({"epoch": 3, "lr": 0.1}, r"it holds 2 entries \(epoch, lr, …\)"),
        ({3: torch.zeros(1)}, "has the key 3"),
        (torch.zeros(1, 4, 8), "looks like a single tensor, such as the released context"),
    ],
)
def test_other_content_is_described(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        read_state_dict(tmp_path / "x.pt", "sr-unet")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("words", "init_conv.bias is a str, not a tensor"),
        (torch.zeros(4, dtype=torch.int64), "init_conv.bias is torch.strided torch.int64"),
        (torch.tensor([1.0, torch.nan]), "init_conv.bias has values that are not finite"),
    ],
    ids=["text", "integers", "nan"],
)
def test_a_value_that_is_no_weight_is_named(weights, tmp_path, value, message):
    torch.save(weights | {"init_conv.bias": value}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        read_state_dict(tmp_path / "x.pt", "sr-unet")


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"context": t}], ids=["bare", "in a dict"])
def test_a_context_is_a_single_tensor(tmp_path, wrap):
    context = torch.rand(1, 4, 8)
    torch.save(wrap(context), tmp_path / "context.pt")
    assert torch.equal(read_tensor(tmp_path / "context.pt", "context"), context)


def test_a_model_is_no_context(weights, tmp_path):
    torch.save({"unet": weights}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="looks like a released super-resolution U-Net"):
        read_tensor(tmp_path / "x.pt", "context")
