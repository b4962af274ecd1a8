"""Checks of the composed config that no group can make alone, before any model is built."""

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ksr_distill.model_json import read_object

ALLOWED_TARGETS = ("ksr_distill.", "lightning.pytorch.")
"""Nothing else is instantiated from a config: a `_target_` such as torch.load runs code."""

EXTENSIBLE = ("experiment", "sweep", "launcher", "trainer", "callbacks", "logger", "hydra")
"""Keys that a plus on the command line may add to."""

STRATEGIES = ("auto", "fsdp")

PRECISIONS = ("bf16-mixed", "bf16", "32-true", "32", 32)
"""Not float16: its scaled gradients would be clipped at their scaled norm. Weights stay float32."""

SHORTENING = ("max_steps", "min_steps", "max_time", "limit_train_batches", "overfit_batches",
              "fast_dev_run")  # fmt: skip
"""Trainer options that end a run early; it would then look like a finished one."""

FOLLOWED_BY_A_WORD = ("--cfg", "-c", "--info", "-i", "--package", "-p", "--config-name", "-cn",
                      "--config-path", "-cp", "--config-dir", "-cd")  # fmt: skip
"""Hydra's own options that take a value: the next word is no override."""

MIN_CROP_PX = 32
"""Side of a tile of `evaluation.metrics.spectral_prominence`."""

MIN_VAL_CROP_PX = 56
"""The sliced Wasserstein distance has 7 px patches on the fourth pyramid level: 7 · 2³."""


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
    if config["data"]["val_shards"] and config["validate_every"] > config["num_updates"]:
        raise ValueError(
            f"validate_every={config['validate_every']} is more than num_updates="
            f"{config['num_updates']}, so the run would never be validated; use at most the latter"
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
            f"trainer.strategy={strategy!r} would wrap both players as one; use auto (a DDP for "
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


def check_overrides(config_name: str, arguments: Sequence[str], folder: Path) -> None:
    """Compose the config once to report mistakes in one line; sweep values are left to Hydra.

    Args:
        arguments: Of the command line.
        folder: The conf/ folder.

    Raises:
        ValueError: If an override names no key, no group or no option; it names the nearest.
    """
    from hydra import compose, initialize_config_dir  # noqa: PLC0415 - inference never gets here
    from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: PLC0415
    from hydra.errors import HydraException  # noqa: PLC0415
    from omegaconf import OmegaConf  # noqa: PLC0415

    before = ["", *arguments]
    texts = [
        text
        for text, option in zip(arguments, before, strict=False)
        if not text.startswith("-") and option not in FOLLOWED_BY_A_WORD
    ]

    def composed(overrides: Sequence[str]) -> Mapping[str, Any]:
        with initialize_config_dir(str(folder), version_base="1.3"):
            return compose(config_name, list(overrides))

    try:
        parsed = OverridesParser.create().parse_overrides(texts)
        for override in parsed:
            if override.is_add() and not str(override.key_or_group).startswith(EXTENSIBLE):
                raise ValueError(
                    f"{override.input_line}: a plus adds a key that nobody reads; drop it to "
                    f"change {override.key_or_group}, or use it for {', '.join(EXTENSIBLE)}"
                )
        config = composed([o.input_line or "" for o in parsed if not o.is_sweep_override()])
    except HydraException as error:
        try:
            known = composed([text for text in texts if text.startswith("+")])
        except HydraException:
            known = {}
        raise ValueError(explain(error, known)) from error
    asks = {text for text in arguments if text.startswith("-")} - {"-m", "--multirun"}  # --help
    if OmegaConf.is_missing(config, "name") and not asks:
        experiments = ", ".join(
            sorted(path.stem for path in (folder / "experiment").glob("*.yaml"))
        )
        raise ValueError(
            "name is missing: it names the run's folder, and an experiment sets it; add "
            f"+experiment= with one of {experiments}, or name=NAME"
        )


def explain(error: BaseException, known: Mapping[str, Any]) -> str:
    """Return Hydra's message in one line, with the key that was probably meant."""
    text = " ".join(one_line(part) for part in (error, error.__cause__) if part is not None)
    text = text.partition(" Config search path:")[0]
    if "no viable alternative" in text or "mismatched input" in text:
        return f"{text}; quote values with braces, commas or spaces twice: 'key=\"a{{0..9}}\"'"
    missing = re.search(r"full_key: (\S+)", text)
    if missing is None:
        return text
    *parents, key = missing[1].split(".")
    node: Any = known
    for parent in parents:
        node = node[parent]
    names = [str(name) for name in node]
    if key in names:  # it exists, but as an interpolation of another group's value
        return f"{missing[1]} is the value of another group; change it there (conf/{parents[0]})"
    close = difflib.get_close_matches(key, names, n=1)
    remedy = f"did you mean {'.'.join([*parents, close[0]])}?" if close else f"use one of {names}"
    return f"{missing[1]} is no key of the config; {remedy}"


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split())


def message_for_user(error: BaseException, kinds: tuple[type[Exception], ...]) -> str | None:
    """Return the message meant for a user, without line breaks; None if there is none.

    That is the outermost error of these kinds in the chain of causes: the one that says what to do.
    Hydra's wrappers around it are of other kinds.
    """
    cause: BaseException | None = error
    while cause is not None:
        is_named = not str(cause).startswith("Unable to configure handler")  # it names no file
        if isinstance(cause, kinds) and is_named:
            return one_line(cause)
        cause = cause.__cause__
    return None
