"""Other packages beside ours: what they document, and one training of theirs read back as ours.

For both comparisons, of planted features (compare_planted.py) and of a language model's
(compare_saelens.py). Needed is a folder with an environment for each package:

    for p in sae-lens eai-sparsify dictionary-learning; do
        python -m venv peers/$p && peers/$p/bin/pip install $p
    done

Where a package does not import because of torchvision, uninstall that there.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sae import formats
from sae.autoencoder import SparseAutoencoder

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

    def train(
        self, recipe: Recipe, score: Callable[[SparseAutoencoder], dict[str, Any]], **job: Any
    ) -> dict[str, Any]:
        """The package's training, scored; `error` says why there are no scores.

        `job` has activations (a folder of safetensors), samples, d_in, d_sae, k, lr and seed.
        """
        with tempfile.TemporaryDirectory(dir=self.args.scratch) as folder:
            job = recipe._asdict() | {"threads": self.args.threads, "output": folder} | job
            info = self._ask(recipe.package, job)
            if "error" in info:
                return info
            name, where = FORMATS[recipe.package]
            _, found = formats.read(Path(folder) / where, name, trusted=True)
            sae = found[0].sae
            if not all(bool(tensor.isfinite().all()) for tensor in sae.state_dict().values()):
                return {"error": "its weights are not finite"}
            return score(sae) | info

    def _ask(self, package: str, job: dict[str, Any]) -> dict[str, Any]:
        worker = self._workers.get(package) or self._begin(package)
        assert worker.stdin and worker.stdout
        print(json.dumps(job), file=worker.stdin, flush=True)
        if not (line := worker.stdout.readline()):
            del self._workers[package]
            return {"error": f"its process ended with {worker.wait()}"}
        return json.loads(line)

    def _begin(self, package: str) -> subprocess.Popen[str]:
        python = self.args.venvs / package / "bin" / "python"
        command = [*self.args.prefix, str(python), str(Path(__file__).with_name("peer_worker.py"))]
        pipe = subprocess.PIPE
        worker = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        self._workers[package] = worker
        return worker


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What both comparisons take."""
    add = parser.add_argument
    add("--venvs", type=Path, required=True, help="folder with an environment for each package")
    add("--only", nargs="+", help="packages or our variants to train, for a part of the table")
    add("--factors", type=float, nargs="+", default=[0.5, 1, 2], help="of the recipes' rates")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--threads", type=int, default=1, help="of PyTorch, for all")
    add("--prefix", nargs="+", default=[], help="put before each package's command, such as nice")
    add("--scratch", type=Path, help="where activations lie meanwhile")
