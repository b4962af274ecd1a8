"""One pass's finished tiles in a file, and the journals that say which are whole."""

import os
import re
import zlib
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ksr_distill.inference.tiling.tiles import TilePlan

JOURNAL_LINE = re.compile(rb"(\d+) ([0-9a-f]{8})\n")
CHANNELS = 3


class TileFile:
    """Tiles of one pass in one raw file, with a journal of those that are whole.

    A tile is written into its place, and then its number and checksum are appended to the journal:
    a kill between the two costs that tile and no other. The checksums find what a power cut lost.

    Args:
        path: Of the raw file; processes that share it have a journal each beside it.
        worker: Whose journal this process writes.
    """

    def __init__(self, path: Path, plan: TilePlan, dtype: torch.dtype, *, worker: int = 0) -> None:
        self.path = path
        self._dtype = dtype
        self._shape = (plan.rows.tile, plan.columns.tile, CHANNELS)
        self._row_bytes = plan.columns.tile * CHANNELS * dtype.itemsize
        self._tile_bytes = self._row_bytes * plan.rows.tile
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._journal = path.with_suffix(f".{worker}.journal")
        _end_torn_line(self._journal)
        self._done = {
            index for index, checksum in self._journaled() if self._checksum(index) == checksum
        }

    def __del__(self) -> None:
        """Close the file; the tiles stay."""
        if hasattr(self, "_file"):
            os.close(self._file)

    def refresh(self) -> None:
        """Notice what other processes have made; their checksums are trusted."""
        self._done |= {index for index, _ in self._journaled()}

    def is_done(self, index: int) -> bool:
        """Tell whether the tile is there, whole."""
        return index in self._done

    def write(self, index: int, pixels: Float[Tensor, "c h w"]) -> None:
        """Keep a tile, and say so in the journal."""
        rows = pixels.to("cpu", self._dtype).permute(1, 2, 0).contiguous()
        data = rows.view(torch.uint8).numpy().tobytes()
        _write_whole(self._file, data, index * self._tile_bytes)
        with self._journal.open("ab") as journal:
            journal.write(b"%d %08x\n" % (index, zlib.crc32(data)))
        self._done.add(index)

    def read_rows(self, index: int, top: int, bottom: int) -> Float[Tensor, "c h w"]:
        """Return rows [top, bottom) of a tile."""
        data = self._read(
            index * self._tile_bytes + top * self._row_bytes, (bottom - top) * self._row_bytes
        )
        rows = torch.frombuffer(data, dtype=self._dtype).view(bottom - top, *self._shape[1:])
        return rows.permute(2, 0, 1)

    def _read(self, offset: int, length: int) -> bytearray:
        data = bytearray(length)
        if os.preadv(self._file, [data], offset) != length:
            raise OSError(
                f"{self.path} ends before byte {offset + length}; remove it and run again"
            )
        return data

    def _checksum(self, index: int) -> int | None:
        start = index * self._tile_bytes
        if os.fstat(self._file).st_size < start + self._tile_bytes:
            return None
        return zlib.crc32(self._read(start, self._tile_bytes))

    def _journaled(self) -> list[tuple[int, int]]:
        """Return (tile, checksum) of all journals' whole lines."""
        return [
            (int(line[1]), int(line[2], 16))
            for journal in sorted(self.path.parent.glob(f"{self.path.stem}.*.journal"))
            for line in JOURNAL_LINE.finditer(journal.read_bytes())
        ]


def _end_torn_line(journal: Path) -> None:
    """Close the line that a kill left open, so that the next one is read as its own."""
    if journal.exists() and (journal.read_bytes() or b"\n")[-1:] != b"\n":
        with journal.open("ab") as file:
            file.write(b"\n")


def _write_whole(descriptor: int, data: bytes, offset: int) -> None:
    """Write all bytes: pwrite may stop early where a disk fills up."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
