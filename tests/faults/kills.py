"""Processes that end in the middle: kill -9, signals, a crash at every step; and two writers."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from faults.tools import STEP, Bench, Outcome, equal, forked, go_on, waited, weights
from sae import checkpoint, store, training
from sae.activations import ActivationStream
from sae.autoencoder import SparseAutoencoder
from sae.errors import RunError, SAEError
from sae.planning import Plan
from sae.stopping import Stop

LONGER = {"tokens": str(96 * STEP), "hookpoints": "layers.*.mlp_act"}


def killed_until_done(bench: Bench, plan: Plan, work: Callable[[], object], seconds: float) -> int:
    """Start `work` and kill it at random moments within `seconds`, again and again; the kills."""
    kills = 0
    while True:
        child = forked(work)
        time.sleep(bench.random.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        if waited(child) == 0:  # it was faster
            return kills
        kills += 1
        if kills > 12:  # more would only take longer
            if waited(forked(work)) != 0:
                raise AssertionError(f"{plan.output} does not go on after {kills} kills")
            return kills


def kill_9(bench: Bench) -> Iterator[Outcome]:
    """F1: killed at random moments, gone on with until done. Each kill counts as a trial."""
    whole = weights(training.train(bench.plan("whole-1", LONGER)))
    wanted, kills, runs = bench.times(25, 300), 0, 0
    while kills < wanted or runs < 5:
        plan = bench.plan(f"killed-{runs}", LONGER)
        own = killed_until_done(bench, plan, partial(go_on, plan), seconds=1.5)
        kills, runs = kills + own, runs + 1
        outcome = equal(plan.output, whole, f"run {runs}, {own} kills")
        yield from [outcome] * max(own, 1)
        shutil.rmtree(plan.output)


def recorded(plan: Plan, log: Path) -> None:
    """Train, and append to `log` which tokens each step learnt from."""
    apply = training.Training.apply

    def noted(self: training.Training, batches: training.Batches, stats: dict) -> None:
        (batch, *_) = batches.values()
        with log.open("a") as file:
            file.write(json.dumps([self.steps, batch.source.tolist()]) + "\n")
        apply(self, batches, stats)

    training.Training.apply = noted  # in this process alone
    go_on(plan)


def same_tokens(bench: Bench) -> Iterator[Outcome]:
    """F3: two kills or more within an epoch, and across its edge: the same tokens at every step."""
    changes = {"tokens": str(40 * STEP)}  # the text has about 22 steps
    plan = bench.plan("whole-3", changes)
    log = plan.output.with_suffix(".log")
    waited(forked(partial(recorded, plan, log)))
    wanted, whole = dict(map(json.loads, log.read_text().splitlines())), weights(plan.output)
    for trial in range(bench.times(20, 100)):
        plan = bench.plan(f"epoch-{trial}", changes)
        log = plan.output.with_suffix(".log")
        kills = 0
        for upto in (
            6,
            12,
            25,
        ):  # steps after which to kill: twice in the first epoch, then behind it
            child = forked(partial(recorded, plan, log))
            while _lines(log) < upto and os.waitpid(child, os.WNOHANG) == (0, 0):
                time.sleep(0.001)
            os.kill(child, signal.SIGKILL)
            kills += waited(child) == -signal.SIGKILL
        if waited(forked(partial(recorded, plan, log))) != 0:
            yield False, f"trial {trial}: it did not go on"
            continue
        rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("]]]")]
        found = dict(rows)
        same = (
            all(tokens == wanted[step] for step, tokens in rows) and found.keys() == wanted.keys()
        )
        ok = same and kills >= 2 and weights(plan.output) == whole
        yield ok, f"trial {trial}: other tokens or weights, {kills} kills"
        shutil.rmtree(plan.output)


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def signals(bench: Bench) -> Iterator[Outcome]:
    """F4: SIGTERM, SIGINT, two SIGINT, and a time limit: saved and gone in 10 s, then equal."""
    whole = weights(training.train(bench.plan("whole-4", LONGER)))
    for trial in range(bench.times(20, 100)):
        kind = ("SIGTERM", "SIGINT", "SIGINT twice", "max-time")[trial % 4]
        plan = bench.plan(f"signal-{trial}", LONGER)
        seconds = bench.random.uniform(0.1, 0.8) if kind == "max-time" else None
        child = forked(partial(_exiting, plan, seconds))
        time.sleep(bench.random.uniform(0.3, 1.2))
        started = time.monotonic()
        if kind != "max-time":
            number = signal.SIGTERM if kind == "SIGTERM" else signal.SIGINT
            os.kill(child, number)
            if kind == "SIGINT twice":
                time.sleep(0.01)
                os.kill(child, number)
        code = waited(child, seconds=10)
        took = time.monotonic() - started
        expected = {"SIGTERM": (143,), "SIGINT": (130,), "max-time": (0,)}.get(kind, (130, -2))
        fine = code in (*expected, 0) and took < 10  # 0: it had ended before
        waited(forked(partial(go_on, plan)))
        same, why = equal(plan.output, whole, kind)
        yield fine and same, f"{why}; exit code {code} after {took:.1f} s"
        shutil.rmtree(plan.output)


def _exiting(plan: Plan, seconds: float | None) -> None:
    """Train as the command line does, and leave with its exit codes."""
    with Stop():  # what comes before the first step or behind the last is noted
        go_on(plan, max_seconds=seconds)
    ended = store.read_manifest(plan.output)["ended"]
    os._exit({"SIGTERM": 143, "SIGINT": 130}.get(ended, 0))


WATCHED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")


def crash_points(bench: Bench) -> Iterator[Outcome]:
    """F2: the process is gone before the n-th thing it does to the disk, for every n of two saves.

    Things done: every file opened, renamed, removed, every folder made or removed, every fsync and
    every safetensors file written.
    """
    changes = {"tokens": str(10 * STEP), "checkpoint.keep": "1"}
    whole = weights(training.train(bench.plan("whole-2", changes)))
    for repeat in range(bench.times(1, 10)):
        for n in range(1, 1000):
            plan = bench.plan(f"crash-{repeat}-{n}", changes)
            code = waited(forked(partial(_crashing, plan, n)))
            if code == 0:  # it did fewer things than n
                shutil.rmtree(plan.output)
                break
            try:
                go_on(plan)
                outcome = equal(plan.output, whole, f"crash before action {n}")
            except Exception as error:
                outcome = False, f"crash before action {n}: {type(error).__name__}: {error}"
            yield outcome
            shutil.rmtree(plan.output)


def _crashing(plan: Plan, n: int) -> None:
    """Train; exit before the n-th action below the run's folder."""
    left = [n]

    def act(path: object) -> None:
        if str(path).startswith(str(plan.output)):
            left[0] -= 1
            if not left[0]:
                os._exit(9)

    def hook(event: str, args: tuple) -> None:
        if event in WATCHED and not (event == "open" and args[1] == "r"):
            act(args[0])

    sys.addaudithook(hook)
    fsync, save_file = store.fsync, checkpoint.save_file
    store.fsync = lambda path: (act(path), fsync(path))[1]
    checkpoint.save_file = lambda tensors, path: (act(path), save_file(tensors, path))[1]
    go_on(plan)


