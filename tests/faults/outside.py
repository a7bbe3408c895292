"""What lies outside the process: Weights & Biases, the network, and the memory of the machine."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from faults import hub
from faults.tools import STEP, Bench, Outcome, equal, forked, go_on, waited, weights
from sae import training
from sae.planning import Plan

CLOSED_PORT = "http://127.0.0.1:9"
ADDED_SECONDS = 10.0
PROJECT = {"wandb.project": "faults", "tokens": str(1100 * STEP), "checkpoint.every_tokens": None}
"""Long enough for fifty logged steps."""


def wandb(bench: Bench) -> Iterator[Outcome]:
    """F12: five broken wandbs: the same weights as without, 10 s later at most."""
    plain = bench.plan("whole-12", PROJECT | {"wandb.project": None})
    started = time.monotonic()
    waited(forked(partial(go_on, plain)))
    alone, whole = time.monotonic() - started, weights(plain.output)
    for name, (mode, break_it) in BROKEN.items():
        plan = bench.plan(f"wandb-{name}".replace(" ", "-"), PROJECT | {"wandb.mode": mode})
        started = time.monotonic()
        code = waited(forked(partial(_mirrored, plan, break_it)), seconds=90)
        later = time.monotonic() - started - alone
        same, why = equal(plan.output, whole, name) if code == 0 else (False, name)
        yield same and later <= ADDED_SECONDS, f"{why}; exit code {code}, {later:.1f} s later"


def _mirrored(plan: Plan, break_it: Callable[[Path], None]) -> None:
    training.Stop  # noqa: B018 - imported before wandb can be broken
    os.environ |= {"HOME": str(plan.output.parent), "WANDB_SILENT": "true"}
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        os.environ.pop(name, None)
    plan.output.mkdir(parents=True, exist_ok=True)
    break_it(plan.output)
    go_on(plan)


def _missing(_: Path) -> None:
    sys.modules["wandb"] = None  # pyright: ignore - importing it raises ImportError


def _unauthorised(_: Path) -> None:
    os.environ["WANDB_BASE_URL"] = CLOSED_PORT


def _unreachable(_: Path) -> None:
    os.environ |= {"WANDB_BASE_URL": CLOSED_PORT, "WANDB_API_KEY": "0" * 40}


def _unwritable(run: Path) -> None:
    (run / "wandb").write_text("a file where wandb wants its folder")


def _raises(_: Path) -> None:
    def log(*_: Any, left: list[int] = [50]) -> None:  # noqa: B006 - it counts
        left[0] -= 1
        if not left[0]:
            raise ConnectionError("the server has gone")

    run = SimpleNamespace(log=log, finish=lambda: None)
    module: Any = SimpleNamespace(init=lambda **_: run, Settings=lambda **_: None)
    sys.modules["wandb"] = module


BROKEN: dict[str, tuple[str, Callable[[Path], None]]] = {
    "missing": ("online", _missing),
    "unauthorised": ("online", _unauthorised),
    "unreachable": ("online", _unreachable),
    "unwritable": ("offline", _unwritable),
    "raises in the middle": ("online", _raises),
}


def flaky_server(bench: Bench) -> Iterator[Outcome]:
    """F13: a Hub that answers 429, 500, 503 or 408, slowly, or half: all of the text, or words."""
    times = range(1, 17 if bench.long else 4)
    names = [f"me/{kind}-{n}" for n in times for kind in hub.KINDS] + ["me/500-999", "me/503-999"]
    found = hub.read_all(names, seconds=1200 if bench.long else 240)
    for name in names:
        how, what = found.get(name, ("", "it crashed"))
        whole = how == "read" and what == hub.digest(hub.TEXTS)
        told = how == "refused" and len(what.splitlines()) <= 3
        yield whole or told, f"{name}: {what[:150]}"


def scan_memory(bench: Bench) -> Iterator[Outcome]:
    """F10: the scan at d_in 512 from 4k to 16k features (64k in the long column): peak memory above
    the model and the weights within the budget, and at most 1.5 times that of 4k."""
    wide = 65_536 if bench.long else 16_384
    script = Path(__file__).parents[2] / "scripts" / "measure_scan_memory.py"
    command = [sys.executable, str(script), "--d-sae", "4096", str(wide)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    peaks = [float(peak.replace(",", "")) for _, _, peak, _ in rows]
    if done.returncode or len(peaks) != 2:
        yield False, f"it was not measured: {done.stderr[-150:]}"
        return
    yield max(peaks) <= 1000, f"{max(peaks):.0f} MB, more than the budget of 1,000"
    yield peaks[1] <= 1.5 * peaks[0], f"{peaks[0]:.0f} MB at 4,096, {peaks[1]:.0f} at {wide:,}"
