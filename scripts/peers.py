"""Other packages beside ours: what they document, their trainings read back as ours, and the rules.

For both comparisons, of planted features (compare_planted.py) and of a language model's
(compare_saelens.py). Needed is a folder with an environment for each package:

    for p in sae-lens eai-sparsify dictionary-learning; do
        python -m venv peers/$p && peers/$p/bin/pip install $p
    done

Where a package does not import because of torchvision, uninstall that there.

The rules: both sides read the same activations in the same order, from files that are written once
a seed. Each has the learning rate that is best with the first seed among factors of its recipe's;
then every seed is trained with it. Ours HOLDS where it is not worse by more than two standard
errors. Every training is written to --out; those found there are not repeated, so that parts of a
table (--only) can be made side by side. A package's training that fails is a line in the table too.
"""

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from kept import Kept
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae import formats
from sae.activations import Batch
from sae.autoencoder import SparseAutoencoder
from sae.config import TrainConfig
from sae.fitting import fit

Row = dict[str, Any]
"""What a training came to: scores and seconds, or an `error` that says why there are none."""

SHARD = 1 << 15
"""Samples a file; batches divide it, and it divides the budget."""
SLOWEST = 1 / 64
"""Of a recipe's rate: where nothing trained down to here, nothing will."""
FORMATS = {
    "sae-lens": ("saelens", "."),
    "eai-sparsify": ("sparsify", "run"),
    "dictionary-learning": ("dictionary_learning", "trainer_0"),
}
"""How each package saves, and in which folder of the worker's output."""


class Recipe(NamedTuple):
    """One variant of one package, with what its documentation gives."""

    package: str
    variant: str
    ours: str
    """Which of our variants it is compared with."""
    lr: float
    batch: int
    coefficient: float = 0.0
    """Of the penalty, in the package's own form; 0 where there is none, but k."""

    @property
    def name(self) -> str:
        return f"{self.package} {self.variant}"


def recipes(d_sae: int) -> tuple[Recipe, ...]:
    """All of them; sparsify's and dictionary_learning's rates go by the number of features."""
    width = (2**14 / d_sae) ** 0.5
    return (
        Recipe("sae-lens", "standard", "relu_l1", 3e-4, 1024, 5),
        Recipe("sae-lens", "topk", "topk", 3e-4, 1024),
        Recipe("sae-lens", "batchtopk", "batchtopk", 3e-4, 1024),
        Recipe("sae-lens", "jumprelu", "jumprelu", 3e-4, 1024, 1),
        Recipe("sae-lens", "gated", "gated", 3e-4, 1024, 1),
        Recipe("eai-sparsify", "topk", "topk", 5e-3 * width, 2048),
        Recipe("dictionary-learning", "standard", "relu_l1", 1e-3, 2048, 0.06),
        Recipe("dictionary-learning", "top_k", "topk", 2e-4 * width, 2048),
        Recipe("dictionary-learning", "batch_top_k", "batchtopk", 2e-4 * width, 2048),
        Recipe("dictionary-learning", "jumprelu", "jumprelu", 3e-4, 2048),
        # Documented are 0.006 to 0.025; with 0.15 the mean max cosine was 0.78, not 0.50.
        Recipe("dictionary-learning", "p_anneal", "p_anneal", 1e-3, 2048, 0.15),
    )


class Peers:
    """A worker for each package, in its own environment, begun when first asked."""

    def __init__(self, args: argparse.Namespace):
        """`args` are those of `add_arguments`."""
        self.args = args
        self._workers: dict[str, subprocess.Popen[str]] = {}

    def close(self) -> None:
        for worker in self._workers.values():
            worker.terminate()

    def ask(self, package: str, job: dict[str, Any]) -> Row:
        """What peer_worker.py answers to a job."""
        worker = self._workers.get(package) or self._begin(package)
        assert worker.stdin and worker.stdout
        print(json.dumps(job), file=worker.stdin, flush=True)
        if not (line := worker.stdout.readline()):
            del self._workers[package]
            return {"error": f"its process ended with {worker.wait()}"}
        return json.loads(line)

    def _begin(self, package: str) -> subprocess.Popen[str]:
        python = self.args.venvs / package / "bin" / "python"
        if not python.exists():
            sys.exit(f"error: --venvs {self.args.venvs}: no {python}; peers.py says how to make it")
        command = [*self.args.prefix, str(python), str(Path(__file__).with_name("peer_worker.py"))]
        pipe = subprocess.PIPE
        worker = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        self._workers[package] = worker
        return worker