def one_writer(bench: Bench) -> Iterator[Outcome]:
    """F14: a second process on the same run is refused; a reader never sees half an SAE."""
    for trial in range(bench.times(10, 100)):
        plan = bench.plan(f"writer-{trial}", LONGER)
        first = forked(partial(go_on, plan))
        while not (plan.output / "metrics.jsonl").exists():
            time.sleep(0.005)
        try:
            go_on(plan)
            refused = False
        except RunError as error:
            refused = "another process" in str(error)
        yield refused and waited(first) == 0, f"trial {trial}: the second writer was not refused"
        shutil.rmtree(plan.output)
    plan = bench.plan("reader")
    run = training.train(plan)
    whole, folder = weights(run), run / "saes" / "layers.1.mlp_act"
    writer = forked(partial(_rewrite, folder, 200))
    wanted = SparseAutoencoder.from_pretrained(folder).state_dict()
    reads, why = 0, ""
    while os.waitpid(writer, os.WNOHANG) == (0, 0):
        try:
            found = SparseAutoencoder.from_pretrained(folder).state_dict()
        except (SAEError, OSError):
            continue  # told that the files change under it: no harm
        reads += 1
        if any(not torch.equal(found[name], wanted[name]) for name in wanted):
            why = "half-written weights were read"
    yield not why and reads > 0 and weights(run) == whole, f"{reads} reads; {why}"


def _rewrite(folder: Path, times: int) -> None:
    sae = SparseAutoencoder.from_pretrained(folder)
    for _ in range(times):
        with store.staged(folder, overwrite=True) as staging:
            sae.save_pretrained(staging)


def stream_is_plan(bench: Bench) -> Iterator[Outcome]:
    """D2: the same config twice, and streams read to the end: the same bits, every token once."""
    first, second = (weights(training.train(bench.plan(f"twice-{i}"))) for i in "ab")
    yield first == second, "two runs of one config differ"
    plan = bench.plan("once", {"data.repeat": "false"})
    stream: ActivationStream = training.Training(plan).stream
    seen = [
        tuple(pair) for batches in stream for b in batches.values() for pair in b.source.tolist()
    ]
    yield len(seen) == len(set(seen)), "a token came twice in one epoch"
