"""The training loop, read top to bottom: plan → stream of activations → one step a batch → run.

Every SAE is trained on the same tokens from one forward pass of the language model. The last of
them may be fine-tuned on as whole sequences (`sae.finetuning`). What an SAE reads
and rebuilds is scaled so that the mean norm at each hookpoint is √d; the weights a run stores have
that scale folded in and take raw activations.

A run that is interrupted leaves a checkpoint, and going on from it gives the same bits as a run
that was not interrupted. RELIABILITY.md says what that covers.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sae import checkpoint, finetuning, fingerprint, mirror, planning, store
from sae import config as settings
from sae.activations import ActivationStream, Batch, Statistics
from sae.autoencoder import locate
from sae.checkpoint import Checkpoint
from sae.errors import RunError
from sae.hooks import Hookpoint
from sae.kernels import StepStats
from sae.learner import Learner
from sae.planning import Plan
from sae.resuming import COMPLETE, TEXT_ENDED
from sae.routes import Route
from sae.stopping import Stop
from sae.store import folder_name, write_atomic

LOG_EVERY_STEPS = 20
SKIPPED_IN_A_ROW = 16
"""Batches skipped one after the other at which a run gives up."""
RETURNS = 3
"""Times that weights which are not finite send a run back to one and the same checkpoint."""
NOT_FINITE = "not finite"
"""How a run ends, beside COMPLETE, TEXT_ENDED and the reasons of `Stop`."""

Batches = Mapping[str, Batch]
"""What each SAE, by its name, reads and rebuilds."""
Report = Callable[[int, dict[str, dict[str, float]]], None]
"""Called with the tokens done and each SAE's metrics, at every logged step."""


def train(
    plan: Plan,
    report: Report = lambda tokens, metrics: None,
    *,
    resume: Checkpoint | None = None,
    max_seconds: float | None = None,
) -> Path:
    """Train the planned SAEs, from the start or from a checkpoint; returns the run's folder.

    On SIGINT and SIGTERM, after `max_seconds` and when a stream ends early, the step is finished,
    and the SAEs reached so far are saved beside a checkpoint; run and SAE manifests say how it
    ended. A batch whose loss or gradients are not finite is skipped: the weights, the schedule and
    everything else are as if it had never come.

    Raises:
        RunError: another process writes the run; no room for a checkpoint; SKIPPED_IN_A_ROW
            batches were skipped (the SAEs saved are then those of the last checkpoint).
    """
    run, stop = plan.output, Stop(max_seconds)
    run.mkdir(parents=True, exist_ok=True)
    with store.locked(run):
        training = Training(plan, resume)
        _prepare(plan, anew=resume is None)
        with stop:
            with Log(plan, training) as log:
                training, ended = _steps(training, log, stop, report)
            training.finish(ended)
    if ended == NOT_FINITE:
        raise _gave_up(training)
    return run


def _steps(training: "Training", log: "Log", stop: Stop, report: Report) -> tuple["Training", str]:
    """One step a batch until something ends it; returns where that leaves the run, and why."""
    while (ended := stop.reason() or training.ended()) is None:
        batches = training.draw(stop=lambda: stop.reason() is not None)
        if batches is None:
            continue  # the condition above knows why
        stats = training.gradients(batches)
        finite = training.finite(stats)
        if finite:
            training.apply(batches, stats)
        else:
            training.skip(batches, log)
        due = training.checkpoint_due()
        if (due or training.ended() or not finite) and not training.healthy():
            training = training.gone_back(log)
            continue
        if finite and ((training.steps - 1) % LOG_EVERY_STEPS == 0 or training.ended()):
            rows = training.metrics(batches, stats)
            log.write(training, rows)
            report(training.tokens, rows)
        if due:
            training.save(log)
    if ended == NOT_FINITE:
        training = training.gone_back(log)
    elif ended != COMPLETE and training.healthy():
        training.save(log)
    return training, ended


