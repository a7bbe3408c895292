"""How well every variant recovers features that were planted, beside the true dictionary.

    python scripts/recover_planted.py

Half a minute a training on one core. Prints tables of variants × scores, means ± standard errors
over the seeds: 256 features in 128 dimensions without and with noise, 1,024 features in 128
dimensions, correlated and hierarchical features, planted maps. `F1 / true` is F1 divided by that of
the true dictionary under the same encoder form; "meets" is said where it and the mean max cosine
(MMC) are both at least 0.95. Every training is written to --out, and read from there again.
"""

import argparse
import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from kept import Kept
from planted_recipes import BATCH, RECIPES, config

from sae.activations import Batch
from sae.fitting import fit
from sae.scores import Exam, Scores
from sae.synthetic import PlantedConfig, PlantedFeatures

GOAL = 0.95
SMALL = PlantedConfig(d_in=128, n_features=256, active=4)
NOISY = dataclasses.replace(SMALL, noise=0.05)


@dataclasses.dataclass(frozen=True)
class Study:
    """One table: what is planted, and which variants are trained on how many samples of it."""

    title: str
    planted: PlantedConfig
    variants: tuple[str, ...]
    samples: int
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings that differ from the variants' recipes."""

    def key(self, name: str, variant: str, seed: int) -> str:
        """What a result is kept under: not that of the study with other samples or changes."""
        changes = "".join(f" {setting}={value}" for setting, value in self.changes.items())
        return f"{name} {variant} samples={self.samples}{changes} seed={seed}"


ALL = tuple(RECIPES)
FAST = ("topk",)
WIDE = ("topk", "batchtopk")
STUDIES = {
    "clean": Study("256 features, no noise", SMALL, ALL, 1 << 19),
    "noisy": Study("256 features, σ = 0.05", NOISY, ALL, 1 << 19),
    "large": Study(
        "1,024 features, no noise",
        PlantedConfig(d_in=128, n_features=1024, active=8),
        WIDE,
        1 << 19,
        {"sae.sparsity.k": 8, "optim.lr": 2.5e-3},
    ),
    "correlated": Study(
        "256 features, 32 groups of correlation 0.5",
        dataclasses.replace(NOISY, groups=32, correlation=0.5),
        ALL,
        1 << 19,
    ),
    "hierarchical": Study(
        "64 parents with 3 children each", dataclasses.replace(NOISY, children=3), ALL, 1 << 19
    ),
    "transcoder": Study(
        "a map from 128 to 96 dimensions", dataclasses.replace(NOISY, d_out=96), FAST, 1 << 20
    ),
    "crosscoder": Study(
        "3 sites of 64 dimensions, a quarter of the features at one of them",
        dataclasses.replace(NOISY, d_in=64, sites=3, private=0.25),
        FAST,
        1 << 20,
    ),
}


class Bed:
    """The data of one study and seed, drawn when first asked for."""

    def __init__(self, study: Study, seed: int):
        self.study, self.seed = study, seed
        self._true: dict[int | None, Scores] = {}

    @cached_property
    def features(self) -> PlantedFeatures:
        return PlantedFeatures(self.study.planted, self.seed)

    @cached_property
    def exam(self) -> Exam:
        return Exam(self.features)

    @cached_property
    def _kept(self) -> list[Batch]:
        return list(self._drawn())

    def _drawn(self) -> Iterator[Batch]:
        stream = self.features.batches(BATCH, self.seed)
        return itertools.islice(stream, self.study.samples // BATCH)

    @property
    def batches(self) -> Iterable[Batch]:
        """Those of the study; kept in memory where several variants read them."""
        return self._kept if len(self.study.variants) > 1 else self._drawn()

    def ideal(self, k: int | None) -> Scores:
        """What the true dictionary reaches, computed once for each encoder form."""
        if k not in self._true:
            self._true[k] = self.exam.ideal(k)
        return self._true[k]

    def result(self, variant: str) -> dict[str, Any]:
        """Train a dictionary as wide as there are features and score it."""
        study, width = self.study, self.features.config.n_features
        recipe = config(variant, study.samples, width, self.seed, **study.changes)
        batches = self.batches
        started = time.perf_counter()
        sae = fit(batches, recipe)
        seconds = time.perf_counter() - started
        k = recipe.sae.sparsity.k if recipe.sae.sparsity.kind == "topk" else None
        scores, true = self.exam.score(sae), self.ideal(k)
        ratio = {"true_f1": true.f1, "f1_to_true": scores.f1 / true.f1, "seconds": seconds}
        return dataclasses.asdict(scores) | ratio


def table(study: Study, results: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """One line for each variant."""
    yield f"\n{study.title}: {study.samples:,} samples\n"
    names = "MMC, recovered, F1, true F1, F1 / true, split, absorbed, seconds, goal"
    yield f"| variant | {names.replace(', ', ' | ')} |"
    yield "|---" * 10 + "|"
    for variant, rows in results.items():
        of = {name: [row[name] for row in rows] for name in rows[0]}
        meets = min(mean(of["mmc"]), mean(of["f1_to_true"])) >= GOAL
        shown = [estimate(of["mmc"]), f"{mean(of['recovered']):.3f}", estimate(of["f1"])]
        shown += [f"{mean(of[name]):.3f}" for name in ("true_f1", "f1_to_true")]
        shown += [f"{mean(of[name]):.1f}" for name in ("split", "absorbed")]
        shown += [f"{mean(of['seconds']):.0f}", "meets" if meets else "below"]
        yield f"| {variant} | {' | '.join(shown)} |"


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def estimate(values: list[float]) -> str:
    """mean ± standard error."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    spread = math.fsum((value - mean(values)) ** 2 for value in values) / (len(values) - 1)
    return f"{mean(values):.3f} ± {math.sqrt(spread / len(values)):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--variants", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("checkpoints/recover_planted.json"))
    parser.add_argument("--threads", type=int, help="of PyTorch; default: all cores")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    kept = Kept(args.out, {"batch": BATCH})
    for name in args.studies:
        study = STUDIES[name]
        results: dict[str, list[dict[str, Any]]] = {}
        for seed in args.seeds:
            bed = Bed(study, seed)
            for variant in (v for v in study.variants if v in args.variants):
                key = study.key(name, variant, seed)
                row = kept.of(key, lambda bed=bed, variant=variant: bed.result(variant))
                results.setdefault(variant, []).append(row)
        print("\n".join(table(study, results)), flush=True)


if __name__ == "__main__":
    main()
