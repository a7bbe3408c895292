"""Files that change behind our back, and disks without room."""

import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from faults.tools import STEP, Bench, Outcome, equal, forked, go_on, waited, weights
from sae import checkpoint, runs, store, training
from sae.autoencoder import SparseAutoencoder
from sae.errors import SAEError
from sae.planning import Plan
from sae.records import FeatureDictionary
from sae.resuming import saved_state
from sae.verification import Finding, verify


def damages(bench: Bench) -> Iterator[Outcome]:
    """F5: checkpoint, weight and feature files damaged at random: named, never loaded silently."""
    run, other = (
        _stopped_and_scanned(bench, name, seed) for name, seed in (("a", "0"), ("b", "1"))
    )
    files = [
        f.relative_to(run)
        for f in run.rglob("*")
        if f.is_file() and not {"steps", "saes"}.isdisjoint(f.relative_to(run).parts)
    ]
    pristine = bench.folder / "pristine"
    shutil.copytree(run, pristine)
    for trial in range(bench.times(200, 1000)):
        file = files[trial % len(files)]
        name = bench.random.choice(list(DAMAGES))
        changed = DAMAGES[name](run / file, other / file, bench)
        if changed:
            yield _noticed(run, file), f"{name}: {file} was loaded silently"
        shutil.rmtree(run)
        shutil.copytree(pristine, run)


def _stopped_and_scanned(bench: Bench, name: str, seed: str) -> Path:
    """A run with two checkpoints, its SAE and its feature dictionary."""
    plan = bench.plan(f"damaged-{name}", {"seed": seed})
    stop = bench.random.randrange(8, 12) * STEP

    def report(tokens: int, rows: dict) -> None:
        if tokens >= stop:
            os.kill(os.getpid(), signal.SIGTERM)

    training.train(plan, report)
    runs.scan_run(runs.open_run(plan.output), n_tokens=1000)
    return plan.output


def _noticed(run: Path, file: Path) -> bool:
    """Whether `sae verify` finds it, and what reads this file refuses it or passes it over."""
    found = any(finding.problems for finding in _findings(run))
    if file.parts[0] == "steps":
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            saved = checkpoint.newest(run)
        passed_over = saved is None or saved.folder.name != file.parts[1]
        return found and passed_over and (bool(told) or saved is not None)
    if file.name in UNREAD:
        return found
    return found and (
        _refused(lambda: SparseAutoencoder.from_pretrained(run))
        or _refused(lambda: FeatureDictionary(store.Run(run).features()))
    )


UNREAD = ("README.md",)
"""What no loader reads, so that verify alone can notice."""


def _findings(run: Path) -> list[Finding]:
    try:
        return list(verify(store.Run(run)))
    except SAEError as error:
        return [Finding("", "", [str(error)])]


def _refused(load: Callable[[], object]) -> bool:
    try:
        load()
    except SAEError:
        return True
    return False


def _grown(file: Path, other: Path, bench: Bench) -> bool:
    with file.open("ab") as end:
        end.write(bench.random.randbytes(bench.random.randrange(1, 100)))
    return True


def _flipped(file: Path, other: Path, bench: Bench) -> bool:
    content = bytearray(file.read_bytes())
    content[bench.random.randrange(len(content))] ^= 1 << bench.random.randrange(8)
    file.write_bytes(content)
    return True


def _cut(file: Path, other: Path, bench: Bench) -> bool:
    os.truncate(file, bench.random.choice((0, file.stat().st_size - 1, file.stat().st_size // 2)))
    return True


def _gone(file: Path, other: Path, bench: Bench) -> bool:
    file.unlink()
    return True


def _swapped(file: Path, other: Path, bench: Bench) -> bool:
    """For the file of another run; no damage where that is the same, or not there."""
    if not other.is_file() or other.read_bytes() == file.read_bytes():
        return False
    shutil.copy(other, file)
    return True


DAMAGES = {"grown": _grown, "a bit": _flipped, "cut": _cut, "gone": _gone, "swapped": _swapped}


def no_room(bench: Bench) -> Iterator[Outcome]:
    """F6: room for 10 to 200 % of the largest file: the checkpoint before stays, and is used."""
    whole = weights(training.train(bench.plan("whole-6")))
    plan = bench.plan("full")
    stopped = forked(partial(_stop_after, plan, 7))
    waited(stopped)
    needed = max(f.stat().st_size for f in (plan.output / "steps").rglob("*.safetensors"))
    pristine = shutil.copytree(plan.output, bench.folder / "full-pristine")
    before = saved_state(pristine).facts["tokens"]
    for tenths in (*range(1, 11), 20):
        told = bench.folder / f"full-{tenths}.txt"
        code = waited(forked(partial(_limited, plan, needed * tenths // 10, told)))
        words = told.read_text() if told.exists() else ""
        if code == 2:
            there = saved_state(plan.output).facts["tokens"] >= before
            fine = tenths <= 10 and there and "bytes, the disk has" in words
        else:
            fine = code == 0 and tenths >= 9  # the pool is sometimes less full
        go_on(plan)
        same, why = equal(plan.output, whole, "full disk")
        yield fine and same, f"{tenths * 10} % of {needed:,} bytes: code {code}, {words!r}; {why}"
        shutil.rmtree(plan.output)
        shutil.copytree(pristine, plan.output)
    yield from _small_disk(bench, plan, whole)


def _stop_after(plan: Plan, steps: int) -> None:
    def report(tokens: int, rows: dict) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    training.LOG_EVERY_STEPS = steps
    training.train(
        plan, lambda tokens, rows: report(tokens, rows) if tokens > steps * STEP else None
    )


def _limited(plan: Plan, most: int, told: Path) -> None:
    """Go on where no file may become larger than `most` bytes; exit code 2 on our own error."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    try:
        go_on(plan)
    except (SAEError, OSError) as error:
        told.write_text(str(error))
        os._exit(2)


def _small_disk(bench: Bench, plan: Plan, whole: list[str]) -> Iterator[Outcome]:
    """A file system of its own that is too small for one more checkpoint, where one may be made."""
    disk = bench.folder / "disk"
    disk.mkdir()
    size = sum(f.stat().st_size for f in plan.output.rglob("*") if f.is_file()) + 60_000
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None, "a small file system cannot be mounted here"
        return
    try:
        run = shutil.copytree(plan.output, disk / "run")
        small, told = dataclasses.replace(plan, output=run), bench.folder / "small.txt"
        code = waited(forked(partial(_limited, small, 1 << 30, told)))
        words = told.read_text() if told.exists() else ""
        same = (
            weights(training.train(small, resume=checkpoint.newest(run))) == whole
            if not code
            else True
        )
        yield code in (0, 2) and same and (not code or "bytes, the disk has" in words), words
    finally:
        subprocess.run(["umount", str(disk)], check=False)
