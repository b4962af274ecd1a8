"""Train a teacher or distil it: `python train.py +experiment=ksr_flash teacher=… data.shards=…`.

The same command resumes. The algorithm: `ksr_distill/training/distillation.py`, `training_step`.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

# Slurm's time-limit warning would end a process that has no handler yet: hold these signals back
# until PreemptionGuard listens.
if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGUSR2))
os.environ.setdefault("WDS_SECURE", "1")  # for webdataset: no pipe: URLs, no pickles

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ksr_distill.config import check_strategy, check_train_config, num_processes
from ksr_distill.data.loading import explain_lost_worker
from ksr_distill.overrides import check_overrides, message_for_user
from ksr_distill.training.checkpoint_folder import last_good_checkpoint, update_of_file
from ksr_distill.training.hints import silence_hints
from ksr_distill.training.launching import (
    check_tasks_of_slurm,
    process_plugins,
    refuse_launcher_in_sweep,
)
from ksr_distill.training.leaves import check_leaves
from ksr_distill.training.sharding import PerNetworkFSDP
from ksr_distill.training.strategy import PerNetworkDDP, leave_groups
from ksr_distill.training.validation import check_monitor

USER_ERRORS = (ValueError, OSError, OmegaConfBaseException, MisconfigurationException)
CONF = Path(__file__).resolve().parent / "conf"


def train(config: dict[str, Any], *, is_sweep: bool) -> None:
    """Check the config, build the run, and train from the last good checkpoint on."""
    silence_hints()
    check_train_config(config)
    check_tasks_of_slurm(config["trainer"], os.environ)
    world_size = num_processes(config["trainer"])
    check_strategy(config, world_size=world_size)
    refuse_launcher_in_sweep(num_processes=world_size, is_sweep=is_sweep, environment=os.environ)
    datamodule = instantiate(config["data"], _convert_="all")
    datamodule.check(world_size=world_size)

    torch.set_float32_matmul_precision("high")  # the critic's heads are float32
    checkpoint = last_good_checkpoint(Path(config["callbacks"]["checkpoint"]["folder"]))
    datamodule.start_update = update_of_file(checkpoint) if checkpoint else 0
    build = instantiate(config["module"], _partial_=True, _convert_="all")
    module = build(record={"config": config})
    if config["data"]["val_shards"] is not None:
        check_monitor(config["callbacks"]["checkpoint"]["monitor"], module.samplers())
    try:
        make_trainer(config).fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:  # raised on all ranks by PreemptionGuard, after the save
        leave_groups()
        raise
    except RuntimeError as error:
        explain_lost_worker(error)
        raise
    leave_groups()


def make_trainer(config: dict[str, Any]) -> Trainer:
    """Return the Trainer; with several processes, each network has its own DDP or FSDP wrapper."""
    settings = {"enable_model_summary": False, **config["trainer"]}  # RunRecord logs the sizes
    if config["data"]["val_shards"] is None:
        settings["limit_val_batches"] = 0
    if num_processes(settings) > 1:
        strategy = PerNetworkFSDP if settings["strategy"] == "fsdp" else PerNetworkDDP
        settings = {**settings, "strategy": strategy()}
    callbacks, loggers = (
        [instantiate(node, _convert_="all") for node in config[group].values() if node]
        for group in ("callbacks", "logger")
    )
    return instantiate(
        settings, callbacks=callbacks, logger=loggers, plugins=process_plugins(), _convert_="all"
    )


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Train with the composed config; end with one line on a user's mistake."""
    is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        check_leaves(cfg)
        train(OmegaConf.to_container(cfg, resolve=True), is_sweep=is_sweep)  # type: ignore[arg-type]
    except Exception as error:
        # In a sweep Hydra records the failure and goes on with the next run.
        is_noted = is_sweep or HydraConfig.get().callbacks
        told = message_for_user(error, USER_ERRORS)
        if is_noted or told is None:
            raise
        sys.exit(f"error: {told}")


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # or Hydra prints its errors and exits
    try:
        check_overrides("train", sys.argv[1:], CONF)
        main()
    except Exception as error:
        told = message_for_user(error, USER_ERRORS)
        if told is None:
            raise
        sys.exit(f"error: {told}")
