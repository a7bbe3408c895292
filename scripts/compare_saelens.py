"""Our variants beside SAELens' and sparsify's own on a language model's activations, at equal L0.

    python scripts/compare_saelens.py --venvs peers

About 100 trainings, estimated at two hours of one core. peers.py says how to make the environments,
and the rules. Expected: for each variant of a package a line with both FVUs, their difference and
HOLDS or FAILS. Below it, what as many of the largest neurons keep.

Both sides have the same hookpoint, width, batch and token budget. Ours has the defaults of
`sae train`, theirs the recipe they document (peers.py, peer_worker.py). The learning rate is the
one of lowest FVU among ½, 1 and 2 times that of the recipe (other --factors to start from:
whichever is near saves trainings); where that is the highest or lowest that was tried, the next is
tried too, on both sides: recipes are meant for far more steps than a small budget has.

Ours has k, or target_l0, at the L0 wanted. Theirs is compared at the held-out L0 that ours has: its
penalty's coefficient, or k, is moved until two trainings lie around that L0, and log FVU is
interpolated between them in log L0. All is evaluated by one evaluator on the same held-out text.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cached_property, partial
from operator import itemgetter
from statistics import fmean
from typing import Any

import peers
import torch
from peers import SHARD, Bed, Recipe, Row, Side, Trainings, standard_error, verdict
from torch import Tensor

from sae import config as settings
from sae.activations import ActivationStream
from sae.autoencoder import SparseAutoencoder
from sae.errors import HookpointError, SAEError
from sae.evaluation import baseline, evaluate
from sae.memory import keep_freed_memory
from sae.planning import Plan, plan

PACKAGES = ("sae-lens", "eai-sparsify")
"""Compared with unless --only names others."""
CLOSE, NARROW = 0.01, 0.4
"""e-folds: so close to an L0 counts as equal to it, so narrow a gap is interpolated across."""
TRIES = 6
"""Trainings at most to come to an L0."""
ABOUT = ("model", "hookpoint", "d_sae", "tokens", "batch", "eval_tokens")
"""The options that all kept results share."""
COLUMNS = (
    "package, variant", "L0 ours", "theirs", "FVU ours", "theirs", "difference ± SE",
    "CE recovered ours", "theirs", "dead ours", "theirs", "rate ours", "theirs",
    "seconds ours", "theirs",
)  # fmt: skip


# ------------------------------------------------------------------------------- one seed's data


class TextBed(Bed):
    """The activations of a language model on text shuffled by one seed."""

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
                # Nothing is written, but checkpoints/ may hold a run of the same settings.
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

    def drawn(self) -> Iterator[Tensor]:
        optim = self.plan.config.optim
        stream = ActivationStream(
            self.plan.lm.model, self.plan.hookpoints, self.plan.source.train(optim.llm_batch),
            batch=optim.batch, pool=optim.pool, dtype=self.plan.dtype,
            generator=torch.Generator().manual_seed(self.seed),
        )  # fmt: skip
        return (batches[self.point].x for batches in stream)

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

    def ours(self, kind: str, l0: float, lr: float) -> Row:
        """One of ours, as `sae train` does it, for an L0."""
        knob = {"k": round(l0)} if kind in ("topk", "batchtopk") else {"target_l0": l0}
        knobs = {f"sae.sparsity.{name}": value for name, value in knob.items()}
        return self.fit(self.config(**{"sae.sparsity.kind": kind, "optim.lr": lr} | knobs))

    def theirs(self, recipe: Recipe, knob: float, lr: float) -> Row:
        """A package's, its penalty's coefficient or else k being `knob`."""
        knobs = {"coefficient": knob, "k": 0} if recipe.coefficient else {"k": round(knob)}
        shape = {"d_in": self.plan.widths[self.point], "d_sae": self.args.d_sae}
        return self.train(recipe, lr=lr, batch=self.args.batch, **shape, **knobs)


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


class Matched:
    """A package's variant at the held-out L0 that ours has; remembers what gave it."""

    def __init__(self, trainings: Trainings[TextBed], recipe: Recipe, ours: Side, l0: float):
        """`l0` is the one that ours is trained for."""
        self.trainings, self.recipe, self.ours, self.l0 = trainings, recipe, ours, l0
        self._found: dict[tuple[float, int], Row] = {}

    def __call__(self, lr: float, seed: int) -> Row:
        """The trainings at a rate with a seed, interpolated."""

        def train(knob: float) -> Row:
            name = f"{self.recipe.name} {knob:g}"
            return self.trainings.of(name, lr, seed, lambda bed: bed.theirs(self.recipe, knob, lr))

        if (lr, seed) not in self._found:
            wanted, counts = self.ours.row(seed)["l0"], not self.recipe.coefficient
            self._found[lr, seed] = at_l0(train, self._start(lr), wanted, counts=counts)
        return self._found[lr, seed]

    def _start(self, lr: float) -> float:
        """Where to begin: at what gave this L0 with another seed, or else with another rate."""
        if not self.recipe.coefficient:
            return self.l0
        near = [(rate, row["knob"]) for (rate, _), row in self._found.items() if "knob" in row]
        knobs = [knob for rate, knob in near if rate == lr] or [knob for _, knob in near]
        return float(f"{knobs[-1]:.3g}") if knobs else self.recipe.coefficient


