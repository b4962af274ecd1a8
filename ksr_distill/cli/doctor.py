"""``ksr doctor``: checks packages, GPUs, memory and disk, one line each."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import NamedTuple

import typer

GIBIBYTE = 2**30
# Distribution and module names: what the base install needs, then what each extra adds.
BASE_PACKAGES = {
    "torch": "torch",
    "diffusers": "diffusers",
    "accelerate": "accelerate",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "pillow": "PIL",
    "psutil": "psutil",
    "jinja2": "jinja2",
    "jaxtyping": "jaxtyping",
}
EXTRA_PACKAGES = {
    "train": {
        "lightning": "lightning",
        "hydra-core": "hydra",
        "wandb": "wandb",
        "webdataset": "webdataset",
        "torchmetrics": "torchmetrics",
        "kornia": "kornia",
        "matplotlib": "matplotlib",
    },
    "study": {"starlette": "starlette", "uvicorn": "uvicorn"},
    "slurm": {"hydra-submitit-launcher": "hydra_plugins.hydra_submitit_launcher"},
}


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        name: What was checked.
        text: The result, and the remedy if it is broken.
        is_broken: Whether something will fail because of it.
    """

    name: str
    text: str
    is_broken: bool = False


def register(app: typer.Typer) -> None:
    """Add the command to the console script."""

    @app.command()
    def doctor() -> None:
        """Check packages, GPUs, memory and disk, a line each; exit 1 if something is broken."""
        num_broken = 0
        for finding in examine():
            mark = "BROKEN" if finding.is_broken else "ok"
            typer.echo(f"{mark:<6} {finding.name:<24} {finding.text}")
            num_broken += finding.is_broken
        if num_broken:
            typer.echo(f"{num_broken} broken", err=True)
            raise typer.Exit(1)


def examine() -> Iterator[Finding]:
    """Yield every finding; torchvision last, because importing it may break the others."""
    yield examine_python()
    for distribution, module in BASE_PACKAGES.items():
        yield examine_package(distribution, module, extra=None)
    yield examine_libvips()
    for extra, packages in EXTRA_PACKAGES.items():
        for distribution, module in packages.items():
            yield examine_package(distribution, module, extra=extra)
    yield from examine_gpus()
    yield examine_memory()
    yield examine_disk(Path.cwd())
    yield examine_torchvision()


def examine_python() -> Finding:
    """Return whether this Python is one that the package allows."""
    is_broken = not (3, 11) <= sys.version_info[:2] < (3, 14)
    remedy = "; use 3.11, 3.12 or 3.13" if is_broken else ""
    text = f"{platform.python_version()}, {platform.system()} {platform.machine()}{remedy}"
    return Finding("python", text, is_broken)


def examine_package(distribution: str, module: str, *, extra: str | None) -> Finding:
    """Return a package's version, importing it: an installed package can still be broken."""
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        if extra is None:
            return Finding(distribution, "not installed; run: pip install ksr-distill", True)
        return Finding(distribution, f"not installed; pip install 'ksr-distill[{extra}]' adds it")
    return _examine_import(distribution, module, version)


def _examine_import(name: str, module: str, version: str) -> Finding:
    try:
        import_module(module)
    except Exception as error:  # noqa: BLE001 -- whatever the import raises is the finding
        return Finding(name, f"{version}, but its import fails: {_one_line(error)}", True)
    return Finding(name, version)


def examine_libvips() -> Finding:
    """Return libvips' version, and which formats its build reads beyond PNG, JPEG and WebP."""
    finding = examine_package("pyvips", "pyvips", extra=None)
    if finding.is_broken:
        return finding
    import pyvips

    major, minor, micro = (pyvips.version(part) for part in range(3))
    loaders = {"HEIC/AVIF": "heifload", "JPEG XL": "jxlload", "TIFF": "tiffload"}
    readable = [
        label
        for label, loader in loaders.items()
        if pyvips.type_find("VipsForeignLoad", loader) != 0
    ]
    text = f"{finding.text}, libvips {major}.{minor}.{micro}; also reads {', '.join(readable)}"
    return Finding("pyvips", text)


def examine_gpus() -> Iterator[Finding]:
    """Yield each GPU that torch sees, or why it sees none."""
    try:
        import torch
    except Exception:  # noqa: BLE001 -- reported with the packages
        return
    if not torch.cuda.is_available():
        has_driver = shutil.which("nvidia-smi") is not None
        build = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
        remedy = (
            f"; a driver is there, but {build}: install a build that fits" if has_driver else ""
        )
        yield Finding("gpu", f"none that torch can use{remedy}", has_driver)
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        text = f"{gpu.name}, {gpu.total_memory / GIBIBYTE:.0f} GiB, CUDA {torch.version.cuda}"
        yield Finding(f"gpu {index}", text)


def examine_memory() -> Finding:
    """Return the main memory and the cores that this process may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    affinity = getattr(os, "sched_getaffinity", None)
    num_cores = len(affinity(0)) if affinity else os.cpu_count()
    return Finding("memory, cores", f"{total / GIBIBYTE:.1f} GiB, {num_cores} cores")


def examine_disk(folder: Path) -> Finding:
    """Return the free disk; a training run needs a few GiB for checkpoints."""
    free = shutil.disk_usage(folder).free / GIBIBYTE
    is_broken = free < 1
    remedy = "; less than 1 GiB: checkpoints will not fit" if is_broken else ""
    return Finding("disk", f"{free:.1f} GiB free in {folder}{remedy}", is_broken)


def examine_torchvision() -> Finding:
    """Return whether a torchvision is installed that does not match torch.

    This package does not use it, but torchmetrics, lightning and diffusers import it if it is
    installed, and PyPI's build for CUDA makes all three fail beside a CPU torch (measured).
    """
    try:
        version = metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return Finding("torchvision", "not installed, and not needed")
    finding = _examine_import("torchvision", "torchvision", version)
    if finding.is_broken:
        return finding._replace(text=f"{finding.text}; run: pip uninstall torchvision")
    return finding


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
