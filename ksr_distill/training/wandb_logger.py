"""Weights & Biases, without prompts, and without power to stop a run when it fails."""

import logging
import netrc
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override
from wandb.errors import Error as WandbError

log = logging.getLogger(__name__)

UPDATE = "update"


def has_key() -> bool:
    """Return whether W&B could log in without asking: by the environment, or by ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class GuestWandbLogger(Logger):
    """Logs to W&B, offline without a key; after a failure it warns once and stops logging.

    All metrics are in ``metrics.csv`` as well. There is no option for a key: keys in configs and
    command lines get logged and committed.
    """

    def __init__(
        self,
        *,
        folder: str | Path,
        project: str,
        name: str,
        group: str | None,
        artifact: str | Path | None,
        init_timeout_s: float | int,
    ) -> None:
        """Make the logger; W&B itself starts with the first figure.

        Args:
            folder: The run's folder; its ``wandb_id.txt`` lets a resumed run go on in the same run.
            project: Of W&B.
            name: Of the run.
            group: Of the runs of a sweep.
            artifact: A file to upload when the run ends well, e.g. the best checkpoint.
            init_timeout_s: How long W&B may take to answer before the run goes on offline.
        """
        super().__init__()
        self.folder = Path(folder)
        self.artifact = Path(artifact) if artifact else None
        self._settings = {"project": project, "name": name, "group": group}
        self._init_timeout_s = init_timeout_s
        self._run: Any = None
        self._has_failed = False

    @property
    @override
    def name(self) -> str:
        """Name of the run."""
        return str(self._settings["name"])

    @property
    @override
    def version(self) -> str:
        """Id of the run: made once, kept in the run's folder."""
        path = self.folder / "wandb_id.txt"
        if not path.exists() or not path.read_text().strip():  # empty: the disk was full
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(secrets.token_hex(4))
        return path.read_text().strip()

    @override
    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *_: Any, **__: Any) -> None:
        """Store the resolved config. Scrub secrets before."""
        self._attempt(lambda run: run.config.update(params, allow_val_change=True))

    @override
    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log figures of an update. The update is a figure itself: a resumed run may repeat it."""
        self._attempt(lambda run: run.log({**metrics, UPDATE: step}))

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[Any], step: int | None = None) -> None:
        """Log pictures (paths, arrays or tensors) of an update."""
        self._attempt(
            lambda run: run.log({key: [wandb.Image(image) for image in images], UPDATE: step})
        )

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Upload the artifact if the run ended well, and end the W&B run."""
        if self._run is None:
            return
        if status == "success" and self.artifact is not None and self.artifact.exists():
            self._attempt(lambda run: run.log_artifact(str(self.artifact), type="model"))
        self._attempt(lambda run: run.finish(exit_code=0 if status == "success" else 1))
        self._run = None

    def _attempt(self, action: Callable[[Any], Any]) -> None:
        if self._has_failed:
            return
        try:
            if self._run is None:
                self._run = self._start()
            action(self._run)
        except Exception as error:  # noqa: BLE001, whatever a guest's trouble is: training goes on
            self._has_failed = True
            log.warning(
                "W&B failed (%s: %s) and is not used any more; training goes on, the figures "
                "are in metrics.csv. Later: wandb sync %s",
                type(error).__name__,
                " ".join(str(error).split()),
                self.folder / "wandb",
            )

    def _start(self) -> Any:
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        try:
            return self._init(mode, self.version)
        except (WandbError, OSError) as error:
            if mode != "online":
                raise
            log.warning(
                "W&B cannot be reached (%s): this run is logged offline; later: wandb sync %s",
                " ".join(str(error).split()),
                self.folder / "wandb",
            )
            return self._init("offline", None)  # the service still holds the id of the failed one

    def _init(self, mode: Any, run_id: str | None) -> Any:
        settings = wandb.Settings(
            init_timeout=self._init_timeout_s,
            silent=True,
            console="off",
            # An outage later on must not hold up the end of the run for hours of retries.
            x_graphql_retry_max=3,
            x_file_stream_retry_max=3,
            x_file_transfer_retry_max=3,
        )
        run = wandb.init(
            **self._settings,
            id=run_id,
            resume="allow" if mode == "online" else None,
            dir=str(self.folder),
            mode=mode,
            settings=settings,
        )
        run.define_metric(UPDATE)
        run.define_metric("*", step_metric=UPDATE)
        return run
