"""Our variants beside SAELens' and sparsify's own on a language model's activations, at equal L0.

    python scripts/compare_saelens.py --venvs peers

About 100 trainings, estimated at two hours of one core; peers.py says how to make the environments.
Expected: for each variant of a package a line with both FVUs, their difference and HOLDS or FAILS:
whether ours is worse by more than two standard errors. Below it, what as many of the largest
neurons keep.

Both sides read the same shuffled activations in the same order, from files that are written once a
seed, at the same hookpoint, width, batch and token budget. Ours has the defaults of `sae train`,
theirs the recipe they document (peers.py, peer_worker.py). The learning rate is chosen by FVU with
the first seed among ½, 1 and 2 times that of the recipe (other --factors to start from: whichever
is near saves trainings); where the best is the highest or lowest that was tried, the next is tried
too, on both sides: recipes are meant for far more steps than a small budget has. Then every seed is
trained with it.

Ours has k, or target_l0, at the L0 wanted. Theirs is compared at the held-out L0 that ours has: its
penalty's coefficient, or k, is moved until two trainings lie around that L0, and log FVU is
interpolated between them in log L0. All is evaluated by one evaluator on the same held-out text.
Every training is written to --out; those found there are not repeated, so that parts of the table
(--only) can be made side by side.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from kept import Kept
from peers import Peers, Recipe
from safetensors.torch import load_file, save_file

from sae import config as settings
from sae.activations import ActivationStream, Batch
from sae.autoencoder import SparseAutoencoder
from sae.errors import HookpointError, SAEError
from sae.evaluation import baseline, evaluate
from sae.fitting import fit
from sae.memory import keep_freed_memory
from sae.planning import Plan, plan

OURS = "ours"
SHARD = 1 << 15
"""Tokens a file; batches divide it, and it divides the budget."""
CLOSE, NARROW = 0.01, 0.4
"""e-folds: so close to an L0 counts as equal to it, so narrow a gap is interpolated across."""
TRIES = 6
"""Trainings at most to come to an L0."""
SLOWEST = 1 / 64
"""Of a recipe's rate: where nothing trained down to here, nothing will."""

Row = dict[str, Any]


# ------------------------------------------------------------------------------- one seed's data


