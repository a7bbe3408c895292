"""The training loop, read top to bottom: plan → stream of activations → one step a batch → run.

Every hookpoint's SAE is trained on the same tokens from one forward pass of the language model.
Inputs are scaled so that their mean norm is √d_in; the weights a run stores have that scale folded
in and take raw activations.
"""

import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sae import config as settings
from sae import kernels, mirror
from sae.activations import ActivationStream, Batch, Statistics
from sae.autoencoder import SparseAutoencoder, locate, read_config
from sae.errors import RunError
from sae.hooks import Hookpoint
from sae.kernels import StepStats
from sae.memory import MicroBatch
from sae.planning import Plan, sparsity_of
from sae.revival import resample
from sae.store import folder_name, staged, write_atomic, write_manifest

LOG_EVERY_STEPS = 20
AUXK_CANDIDATES = 2
"""Dead features among which AuxK chooses, in multiples of auxk: all of them would cost as much as a
dense step while many are dead."""

Report = Callable[[int, dict[str, dict[str, float]]], None]
"""Called with the tokens done and each hookpoint's metrics, at every logged step."""


def train(plan: Plan, report: Report = lambda tokens, metrics: None) -> Path:
    """Train the planned SAEs and write the run; returns its folder.

    On Ctrl-C, and when a stream ends early, the weights reached so far are saved all the same and
    the manifest says how many tokens they have seen.
    """
    config = plan.config
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    stream = ActivationStream(
        plan.lm.model,
        plan.hookpoints,
        plan.source.train(config.optim.llm_batch),
        batch=config.optim.batch,
        pool=config.optim.pool,
        dtype=plan.dtype,
        generator=generator,
    )
    statistics = stream.statistics()
    learners = {
        point: Learner(plan, point, statistics[point], generator) for point in plan.hookpoints
    }
    plan.output.mkdir(parents=True, exist_ok=True)
    write_atomic(plan.output / "config.yaml", settings.dump(config))
    tokens, started, interrupted = 0, time.perf_counter(), True
    try:
        with Log(plan, started) as log:
            for step, batches in enumerate(stream):
                done = tokens / config.tokens
                found = {point: learners[point].step(batches[point], done) for point in learners}
                tokens += config.optim.batch
                last = tokens >= config.tokens
                if step % LOG_EVERY_STEPS == 0 or last:
                    rows = {str(p): learners[p].metrics(found[p], batches[p]) for p in learners}
                    log.write(tokens, rows)
                    _check_finite(rows, tokens)
                    report(tokens, rows)
                if last:
                    break
        interrupted = False
    except KeyboardInterrupt:
        pass  # saved below, like every other end
    finally:
        for point, learner in learners.items():
            save(plan, point, learner, tokens, interrupted)
        seconds = round(time.perf_counter() - started, 1)
        write_manifest(
            plan.output, {"tokens": tokens, "interrupted": interrupted, "seconds": seconds}
        )
    return plan.output


def _check_finite(rows: dict[str, dict[str, float]], tokens: int) -> None:
    """Stop at the first logged loss that is not a number."""
    for hookpoint, metrics in rows.items():
        if not math.isfinite(metrics["loss"]):
            raise RunError(
                f"optim.lr: the loss of {hookpoint} is {metrics['loss']} after {tokens:,} tokens; "
                "give a lower --optim.lr, or a smaller --optim.grad-clip"
            )


