"""Workers that may die, runs to compare, and the count of what held."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny

from sae import checkpoint, resuming, training
from sae.planning import Plan
from sae.store import Run, sha256

STEP = tiny.BATCH
EVERY = {"checkpoint.every_tokens": str(3 * STEP), "data.repeat": "true"}
"""A checkpoint every three steps, and as many passes over the text as the budget asks for."""

Outcome = tuple[bool | None, str]
"""Whether one trial held (None: it could not be tried) and what went wrong."""


@dataclass(frozen=True)
class Bench:
    """Where trials happen: a model and texts, a random schedule, the gate or the long column."""

    folder: Path
    random: random.Random
    long: bool

    def plan(self, name: str, changes: Mapping[str, str | None] | None = None) -> Plan:
        """A quick run in a folder of that name, whether something is there or not."""
        given = EVERY | {"output": str(self.folder / name)} | dict(changes or {})
        return tiny.planned(self.folder, given, resuming=True)

    def times(self, gate: int, long: int) -> int:
        """How many trials."""
        return long if self.long else gate


def go_on(plan: Plan, **options: Any) -> Path:
    """Train from the newest checkpoint, or from the start where there is none, to the end."""
    if resuming.is_complete(plan.output):
        return plan.output
    return training.train(plan, resume=checkpoint.newest(plan.output), **options)


def weights(run: Path) -> list[str]:
    """The hashes of a run's weights."""
    return [sha256(sae / "sae.safetensors") for sae in Run(run).saes().values()]


def forked(work: Callable[[], object]) -> int:
    """Start `work` in a process of its own and return its id; it exits with 0, or 1 on an error."""
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        with open(os.devnull, "w") as null:  # noqa: PTH123 - a descriptor, not a path
            os.dup2(null.fileno(), 2)
            work()
        code = 0
    finally:
        os._exit(code)


def waited(child: int, seconds: float = 60) -> int | None:
    """Exit code of a process, −signal where one ended it; None (and SIGKILL) after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def equal(run: Path, whole: list[str], what: str) -> Outcome:
    """Whether a run ended in the weights of the one that nobody disturbed."""
    found = weights(run)
    return found == whole, f"{what}: other weights than those of the undisturbed run"


def outcomes(trials: Iterator[Outcome]) -> tuple[int, int, int, list[str]]:
    """Tried, held, skipped, and what did not hold or why it was skipped."""
    found = list(trials)
    held = sum(ok is True for ok, _ in found)
    skipped = sum(ok is None for ok, _ in found)
    return len(found), held, skipped, [why for ok, why in found if not ok]
