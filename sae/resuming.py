"""What an interrupted run goes on with: its own config, its newest whole checkpoint, and the same
surroundings, since only then the bits come out the same."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sae import checkpoint
from sae.checkpoint import Checkpoint
from sae.config import TrainConfig
from sae.errors import ConfigError, RunError
from sae.planning import Plan, environment
from sae.store import MANIFEST

FREE = ("output", "checkpoint", "wandb")
"""Settings that may change on the way: nothing that is learnt depends on them."""


def saved_state(run: Path) -> Checkpoint:
    """The checkpoint to go on from; RunError where there is none, or the run is complete."""
    saved = checkpoint.newest(run)
    if saved is not None:
        return saved
    if is_complete(run):
        raise RunError(
            f"{run}: nothing to resume, the run is complete; --init-from trains it further"
        )
    raise RunError(
        f"{run}: nothing to resume, it has no whole checkpoint; start it anew under another "
        "--output, or here with --resume auto"
    )


def is_interrupted(run: Path) -> bool:
    """Whether a run has checkpoints, whole or not: a run that has ended keeps none."""
    return (run / checkpoint.FOLDER).is_dir()


def is_complete(run: Path) -> bool:
    """Whether a run has come to its end."""
    return (run / MANIFEST).is_file() and not is_interrupted(run)


def check_config(saved: Checkpoint, chosen: TrainConfig) -> None:
    """ConfigError with a line for each setting that is not as the run was started with."""
    before = dict(_flat(saved.facts["config"]))
    lines = [
        f"{key}: {value!r} came, the run to resume has {before.get(key)!r}; leave it out, or start "
        "another run"
        for key, value in _flat(chosen.model_dump(mode="json"))
        if value != before.get(key) and key.partition(".")[0] not in FREE
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def check_environment(saved: Checkpoint, plan: Plan, *, allow_changed: bool) -> list[str]:
    """What is not as it was, in words; RunError naming it unless `allow_changed`."""
    before = saved.facts["environment"]
    changed = [
        f"{key} {before.get(key)} then, {value} now"
        for key, value in environment(plan).items()
        if before.get(key) != value
    ]
    if changed and not allow_changed:
        raise RunError(
            f"{plan.output}: {'; '.join(changed)}\n  so the weights would not be those of an "
            "uninterrupted run; restore it, or add --allow-changed-environment"
        )
    return changed


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every setting."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
