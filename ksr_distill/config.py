"""Checks of the composed config that no group can make alone, before any model is built."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ksr_distill.model_json import read_object

ALLOWED_TARGETS = ("ksr_distill.", "lightning.pytorch.")
"""Nothing else is instantiated from a config: a `_target_` such as torch.load runs code."""

STRATEGIES = ("auto", "fsdp")

PRECISIONS = ("bf16-mixed", "bf16", "32-true", "32", 32)
"""Not float16: its scaled gradients would be clipped at their scaled norm. Weights stay float32."""

SHORTENING = ("max_steps", "min_steps", "max_time", "limit_train_batches", "overfit_batches",
              "fast_dev_run")  # fmt: skip
"""Trainer options that end a run early; it would then look like a finished one."""

MIN_CROP_PX = 32
"""`evaluation.metrics.CHECKERBOARD_TILE_PX`, which this layer may not import."""

MIN_VAL_CROP_PX = 56
"""`evaluation.distributions.MIN_SIDE_PX`, likewise: patches of 7 px on the fourth level, 7 · 2³."""


def check_train_config(config: Mapping[str, Any]) -> None:
    """Check everything that can be checked without building anything.

    Args:
        config: The resolved config of train.yaml.

    Raises:
        ValueError: One line: key, value, what is allowed, what to do.
    """
    check_targets(config)
    check_game(config)
    check_cuda_graphs(config)
    check_trainer(config["trainer"])
    check_run_folder(config)
    check_whole_number(config, "num_updates", at_least=1)
    check_whole_number(config, "scale", at_least=2)
    check_whole_number(config, "seed", at_least=0)
    check_whole_number(config, "log_every", at_least=1)
    check_whole_number(config, "validate_every", at_least=1)
    check_crops(config)
    if config["data"]["val_shards"] and config["validate_every"] > config["num_updates"]:
        raise ValueError(
            f"validate_every={config['validate_every']} is more than num_updates="
            f"{config['num_updates']}, so the run would never be validated; use at most the latter"
        )
    check_warmup(config)


def check_crops(config: Mapping[str, Any]) -> None:
    """Refuse crops that do not fit the network, or are too small for the metrics of a run."""
    stride = model_stride(config)
    crop_px = config["data"]["crop_px"]
    multiple = math.lcm(stride, config["scale"])
    least = -(-MIN_CROP_PX // multiple) * multiple
    if not isinstance(crop_px, int) or crop_px < multiple or crop_px % multiple:
        nearest = max(least, int(float(crop_px)) // multiple * multiple)
        raise ValueError(
            f"data.crop_px={crop_px} is not a multiple of {multiple} (the U-Net's stride {stride} "
            f"and scale {config['scale']}); use {nearest}"
        )
    if crop_px < MIN_CROP_PX:
        raise ValueError(
            f"data.crop_px={crop_px} is too small to look for checkerboards in "
            f"health/checkerboard_peak, whose tiles are {MIN_CROP_PX} px; use at least {least}"
        )
    val_crop_px = config["data"]["val_crop_px"]
    if config["data"]["val_shards"] and val_crop_px is not None and val_crop_px < MIN_VAL_CROP_PX:
        raise ValueError(
            f"data.val_crop_px={val_crop_px} is too small for val/swd, whose pyramid has four "
            f"levels of 7 px patches; use at least {MIN_VAL_CROP_PX}, or data.val_shards=null"
        )
    check_val_sides(config["data"], multiple=multiple)


def check_val_sides(data: Mapping[str, Any], *, multiple: int) -> None:
    """Refuse validation pictures that the network cannot take, before the first validation does."""
    key = "val_side_multiple" if data["val_crop_px"] is None else "val_crop_px"
    side = data[key]
    if data["val_shards"] and side % multiple:
        least = MIN_VAL_CROP_PX if key == "val_crop_px" else 1
        raise ValueError(
            f"data.{key}={side} is not a multiple of {multiple} (the U-Net's stride and scale); "
            f"use {max(side // multiple, -(-least // multiple)) * multiple}"
        )


def check_warmup(config: Mapping[str, Any]) -> None:
    """Refuse a run that ends before the student's first update: it would export the teacher."""
    game = config["loss"].get("game") if "game" in config["module"] else None
    if not game:
        return
    alone = game["critic_warmup_updates"] + game["critic_updates_per_student"] - 1
    if alone >= config["num_updates"]:
        raise ValueError(
            f"loss.game.critic_warmup_updates={game['critic_warmup_updates']} with num_updates="
            f"{config['num_updates']}: the critic would train alone for the first {alone} updates "
            "and the student never change; use a shorter warm-up, or a longer run"
        )