class Learner:
    """One SAE in training: unfolded weights, Adam, schedules, and how long each feature is quiet.

    `statistics` gives the scale of the inputs and b_dec's start. An L1 penalty makes activations
    too small, so its training ends with a refit: the decoder alone, without penalty (after Wright
    & Sharkey 2024, "Addressing feature suppression in SAEs", who tune the norms).
    """

    def __init__(
        self, plan: Plan, point: Hookpoint, statistics: Statistics, generator: torch.Generator
    ):
        config = plan.config
        self.config, self.generator, self.dtype = config, generator, plan.dtype
        self.sae, self.scale = _start(plan, point, statistics, generator)
        self.optimizer = torch.optim.Adam(
            self.sae.parameters(), lr=config.optim.lr, betas=config.optim.betas, fused=True
        )
        self.quiet = torch.zeros(self.sae.d_sae, dtype=torch.long, device=plan.device)
        self.tokens_since_revival = 0
        self.revived = 0
        self.lr = 0.0
        self.refit: float = getattr(config.sae.sparsity, "refit", 0.0)
        self.variance = 0.0  # E‖y − mean y‖² of the first batch
        self.chunk = MicroBatch(f"the step of {point}", "tokens", "lower optim.batch or sae.d_sae")

    def step(self, batch: Batch, done: float) -> StepStats:
        """One Adam step on raw activations; `done` is the share of the tokens trained on."""
        x, y = batch.x.float() * self.scale, batch.y.float() * self.scale
        self.variance = self.variance or _variance(y).item()
        stats = self._gradients(x, y, done)
        optim = self.config.optim
        if optim.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), optim.grad_clip)
        self.lr = optim.lr * warmed_up(done, optim.lr_warmup) * self._decayed(done)
        self.optimizer.param_groups[0]["lr"] = self.lr
        self.optimizer.step()
        self.quiet = torch.where(stats.fired > 0, 0, self.quiet + len(x))
        self._revive(x, y, done)
        return stats

    @property
    def dead(self) -> Tensor:
        """[d_sae] which features have not fired for `optim.dead_after` tokens."""
        return self.quiet >= self.config.optim.dead_after

    def metrics(self, stats: StepStats, batch: Batch) -> dict[str, float]:
        """What a logged step writes down. `fvu` is that of this batch."""
        y = batch.y.float() * self.scale
        (document, position), context = batch.source.T, self.config.data.context
        return {
            "loss": stats.loss.item(),
            "mse": stats.mse.item(),
            "fvu": (stats.mse / _variance(y)).item(),
            "l0": stats.l0.item(),
            "dead": self.dead.float().mean().item(),
            "revived": self.revived,
            "lr": self.lr,
            "sequences": len(torch.stack([document, position // context]).unique(dim=1)[0]),
        }

    def _gradients(self, x: Tensor, y: Tensor, done: float) -> StepStats:
        sparsity = self.config.sae.sparsity
        if sparsity.kind == "relu_l1":
            refitting = done >= 1 - self.refit
            l1 = 0.0 if refitting else sparsity.l1 * warmed_up(done, sparsity.l1_warmup)
            stats = self.chunk.fit(
                len(x),
                lambda n: kernels.relu_l1_step(self.sae, x, y, l1, n, matmul_dtype=self.dtype),
            )
            if refitting:
                for parameter in (self.sae.W_enc, self.sae.b_enc, self.sae.b_dec):
                    parameter.grad = None  # Adam leaves these alone: what is active stays so
            return stats
        auxk = sparsity.auxk or self.sae.d_in // 2
        step = functools.partial(
            kernels.topk_step,
            self.sae,
            x,
            y,
            sparsity.k,
            auxk=auxk,
            auxk_coef=sparsity.auxk_coef * self.variance,  # both losses in the same unit
            dead=self._quietest_dead(AUXK_CANDIDATES * auxk),
            matmul_dtype=self.dtype,
        )
        return self.chunk.fit(len(x), lambda n: step(chunk=n))

    def _decayed(self, done: float) -> float:
        """1 → 0 over `lr_decay` before the refit, and once more over the refit."""
        if done >= 1 - self.refit:
            return (1 - done) / self.refit if self.refit else 0.0
        share = self.config.optim.lr_decay
        return min(1.0, (1 - self.refit - done) / share) if share else 1.0

    def _quietest_dead(self, limit: int) -> Tensor:
        """[d_sae] the dead features that have been quiet longest, at most `limit` of them."""
        quietest = torch.zeros_like(self.quiet, dtype=torch.bool)
        quietest[self.quiet.topk(min(limit, len(self.quiet))).indices] = True
        return quietest & self.dead

    def _revive(self, x: Tensor, y: Tensor, done: float) -> None:
        """Resample every `dead_after` tokens until the learning rate starts to fall."""
        optim = self.config.optim
        self.tokens_since_revival += len(x)
        if self.sae.sparsity.revival != "resample" or self._decayed(done) < 1:
            return
        if self.tokens_since_revival >= optim.dead_after:
            dead = self.dead
            self.revived += resample(
                self.sae, self.optimizer, x, y, dead, self.generator, self.chunk
            )
            self.quiet[dead] = 0
            self.tokens_since_revival = 0


def _variance(y: Tensor) -> Tensor:
    """Mean over the batch of ‖y − mean y‖²."""
    return (y - y.mean(0)).square().sum(1).mean()


def warmed_up(done: float, share: float) -> float:
    """0 → 1 over the first `share` of the tokens."""
    return min(1.0, done / share) if share else 1.0


def _start(
    plan: Plan, point: Hookpoint, statistics: Statistics, generator: torch.Generator
) -> tuple[SparseAutoencoder, float]:
    """A new autoencoder with b_dec at the mean, or that of `init_from`; and the inputs' scale."""
    config, d_in = plan.config, plan.widths[point]
    if config.init_from is None:
        sae = SparseAutoencoder(
            d_in,
            config.sae.width(d_in),
            sparsity_of(config),
            subtract_b_dec=config.sae.subtract_b_dec,
            device=plan.device,
        )
        sae.initialise(statistics.mean * statistics.scale, generator)
        return sae, statistics.scale
    folder = locate(config.init_from, str(point))
    old = SparseAutoencoder.from_pretrained(folder, device=plan.device, dtype=torch.float32)
    scale = (read_config(folder).get("metadata") or {}).get("scale", statistics.scale)
    sae = old.unfolded(scale)
    sae.sparsity = sparsity_of(config)
    return sae, scale


def save(plan: Plan, point: Hookpoint, learner: Learner, tokens: int, interrupted: bool) -> None:
    """Write one SAE for raw activations, with where it came from; broken weights are not kept."""
    if not all(parameter.isfinite().all() for parameter in learner.sae.parameters()):
        return
    origin = {
        "hookpoint": str(point),
        "model": plan.lm.name,
        "revision": plan.lm.revision,
        "data": plan.source.name,
        "data_fingerprint": plan.source.fingerprint,
        "tokens": tokens,
        "epochs": round(tokens / plan.source.tokens_available, 3)
        if plan.source.tokens_available
        else None,
        "interrupted": interrupted,
        "scale": learner.scale,
        "seed": plan.config.seed,
    }
    with staged(plan.output / "saes" / folder_name(str(point)), extra=origin) as folder:
        learner.sae.folded(learner.scale).save_pretrained(folder, metadata=origin)


class Log:
    """metrics.jsonl, one line a logged step and hookpoint, and its optional mirror."""

    def __init__(self, plan: Plan, started: float):
        self._path, self._started = plan.output / "metrics.jsonl", started
        self._mirror = mirror.open_mirror(plan.config, plan.output)

    def __enter__(self) -> "Log":
        self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._mirror.close()

    def write(self, tokens: int, rows: dict[str, dict[str, float]]) -> None:
        """Append the metrics of every hookpoint; a number that is not finite becomes null."""
        seconds = round(time.perf_counter() - self._started, 3)
        for hookpoint, metrics in rows.items():
            finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
            row = {"tokens": tokens, "seconds": seconds, "hookpoint": hookpoint} | finite
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._mirror.log({f"{hookpoint}/{k}": v for k, v in finite.items()}, tokens)
        self._file.flush()
