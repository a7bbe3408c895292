"""Our variants and those of three other packages on the same planted features, by one scorer.

    python scripts/compare_planted.py --venvs peers

About 90 trainings of half a minute on one core. peers.py says how to make the environments, and
the rules.

256 features in 128 dimensions, 4 active on average, σ = 0.05. The learning rate is the one of
highest mean max cosine among ½, 1 and 2 times the recipe's. Prints, for each variant of a package,
its scores beside ours and the difference in standard errors.
"""

import argparse
import dataclasses
import math
from collections.abc import Iterator
from contextlib import closing
from functools import cached_property, partial
from statistics import fmean

import peers
import torch
from peers import Bed, Recipe, Row, Side, Trainings, standard_error, verdict
from planted_recipes import BATCH, LR, config
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.scores import Exam
from sae.synthetic import PlantedConfig, PlantedFeatures

PLANTED = PlantedConfig(d_in=128, n_features=256, active=4, noise=0.05)
COLUMNS = (
    "package, variant", "ours", "MMC ours", "theirs", "difference", "F1 ours", "theirs",
    "difference", "rate ours", "theirs", "seconds",
)  # fmt: skip


class PlantedBed(Bed):
    """The samples of one seed, and the exam."""

    @cached_property
    def exam(self) -> Exam:
        return Exam(PlantedFeatures(PLANTED, self.seed))

    def drawn(self) -> Iterator[Tensor]:
        stream = PlantedFeatures(PLANTED, self.seed).batches(BATCH, self.seed)
        return (batch.x for batch in stream)

    def score(self, sae: SparseAutoencoder) -> Row:
        return dataclasses.asdict(self.exam.score(sae))


def sides(
    trainings: Trainings[PlantedBed], recipe: Recipe, args: argparse.Namespace
) -> tuple[Side, Side]:
    """Our variant, and the package's that it is beside."""
    job = {"d_in": PLANTED.d_in, "d_sae": PLANTED.n_features, "k": round(PLANTED.active)}

    def ours(lr: float, seed: int) -> Row:
        mine = config(recipe.ours, args.tokens, PLANTED.n_features, seed, **{"optim.lr": lr})
        return trainings.of(f"ours {recipe.ours}", lr, seed, lambda bed: bed.fit(mine))

    def theirs(lr: float, seed: int) -> Row:
        return trainings.of(recipe.name, lr, seed, lambda bed: bed.train(recipe, lr=lr, **job))

    side = partial(Side, seeds=args.seeds, loss=lambda row: -row["mmc"])
    return side(ours, LR, args.factors_ours), side(theirs, recipe.lr, args.factors)


def cells(recipe: Recipe, ours: Side, theirs: Side) -> list[str]:
    """A line of the table."""
    said = [recipe.name, recipe.ours]
    if theirs.error:
        return [*said, f"did not run: {theirs.error}"]
    for measure in ("mmc", "f1"):
        mine, other = ours.values(measure), theirs.values(measure)
        said += [estimate(mine), estimate(other), contrast(mine, other)]
    return [*said, f"{ours.lr:g}", f"{theirs.lr:g}", f"{theirs.mean('seconds'):.0f}"]


def estimate(values: list[float]) -> str:
    """mean ± standard error."""
    return f"{fmean(values):.3f} ± {standard_error(values):.3f}"


def contrast(ours: list[float], theirs: list[float]) -> str:
    """The difference of the means, in its standard errors too, and the verdict.

    The errors of the two sides are added up, as if each had seeds of its own.
    """
    difference = fmean(ours) - fmean(theirs)
    error = math.hypot(standard_error(ours), standard_error(theirs))
    if not error:
        return f"{difference:+.3f}"
    return f"{difference:+.3f} ({difference / error:+.0f} SE) {verdict(-difference, error)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    peers.add_arguments(parser, "--samples", 1 << 19, "compare_planted.json")
    parser.set_defaults(batch=BATCH)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipes = peers.chosen(peers.recipes(PLANTED.n_features), args.only)
    about = {"samples": args.tokens}
    with closing(Trainings(args, about, PlantedBed)) as trainings:
        rows = [cells(recipe, *sides(trainings, recipe, args)) for recipe in recipes]
    peers.print_table(COLUMNS, rows)


if __name__ == "__main__":
    main()