def check_game(config: Mapping[str, Any]) -> None:
    """Refuse a distillation with a teacher's loss, of which an experiment may have set parts."""
    if "game" not in config["module"]:
        return
    for part in ("game", "critic", "student"):
        if "_target_" not in (config["loss"].get(part) or {}):
            raise ValueError(
                f"loss.{part} is not set by the chosen loss, which trains a teacher; use "
                "loss=sr_default or loss=kandinsky31"
            )


def check_cuda_graphs(config: Mapping[str, Any]) -> None:
    """Refuse CUDA graphs of recomputed activations: dropout is repeated from the RNG state."""
    if config["cuda_graphs"] and config["gradient_checkpointing"]:
        raise ValueError(
            "cuda_graphs=true with gradient_checkpointing=true: an update that computes "
            "activations again cannot be captured; use cuda_graphs=false"
        )


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Refuse settings of Lightning's Trainer that this training does not support."""
    if trainer.get("precision") not in PRECISIONS:
        raise ValueError(
            f"trainer.precision={trainer.get('precision')!r} is not allowed: networks are trained "
            "in float32 weights without scaled gradients; use bf16-mixed, or 32-true"
        )
    for key in SHORTENING:
        if trainer.get(key) is not None:
            raise ValueError(
                f"trainer.{key}={trainer[key]!r} would end a run as if it had finished; leave it "
                "out and set num_updates"
            )
    devices = trainer.get("devices")
    is_list = isinstance(devices, str) and devices.replace(",", "").replace("-", "").isdigit()
    if isinstance(devices, str) and devices != "auto" and not is_list:
        raise ValueError(
            f"trainer.devices={devices!r} is not allowed; use auto, a number, or a list as [0,1]"
        )


def check_run_folder(config: Mapping[str, Any]) -> None:
    """Refuse a run without a folder of its own, or without checkpoints in it."""
    for key in ("name", "run_dir"):
        if not str(config[key]).strip("/. "):
            raise ValueError(f"{key}={config[key]!r} is no folder of its own; give the run one")
    if not config["callbacks"].get("checkpoint"):
        raise ValueError(
            "callbacks.checkpoint is removed: nothing of the run would be kept; keep it, and "
            "raise callbacks.checkpoint.every_updates to save rarely"
        )


def check_strategy(config: Mapping[str, Any], *, world_size: int) -> None:
    """Refuse a strategy that cannot train student and critic as two networks.

    Raises:
        ValueError: One line: key, value, what is allowed, what to do.
    """
    strategy, devices = config["trainer"]["strategy"], config["trainer"].get("devices")
    if config["trainer"].get("accelerator") == "cpu" and isinstance(devices, int) and devices < 1:
        raise ValueError(
            f"trainer.devices={devices} is not allowed on a CPU; use a whole number ≥ 1, or auto"
        )
    if strategy not in STRATEGIES:
        raise ValueError(
            f"trainer.strategy={strategy!r} would wrap both networks as one; use auto (a DDP for "
            "each network) or fsdp (their weights in shards)"
        )
    if strategy == "fsdp" and world_size == 1:
        raise ValueError(
            "trainer.strategy=fsdp splits the weights among processes, and this run has 1; use "
            "trainer=auto, or start more (torchrun, slurm/train.sbatch, trainer.devices)"
        )
    for key in ("compile_networks", "cuda_graphs"):
        if strategy == "fsdp" and config[key]:
            raise ValueError(
                f"{key}={config[key]} with trainer.strategy=fsdp: sharded weights, gathered anew "
                f"each time, can be neither compiled nor captured; use {key}=false"
            )


