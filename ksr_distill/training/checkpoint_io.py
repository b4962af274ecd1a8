"""Checkpoint files that are either whole or not there, and say so with a checksum.

A checkpoint is a pair: ``update-000001000.ckpt`` and its manifest, ``update-000001000.ckpt.json``.
Both are written under a temporary name beside the target, flushed to the disk and moved; first the
manifest, so every ``.ckpt`` that can be seen has one. One flipped bit is loaded silently by
``torch.load`` (195 of 200, docs/reliability.md), hence the sha256.
"""

import hashlib
import json
import logging
import os
import pickle
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor

from ksr_distill.durable import flush_to_disk, replace_file

log = logging.getLogger(__name__)

TEMPORARY = ".tmp"
MANIFEST = ".json"
OWN_SUM = "sha256_of_the_above"
PLAIN = (str, int, float, bool, complex, bytes, type(None), torch.Size, torch.dtype, torch.device)


class _HashingWriter:
    """A file that knows the sha256 of what was written, so that a save reads nothing back."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def manifest_path(path: Path) -> Path:
    """Return where the manifest of a checkpoint lies."""
    return path.with_name(path.name + MANIFEST)


def write_checkpoint(checkpoint: dict[str, Any], path: Path, facts: dict[str, Any]) -> None:
    """Write a checkpoint and its manifest; a reader sees the whole pair or nothing.

    Args:
        checkpoint: Tensors and plain Python values only: it has to load with weights_only=True.
        path: Where it goes. A file of that name is replaced.
        facts: Goes into the manifest beside the checksum, e.g. the update and the metrics.

    Raises:
        OSError: When the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    manifest = manifest_path(path)
    manifest_temporary = manifest.with_name(manifest.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            writer = _HashingWriter(file)
            try:
                torch.save(checkpoint, cast(IO[bytes], writer))
            except RuntimeError as error:
                # torch's zip writer speaks of positions where the disk was full
                raise writer.error or error from error
            num_bytes = file.tell()
        flush_to_disk(temporary)
        summary = {"sha256": writer.sha256.hexdigest(), "bytes": num_bytes, **facts}
        manifest_temporary.write_text(manifest_text(summary))
        flush_to_disk(manifest_temporary)
        # Between the two moves no old file may stand under the new manifest.
        path.unlink(missing_ok=True)
        manifest_temporary.replace(manifest)
        temporary.replace(path)
        flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        manifest_temporary.unlink(missing_ok=True)


def manifest_text(facts: dict[str, Any]) -> str:
    """Return a manifest's text: the facts, and a checksum of them."""
    return json.dumps({**facts, OWN_SUM: _sum_of(facts)}, indent=2) + "\n"


def _sum_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_manifest(path: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint, or replace it as a whole."""
    replace_file(manifest_path(path), manifest_text(facts).encode())


def read_manifest(path: Path) -> dict[str, Any]:
    """Return what the manifest of a checkpoint says.

    Raises:
        ValueError: When it is missing or damaged.
    """
    manifest = manifest_path(path)
    try:
        if manifest.exists() and not manifest.is_file():
            raise ValueError("it is no file")  # a pipe would be waited for
        facts = json.loads(manifest.read_text())
        if facts.pop(OWN_SUM) != _sum_of(facts):
            raise ValueError("its own checksum differs")
        return {**facts, "sha256": str(facts["sha256"]), "bytes": int(facts["bytes"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{manifest}: no readable manifest ({type(error).__name__}), so {path.name} cannot be "
            "checked; copy checkpoints together with their .json, or use another checkpoint"
        ) from error


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint after checking every byte against it.

    Raises:
        ValueError: When size or checksum differ, or the manifest is missing.
    """
    facts = read_manifest(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; use another checkpoint")
    num_bytes = path.stat().st_size
    if num_bytes != facts["bytes"]:
        raise ValueError(
            f"{path}: {num_bytes} bytes, its manifest says {facts['bytes']}: the file is cut off; "
            "use another checkpoint"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != facts["sha256"]:
        raise ValueError(
            f"{path}: sha256 {found[:12]}…, its manifest says {facts['sha256'][:12]}…: the file is "
            "damaged; use another checkpoint"
        )
    return facts


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint on the CPU, checked against its manifest; no code in it can run.

    Raises:
        FileNotFoundError: When there is no such file; URLs are not read.
        ValueError: When the file is damaged or holds anything but tensors and plain values.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such checkpoint; give a local file (URLs are not read)"
        )
    if not manifest_path(path).exists():
        path = path.resolve()  # `last.ckpt` is a link; the manifest lies beside the file
    verify_checkpoint(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(
            f"{path}: refused ({str(error).splitlines()[0]}): a checkpoint may hold tensors and "
            "plain values only, for pickled code would run; use one that train.py wrote"
        ) from error


class PinnedMemory:
    """Host memory that a device copies into at full speed, cut out of large blocks.

    torch rounds each pinned tensor up to a power of two: 1.7 times the bytes of the full model.
    """

    def __init__(self, *, block_bytes: int = 2**28, pin: bool = True) -> None:
        """Make it; nothing is taken yet.

        Args:
            block_bytes: Of a block; a larger tensor has one of its own.
            pin: Without a device there is nothing to pin for.
        """
        self.block_bytes = block_bytes
        self.pin = pin
        self.num_bytes = 0
        self._free: Tensor = torch.empty(0, dtype=torch.uint8)
        self._places: dict[str, Tensor] = {}

    def place_for(self, tensor: Tensor, key: str) -> Tensor:
        """Return a tensor like this one, the same at each call with the key: pinning takes seconds.

        It has a storage of its own, so that it is saved alone and not with its whole block.
        """
        place = self._places.get(key)
        if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
            place = self._places[key] = self._cut(tensor)
        return place

    def _cut(self, tensor: Tensor) -> Tensor:
        if tensor.numel() == 0:
            return torch.empty_like(tensor, device="cpu")
        if tensor.nbytes > len(self._free):
            size = max(tensor.nbytes, self.block_bytes)
            self._free = torch.empty(size, dtype=torch.uint8, pin_memory=self.pin)
            self.num_bytes += size
        flat = torch.frombuffer(self._free.numpy(), dtype=tensor.dtype, count=tensor.numel())
        self._free = self._free[-(-tensor.nbytes // 64) * 64 :]
        return flat.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride())


def copy_to_host(tree: Any, memory: PinnedMemory, key: str = "") -> Any:
    """Return the same tree with its tensors copied to host memory: what a background write may use.

    Args:
        tree: Nested dicts, lists and tuples of tensors and plain values.
        memory: Where a device's tensors go; the same places at every save.
        key: Where in the tree this is.
    """
    if isinstance(tree, Tensor):
        if tree.device.type == "cpu":
            return tree.detach().clone()
        return memory.place_for(tree, key).copy_(tree.detach(), non_blocking=True)
    if isinstance(tree, dict):
        copies = ((k, copy_to_host(v, memory, f"{key}/{k}")) for k, v in tree.items())
        return type(tree)(copies)
    if isinstance(tree, list | tuple):
        return type(tree)(copy_to_host(v, memory, f"{key}/{i}") for i, v in enumerate(tree))
    return tree


def refuse_what_will_not_load(tree: Any, key: str = "checkpoint") -> None:
    """Check, before it is written, that a checkpoint holds tensors and plain values only.

    Raises:
        TypeError: Names the place; such a file would be refused when the run is continued.
    """
    if isinstance(tree, dict):
        for name, value in tree.items():
            refuse_what_will_not_load(name, f"{key}/{name}")
            refuse_what_will_not_load(value, f"{key}/{name}")
    elif type(tree) in (list, tuple):
        for i, value in enumerate(tree):
            refuse_what_will_not_load(value, f"{key}/{i}")
    elif not isinstance(tree, Tensor) and type(tree) not in PLAIN:
        raise TypeError(f"{key} is a {type(tree).__name__}: store tensors and plain values only")


def _num_bytes(tree: Any) -> int:
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        return sum(map(_num_bytes, tree.values()))
    return sum(map(_num_bytes, tree)) if isinstance(tree, list | tuple) else 0


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's reader and writer of checkpoints: whole files, checksums, no pickled code.

    A save that fails for the disk's sake is logged and remembered in ``failure``; training goes on
    and the earlier checkpoints stay.
    """

    def __init__(self, *, background_above_mb: float | int) -> None:
        """Make the reader and writer.

        Args:
            background_above_mb: Larger checkpoints are copied, and written by a thread.
        """
        self.background_above_mb = background_above_mb
        self.failure: str | None = None
        self._memory = PinnedMemory()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint; ``storage_options`` are the facts that its manifest will hold."""
        self.wait()
        refuse_what_will_not_load(checkpoint)
        target, facts = Path(path), storage_options or {}
        target.parent.mkdir(parents=True, exist_ok=True)
        if _num_bytes(checkpoint) < self.background_above_mb * 1e6:
            self._write(checkpoint, target, facts)
            return
        copy = copy_to_host(checkpoint, self._memory)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._pending = self._writer.submit(self._write, copy, target, facts)

    def _write(self, checkpoint: dict[str, Any], path: Path, facts: dict[str, Any]) -> None:
        try:
            write_checkpoint(checkpoint, path, facts)
        except (OSError, RuntimeError) as error:
            self.failure = " ".join(str(error).split())
            log.error(
                "checkpoint %s was not written (%s); the earlier ones are kept, training goes on: "
                "free space in %s, or lower callbacks.checkpoint.keep_last and keep_best",
                path.name,
                self.failure,
                path.parent,
            )
        else:
            self.failure = None

    def when_written(self, action: Callable[[], None]) -> None:
        """Do something after everything handed over is on the disk, without waiting for it."""
        if self.is_writing:
            self._pending = self._writer.submit(action)  # the one thread takes them in turn
        else:
            action()

    @property
    def is_writing(self) -> bool:
        """Whether the thread still writes."""
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Return when everything handed over is on the disk, or has failed."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Return a checkpoint after checking its bytes and its contents."""
        if weights_only is False or map_location not in (None, "cpu"):
            raise ValueError(
                f"{path}: weights_only={weights_only}, map_location={map_location}: checkpoints "
                "are read to the CPU with weights_only=True alone; leave both arguments out"
            )
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint, then its manifest."""
        Path(path).unlink(missing_ok=True)
        manifest_path(Path(path)).unlink(missing_ok=True)

    def teardown(self) -> None:
        """Finish what is being written."""
        self.wait()
