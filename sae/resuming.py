"""What an interrupted run goes on with: its own config, its newest whole checkpoint, and the same
surroundings, since only then the bits come out the same."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sae import checkpoint, config
from sae.checkpoint import Checkpoint
from sae.config import TrainConfig
from sae.errors import ConfigError, RunError
from sae.planning import Plan, environment
from sae.store import MANIFEST, SETTINGS, read_manifest

COMPLETE, TEXT_ENDED = "complete", "text ended"
"""How a run ends of itself."""
FREE = ("output", "checkpoint", "wandb")
"""Settings that may change on the way: nothing that is learnt depends on them."""


def saved_state(run: Path) -> Checkpoint:
    """The checkpoint to go on from; RunError where there is none, or the run is complete."""
    if is_complete(run):
        raise RunError(
            f"{run}: nothing to resume, the run is complete; --init-from trains it further"
        )
    saved = checkpoint.newest(run)
    if saved is None:
        raise RunError(
            f"{run}: nothing to resume, it has no whole checkpoint; start it anew under another "
            "--output, or here with --resume auto"
        )
    return saved


def is_complete(run: Path) -> bool:
    """Whether a run has come to its end: it has a manifest, which a run that goes on has not."""
    if not (run / MANIFEST).is_file():
        return False
    return read_manifest(run).get("ended", COMPLETE) in (COMPLETE, TEXT_ENDED)


def check_complete(run: Path, chosen: TrainConfig) -> None:
    """ConfigError where a run that is complete was trained with other settings."""
    lines = list(_differences(config.load(run / SETTINGS), chosen))
    if lines:
        raise ConfigError("\n".join([*lines, f"{run} is complete; --init-from trains it further"]))


def check_config(saved: Checkpoint, chosen: TrainConfig) -> None:
    """ConfigError with a line for each setting that is not as the run was started with.

    And where this version does not know the settings that it was started with.
    """
    started_with = config.resolve(None, saved.facts["config"], begun=True)
    if lines := list(_differences(started_with, chosen)):
        raise ConfigError("\n".join(lines))


def _differences(started_with: TrainConfig, chosen: TrainConfig) -> Iterator[str]:
    before, now = (dict(_flat(each.model_dump(mode="json"))) for each in (started_with, chosen))
    for key in {**now, **before}:  # a grid may have lost a setting
        if now.get(key) != before.get(key) and key.partition(".")[0] not in FREE:
            yield (
                f"{key}: {now.get(key)!r} came, the run to resume has {before.get(key)!r}; leave "
                "it out, or start another run"
            )
    came, had = ([key for key, _ in each.grid] for each in (chosen, started_with))
    if came != had and sorted(came) == sorted(had):  # their order names the SAEs
        yield f"grid: {', '.join(came)} came, the run to resume has the order {', '.join(had)}"


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