def model_stride(config: Mapping[str, Any]) -> int:
    """Return the stride of the network to be trained; a student has its teacher's."""
    if "model" in config["module"]:
        return 2 ** (len(config["model"]["channel_multipliers"]) - 1)
    if config["teacher"] is None:
        raise ValueError(
            "teacher=null: a distillation needs a teacher's folder; train one with "
            "+experiment=ksr_teacher and `ksr export` it, or `ksr convert sr-unet` a released "
            "file, then give teacher=FOLDER"
        )
    network = read_object(model_folder(config["teacher"], key="teacher") / "config.json")
    if not isinstance(network.get("channel_multipliers"), list):
        raise ValueError(
            f"teacher={config['teacher']} holds no U-Net of ours (config.json names no "
            "channel_multipliers); give a folder made by `ksr export` or `ksr convert sr-unet`"
        )
    check_teacher(Path(config["teacher"]) / "model_index.json", scale=config["scale"])
    return 2 ** (len(network["channel_multipliers"]) - 1)


def check_teacher(index_file: Path, *, scale: int) -> None:
    """Refuse to distil a student or a teacher of another scale; a bare U-Net names neither."""
    if not index_file.is_file():
        return
    index = read_object(index_file)
    if "student_timesteps" in index:
        raise ValueError(
            f"teacher={index_file.parent} is a student ({index.get('_class_name')}); give the "
            "teacher's folder, made by `ksr export` from a ksr_teacher run"
        )
    if index.get("scale", scale) != scale:
        raise ValueError(
            f"teacher={index_file.parent} was trained for scale={index['scale']}, this run has "
            f"scale={scale}; give a teacher of this scale, or scale={index['scale']}"
        )


def model_folder(folder: str | Path, *, key: str) -> Path:
    """Return the folder with a U-Net's config.json: the one given, or its ``sr`` subfolder.

    Raises:
        ValueError: If there is none.
    """
    folder = Path(folder)
    for candidate in (folder / "sr", folder):
        if (candidate / "config.json").is_file():
            return candidate
    state = "has no config.json and no sr/config.json" if folder.exists() else "does not exist"
    raise ValueError(
        f"{key}={folder} {state}; give a folder made by `ksr export` from a ksr_teacher run, or by "
        "`ksr convert sr-unet` from released weights"
    )


def check_targets(config: Mapping[str, Any]) -> None:
    """Refuse a `_target_` that is not ours: instantiating a config must never run foreign code."""
    for key, target in targets(config):
        if not str(target).startswith(ALLOWED_TARGETS):
            raise ValueError(
                f"{key}={target} may not be instantiated; use a class of "
                f"{' or '.join(name + '*' for name in ALLOWED_TARGETS)}"
            )


def targets(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every (key, `_target_`) below a node."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node)
    for key, value in items:
        where = f"{path}.{key}" if path else str(key)
        if key == "_target_":
            yield where, value
        elif isinstance(value, Mapping | list | tuple):
            yield from targets(value, where)


def check_whole_number(
    config: Mapping[str, Any], key: str, *, at_least: int, may_be_null: bool = False
) -> None:
    """Refuse a value that is no integer, or too small."""
    value = config[key]
    if value is None and may_be_null:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(
            f"{key}={value!r} is not allowed; use a whole number ≥ {at_least}"
            f"{' or null' if may_be_null else ''}"
        )


def num_processes(trainer: Mapping[str, Any]) -> int:
    """Return how many processes will train, as far as this one can tell on its own."""
    for variable in ("WORLD_SIZE", "SLURM_NTASKS"):
        if os.environ.get(variable, "").isdigit():
            return int(os.environ[variable])
    devices = trainer["devices"]
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        devices = len(devices)
    if not isinstance(devices, int) or devices < 0:  # "auto", -1: all there are, as Lightning says
        is_cpu = trainer["accelerator"] == "cpu"
        devices = 1 if is_cpu else max(torch.cuda.device_count(), 1)
    return devices * trainer["num_nodes"]
