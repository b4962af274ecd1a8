"""Reads untrusted weight files: tensors only, with a clear error for anything else."""

import codecs
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_ZIP_MAGIC = b"PK\x03\x04"
_LIGHTNING_KEY = "pytorch-lightning_version"
_MAX_PEEK_BYTES = 64 * 2**20

# What torch's restricted unpickler and the zip readers raise on damaged or foreign files.
_LOAD_FAILURES = (
    pickle.UnpicklingError, zipfile.BadZipFile, struct.error, zlib.error, RuntimeError, EOFError,
    ValueError, LookupError, AttributeError, TypeError, OverflowError, AssertionError, MemoryError,
)  # fmt: skip

_KNOWN_STARTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run `git lfs pull`",
    b"<!doctype": "a web page; the download went wrong",
    b"<html": "a web page; the download went wrong",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"\x89png": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89hdf": "an HDF5 file",
}

# The kinds of state dict, each by names that only it has.
_SIGNATURES = {
    "sr-unet": ("init_conv.weight", "to_time_embed.1.weight", "out_conv.weight"),
    "refiner": ("in_layer.weight", "feature_pooling.attention.to_key.weight"),
    "movq": ("encoder.down.0.block.0.conv1.weight", "post_quant_conv.weight"),
    "KSRUNet": ("conv_in.weight", "down_levels.0.0.conv_1.weight"),
    "Kandinsky3UNet": ("conv_in.weight", "add_time_condition.attention.to_k.weight"),
    "VQModel": ("encoder.down_blocks.0.resnets.0.conv1.weight", "post_quant_conv.weight"),
}
_DESCRIPTIONS = {
    "sr-unet": "a released super-resolution U-Net; use `ksr convert sr-unet`",
    "refiner": "the released refiner (Kandinsky 3.0 Flash); use `ksr convert refiner`",
    "movq": "the released MoVQ; use `ksr convert movq`",
    "context": "a single tensor, such as the released context; use `ksr convert context`",
    "KSRUNet": "weights of this package's KSRUNet, which need no conversion",
    "Kandinsky3UNet": "weights of diffusers' Kandinsky3UNet, which need no conversion",
    "VQModel": "weights of diffusers' VQModel, which need no conversion",
}


def read_state_dict(path: Path, kind: str) -> dict[str, Tensor]:
    """Return the state dict in the file: bare, or below ``unet`` or ``state_dict``.

    Args:
        path: A ``.pt``, ``.ckpt`` or ``.safetensors`` file; told apart by its content.
        kind: What is expected: ``sr-unet``, ``refiner`` or ``movq``.

    Raises:
        ValueError: If the file is something else; says what it looks like.
    """
    content = _unwrap(read_content(path), path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} looks like {_DESCRIPTIONS['context']}")
    found = recognise(content)
    if found != kind:
        raise ValueError(f"{path} {_describe(found, content)}")
    return check_tensors(content, path)


def read_tensor(path: Path, kind: str) -> Tensor:
    """Return the single tensor in the file, bare or alone in a dict.

    Args:
        kind: What is expected, for the error.
    """
    content = _unwrap(read_content(path), path)
    if isinstance(content, Mapping) and len(content) == 1:
        content = next(iter(content.values()))
    if isinstance(content, Mapping):
        raise ValueError(f"{path} {_describe(recognise(content), content)}")
    return check_tensors({kind: content}, path)[kind]


def recognise(state_dict: Mapping[str, Any]) -> str | None:
    """Return the kind of model that has these names, or None."""
    for kind, names in _SIGNATURES.items():
        if all(name in state_dict for name in names):
            return kind
    return None


def read_content(path: Path) -> Any:
    """Return what the file holds, unpickled with ``weights_only``: no code can run.

    Raises:
        ValueError: If it is no weight file, is damaged, or holds pickled objects besides tensors.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the weight file inside it")
    with path.open("rb") as file:
        head = file.read(1024)
    size = path.stat().st_size
    if _is_safetensors(head):
        return _read_safetensors(path)
    is_zip = head.startswith(_ZIP_MAGIC)
    if is_zip:
        _check_archive(path, size)
    elif not head.startswith(b"\x80"):
        raise ValueError(f"{path} is {_look(head)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the pickle's protocol: we say more
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except _LOAD_FAILURES as error:
        _refuse_pickle(path, error, is_zip)


def check_tensors(state_dict: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the state dict if it is nothing but finite, dense tensors of floating point."""
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name} is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or not value.is_floating_point():
            raise ValueError(f"{path}: {name} is {value.layout} {value.dtype}, not dense floats")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{path}: {name} has values that are not finite; the file is damaged")
    return dict(state_dict)


