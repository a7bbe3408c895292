"""Weights & Biases as a copy of metrics.jsonl; whatever goes wrong there, training goes on."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae.config import TrainConfig


class Mirror:
    """Sends metrics to a wandb run, or nowhere; after a first failure, nowhere, with a warning."""

    def __init__(self, run: Any = None):
        self._run = run

    def log(self, metrics: Mapping[str, float | None], tokens: int) -> None:
        """Send one step's metrics under the number of tokens done."""
        self._try(lambda run: run.log({"tokens": tokens, **metrics}))

    def close(self) -> None:
        """Finish the wandb run."""
        self._try(lambda run: run.finish())

    def _try(self, action: Any) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # wandb's own, the network's, the disk's: none may stop training
            self._run = None
            _warn(error)


def open_mirror(config: TrainConfig, folder: Path) -> Mirror:
    """A wandb run for `wandb.project`, or a mirror that does nothing."""
    if config.wandb.project is None:
        return Mirror()
    try:
        import wandb

        return Mirror(
            wandb.init(
                project=config.wandb.project,
                mode=config.wandb.mode,
                dir=str(folder),
                name=folder.name,
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(silent=True, console="off", init_timeout=6),
            )
        )
    except Exception as error:  # not installed, no key, no network, no room: see Mirror
        _warn(error)
        return Mirror()


def _warn(error: Exception) -> None:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    hint = " (pip install wandb)" if isinstance(error, ModuleNotFoundError) else ""
    warnings.warn(
        f"wandb stopped: {first}{hint}; training goes on, metrics.jsonl is complete", stacklevel=3
    )