# ------------------------------------------------------------------------------------- trainings


class Bed(ABC):
    """What all trainings of one seed share, made when first asked for."""

    def __init__(self, args: argparse.Namespace, workers: Peers, folder: Path, seed: int):
        """`args` are those of `add_arguments`, with batch; the activations go to `folder`."""
        self.args, self.workers, self.folder, self.seed = args, workers, folder, seed

    @abstractmethod
    def drawn(self) -> Iterator[Tensor]:
        """Activations [batch d_in], as many as the budget or more."""

    @abstractmethod
    def score(self, sae: SparseAutoencoder) -> Row:
        """How good an SAE is."""

    @cached_property
    def stored(self) -> Path:
        """The folder of the activations, in files of SHARD."""
        self.folder.mkdir()
        drawn = self.drawn()
        for n in range(self.args.tokens // SHARD):
            acts = torch.cat(list(islice(drawn, SHARD // self.args.batch)))
            save_file({"acts": acts}, self.folder / f"{n:06}.safetensors")
        return self.folder

    def batches(self) -> Iterator[Batch]:
        """The stored activations; only logging reads where they are from."""
        for shard in sorted(self.stored.glob("*.safetensors")):
            for x in load_file(shard)["acts"].split(self.args.batch):
                yield Batch(x, x, torch.zeros(len(x), 2, dtype=torch.long))

    def fit(self, config: TrainConfig) -> Row:
        """An SAE of ours on the stored activations."""
        batches, started = list(self.batches()), time.perf_counter()
        sae = fit(batches, config)
        seconds = time.perf_counter() - started
        return self.score(sae) | {"seconds": seconds}

    def train(self, recipe: Recipe, **job: Any) -> Row:
        """A package's SAE on the stored activations; `job` has d_in, d_sae, k and lr."""
        shared = {"samples": self.args.tokens, "seed": self.seed, "threads": self.args.threads}
        with tempfile.TemporaryDirectory(dir=self.args.scratch) as folder:
            places = {"activations": str(self.stored), "output": folder}
            info = self.workers.ask(recipe.package, recipe._asdict() | shared | places | job)
            if "error" in info:
                return info
            name, where = FORMATS[recipe.package]
            _, found = formats.read(Path(folder) / where, name, trusted=True)
            sae = found[0].sae
            if not all(bool(tensor.isfinite().all()) for tensor in sae.state_dict().values()):
                return {"error": "its weights are not finite"}
            return self.score(sae) | info


B = TypeVar("B", bound=Bed)


class Trainings(Generic[B]):
    """Trainings by name, learning rate and seed, done when first asked for and kept in a file."""

    def __init__(self, args: argparse.Namespace, about: dict[str, Any], bed: type[B]):
        """`args` are those of `add_arguments`, `about` are the settings that all share."""
        self.kept, self._workers = Kept(args.out, about), Peers(args)
        self._folder = tempfile.TemporaryDirectory(dir=args.scratch)

        def new(seed: int) -> B:
            return bed(args, self._workers, Path(self._folder.name) / str(seed), seed)

        self.bed = functools.cache(new)

    def close(self) -> None:
        self._workers.close()
        self._folder.cleanup()

    def of(self, name: str, lr: float, seed: int, train: Callable[[B], Row]) -> Row:
        """What is kept of a training, or what `train` gives on the bed of the seed."""
        return self.kept.of(f"{name} lr={lr:g} seed={seed}", lambda: train(self.bed(seed)))


# ------------------------------------------------------------------------------------- the rules


@dataclass
class Side:
    """One variant, ours or a package's, at the best of its learning rates."""

    train: Callable[[float, int], Row]
    """A training at a learning rate with a seed; the same when asked again."""
    recipe_lr: float
    factors: Sequence[float]
    """Of the recipe's rate, to choose among."""
    seeds: Sequence[int]
    loss: Callable[[Row], float]
    """What the best rate has least of, with the first seed."""
    widen: bool = False
    """Whether to try rates beyond the factors too, as `best_factor` says."""

    @cached_property
    def lr(self) -> float:
        def loss(factor: float) -> float:
            row = self.train(self.recipe_lr * factor, self.seeds[0])
            return math.inf if "error" in row else self.loss(row)

        return self.recipe_lr * best_factor(loss, self.factors, widen=self.widen)

    def row(self, seed: int) -> Row:
        return self.train(self.lr, seed)

    @property
    def rows(self) -> list[Row]:
        """Every seed's."""
        return [self.row(seed) for seed in self.seeds]

    @property
    def error(self) -> str | None:
        """Why the first of the seeds that failed did."""
        return next((row["error"] for row in self.rows if "error" in row), None)

    def values(self, name: str) -> list[float]:
        """A score of every seed; NaN where it is not known."""
        return [math.nan if row[name] is None else row[name] for row in self.rows]

    def mean(self, name: str) -> float:
        return statistics.fmean(self.values(name))


def best_factor(
    loss: Callable[[float], float], factors: Sequence[float], *, widen: bool = False
) -> float:
    """The factor of least loss, the lowest among equals.

    With `widen`, where that is the highest or lowest that was tried, its double or half is tried
    too, until both neighbours of the best are worse.
    """
    tried: dict[float, float] = {}
    while True:
        tried |= {factor: loss(factor) for factor in factors}
        best = min(tried, key=lambda factor: (tried[factor], factor))
        edges = {max(tried): 2 * best, min(tried): best / 2}
        ended = tried[best] == math.inf and best < SLOWEST
        if not widen or best not in edges or ended:
            return best
        factors = [edges[best]]


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def verdict(worse: float, error: float) -> str:
    """Whether what ours is worse by is at most two standard errors."""
    return "HOLDS" if worse <= 2 * error else "FAILS"


def chosen(
    among: Sequence[Recipe], only: Sequence[str] = (), packages: Sequence[str] = tuple(FORMATS)
) -> list[Recipe]:
    """Those whose package and our variant are in `only`.

    Where it has no package `packages` are meant, where it has no variant all. Exits where a name
    is neither.
    """
    asked, known = {*only}, {recipe.package for recipe in among}
    variants = {recipe.ours for recipe in among}
    if unknown := asked - known - variants:
        names = ", ".join([*sorted(known), *sorted(variants)])
        sys.exit(f"error: --only {' '.join(sorted(unknown))}: expected some of {names}")
    wanted = (asked & known or {*packages}) | (asked & variants or variants)
    return [recipe for recipe in among if {recipe.package, recipe.ours} <= wanted]


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """In Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    print("", lines[0], "|---" * len(heads) + "|", *lines[1:], sep="\n")


def whole(budget: str) -> int:
    """A budget rounded down to whole files; ArgumentTypeError where it is less than one."""
    if (samples := int(budget) // SHARD * SHARD) < SHARD:
        raise argparse.ArgumentTypeError(f"{budget} came, wanted at least {SHARD}, a file")
    return samples


def add_arguments(parser: argparse.ArgumentParser, budget: str, default: int, out: str) -> None:
    """What both comparisons take; `budget` is what they call the option behind args.tokens."""
    add = parser.add_argument
    add(budget, dest="tokens", type=whole, default=default, help=f"activations, in whole {SHARD}s")
    add("--venvs", type=Path, required=True, help="folder with an environment for each package")
    add("--only", nargs="+", default=[], help="packages, our variants or both: a part of the table")
    add("--factors", type=float, nargs="+", default=[0.5, 1, 2], help="of the packages' rates")
    add("--factors-ours", type=float, nargs="+", default=[0.5, 1, 2], help="of our rate")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--threads", type=int, default=1, help="of PyTorch, for all")
    add("--prefix", nargs="+", default=[], help="put before each package's command, such as nice")
    add("--scratch", type=Path, help="where activations lie meanwhile")
    add("--out", type=Path, default=Path("checkpoints") / out, help="results, kept and reused")
