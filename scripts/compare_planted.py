"""Our variants and those of three other packages on the same planted features, by one scorer.

    for p in sae-lens eai-sparsify dictionary-learning; do
        python -m venv peers/$p && peers/$p/bin/pip install $p
    done
    python scripts/compare_planted.py --venvs peers

About 90 trainings of half a minute on one core. Where a package does not import because of
torchvision, uninstall that there.

256 features in 128 dimensions, 4 active on average, σ = 0.05, the same samples in the same order
for all, read from files by the packages' own trainers (planted_worker.py has their recipes). The
learning rate is chosen by mean max cosine with the first seed among ½, 1 and 2 times the recipe's,
ours among as many; then every seed is trained with it. Prints, for each variant of a package, its
scores beside ours and the difference in standard errors. Every training is written to --out; those
found there are not repeated. A training that fails is a line in the table too.
"""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kept import Kept
from planted_recipes import BATCH, LR, config
from safetensors.torch import load_file, save_file

from sae.fitting import fit
from sae.scores import Exam
from sae.synthetic import PlantedConfig, PlantedFeatures

PLANTED = PlantedConfig(d_in=128, n_features=256, active=4, noise=0.05)
OURS = "ours"
SHARD = 1 << 16
MEASURES = ("mmc", "f1")


class Recipe(NamedTuple):
    """One variant of one package, with what its documentation gives."""

    package: str
    variant: str
    ours: str
    """Which of our variants it is compared with."""
    lr: float
    batch: int
    coefficient: float = 0.0
    """Of the penalty, in the package's own form."""

    @property
    def name(self) -> str:
        return f"{self.package} {self.variant}"


PEERS = (
    Recipe("sae-lens", "standard", "relu_l1", 3e-4, 1024, 5),
    Recipe("sae-lens", "topk", "topk", 3e-4, 1024),
    Recipe("sae-lens", "batchtopk", "batchtopk", 3e-4, 1024),
    Recipe("sae-lens", "jumprelu", "jumprelu", 3e-4, 1024, 1),
    Recipe("sae-lens", "gated", "gated", 3e-4, 1024, 1),
    Recipe("eai-sparsify", "topk", "topk", 5e-3 / (256 / 2**14) ** 0.5, 2048),
    Recipe("dictionary-learning", "standard", "relu_l1", 1e-3, 2048, 0.06),
    Recipe("dictionary-learning", "top_k", "topk", 2e-4 / (256 / 2**14) ** 0.5, 2048),
    Recipe("dictionary-learning", "batch_top_k", "batchtopk", 2e-4 / (256 / 2**14) ** 0.5, 2048),
    Recipe("dictionary-learning", "jumprelu", "jumprelu", 3e-4, 2048),
    # Documented are 0.006 to 0.025; 0.15 gave a mean max cosine of 0.78 instead of 0.50 in a trial.
    Recipe("dictionary-learning", "p_anneal", "p_anneal", 1e-3, 2048, 0.15),
)


class Bed:
    """The samples of one seed in files, and the exam; made when first asked for."""

    def __init__(self, seed: int, samples: int):
        self.seed, self.samples = seed, samples
        self._folder = tempfile.TemporaryDirectory(prefix="planted-")
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
        """The folder of the samples; the exam's lie beside it."""
        stream, folder = self.features.batches(BATCH, self.seed), self.folder / "acts"
        folder.mkdir()
        for n in range(self.samples // SHARD):
            acts = torch.cat([batch.x for batch in islice(stream, SHARD // BATCH)])
            save_file({"acts": acts}, folder / f"{n:06}.safetensors")
        save_file({"tuning": self.exam.tuning.x, "test": self.exam.test.x}, self.exam_file)
        return folder

    @property
    def exam_file(self) -> Path:
        return self.folder / "exam.safetensors"


def train_ours(bed: Bed, variant: str, lr: float) -> dict[str, Any]:
    """One of our variants, its scores and seconds."""
    recipe = config(variant, bed.samples, PLANTED.n_features, bed.seed, **{"optim.lr": lr})
    batches = list(islice(bed.features.batches(BATCH, bed.seed), bed.samples // BATCH))
    started = time.perf_counter()
    sae = fit(batches, recipe)
    seconds = time.perf_counter() - started
    return dataclasses.asdict(bed.exam.score(sae)) | {"seconds": seconds}


def train_theirs(bed: Bed, recipe: Recipe, lr: float, args: argparse.Namespace) -> dict[str, Any]:
    """A package's variant in its own environment; `error` says why there are no scores."""
    job = recipe._asdict() | {
        "lr": lr,
        "seed": bed.seed,
        "k": round(PLANTED.active),
        "samples": bed.samples,
        "d_in": PLANTED.d_in,
        "d_sae": PLANTED.n_features,
        "activations": str(bed.stored),
        "exam": str(bed.exam_file),
        "threads": args.threads,
    }
    with tempfile.TemporaryDirectory(dir=bed.folder) as folder:
        order, output = Path(folder) / "job.json", Path(folder) / "out"
        order.write_text(json.dumps(job))
        worker = Path(__file__).with_name("planted_worker.py")
        python = args.venvs / recipe.package / "bin" / "python"
        command = [*args.prefix, str(python), str(worker), str(order), str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
        found, info = load_file(output / "result.safetensors"), output / "info.json"
        scores = bed.exam.judge(found["W_dec"], found["tuning"], found["test"])
        return dataclasses.asdict(scores) | json.loads(info.read_text())


class Trainings:
    """Trainings by side, learning rate and seed, done when first asked for."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.kept = Kept(args.out, {"samples": args.samples})
        self._beds: dict[int, Bed] = {}

    def close(self) -> None:
        for bed in self._beds.values():
            bed.close()

    def of(self, side: Recipe | str, lr: float, seed: int) -> dict[str, Any]:
        """The scores of a package's variant, or of ours by its name."""
        if seed not in self._beds:
            self._beds[seed] = Bed(seed, self.args.samples)
        bed = self._beds[seed]
        if isinstance(side, str):
            key = f"{OURS} {side} lr={lr:g} seed={seed}"
            return self.kept.of(key, lambda: train_ours(bed, side, lr))
        key = f"{side.name} lr={lr:g} seed={seed}"
        return self.kept.of(key, lambda: train_theirs(bed, side, lr, self.args))

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
    add = parser.add_argument
    add("--venvs", type=Path, required=True, help="folder with an environment for each package")
    add("--only", nargs="+", help="packages or our variants to train, for a part of the table")
    add("--samples", type=int, default=1 << 19, help=f"budget, in whole {SHARD}s")
    add("--factors", type=float, nargs="+", default=[0.5, 1, 2], help="of the recipes' rates")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch, for all")
    add("--prefix", nargs="+", default=[], help="put before each command, such as nice")
    add("--out", type=Path, default=Path("compare_planted.json"))
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
