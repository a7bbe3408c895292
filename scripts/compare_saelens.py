"""Our ReLU-L1 autoencoders beside SAELens' own, on the same activations, by one evaluator.

    python -m venv /tmp/saelens && /tmp/saelens/bin/pip install sae-lens
    python scripts/compare_saelens.py --venv /tmp/saelens/bin/python

36 trainings and 1 GB of disk meanwhile; estimated at an hour or two on two cores. Expected: two
tables, and for each measure a line that says HOLDS or FAILS and by how much the sides differ.

Both sides read the same shuffled activations in the same order, from files that are written once a
seed, at the same hookpoint, width and token budget, and minimise the same loss: squared error plus
L1 on activations weighted by decoder norms, inputs of mean norm √d_in. Ours is trained with the
defaults of `sae train`, SAELens' with its tutorial's recipe (batch 4096, documented learning rate
5e-5; saelens_worker.py has it in full). That rate is meant for 30 000 steps and barely moves in a
few hundred, so beside ½, 1 and 2 times it SAELens may choose 4 to 32 times; ours chooses among as
many. The rate with the lowest held-out loss at the middle L1 (the lower
of two) and the first seed is taken.

Prints held-out FVU and cross-entropy recovered (the ablation puts in the mean) at equal L0:
interpolated in log L0 within the range all seeds of both sides share. Every training is written to
--out; those found there are not repeated.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from kept import Kept
from saelens_worker import batches
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae import config as settings
from sae.activations import ActivationStream, Batch, read
from sae.autoencoder import SparseAutoencoder
from sae.errors import SAEError
from sae.evaluation import evaluate
from sae.learner import Learner
from sae.memory import keep_freed_memory
from sae.planning import Plan, plan
from sae.sparsity import make_sparsity

SIDES = ("ours", "SAELens")
BLOCK = 4096
"""Tokens; both batches divide it, and it divides the budget."""
SHARD = 16 * BLOCK
LOSS_BATCHES = 4
"""Held-out batches on which the learning rates are compared."""


class Training(NamedTuple):
    """What sets one training apart from the others."""

    side: str
    l1: float
    lr: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.side} l1={self.l1:g} lr={self.lr:g} seed={self.seed}"


# ------------------------------------------------------------------------------- one seed's data


class Bed:
    """What all trainings of one seed share; made when first asked for, files deleted by close()."""

    def __init__(self, args: argparse.Namespace, seed: int):
        self.args, self.seed = args, seed
        self._folder = tempfile.TemporaryDirectory(prefix="compare-", dir=args.scratch)
        self.folder = Path(self._folder.name)

    def close(self) -> None:
        self._folder.cleanup()

    @cached_property
    def plan(self) -> Plan:
        """The model and the text, with our defaults for all that is not on the command line."""
        args = self.args
        wanted = {
            "hookpoints": [args.hookpoint],
            "model.name": args.model,
            "sae.expansion_factor": args.expansion,
            "tokens": args.tokens,
            "seed": self.seed,
            "output": str(self.folder / "run"),
        }
        return plan(settings.resolve(None, {k: v for k, v in wanted.items() if v is not None}))

    @cached_property
    def point(self) -> Any:
        return self.plan.hookpoints[0]

    @cached_property
    def d_in(self) -> int:
        return self.plan.widths[self.point]

    @cached_property
    def statistics(self) -> Any:
        """Our stream's mean and mean norm; the activations are written on the way."""
        started, optim = time.perf_counter(), self.plan.config.optim
        stream = ActivationStream(
            self.plan.lm.model, self.plan.hookpoints, self.plan.source.train(optim.llm_batch),
            batch=BLOCK, pool=optim.pool, dtype=self.plan.dtype,
            generator=torch.Generator().manual_seed(self.seed),
        )  # fmt: skip
        found, waiting = stream.statistics()[self.point], []
        for n, drawn in enumerate(islice(stream, self.args.tokens // BLOCK), start=1):
            waiting.append(drawn[self.point].x.cpu())
            if len(waiting) * BLOCK == SHARD or n == self.args.tokens // BLOCK:
                save_file({"acts": torch.cat(waiting)}, self.folder / f"{n:06}.safetensors")
                waiting.clear()
        print(f"seed {self.seed}: activations stored, {time.perf_counter() - started:.0f} s")
        return found

    @cached_property
    def heldout(self) -> Tensor:
        """[n d_in] held-out activations in fp32, for the loss."""
        rows = islice(self.plan.source.heldout(16), LOSS_BATCHES)
        model, points = self.plan.lm.model, self.plan.hookpoints
        return torch.cat([read(model, points, r, torch.float32)[0][self.point] for r in rows])


# ------------------------------------------------------------------------------------- trainings


def train_ours(bed: Bed, training: Training) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """Our learner on the stored activations: what `sae train` does behind its stream."""
    scale_and_mean, config = bed.statistics, bed.plan.config
    sparsity = config.sae.sparsity.model_copy(update={"l1": training.l1})
    config = config.model_copy(
        update={
            "sae": config.sae.model_copy(update={"sparsity": sparsity}),
            "optim": config.optim.model_copy(update={"lr": training.lr}),
        }
    )
    device, dtype = bed.plan.device, bed.plan.dtype
    started, tokens = time.perf_counter(), 0
    learner = Learner.begin(config, scale_and_mean, dtype=dtype)
    for stored in batches(bed.folder, config.optim.batch):
        x = stored.to(device)
        source = torch.zeros(len(x), 2, dtype=torch.long)  # only logging reads it
        drawn, done = Batch(x, x, source), tokens / config.tokens
        learner.apply(drawn, learner.gradients(drawn, done), done)
        tokens += len(x)
    info = {"seconds": time.perf_counter() - started, "revived": learner.revived}
    return learner.raw(), info


def train_saelens(bed: Bed, training: Training) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """SAELens' trainer in its own environment, in the number format of ours."""
    bed.statistics  # noqa: B018 - writes the activations
    job = training._asdict() | {
        "activations": str(bed.folder),
        "d_in": bed.d_in,
        "d_sae": bed.plan.config.sae.width(bed.d_in),
        "tokens": bed.args.tokens,
        "batch": bed.args.batch_saelens,
        "device": str(bed.plan.device),
        "autocast": bed.plan.dtype == torch.bfloat16,
    }
    with tempfile.TemporaryDirectory(dir=bed.folder) as folder:
        order, output = Path(folder) / "job.json", Path(folder) / "out"
        order.write_text(json.dumps(job))
        worker = Path(__file__).with_name("saelens_worker.py")
        command = [bed.args.venv, str(worker), str(order), str(output)]
        # The environment's way of keep_freed_memory(): SAELens gets it as well.
        env = os.environ | {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        if done.returncode:
            sys.exit(f"SAELens: {training.key} ended with {done.returncode}\n{done.stderr[-2000:]}")
        return read_saelens(output, training.l1), json.loads((output / "info.json").read_text())


def read_saelens(folder: Path, l1: float) -> SparseAutoencoder:
    """A standard SAE that SAELens saved for raw activations, as ours."""
    weights = load_file(folder / "sae_weights.safetensors")
    d_in, d_sae = weights["W_enc"].shape
    sae = SparseAutoencoder(d_in, d_sae, make_sparsity("relu_l1", l1=l1), subtract_b_dec=False)
    sae.load_state_dict(weights)
    return sae


@torch.no_grad()
def loss(bed: Bed, sae: SparseAutoencoder, l1: float) -> float | None:
    """The loss both sides minimise, on held-out activations of mean norm √d_in."""
    sae, scale, total = sae.to(bed.plan.device), bed.statistics.scale, 0.0
    for x in bed.heldout.split(4096):
        out = sae(x)
        squares = (out.recon - x).square().sum() * scale**2
        total += (squares + l1 * scale * (out.acts @ sae.decoder_norms).sum()).item()
    return total / len(bed.heldout) if math.isfinite(total) else None


def scored(bed: Bed, training: Training) -> dict[str, Any]:
    """Train and evaluate; one entry of the results."""
    train = train_ours if training.side == "ours" else train_saelens
    sae, info = train(bed, training)
    rows = bed.plan.source.heldout(bed.plan.config.optim.llm_batch)
    model: Any = bed.plan.lm.model
    found = evaluate(model, {bed.point: sae}, rows, n_tokens=bed.args.eval_tokens)[bed.point]
    crossed = found.cross_entropy
    scores = {
        "loss": loss(bed, sae, training.l1),
        "l0": found.l0.value,
        "fvu": found.fvu.value,
        "ce": crossed.recovered_mean.value if crossed else None,
        "dead": found.dead.value,
    }
    return training._asdict() | info | scores


def entry(results: Kept, bed: Bed, training: Training) -> dict[str, Any]:
    """The entry of a training, which is done if it is not there."""
    return results.of(training.key, lambda: scored(bed, training))


def trained(args: argparse.Namespace, results: Kept) -> list[dict[str, Any]]:
    """All trainings at the chosen rates."""
    rates: dict[str, float] = {}
    rows = []
    for seed in args.seeds:
        bed = Bed(args, seed)
        try:
            rates = rates or {side: best_rate(args, results, bed, side) for side in SIDES}
            rows += [
                entry(results, bed, Training(side, l1, rates[side], seed))
                for side in SIDES
                for l1 in coefficients(args, side)
            ]
        finally:
            bed.close()
    return rows


def coefficients(args: argparse.Namespace, side: str) -> list[float]:
    """The L1 coefficients of a side, in order."""
    return sorted(args.l1 if side == "ours" else args.l1_saelens or args.l1)


def best_rate(args: argparse.Namespace, results: Kept, bed: Bed, side: str) -> float:
    """The learning rate of lowest held-out loss at the middle coefficient."""
    base, factors = (
        (args.lr_ours, args.factors_ours)
        if side == "ours"
        else (args.lr_saelens, args.factors_saelens)
    )
    l1 = coefficients(args, side)
    tried = [Training(side, l1[(len(l1) - 1) // 2], base * factor, bed.seed) for factor in factors]
    losses = [entry(results, bed, training)["loss"] for training in tried]
    best = min(range(len(tried)), key=lambda i: math.inf if losses[i] is None else losses[i])
    print(f"{side}: lr {tried[best].lr:g}, {factors[best]:g} × {base:g}", flush=True)
    return tried[best].lr


# ------------------------------------------------------------------------------------ comparison


class Curves:
    """L0, FVU and cross-entropy recovered by side and seed, each [seeds sparsities], L0 rising."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.seeds = sorted({row["seed"] for row in rows})
        self.by = {
            (side, seed): sorted(
                (r for r in rows if (r["side"], r["seed"]) == (side, seed) and r["l0"]),
                key=lambda r: r["l0"],
            )
            for side in SIDES
            for seed in self.seeds
        }

    def shared(self, points: int) -> np.ndarray:
        """L0s, even in the log, that every curve reaches; none where there is no such range."""
        if not all(self.by.values()):
            return np.empty(0)
        low = max(rows[0]["l0"] for rows in self.by.values())
        high = min(rows[-1]["l0"] for rows in self.by.values())
        return np.geomspace(low, high, points) if low < high else np.empty(0)

    def at(self, side: str, measure: str, l0: np.ndarray) -> np.ndarray:
        """[seeds points] a measure interpolated in log L0."""
        curves = [self.by[side, seed] for seed in self.seeds]
        return np.array(
            [
                np.interp(np.log(l0), np.log([r["l0"] for r in rows]), [r[measure] for r in rows])
                for rows in curves
            ]
        )


class Contrast(NamedTuple):
    """One measure at equal L0: [points] each; `se` is that of `difference`, over the seeds."""

    ours: np.ndarray
    theirs: np.ndarray
    difference: np.ndarray
    se: np.ndarray

    def cells(self, point: int) -> str:
        ours, theirs, difference, se = (values[point] for values in self)
        error = "" if math.isnan(se) else f" ± {se:.4f}"
        return f" {ours:.4f} | {theirs:.4f} | {difference:+.4f}{error} |"

    def verdict(self, name: str, better: int) -> str:
        """`better`: the sign of a difference in our favour."""
        gain, mean = better * self.difference, self.difference.mean()
        size = (
            f"difference {self.difference.min():+.4f} to {self.difference.max():+.4f}, "
            f"mean {mean:+.4f} ({mean / self.theirs.mean():+.1%} of theirs)"
        )
        if np.isnan(self.se).any():
            return f"{name}: one seed, no standard error, no verdict; {size}."
        behind, ahead = (gain < -2 * self.se).sum(), (gain > 2 * self.se).sum()
        held = "FAILS" if behind else "HOLDS"
        return (
            f"{name}: {held}. By more than two standard errors ours is worse at {behind} and "
            f"better at {ahead} of {len(gain)} points; {size}."
        )


def contrast(curves: Curves, measure: str, l0: np.ndarray) -> Contrast:
    """Ours − theirs seed by seed; without a second seed the standard error is NaN."""
    ours, theirs = (curves.at(side, measure, l0) for side in SIDES)
    each, n = ours - theirs, len(ours)
    se = each.std(0, ddof=1) / math.sqrt(n) if n > 1 else np.full(len(l0), math.nan)
    return Contrast(ours.mean(0), theirs.mean(0), each.mean(0), se)


def print_trainings(rows: list[dict[str, Any]]) -> None:
    """The curves as trained, means over the seeds."""
    print("\n| side | L1 | learning rate | L0 | FVU | CE recovered | dead | seconds |")
    print("|---" * 8 + "|")
    for side, l1, lr in sorted({(r["side"], r["l1"], r["lr"]) for r in rows}):
        same = [r for r in rows if (r["side"], r["l1"]) == (side, l1)]
        mean = {k: np.mean([r[k] for r in same]) for k in ("l0", "fvu", "ce", "dead", "seconds")}
        print(
            f"| {side} | {l1:g} | {lr:g} | {mean['l0']:.1f} | {mean['fvu']:.4f} "
            f"| {mean['ce']:.4f} | {mean['dead']:.1%} | {mean['seconds']:.0f} |"
        )


def print_comparison(rows: list[dict[str, Any]], points: int) -> None:
    """Both sides at equal L0, and in words who is ahead."""
    curves = Curves(rows)
    l0 = curves.shared(points)
    if not len(l0):
        sys.exit("no L0 that every seed of both sides reaches; give other --l1 or --l1-saelens")
    fvu, ce = contrast(curves, "fvu", l0), contrast(curves, "ce", l0)
    print("\n| L0 | FVU ours | SAELens | difference ± SE | CE ours | SAELens | difference ± SE |")
    print("|---" * 7 + "|")
    for point, value in enumerate(l0):
        print(f"| {value:.1f} |{fvu.cells(point)}{ce.cells(point)}")
    print()
    print(fvu.verdict("FVU", better=-1))
    print(ce.verdict("Cross-entropy recovered", better=1))


# ------------------------------------------------------------------------------- the command line


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--venv", required=True, help="the Python of an environment that holds sae-lens")
    add("--out", type=Path, default=Path("compare_saelens.json"), help="results, kept and reused")
    add("--model", help="language model; default: the bundled one")
    add("--hookpoint", default="layers.2.mlp_act")
    add("--expansion", type=int, default=8, help="features per input dimension")
    add("--tokens", type=int, default=1_000_000, help=f"budget, rounded down to whole {BLOCK}s")
    add(
        "--l1", type=float, nargs="+", default=[8, 12, 16, 24], help="ours, and SAELens' by default"
    )
    add("--l1-saelens", type=float, nargs="+", help="SAELens' where they differ")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--lr-ours", type=float, default=1e-3, help="base learning rate")
    add("--lr-saelens", type=float, default=5e-5, help="base learning rate")
    eighths, doubles = [1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], [1 / 2, 1, 2, 4, 8, 16, 32]
    add("--factors-ours", type=float, nargs="+", default=eighths, help="times the base, all tried")
    add("--factors-saelens", type=float, nargs="+", default=doubles)
    add("--batch-saelens", type=int, default=4096, help=f"tokens; must divide {BLOCK}")
    add("--eval-tokens", type=int, default=60_000, help="held-out tokens")
    add("--points", type=int, default=5, help="L0s at which the two are compared")
    add("--scratch", type=Path, help="where a seed's activations lie meanwhile (1 GB)")
    args = parser.parse_args()
    args.tokens = args.tokens // BLOCK * BLOCK
    return args


def main() -> None:
    args = arguments()
    keep_freed_memory()
    kept = ("model", "hookpoint", "expansion", "tokens", "batch_saelens", "eval_tokens")
    try:
        rows = trained(args, Kept(args.out, {name: getattr(args, name) for name in kept}))
    except SAEError as error:
        sys.exit(f"error: {error}")
    print_trainings(rows)
    print_comparison(rows, args.points)


if __name__ == "__main__":
    main()