class Training:
    """All that changes while a run trains: the stream, the learners, and how far they are.

    A checkpoint holds nothing else. `steps` and `tokens` count what was learnt from; skipped
    batches are in neither.
    """

    def __init__(self, plan: Plan, saved: Checkpoint | None = None):
        self.plan = plan
        facts = saved.facts if saved else {}
        self.tokens: int = facts.get("tokens", 0)
        self.steps: int = facts.get("steps", 0)
        self.skipped: int = facts.get("skipped", 0)
        self.streak: int = facts.get("streak", 0)
        self.logged: dict[str, int] = facts.get("logged", {})
        self.returns = 0
        self._ran_out: bool = facts.get("memory_ran_out", False)
        self._before: float = facts.get("seconds", 0.0)
        self._started = self._saved_at = time.perf_counter()
        self._saved_tokens = self.tokens
        self._text_ended = False
        self._spliced = finetuning.spliced_passes()
        torch.manual_seed(plan.config.seed)
        self.stream = self._stream(saved)
        self.learners = self._learners(saved)

    def _stream(self, saved: Checkpoint | None) -> ActivationStream:
        plan, optim = self.plan, self.plan.config.optim
        state = saved.part("stream") if saved else None
        start = int(state["reading"][0]) if state else 0
        return ActivationStream(
            plan.lm.model,
            plan.hookpoints,
            plan.source.train(optim.llm_batch, start=start),
            batch=optim.batch,
            pool=optim.pool,
            dtype=plan.dtype,
            generator=torch.Generator().manual_seed(plan.config.seed),
            max_norm=optim.max_norm,
            state=state,
        )

    def _learners(self, saved: Checkpoint | None) -> dict[str, Learner]:
        plan, members, dtype = self.plan, self.plan.members, self.plan.dtype
        if saved:
            parts = {name: saved.part(folder_name(name)) for name in members}
            return {
                name: Learner.restored(each.config, parts[name], device=plan.device, dtype=dtype)
                for name, each in members.items()
            }
        found = self.stream.statistics()
        sides = {name: _sides(each.route, found) for name, each in members.items()}
        if start := plan.config.init_from:
            return {
                name: Learner.going_on(each.config, locate(start, name), *sides[name], dtype=dtype)
                for name, each in members.items()
            }
        by_data = [name for name, each in members.items() if each.config.sae.init == "data"]
        most = max((members[name].d_sae for name in by_data), default=0)
        peeked = self._peek(min(most, len(self.stream)))
        tokens = {name: peeked[name] for name in by_data}
        return {
            name: Learner.begin(each.config, *sides[name], tokens.get(name), dtype=dtype)
            for name, each in members.items()
        }

    def _peek(self, n: int) -> Batches:
        return self._along(self.stream.peek(n))

    def _along(self, tokens: Mapping[Hookpoint, Batch]) -> Batches:
        return {n: Batch.along(each.route, tokens) for n, each in self.plan.members.items()}

    @property
    def seconds(self) -> float:
        """Time spent on the run, over all interruptions."""
        return self._before + time.perf_counter() - self._started

    @property
    def memory_ran_out(self) -> bool:
        """Whether work was ever split to fit into memory; the last bits may then be others."""
        chunks = (each.chunk for each in self.learners.values())
        splits = [self.stream.passes, self._spliced, *chunks]
        return self._ran_out or any(split.halved for split in splits)

    @property
    def done(self) -> float:
        """Share of the tokens learnt from."""
        return self.tokens / self.plan.config.tokens

    def ended(self) -> str | None:
        """Whether there is nothing more to do, and why."""
        if self.tokens >= self.plan.config.tokens:
            return COMPLETE
        if self.streak >= SKIPPED_IN_A_ROW or self.returns >= RETURNS:
            return NOT_FINITE
        return TEXT_ENDED if self._text_ended else None

    def draw(self, stop: Callable[[], bool]) -> Batches | None:
        """The next batches; None where reading was stopped and where the text has ended."""
        self.stream.stop = stop
        config = self.plan.config
        if self.tokens < config.tokens - config.finetune.tokens:
            drawn = self.stream.draw()
            found = None if drawn is None else self._along(drawn)
        else:
            found = self._sequences()
        self._text_ended = found is None and not stop()
        return found

    def _sequences(self) -> Batches | None:
        """The next rows of text, whole, of about a batch of tokens; rows that keep none pass by."""
        plan, optim = self.plan, self.plan.config.optim
        wanted = max(1, optim.batch // plan.config.data.context)
        while (rows := self.stream.rows(wanted)) is not None:
            read = finetuning.Sequences.read(
                plan.lm.model, plan.hookpoints, rows, plan.dtype, self._spliced, optim.max_norm
            )
            if read.rows.kept.any():
                return {name: read.batch(each.route) for name, each in plan.members.items()}
        return None

    def gradients(self, batches: Batches) -> dict[str, StepStats]:
        """What each learner measures; its weights stay as they are."""
        return {n: each.gradients(batches[n], self.done) for n, each in self.learners.items()}

    def finite(self, stats: Mapping[str, StepStats]) -> bool:
        """Whether every loss and gradient is a number, and so whether the step may be taken."""
        found = [each.finite(stats[name]) for name, each in self.learners.items()]
        return bool(torch.stack(found).all())

    def healthy(self) -> bool:
        """Whether all weights are finite."""
        return all(each.healthy() for each in self.learners.values())

    def apply(self, batches: Batches, stats: Mapping[str, StepStats]) -> None:
        """Take the step."""
        for name, each in self.learners.items():
            each.apply(batches[name], stats[name], self.done)
        (batch, *_) = batches.values()
        self.tokens += len(batch.source)
        self.steps += 1
        self.streak = 0

    def metrics(
        self, batches: Batches, stats: Mapping[str, StepStats]
    ) -> dict[str, dict[str, float]]:
        """A row for each SAE."""
        shared = {"masked": self.stream.reading.masked, "skipped": self.skipped}
        return {
            name: each.metrics(stats[name], batches[name]) | shared
            for name, each in self.learners.items()
        }

    def skip(self, batches: Batches, log: "Log") -> None:
        """Pass over a batch; all that remembers it is the log and two counts."""
        self.skipped += 1
        self.streak += 1
        (batch, *_) = batches.values()
        log.event(self, "skipped", {"documents": batch.source[:, 0].unique().tolist()})

    def checkpoint_due(self) -> bool:
        """Whether enough time or tokens have passed since the last checkpoint."""
        wanted = self.plan.config.checkpoint
        late = time.perf_counter() - self._saved_at >= wanted.minutes * 60
        every = wanted.every_tokens or math.inf
        return not self.ended() and (late or self.tokens - self._saved_tokens >= every)

    def save(self, log: "Log") -> None:
        """Write a checkpoint, named by the tokens drawn."""
        config = self.plan.config
        parts = {folder_name(name): each.state() for name, each in self.learners.items()}
        parts["stream"] = self.stream.state()
        facts = {
            "tokens": self.tokens,
            "steps": self.steps,
            "skipped": self.skipped,
            "streak": self.streak,
            "memory_ran_out": self.memory_ran_out,
            "seconds": round(self.seconds, 1),
            "logged": log.sizes(),
            "config": config.model_dump(mode="json"),
            "environment": planning.environment(self.plan),
        }
        drawn = self.tokens + self.skipped * config.optim.batch
        checkpoint.write(self.plan.output, drawn, parts, facts, config.checkpoint.keep)
        self._saved_at, self._saved_tokens = time.perf_counter(), self.tokens
        self.returns = 0

    def gone_back(self, log: "Log") -> "Training":
        """The run as its last checkpoint has it, or at its start where there is none."""
        before = Training(self.plan, checkpoint.newest(self.plan.output))
        before.returns = self.returns + 1
        log.rewind(before)
        log.event(before, "went back", {"from_tokens": self.tokens})
        return before

    def finish(self, ended: str) -> None:
        """Write the SAEs and the manifest; a run that has ended needs its checkpoints no more."""
        if self.steps and self.healthy():
            examples = self._peek(2 * fingerprint.ROWS)  # twice, should some not be finite
            for name, learner in self.learners.items():
                save(self.plan, name, learner, examples[name], self.tokens, ended)
        facts = {
            "tokens": self.tokens,
            "ended": ended,
            "seconds": round(self.seconds, 1),
            "skipped": self.skipped,
            "memory_ran_out": self.memory_ran_out,
        }
        store.write_manifest(self.plan.output, facts)
        if ended in (COMPLETE, TEXT_ENDED):
            checkpoint.remove(self.plan.output)


def _sides(
    route: Route, found: Mapping[Hookpoint, Statistics]
) -> tuple[Statistics, Statistics | None]:
    """Of what an SAE reads; and of what it rebuilds, where that is something else."""
    sides = (route.inputs, route.targets)
    x, y = (Statistics.side_by_side([found[point] for point in side]) for side in sides)
    return x, y if route.is_map else None


def _prepare(plan: Plan, *, anew: bool) -> None:
    """The run's folder before the first step: its config, and no manifest of an earlier end."""
    if anew:
        if (plan.output / "saes").exists() or checkpoint.newest(plan.output):
            raise RunError(f"output: {plan.output} holds a run already; give another folder")
        checkpoint.remove(plan.output)  # what a crash in the first save has left
        write_atomic(plan.output / store.SETTINGS, settings.dump(plan.config))
    (plan.output / store.MANIFEST).unlink(missing_ok=True)


def _gave_up(training: Training) -> RunError:
    kept = (
        f"the SAEs are those of {training.tokens:,} tokens" if training.steps else "none is saved"
    )
    return RunError(
        f"optim.lr: losses or gradients were not finite in {SKIPPED_IN_A_ROW} batches in a row, or "
        f"weights again and again; {kept}.\nGive a lower --optim.lr, or --model.dtype float32"
    )


def save(plan: Plan, name: str, learner: Learner, examples: Batch, tokens: int, ended: str) -> None:
    """Write one SAE for raw activations, with its origin and what it gives for examples."""
    available, member = plan.source.tokens_available, plan.members[name]
    origin = {
        **member.route.origin(),
        "model": plan.lm.name,
        "revision": plan.lm.revision,
        "data": plan.source.name,
        "data_fingerprint": plan.source.fingerprint,
        "tokens": tokens,
        "epochs": round(tokens / available, 3) if available else None,
        "ended": ended,
        **learner.scales(),
        "seed": member.config.seed,
        **({"grid": member.settings} if member.settings else {}),
    }
    folder = plan.output / "saes" / folder_name(name)
    targets = examples.y if member.route.is_map else None
    with store.staged(folder, extra=origin, overwrite=True) as staging:
        learner.raw().save_pretrained(staging, origin, inputs=examples.x, targets=targets)


class Log:
    """metrics.jsonl, one line a logged step and SAE, with its optional mirror; events.jsonl.

    A line names the hookpoint; of a grid's SAEs also the name and the settings that the grid sets.
    Both begin where the training does: lines of steps that a kill has undone are cut off.
    """

    def __init__(self, plan: Plan, training: Training):
        self._paths = {name: plan.output / f"{name}.jsonl" for name in ("metrics", "events")}
        self._start, self._plan = training, plan

    def __enter__(self) -> "Log":
        self._files = {name: path.open("a", encoding="utf-8") for name, path in self._paths.items()}
        self._mirror = mirror.open_mirror(self._plan.config, self._plan.output)
        self.rewind(self._start)
        if self._start.steps:
            self.event(self._start, "resumed", {})
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._mirror.close()

    def write(self, training: Training, rows: dict[str, dict[str, float]]) -> None:
        """Append the metrics of every SAE; a number that is not finite becomes null."""
        for name, metrics in rows.items():
            member = self._plan.members[name]
            which = {"sae": name, **member.settings} if member.settings else {}
            finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
            row = {"hookpoint": str(member.route)} | which | finite
            self._append("metrics", training, row)
            self._mirror.log({f"{name}/{k}": v for k, v in finite.items()}, training.tokens)

    def event(self, training: Training, name: str, facts: dict[str, Any]) -> None:
        """Append what happened beside the steps."""
        self._append("events", training, {"event": name} | facts)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, all of them on the disk."""
        for name, path in self._paths.items():
            self._files[name].flush()
            store.fsync(path)
        return {name: path.stat().st_size for name, path in self._paths.items()}

    def rewind(self, training: Training) -> None:
        """Cut off what was logged after the state that `training` begins with."""
        for name, size in self.sizes().items():
            self._files[name].truncate(min(size, training.logged.get(name, 0)))

    def _append(self, name: str, training: Training, facts: dict[str, Any]) -> None:
        row = {"tokens": training.tokens, "seconds": round(training.seconds, 3)} | facts
        self._files[name].write(json.dumps(row, allow_nan=False) + "\n")
        self._files[name].flush()
