"""What loading costs beyond decoding: crops per second from shards, against the bare files.

    python -m benchmarks.loader                      # synthetic pictures
    python -m benchmarks.loader --photos FOLDER      # yours

Bare decoding reads the same members in the same order and converts them to arrays: no index, no
checksum, no crop, no batch. Both alternate in one run. Processor time per crop hardly depends on
other programs; crops per second by the clock need an idle machine.
"""

import argparse
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.measuring import RESULTS, write_results
from ksr_distill.data.index import Member, read_index
from ksr_distill.data.loading import collate_update
from ksr_distill.data.packing import pack_folder
from ksr_distill.data.reader import ShardDataset
from ksr_distill.data.sources import PackOptions
from ksr_distill.degradation import BicubicDegradation
from ksr_distill.training.datamodule import ShardDataModule

BATCH = 16


class Case(NamedTuple):
    """Files of one kind, and the crops that are taken from them."""

    name: str
    suffix: str
    side_px: int
    crop_px: int
    pictures: int


CASES = (
    Case("tiles, WebP", "png", 160, 128, 200),
    Case("pictures, WebP", "png", 512, 256, 40),
    Case("pictures, JPEG", "jpg", 768, 256, 40),
)


class Row(NamedTuple):
    """Results of a case; a share of 1 is as fast as bare decoding."""

    case: str
    crop_px: int
    bare_cpu_ms: float
    crop_cpu_ms: float
    cpu_share: float
    crops_per_s_and_core: float
    bare_crops_per_s: float
    loader_crops_per_s: float
    clock_share: float
    workers: int


