"""Our variants and those of three other packages on the same planted features, by one scorer.

    python scripts/compare_planted.py --venvs peers

About 90 trainings of half a minute on one core. peers.py says how to make the environments.

256 features in 128 dimensions, 4 active on average, σ = 0.05, the same samples in the same order
for all, read from files by the packages' own trainers (recipes: peers.py and peer_worker.py). The
learning rate is chosen by mean max cosine with the first seed among ½, 1 and 2 times the recipe's,
ours among as many; then every seed is trained with it. Prints, for each variant of a package, its
scores beside ours and the difference in standard errors. Every training is written to --out; those
found there are not repeated. A training that fails is a line in the table too.
"""

import argparse
import dataclasses
import math
import sys
import tempfile
import time
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import peers
import torch
from kept import Kept
from peers import Peers, Recipe
from planted_recipes import BATCH, LR, config
from safetensors.torch import save_file

from sae.fitting import fit
from sae.scores import Exam
from sae.synthetic import PlantedConfig, PlantedFeatures

PLANTED = PlantedConfig(d_in=128, n_features=256, active=4, noise=0.05)
OURS = "ours"
SHARD = 1 << 16
MEASURES = ("mmc", "f1")
PEERS = peers.recipes(PLANTED.n_features)


class Bed:
    """The samples of one seed in files, and the exam; made when first asked for."""

    def __init__(self, seed: int, samples: int, scratch: Path | None):
        self.seed, self.samples = seed, samples
        self._folder = tempfile.TemporaryDirectory(prefix="planted-", dir=scratch)
        self.folder = Path(self._folder.name)

    def close(self) -> None:
        self._folder.cleanup()

    @cached_property
    def features(self) -> PlantedFeatures:
        return PlantedFeatures(PLANTED, self.seed)

    @cached_property
    def exam(self) -> Exam:
        return Exam(self.features)

    @cached_property
    def stored(self) -> Path:
        """The folder of the samples."""
        stream, folder = self.features.batches(BATCH, self.seed), self.folder / "acts"
        folder.mkdir()
        for n in range(self.samples // SHARD):
            acts = torch.cat([batch.x for batch in islice(stream, SHARD // BATCH)])
            save_file({"acts": acts}, folder / f"{n:06}.safetensors")
        return folder


def train_ours(bed: Bed, variant: str, lr: float) -> dict[str, Any]:
    """One of our variants, its scores and seconds."""
    recipe = config(variant, bed.samples, PLANTED.n_features, bed.seed, **{"optim.lr": lr})
    batches = list(islice(bed.features.batches(BATCH, bed.seed), bed.samples // BATCH))
    started = time.perf_counter()
    sae = fit(batches, recipe)
    seconds = time.perf_counter() - started
    return dataclasses.asdict(bed.exam.score(sae)) | {"seconds": seconds}


def train_theirs(bed: Bed, recipe: Recipe, lr: float, workers: Peers) -> dict[str, Any]:
    """A package's variant, its scores and seconds; `error` says why there are no scores."""
    return workers.train(
        recipe,
        lambda sae: dataclasses.asdict(bed.exam.score(sae)),
        lr=lr,
        seed=bed.seed,
        k=round(PLANTED.active),
        samples=bed.samples,
        d_in=PLANTED.d_in,
        d_sae=PLANTED.n_features,
        activations=str(bed.stored),
    )


class Trainings:
    """Trainings by side, learning rate and seed, done when first asked for."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.kept = Kept(args.out, {"samples": args.samples})
        self.workers = Peers(args)
        self._beds: dict[int, Bed] = {}

    def close(self) -> None:
        self.workers.close()
        for bed in self._beds.values():
            bed.close()

    def of(self, side: Recipe | str, lr: float, seed: int) -> dict[str, Any]:
        """The scores of a package's variant, or of ours by its name."""
        if seed not in self._beds:
            self._beds[seed] = Bed(seed, self.args.samples, self.args.scratch)
        bed = self._beds[seed]
        if isinstance(side, str):
            key = f"{OURS} {side} lr={lr:g} seed={seed}"
            return self.kept.of(key, lambda: train_ours(bed, side, lr))
        key = f"{side.name} lr={lr:g} seed={seed}"
        return self.kept.of(key, lambda: train_theirs(bed, side, lr, self.workers))

    def chosen(self, side: Recipe | str) -> float:
        """The learning rate with the largest mean max cosine at the first seed."""
        base = LR if isinstance(side, str) else side.lr
        rates = [base * factor for factor in self.args.factors]
        return max(rates, key=lambda lr: self.of(side, lr, self.args.seeds[0]).get("mmc", 0.0))

    def all(self, side: Recipe | str) -> tuple[float, list[dict[str, Any]]]:
        """The chosen rate, and the results of every seed with it."""
        lr = self.chosen(side)
        return lr, [self.of(side, lr, seed) for seed in self.args.seeds]


def line(recipe: Recipe, trainings: Trainings) -> str:
    """One variant of a package beside ours."""
    lr, theirs = trainings.all(recipe)
    cells = [recipe.name, recipe.ours]
    if failed := [row["error"] for row in theirs if "error" in row]:
        return f"| {' | '.join(cells)} | did not run: {failed[0]} |" + " |" * 7
    our_lr, ours = trainings.all(recipe.ours)
    for measure in MEASURES:
        mine, other = [r[measure] for r in ours], [r[measure] for r in theirs]
        cells += [estimate(mine), estimate(other), contrast(mine, other)]
    cells += [f"{our_lr:g}", f"{lr:g}", f"{seconds(theirs):.0f}"]
    return f"| {' | '.join(cells)} |"


def estimate(values: list[float]) -> str:
    """mean ± standard error."""
    return f"{mean(values):.3f} ± {error(values):.3f}"


def contrast(ours: list[float], theirs: list[float]) -> str:
    """The difference, in standard errors of the difference too, and what that says."""
    difference = mean(ours) - mean(theirs)
    size = math.hypot(error(ours), error(theirs))
    held = "HOLDS" if difference >= -2 * size else "FAILS"
    return f"{difference:+.3f} ({difference / size:+.0f} SE) {held}" if size else f"{held}"


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def error(values: list[float]) -> float:
    """The standard error of the mean; 0 for a single value."""
    n = len(values)
    if n == 1:
        return 0.0
    return math.sqrt(math.fsum((v - mean(values)) ** 2 for v in values) / (n - 1) / n)


def seconds(rows: list[dict[str, Any]]) -> float:
    return mean([row["seconds"] for row in rows])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    peers.add_arguments(parser)
    add = parser.add_argument
    add("--samples", type=int, default=1 << 19, help=f"budget, in whole {SHARD}s")
    add("--out", type=Path, default=Path("checkpoints/compare_planted.json"))
    args = parser.parse_args()
    args.samples = args.samples // SHARD * SHARD
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    trainings = Trainings(args)
    try:
        for side in (*PEERS, *dict.fromkeys(peer.ours for peer in PEERS)):
            name = side if isinstance(side, str) else side.package
            if args.only and name in args.only:
                trainings.all(side)
        if args.only:
            return
        columns = (
            "MMC ours, theirs, difference, F1 ours, theirs, difference, LR ours, theirs, seconds"
        )
        print(f"| package, variant | ours | {columns.replace(', ', ' | ')} |")
        print("|---" * 11 + "|")
        for recipe in PEERS:
            print(line(recipe, trainings), flush=True)
    finally:
        trainings.close()


if __name__ == "__main__":
    sys.exit(main())
