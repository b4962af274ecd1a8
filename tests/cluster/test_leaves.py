"""A leaf of a wrong type or out of its range is one line with the key, before anything is built."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from real_run import ROOT

from ksr_distill.config import check_strategy
from ksr_distill.overrides import message_for_user
from ksr_distill.training.leaves import check_leaves


@pytest.fixture(scope="module")
def config() -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        needs = ["teacher=t", "data.shards=a.tar", "run_dir=r", "degradation=second_order"]
        return compose("train", ["+experiment=quickstart_flash", *needs])


NOT_A_COUNT: list[Any] = ["abc", 2.5, None, [1], True, {"a": 1}]
WRONG = [
    *(("data.batch_size", value) for value in (*NOT_A_COUNT, 0, -4)),
    *(("data.flip_prob", value) for value in ("abc", -1, 1.5, float("nan"))),
    ("data.shards", 5), ("data.shards", [1]), ("data.worker_start_method", "abc"),
    ("data.micro_batch_size", 0), ("data.prefetch_updates", 0), ("data.num_workers", -1),
    ("data.window_shards", 0), ("data.corrupt_budget", -1), ("data.timeout_s", -1),
    ("teacher", 7), ("seed", "abc"), ("ema_decay", 2), ("channels_last", "abc"),
    ("model.base_channels", "abc"), ("model.num_blocks", 3), ("critic.head_channels", "32x"),
    ("diffusion.num_inference_steps", "four"), ("optim.student.learning_rate", "1e-4x"),
    ("loss.student.l1", [1]), ("loss.game.critic_warmup_updates", 1.5),
    ("degradation.first.blur.prob", "abc"), ("trainer.max_epochs", -1),
    ("trainer.check_val_every_n_epoch", 2),
    ("trainer.precision", "bf15"), ("trainer.num_nodes", "two"), ("callbacks.health", 3),
    ("callbacks.checkpoint.mode", "up"), ("callbacks.checkpoint.every_updates", 0),
    ("callbacks.stall.timeout_s", 0), ("logger.csv.folder", 3),
    ("trainer.max_step", 3), ("callbacks.speed.every", 3),
]  # fmt: skip


def test_every_leaf_that_is_wrong_is_named_as_it_is_set(config: DictConfig) -> None:
    check_leaves(config)
    for key, value in WRONG:
        changed = config.copy()
        OmegaConf.update(changed, key, value, merge=False, force_add=True)
        with pytest.raises(ValueError, match="is not allowed; use ") as error:
            check_leaves(changed)
        assert str(error.value).startswith(f"{key}="), (key, value, error.value)
        assert "\n" not in str(error.value)


def test_a_foreign_class_is_refused_before_its_module_is_imported(config: DictConfig) -> None:
    changed = config.copy()
    OmegaConf.update(changed, "callbacks.health._target_", "no_such_module.Thing")
    with pytest.raises(ValueError, match="may not be instantiated"):
        check_leaves(changed)


def test_a_class_that_is_not_there_is_named(config: DictConfig) -> None:
    for target in ("ksr_distill.no_such.Thing", "ksr_distill.config.Thing", "ksr_distill."):
        changed = config.copy()
        OmegaConf.update(changed, "callbacks.health._target_", target)
        with pytest.raises(ValueError, match=f"_target_={target} cannot be used"):
            check_leaves(changed)


def test_all_devices_there_are_is_no_number_of_processes_on_a_cpu(config: DictConfig) -> None:
    changed: Any = OmegaConf.to_container(config, resolve=True)
    changed["trainer"]["devices"] = -1
    with pytest.raises(ValueError, match=r"trainer\.devices=-1 is not allowed on a CPU; use"):
        check_strategy(changed, world_size=1)


def test_the_user_is_told_what_to_do_and_not_what_lies_beneath() -> None:
    def chained() -> None:
        try:
            Path("/nonexistent/x").read_text()
        except OSError as error:
            raise ValueError("x has no index;\n pack it") from error

    with pytest.raises(ValueError, match="pack it") as caught:
        chained()
    wrapped = RuntimeError("Error in call to target")
    wrapped.__cause__ = caught.value
    assert message_for_user(wrapped, (ValueError, OSError)) == "x has no index; pack it"
    assert message_for_user(RuntimeError("a bug"), (ValueError,)) is None