# ------------------------------------------------------------------------------------ comparison


def sides(
    trainings: Trainings[TextBed], recipe: Recipe, l0: float, args: argparse.Namespace
) -> tuple[Side, Side]:
    """Our variant for an L0, and the package's at the L0 that ours then has."""

    def train(lr: float, seed: int) -> Row:
        name = f"ours {recipe.ours} {l0:g}"
        return trainings.of(name, lr, seed, lambda bed: bed.ours(recipe.ours, l0, lr))

    side = partial(Side, seeds=args.seeds, loss=itemgetter("fvu"), widen=True)
    ours = side(train, settings.OptimConfig().lr, args.factors_ours)
    return ours, side(Matched(trainings, recipe, ours, l0), recipe.lr, args.factors)


def cells(recipe: Recipe, ours: Side, theirs: Side) -> list[str]:
    """A line of the table."""
    if theirs.error:
        return [recipe.name, f"did not run: {theirs.error}"]
    both = (ours, theirs)
    said = [f"{recipe.name} ({theirs.rows[0]['version']})"]
    said += [f"{side.mean('l0'):.1f}" for side in both]
    said += [f"{side.mean('fvu'):.4f}" for side in both]
    said += [contrast(ours.values("fvu"), theirs.values("fvu"))]
    said += [f"{side.mean('ce'):.4f}" for side in both]
    said += [f"{side.mean('dead'):.1%}" for side in both]
    said += [f"{side.lr:.2g} ({side.lr / side.recipe_lr:g})" for side in both]
    return said + [f"{side.mean('seconds'):.0f}" for side in both]


def contrast(ours: list[float], theirs: list[float]) -> str:
    """FVU ours − theirs seed by seed, its standard error, its share of theirs, and the verdict."""
    each = [mine - other for mine, other in zip(ours, theirs, strict=True)]
    difference, error = fmean(each), standard_error(each)
    part = f"({difference / fmean(theirs):+.0%})"
    if not error:
        return f"{difference:+.4f} {part}"
    return f"{difference:+.4f} ± {error:.4f} {part} {verdict(difference, error)}"


def print_neurons(bed: TextBed, l0s: list[float]) -> None:
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
    peers.add_arguments(parser, "--tokens", 6 * SHARD, "compare_saelens.json")
    add = parser.add_argument
    add("--model", default="builtin:", help="language model")
    add("--hookpoint", default="layers.2.mlp_act")
    add("--l0", type=float, nargs="+", default=[32], help="features active on a token")
    add("--d-sae", type=int, default=1024, help="features")
    add("--batch", type=int, default=512, help="tokens, of all sides; few tokens want many steps")
    add("--eval-tokens", type=int, default=20_000, help="held-out tokens")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    # sae.sparsity.kind has no p_anneal: it is ReLU-L1 with settings that planted_recipes.py gives.
    known = [recipe for recipe in peers.recipes(args.d_sae) if recipe.ours != "p_anneal"]
    recipes = peers.chosen(known, args.only, PACKAGES)
    about = {name: getattr(args, name) for name in ABOUT}
    try:
        with closing(Trainings(args, about, TextBed)) as trainings:
            pairs = [(r, sides(trainings, r, l0, args)) for l0 in args.l0 for r in recipes]
            rows = [cells(recipe, ours, theirs) for recipe, (ours, theirs) in pairs]
            peers.print_table(COLUMNS, rows)
            print_neurons(trainings.bed(args.seeds[0]), args.l0)
    except SAEError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