class Bed:
    """What all trainings of one seed share; made when first asked for, files deleted by close()."""

    def __init__(self, args: argparse.Namespace, seed: int):
        self.args, self.seed = args, seed
        self._folder = tempfile.TemporaryDirectory(prefix="compare-", dir=args.scratch)
        self.folder = Path(self._folder.name)

    def close(self) -> None:
        self._folder.cleanup()

    def config(self, **changes: Any) -> settings.TrainConfig:
        """Our defaults for all that is not on the command line; `changes` by dotted names."""
        args = self.args
        return settings.resolve(
            None,
            {
                "hookpoints": [args.hookpoint],
                "model.name": args.model,
                "model.dtype": "float32",
                "device": "cpu",
                "sae.d_sae": args.d_sae,
                "optim.batch": args.batch,
                "optim.pool": min(settings.OptimConfig().pool, args.tokens),
                "tokens": args.tokens,
                "seed": self.seed,
                "output": str(self.folder / "run"),
            }
            | changes,
        )

    @cached_property
    def plan(self) -> Plan:
        return plan(self.config())

    @cached_property
    def point(self) -> Any:
        return self.plan.hookpoints[0]

    @cached_property
    def stored(self) -> Path:
        """The folder of the activations, in shards."""
        folder, optim = self.folder / "acts", self.plan.config.optim
        folder.mkdir()
        stream = ActivationStream(
            self.plan.lm.model, self.plan.hookpoints, self.plan.source.train(optim.llm_batch),
            batch=optim.batch, pool=optim.pool, dtype=self.plan.dtype,
            generator=torch.Generator().manual_seed(self.seed),
        )  # fmt: skip
        for n in range(self.args.tokens // SHARD):
            drawn = islice(stream, SHARD // optim.batch)
            acts = torch.cat([batches[self.point].x for batches in drawn])
            save_file({"acts": acts}, folder / f"{n:06}.safetensors")
        return folder

    @cached_property
    def batches(self) -> list[Batch]:
        """The stored activations; only logging reads where they are from."""
        found = []
        for shard in sorted(self.stored.glob("*.safetensors")):
            for x in load_file(shard)["acts"].split(self.args.batch):
                found.append(Batch(x, x, torch.zeros(len(x), 2, dtype=torch.long)))
        return found

    @property
    def heldout(self) -> Any:
        """Rows of held-out text."""
        return self.plan.source.heldout(self.plan.config.optim.llm_batch)

    def score(self, sae: SparseAutoencoder) -> Row:
        """What our evaluator says of an SAE; the cross-entropy is against the mean put in."""
        model: Any = self.plan.lm.model
        found = evaluate(model, {self.point: sae}, self.heldout, n_tokens=self.args.eval_tokens)
        scores, crossed = found[self.point], found[self.point].cross_entropy
        return {
            "l0": scores.l0.value,
            "fvu": scores.fvu.value,
            "ce": crossed.recovered_mean.value if crossed else None,
            "dead": scores.dead.value,
        }


def train_ours(bed: Bed, kind: str, l0: float, lr: float) -> Row:
    """One of our variants, as `sae train` does it, for an L0."""
    knob = {"k": round(l0)} if kind in ("topk", "batchtopk") else {"target_l0": l0}
    knobs = {f"sae.sparsity.{name}": value for name, value in knob.items()}
    config = bed.config(**{"sae.sparsity.kind": kind, "optim.lr": lr} | knobs)
    batches, started = bed.batches, time.perf_counter()
    sae = fit(batches, config)
    seconds = time.perf_counter() - started
    return bed.score(sae) | {"seconds": seconds}


def train_theirs(bed: Bed, side: Recipe, knob: float, lr: float, workers: Peers) -> Row:
    """A package's variant, its penalty's coefficient or else k being `knob`."""
    return workers.train(
        side,
        bed.score,
        lr=lr,
        seed=bed.seed,
        samples=bed.args.tokens,
        batch=bed.args.batch,
        d_in=bed.plan.widths[bed.point],
        d_sae=bed.args.d_sae,
        activations=str(bed.stored),
        **({"coefficient": knob, "k": 0} if side.coefficient else {"k": round(knob)}),
    )


# ---------------------------------------------------------------------------------- to equal L0


def at_l0(train: Callable[[float], Row], knob: float, wanted: float, *, counts: bool) -> Row:
    """What `train` gives at an L0, from trainings around it; `error` says why that is not known.

    `counts`: L0 rises with the knob, a whole number; otherwise it falls with it.
    """
    rows: list[Row] = []
    for _ in range(TRIES):
        row = train(knob)
        if "error" in row:
            return row
        rows.append(row | {"knob": knob, "l0": max(row["l0"] or 0.0, 0.1)})
        if found := between(rows, wanted):
            return found
        knob = next_knob(rows, wanted, counts=counts)
    reached = ", ".join(f"{row['l0']:.1f}" for row in rows)
    return {"error": f"no L0 near {wanted:.1f} in {TRIES} trainings, but {reached}"}


def between(rows: list[Row], wanted: float) -> Row | None:
    """The row at an L0 or, from one below and one above it, interpolated; None if none is near."""
    nearest = min(rows, key=lambda row: abs(math.log(row["l0"] / wanted)))
    if abs(math.log(nearest["l0"] / wanted)) < CLOSE:
        return nearest
    below = [row for row in rows if row["l0"] < wanted]
    above = [row for row in rows if row["l0"] > wanted]
    if not below or not above:
        return None
    low, high = max(below, key=lambda r: r["l0"]), min(above, key=lambda r: r["l0"])
    gap = math.log(high["l0"] / low["l0"])
    if gap > NARROW:
        return None
    share = math.log(wanted / low["l0"]) / gap
    mixed = {
        name: (1 - share) * low[name] + share * high[name]
        for name in ("ce", "dead", "seconds", "knob")
        if low[name] is not None
    }
    fvu = math.exp((1 - share) * math.log(low["fvu"]) + share * math.log(high["fvu"]))
    return low | mixed | {"l0": wanted, "fvu": fvu}


def next_knob(rows: list[Row], wanted: float, *, counts: bool) -> float:
    """A little beyond where the last two rows, taken as a power law, would have the L0 wanted."""
    last, slope = rows[-1], 1.0 if counts else -0.7
    if len(rows) > 1 and rows[-2]["knob"] != last["knob"]:
        before = rows[-2]
        seen = math.log(last["l0"] / before["l0"]) / math.log(last["knob"] / before["knob"])
        slope = seen if abs(seen) > 0.1 and seen * slope > 0 else slope
    goal = math.log(wanted / last["l0"])
    move = (goal + math.copysign(0.05, goal)) / slope
    knob = last["knob"] * math.exp(max(-2.0, min(2.0, move)))
    if not counts:
        return float(f"{knob:.3g}")
    return math.ceil(knob) if knob > last["knob"] else math.floor(knob)


# ------------------------------------------------------------------------------------- trainings


class Trainings:
    """Trainings of all sides, done when first asked for."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        shared = ("model", "hookpoint", "d_sae", "tokens", "batch", "eval_tokens")
        self.kept = Kept(args.out, {name: getattr(args, name) for name in shared})
        self.workers = Peers(args)
        self._beds: dict[int, Bed] = {}
        self._at: dict[tuple[Recipe, float, float, int], Row] = {}
        self._rates: dict[tuple[Recipe, float], float] = {}

    def close(self) -> None:
        self.workers.close()
        for bed in self._beds.values():
            bed.close()

    def bed(self, seed: int) -> Bed:
        if seed not in self._beds:
            self._beds[seed] = Bed(self.args, seed)
        return self._beds[seed]

    def of(self, side: Recipe, knob: float, lr: float, seed: int) -> Row:
        """One training."""
        bed, key = self.bed(seed), f"{side.name} {knob:g} lr={lr:g} seed={seed}"
        if side.package == OURS:
            return self.kept.of(key, lambda: train_ours(bed, side.variant, knob, lr))
        return self.kept.of(key, lambda: train_theirs(bed, side, knob, lr, self.workers))

    def at(self, side: Recipe, l0: float, lr: float, seed: int) -> Row:
        """Ours for an L0 that is wanted; theirs at the one that ours then has."""
        if side.package == OURS:
            return self.of(side, l0, lr, seed)
        if (asked := (side, l0, lr, seed)) not in self._at:
            there = self.of(own(side), l0, self.rate(own(side), l0), seed)["l0"]
            train, counts = partial(self.of, side, lr=lr, seed=seed), not side.coefficient
            self._at[asked] = at_l0(train, self._start(side, l0, lr), there, counts=counts)
        return self._at[asked]

    def _start(self, side: Recipe, l0: float, lr: float) -> float:
        """Where to begin: at what gave this L0 with another seed, or else with another rate."""
        if not side.coefficient:
            return l0
        found = {key: row["knob"] for key, row in self._at.items() if "knob" in row}
        near = [key for key in found if key[:2] == (side, l0)]
        same = [key for key in near if key[2] == lr] or near
        return float(f"{found[same[-1]]:.3g}") if same else side.coefficient

    def rate(self, side: Recipe, l0: float) -> float:
        """The learning rate of lowest FVU with the first seed."""
        if (side, l0) not in self._rates:
            seed, args = self.args.seeds[0], self.args
            factors = args.factors_ours if side.package == OURS else args.factors
            tried: dict[float, float] = {}
            while factors:
                for factor in factors:
                    row = self.at(side, l0, side.lr * factor, seed)
                    tried[factor] = row.get("fvu", math.inf)
                best = min(sorted(tried), key=lambda factor: tried[factor])
                edges = {max(tried): 2 * best, min(tried): best / 2}
                ended = tried[best] == math.inf and best < SLOWEST
                factors = [edges[best]] if best in edges and not ended else []
                self._rates[side, l0] = side.lr * best
        return self._rates[side, l0]

    def all(self, side: Recipe, l0: float) -> list[Row]:
        """Every seed at the chosen rate."""
        lr = self.rate(side, l0)
        return [self.at(side, l0, lr, seed) for seed in self.args.seeds]


def own(recipe: Recipe) -> Recipe:
    """What a package's variant is compared with."""
    lr, batch = settings.OptimConfig().lr, settings.OptimConfig().batch
    return Recipe(OURS, recipe.ours, recipe.ours, lr, batch)


# ------------------------------------------------------------------------------------ comparison


def line(trainings: Trainings, side: Recipe, l0: float) -> str:
    """One variant of a package beside ours."""
    mine, theirs = own(side), trainings.all(side, l0)
    if failed := [row["error"] for row in theirs if "error" in row]:
        return f"| {side.name} | did not run: {failed[0]} |"
    ours = trainings.all(mine, l0)
    cells = [
        f"{side.name} ({theirs[0]['version']})",
        f"{mean(ours, 'l0'):.1f}",
        f"{mean(theirs, 'l0'):.1f}",
    ]
    cells += [f"{mean(rows, 'fvu'):.4f}" for rows in (ours, theirs)]
    cells += [contrast(ours, theirs)]
    cells += [f"{mean(rows, 'ce'):.4f}" for rows in (ours, theirs)]
    cells += [f"{mean(rows, 'dead'):.1%}" for rows in (ours, theirs)]
    cells += [
        f"{trainings.rate(s, l0):.2g} ({trainings.rate(s, l0) / s.lr:g})" for s in (mine, side)
    ]
    cells += [f"{mean(rows, 'seconds'):.0f}" for rows in (ours, theirs)]
    return f"| {' | '.join(cells)} |"


def mean(rows: list[Row], name: str) -> float:
    """Over the seeds; NaN where it is not known."""
    return float(np.mean([math.nan if row[name] is None else row[name] for row in rows]))


def contrast(ours: list[Row], theirs: list[Row]) -> str:
    """FVU ours − theirs seed by seed, its standard error, its share of theirs, and the verdict."""
    each = np.array([a["fvu"] - b["fvu"] for a, b in zip(ours, theirs, strict=True)])
    difference, part = each.mean(), each.mean() / mean(theirs, "fvu")
    if len(each) == 1:
        return f"{difference:+.4f} ({part:+.0%})"
    se = each.std(ddof=1) / math.sqrt(len(each))
    verdict = "HOLDS" if difference <= 2 * se else "FAILS"
    return f"{difference:+.4f} ± {se:.4f} ({part:+.0%}) {verdict}"


def print_neurons(bed: Bed, l0s: list[float]) -> None:
    """What the largest neurons keep, where the hookpoint has neurons."""
    model: Any = bed.plan.lm.model
    ks, tokens = [round(l0) for l0 in l0s], bed.args.eval_tokens
    try:
        found = baseline(model, bed.point, bed.heldout, n_tokens=tokens, ks=ks)
    except HookpointError as error:
        print(f"\nno neurons beside them: {error}")
        return
    for kept in found:
        ce = kept.ce_recovered_mean
        said = f", cross-entropy recovered {ce.value:.4f}" if ce and ce.value is not None else ""
        print(f"\nthe {kept.k} largest neurons: FVU {kept.fvu.value:.4f}{said}")


# ------------------------------------------------------------------------------- the command line


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    peers.add_arguments(parser)
    add = parser.add_argument
    add("--out", type=Path, default=Path("checkpoints/compare_saelens.json"), help="kept, reused")
    add("--factors-ours", type=float, nargs="+", default=[0.5, 1, 2], help="of our default rate")
    add("--packages", nargs="+", default=["sae-lens", "eai-sparsify"], help="to compare with")
    add("--model", default="builtin:", help="language model")
    add("--hookpoint", default="layers.2.mlp_act")
    add("--l0", type=float, nargs="+", default=[32], help="features active on a token")
    add("--d-sae", type=int, default=1024, help="features")
    add("--tokens", type=int, default=6 * SHARD, help=f"budget, rounded down to whole {SHARD}s")
    add("--batch", type=int, default=512, help="tokens, of all sides; few tokens want many steps")
    add("--eval-tokens", type=int, default=20_000, help="held-out tokens")
    args = parser.parse_args()
    args.tokens = args.tokens // SHARD * SHARD
    return args


def main() -> None:
    args = arguments()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    trainings = Trainings(args)
    sides = [side for side in peers.recipes(args.d_sae) if side.package in args.packages]
    sides = [side for side in sides if side.ours != "p_anneal"]  # it has no variant of its own here
    if args.only:
        sides = [side for side in sides if {side.package, side.ours} & {*args.only}]
    try:
        lines = [line(trainings, side, l0) for l0 in args.l0 for side in sides]
        print(
            "\n| package, variant | L0 ours | theirs | FVU ours | theirs | difference ± SE", end=""
        )
        print(" | CE recovered ours | theirs | dead ours | theirs | rate ours | theirs", end="")
        print(" | seconds ours | theirs |")
        print("|---" * 14 + "|")
        print("\n".join(lines))
        print_neurons(trainings.bed(args.seeds[0]), args.l0)
    except SAEError as error:
        sys.exit(f"error: {error}")
    finally:
        trainings.close()


if __name__ == "__main__":
    main()