def _unwrap(content: Any, path: Path) -> Any:
    if isinstance(content, Tensor):
        return content
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    inner = next((content[k] for k in ("unet", "state_dict") if k in content), content)
    if not isinstance(inner, Mapping):
        raise ValueError(f"{path}: its state dict is a {type(inner).__name__}, not a dict")
    if _LIGHTNING_KEY in content and recognise(inner) is None:
        raise ValueError(f"{path} looks like a Lightning checkpoint; use `ksr export` for ours")
    strange = next((name for name in inner if not isinstance(name, str)), None)
    if strange is not None:
        raise ValueError(f"{path} has the key {strange!r}; a state dict's keys are names")
    return inner


def _describe(kind: str | None, content: Mapping[str, Any]) -> str:
    if kind is not None:
        return f"looks like {_DESCRIPTIONS[kind]}"
    names = ", ".join(list(content)[:3]) or "nothing"
    return f"is none of the released models: it holds {len(content)} entries ({names}, …)"


def _is_safetensors(head: bytes) -> bool:
    """A header's length in eight bytes (torch's files would need a giant one), then JSON."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is a damaged or truncated safetensors file ({error})") from error


def _check_archive(path: Path, size: int) -> None:
    """Refuse truncated archives and, because torch does not look, flipped bits."""
    try:
        has_end = zipfile.is_zipfile(path)
        names, damaged = _names_and_first_damaged(path) if has_end else ([], None)
    except (*_LOAD_FAILURES, OSError) as error:  # OSError: an offset that lies outside
        raise ValueError(f"{path} is a damaged archive ({error}); download it again") from error
    if not has_end:
        raise ValueError(f"{path} is truncated at {size} bytes; copy or download it again")
    if not any(name.endswith("/data.pkl") for name in names):
        raise ValueError(f"{path} is a zip archive of {len(names)} files, not a weight file")
    if damaged is not None:
        raise ValueError(f"{path} is damaged: {damaged} does not match its checksum")


def _names_and_first_damaged(path: Path) -> tuple[list[str], str | None]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist(), archive.testzip()


def _look(head: bytes) -> str:
    for start, description in _KNOWN_STARTS.items():
        if head.lstrip().lower().startswith(start):
            return description
    if not head:
        return "empty (0 bytes); the download went wrong"
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        return "no weight file: neither a torch archive nor safetensors"
    return f"a text file ({text.strip()[:40]!r}), not weights"


def _refuse_pickle(path: Path, error: Exception, is_zip: bool) -> NoReturn:
    named = re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(error))
    if _LIGHTNING_KEY in _pickled_strings(path, is_zip):
        message = "looks like a Lightning checkpoint; use `ksr export` for ours"
    elif isinstance(error, pickle.UnpicklingError) and named:
        message = (
            f"holds a pickled object with code ({named[1]}), which is never run; "
            "ask for a file with tensors alone (safetensors)"
        )
    else:
        reason = f"{type(error).__name__}: {error}"[:120]
        message = f"is a damaged checkpoint, or none at all ({reason})"
    raise ValueError(f"{path} {message}") from error


def _pickled_strings(path: Path, is_zip: bool) -> set[str]:
    """Return the strings in the pickle without running it."""
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as file:
                pickled = file.read(_MAX_PEEK_BYTES)
    else:
        with path.open("rb") as file:
            pickled = file.read(_MAX_PEEK_BYTES)
    strings: set[str] = set()
    try:
        strings.update(arg for _, arg, _ in pickletools.genops(pickled) if isinstance(arg, str))
    except _LOAD_FAILURES:  # the pickle ends early: what was read so far is enough
        return strings
    return strings