def make_pictures(folder: Path, case: Case) -> None:
    """Write pictures with edges, flat areas and grain, which compress about like photos."""
    generator = np.random.default_rng(0)
    for number in range(case.pictures):
        coarse = generator.integers(0, 256, (case.side_px // 16, case.side_px // 16, 3), np.uint8)
        smooth = Image.fromarray(coarse).resize(
            (case.side_px, case.side_px), Image.Resampling.BICUBIC
        )
        grain = generator.normal(0, 4, (case.side_px, case.side_px, 3))
        pixels = np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.{case.suffix}", quality=90)


def pack(photos: Path, out: Path, tile_px: int | None) -> str:
    """Pack as `ksr shards pack` does; return the pattern for data.shards."""
    options = PackOptions(0.0, (), 1, 0.0, tile_px, 64)
    report = pack_folder(photos, out, options, num_workers=0, on_progress=lambda *_: None)
    return report.patterns["train"]


def datamodule(shards: str, *, crop_px: int, workers: int) -> ShardDataModule:
    """Return the training's data module, as conf/data/shards.yaml sets it."""
    module = ShardDataModule(
        window_shards=16, shards=shards, val_shards=None, degradation=BicubicDegradation(2),
        seed=0, num_updates=10**6, crop_px=crop_px, flip_prob=0.5, transpose_prob=0.0,
        batch_size=BATCH, micro_batch_size=None, num_val_pictures=1, val_crop_px=None,
        val_batch_size=1, val_side_multiple=8, corrupt_budget=0, num_workers=workers,
        prefetch_updates=2, worker_start_method=None, timeout_s=60,
    )  # fmt: skip
    module.check(world_size=1)
    return module


def members_in_order(module: ShardDataModule, count: int) -> list[tuple[Path, Member]]:
    """Return the locations of the first positions' files."""
    indexes = [read_index(path) for path in module.paths]
    places = [module.plan.locate(position) for position in range(count)]  # type: ignore[union-attr]
    return [(module.paths[p.shard], indexes[p.shard].members[p.member]) for p in places]


def decode_bare(members: Sequence[tuple[Path, Member]]) -> None:
    """Read and decode the files, nothing else."""
    descriptors = {path: os.open(path, os.O_RDONLY) for path in {path for path, _ in members}}
    for path, member in members:
        content = os.pread(descriptors[path], member.size, member.offset)
        np.asarray(Image.open(io.BytesIO(content)))
    for descriptor in descriptors.values():
        os.close(descriptor)


def load_batches(dataset: ShardDataset, count: int) -> None:
    """Make the batches of the first positions, in this process."""
    for first in range(0, count, BATCH):
        collate_update([dataset[i] for i in range(first, min(first + BATCH, count))])


def decode_in_processes(members: Sequence[tuple[Path, Member]], workers: int) -> None:
    """Share the files among processes, as a loader's workers do."""
    context = multiprocessing.get_context("fork")
    shares = [members[i::workers] for i in range(workers)]
    processes = [context.Process(target=decode_bare, args=(share,)) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def drain(module: ShardDataModule, count: int) -> None:
    """Take the batches of the first positions from the training's loader."""
    batches: Any = iter(module.train_dataloader())
    for _ in islice(batches, count // BATCH):
        pass
    batches.close()


def alternate(
    calls: Sequence[Callable[[], None]], clock: Callable[[], float], repeats: int
) -> list[float]:
    """Return each call's fastest time by a clock, over repeats in turns: noise only adds."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 1):
        for times, call in zip(taken, calls, strict=True):
            start = clock()
            call()
            times.append(clock() - start)
    return [min(times[1:]) for times in taken]


def measure(case: Case, shards: str, *, positions: int, workers: int, repeats: int) -> Row:
    """Return a case's row."""
    module = datamodule(shards, crop_px=case.crop_px, workers=0)
    members = members_in_order(module, positions)
    dataset: Any = module._training_loader().dataset
    torch.set_num_threads(1)  # as in a worker; others would spin, and their time would count
    bare_cpu, crop_cpu = alternate(
        [lambda: decode_bare(members), lambda: load_batches(dataset, positions)],
        time.process_time,
        repeats,
    )
    parallel = datamodule(shards, crop_px=case.crop_px, workers=workers)
    many = members_in_order(module, 4 * positions)
    bare, loader = alternate(
        [lambda: decode_in_processes(many, workers), lambda: drain(parallel, 4 * positions)],
        time.perf_counter,
        max(1, repeats // 2),
    )
    loaded = 4 * positions // BATCH * BATCH
    return Row(
        case.name, case.crop_px, bare_cpu / positions * 1e3, crop_cpu / positions * 1e3,
        bare_cpu / crop_cpu, positions / crop_cpu, len(many) / bare, loaded / loader,
        loaded / loader / (len(many) / bare), workers,
    )  # fmt: skip


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows as Markdown."""
    print("| files | crops | bare, ms of processor | crop, ms | share | crops/s and core "
          "| crops/s, workers | share by the clock |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for r in rows:
        print(f"| {r.case} | {r.crop_px}² | {r.bare_cpu_ms:.3f} | {r.crop_cpu_ms:.3f} "
              f"| {r.cpu_share:.1%} | {r.crops_per_s_and_core:.0f} "
              f"| {r.loader_crops_per_s:.0f}, {r.workers} | {r.clock_share:.1%} |")  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, help="a folder of photos instead of made-up ones")
    parser.add_argument("--tile-px", type=int, help="cut the photos as `ksr shards pack` would")
    parser.add_argument("--crop-px", type=int, default=128, help="of the photos' crops")
    parser.add_argument("--positions", type=int, default=192)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, default=RESULTS / "loader.json")
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for number, made in enumerate(CASES[:1] if options.photos else CASES):
            case, photos = made, options.photos
            if photos:
                case = made._replace(name=photos.name, crop_px=options.crop_px)
            else:
                photos = folder / f"photos{number}"
                photos.mkdir()
                make_pictures(photos, case)
            shards = pack(photos, folder / f"shards{number}", options.tile_px)
            rows.append(measure(case, shards, positions=options.positions,
                                workers=options.workers, repeats=options.repeats))  # fmt: skip
    print_table(rows)
    results = {
        "share_of_bare_decoding": min(row.cpu_share for row in rows),
        "clock_share_of_bare_decoding": statistics.median(row.clock_share for row in rows),
        "crops_per_s_and_core": min(row.crops_per_s_and_core for row in rows),
        "rows": [row._asdict() for row in rows],
    }
    write_results(options.json, results)


if __name__ == "__main__":
    main()
