"""Mistakes on a command line, and errors of a run, told to the user in one line."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

EXTENSIBLE = ("experiment", "sweep", "launcher", "trainer", "callbacks", "logger", "hydra")
"""Keys that a plus on the command line may add to."""

MODULE_GROUPS = ("model", "critic", "diffusion", "loss", "optim")
"""Groups that only conf/module reads, each of its options another part."""

FOLLOWED_BY_A_WORD = ("--cfg", "-c", "--info", "-i", "--package", "-p", "--config-name", "-cn",
                      "--config-path", "-cp", "--config-dir", "-cd")  # fmt: skip
"""Hydra's own options that take a value: the next word is no override."""


def check_overrides(config_name: str, arguments: Sequence[str], folder: Path) -> None:
    """Compose the config once to report mistakes in one line; sweep values are left to Hydra.

    Args:
        arguments: Of the command line.
        folder: The conf/ folder.

    Raises:
        ValueError: If an override names no key, no group or no option (it names the nearest), or
            would change nothing.
    """
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
    if "module" in config:
        refuse_unused(parsed, OmegaConf.to_container(config["module"], resolve=False))
        refuse_another_scale(parsed, config["scale"])
    asks = {text for text in arguments if text.startswith("-")} - {"-m", "--multirun"}  # --help
    if OmegaConf.is_missing(config, "name") and not asks:
        experiments = ", ".join(
            sorted(path.stem for path in (folder / "experiment").glob("*.yaml"))
        )
        raise ValueError(
            "name is missing: it names the run's folder, and an experiment sets it; add "
            f"+experiment= with one of {experiments}, or name=NAME"
        )


def refuse_unused(overrides: Sequence[Override], module: Any) -> None:
    """Refuse overrides that would change nothing, since the run's module does not read them.

    Args:
        module: The config's node, with its interpolations.

    Raises:
        ValueError: E.g. for ``model=tiny`` in a distillation.
    """
    read = re.findall(r"\$\{([\w.]+)\}", str(module))
    for override in overrides:
        key = str(override.key_or_group)
        group = key.partition(".")[0]
        is_read = any(f"{one}.".startswith(f"{key}.") or f"{key}.".startswith(f"{one}.")
                      for one in read)  # fmt: skip
        if is_read or group not in MODULE_GROUPS:
            continue
        remedy = "drop it"
        if group == "model":
            remedy = "a student has its teacher's network: choose another teacher="
        elif others := sorted(one for one in read if one.startswith(f"{group}.")):
            remedy = f"drop it, or use {', '.join(others)}"
        raise ValueError(
            f"{override.input_line} would change nothing: {module['_target_']} does not read "
            f"{key}; {remedy}"
        )


def refuse_another_scale(overrides: Sequence[Override], scale: int) -> None:
    """Refuse a model that is named for another scale than the run's, unless that is given, too.

    The network is the same: a layout may be trained for any scale that is asked for.

    Raises:
        ValueError: E.g. for ``model=ksr_x4`` alone.
    """
    if any(override.key_or_group == "scale" for override in overrides):
        return
    for override in overrides:
        named = re.search(r"_x(\d+)$", str(override.value()))
        if override.key_or_group == "model" and named and int(named[1]) != scale:
            raise ValueError(
                f"{override.input_line} is for scale={named[1]}, and scale is {scale}; give "
                f"scale={named[1]} as well, or scale={scale} if that is meant"
            )


def explain(error: BaseException, known: Mapping[str, Any]) -> str:
    """Return Hydra's message in one line, with the key that was probably meant."""
    text = " ".join(one_line(part) for part in (error, error.__cause__) if part is not None)
    text = text.partition(" Config search path:")[0]
    if re.search("no viable alternative|mismatched input|LexerNoViableAlt", text):
        return f"{text}; quote values with braces, commas, spaces or ~ twice: 'key=\"a{{0..9}}\"'"
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
