"""Checks every leaf of a config: its type by the class that takes it, its range by its name.

To YAML ``1O`` is a text and ``-4`` a number: without this a typo ends in a traceback from deep
inside, or in a run with other settings than meant.
"""

import difflib
import inspect
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from ksr_distill.config import check_targets

RANGES: dict[str, tuple[float, float]] = {
    "flip_prob": (0, 1), "transpose_prob": (0, 1), "detail_share": (0, 1), "ema_decay": (0, 1),
    "batch_size": (1, math.inf), "micro_batch_size": (1, math.inf),
    "val_batch_size": (1, math.inf), "num_val_pictures": (1, math.inf),
    "val_crop_px": (1, math.inf), "val_side_multiple": (1, math.inf),
    "corrupt_budget": (0, math.inf), "num_workers": (0, math.inf),
    "prefetch_updates": (1, math.inf), "window_shards": (1, math.inf),
    "shuffle_buffer": (1, math.inf), "timeout_s": (0.1, math.inf),
    "every_updates": (1, math.inf), "warn_after": (1, math.inf), "stop_after": (1, math.inf),
    "background_above_mb": (0, math.inf), "stay_alive_s": (0, math.inf),
    "init_timeout_s": (1, math.inf), "num_nodes": (1, math.inf), "max_epochs": (1, 1),
    "check_val_every_n_epoch": (1, 1),
    "head_channels": (1, math.inf), "dropout": (0, 1),
}  # fmt: skip
"""Both ends are allowed. A run is one epoch: the loader ends after num_updates."""

WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text",
    Path: "a path", type(None): "null", Mapping: "a map of keys", dict: "a map of keys",
}  # fmt: skip
SCALARS = {bool: bool, int: int, float: (int, float), str: str, Path: str, type(None): type(None)}


def check_leaves(config: DictConfig) -> None:
    """Refuse the first leaf of a wrong type or out of its range.

    Raises:
        ValueError: One line: the key as it is set on the command line, the value, what is allowed.
    """
    written: Any = OmegaConf.to_container(config, resolve=False)
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    check_targets(resolved)  # before anything is imported in its name
    for group in ("callbacks", "logger"):
        for name, node in resolved[group].items():
            if node is not None and "_target_" not in (node if isinstance(node, dict) else ()):
                raise ValueError(f"{group}.{name}={node!r} is not allowed; use its keys, or null")
    resolved["model"] = {**resolved["model"], "_target_": "ksr_distill.models.KSRUNet"}
    # module comes last: its leaves are interpolations of other groups'.
    nodes = sorted(_nodes(resolved), key=lambda node: node[0][0] == "module")
    for path, node in nodes:
        hints = _hints_of(str(node["_target_"]))
        for name in node.keys() - hints.keys():
            if not name.startswith("_"):
                raise ValueError(explain_unknown(".".join((*path, name)), node[name], list(hints)))
        for name in node.keys() & hints.keys():
            key = _set_as(written, (*path, name))
            if node[name] is None and key == "teacher":
                continue  # check_train_config explains this one better
            _check(key, node[name], hints[name])


def explain_unknown(key: str, value: Any, names: Sequence[str]) -> str:
    """Return the message for a key, added by a plus, that its class does not take."""
    *parents, name = key.split(".")
    close = difflib.get_close_matches(name, names, n=1)
    nearest = f"{'.'.join([*parents, close[0]])}" if close else ", ".join(sorted(names))
    return f"{key}={_shown(value)} is not allowed; use {nearest}"


def _check(key: str, value: Any, hint: Any) -> None:
    if not fits(value, hint):
        raise ValueError(f"{key}={_shown(value)} is not allowed; use {allowed_by(hint)}")
    low, high = RANGES.get(key.rpartition(".")[2], (-math.inf, math.inf))
    if isinstance(value, int | float) and not low <= value <= high:
        rule = f"{low:g}" if low == high else f"≥ {low:g}" if high == math.inf else "0 … 1"
        raise ValueError(f"{key}={value} is not allowed; use {rule}")


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value of a config is what an annotation asks for."""
    kind = get_origin(hint) or hint
    if kind in (Union, types.UnionType):
        return any(fits(value, part) for part in get_args(hint))
    if kind is Literal:
        return value in get_args(hint)
    if kind in SCALARS:
        is_nan = isinstance(value, float) and math.isnan(value)
        is_number_as_bool = isinstance(value, bool) and kind is not bool
        return isinstance(value, SCALARS[kind]) and not is_nan and not is_number_as_bool
    if kind in (list, tuple, Sequence):
        element = (get_args(hint) or (Any,))[0]
        return isinstance(value, list) and all(fits(item, element) for item in value)
    if isinstance(kind, type):  # a dict, or what a node with a _target_ becomes
        return isinstance(value, Mapping)
    return True


def allowed_by(hint: Any) -> str:
    """Return in words what an annotation asks for."""
    kind = get_origin(hint) or hint
    if kind in (Union, types.UnionType):
        parts = [p for p in get_args(hint) if not (p is int and float in get_args(hint))]
        words = [allowed_by(p) for p in parts if get_origin(p) or p in WORDS]
        return " or ".join(dict.fromkeys(words))
    if kind is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(hint))
    if kind in (list, tuple, Sequence):
        element = get_args(hint)[:1]
        return f"a list, each {allowed_by(element[0])}" if element else "a list"
    return WORDS.get(kind, "one of the group's options")


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def _nodes(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if "_target_" in node:
        yield path, node
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _nodes(value, (*path, str(name)))


def _set_as(written: Any, path: tuple[str, ...]) -> str:
    """Return the key that a user would set: for an interpolation, the one that it points to."""
    node: Any = written
    seen: list[str] = []
    for name in path:
        seen.append(name)
        node = node[name]
        if other := re.fullmatch(r"\$\{([\w.]+)\}", str(node)):
            return _set_as(written, (*other[1].split("."), *path[len(seen) :]))
    return ".".join(path)


@cache
def _hints_of(target: str) -> dict[str, Any]:
    """Return the annotations of all arguments, including those passed on as ``**rest``."""
    module, _, name = target.rpartition(".")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"_target_={target} cannot be used ({error}); use a class that is there"
        ) from error
    hints = {} if isinstance(function, type) else get_type_hints(function)
    made = hints.pop("return", None) if hints else function
    for kind in reversed(inspect.getmro(made) if isinstance(made, type) else ()):
        if "__init__" in vars(kind) and kind is not object:
            hints = get_type_hints(vars(kind)["__init__"]) | hints
    kept = ("return", "rest", "common")
    return {name: hint for name, hint in hints.items() if name not in kept}
