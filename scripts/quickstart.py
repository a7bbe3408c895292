"""Train, evaluate, scan and read an SAE on the bundled model; about five minutes on two cores.

    python scripts/quickstart.py [--output checkpoints/quickstart]

Ends with held-out FVU, L0 and dead share, twenty features drawn by seed, and a count: how many of
them have one token (or one left neighbour) at the peak of at least 8 of their 10 top examples,
beside the same count for a randomly initialised SAE with as many active features a token.
"""

import argparse
import collections
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from sae import cli
from sae.activations import ActivationStream
from sae.autoencoder import SparseAutoencoder
from sae.features import ScanSettings, scan
from sae.records import FeatureDictionary
from sae.runs import OpenRun, open_run
from sae.sparsity import make_sparsity
from sae.store import Run

OUTPUT = "checkpoints/quickstart"
SEED = 0
DRAWN = 20
EXAMPLES = 10
AGREEING = 8
SCANNED = 400_000


def shares_a_token(dictionary: FeatureDictionary, feature: int) -> bool:
    """Whether AGREEING of the top EXAMPLES have the same peak token, or the same one left of it."""
    examples = dictionary.examples([feature], "top")[:EXAMPLES]
    contexts = [dictionary.context(example) for example in examples]
    peaks = collections.Counter(c.pieces[c.peak] for c in contexts)
    before = collections.Counter(c.pieces[c.peak - 1] for c in contexts if c.peak > 0)
    return any(count >= AGREEING for c in (peaks, before) for count in c.values())


def clear_features(dictionary: FeatureDictionary) -> int:
    """How many of DRAWN live features drawn by SEED share a token."""
    return sum(shares_a_token(dictionary, f) for f in dictionary.sample(DRAWN, SEED))


def random_sae(opened: OpenRun, k: int) -> SparseAutoencoder:
    """An untrained SAE of the same width, b_dec at the mean, its k largest features active."""
    (trained,), (route,) = opened.autoencoders().values(), opened.routes.values()
    (point,) = route.points
    sae = SparseAutoencoder(trained.d_in, trained.d_sae, make_sparsity("topk", k=k))
    stream = ActivationStream(
        opened.inputs.lm.model, [point], opened.rows(heldout=False), batch=1024, pool=16_384,
        dtype=torch.float32, generator=torch.Generator().manual_seed(SEED),
    )  # fmt: skip
    mean = stream.statistics()[point].mean
    sae.initialise(mean, torch.Generator().manual_seed(SEED))
    return sae


def clear_by_chance(run: Path, k: int) -> int:
    """The count of `clear_features` for the randomly initialised SAE."""
    opened = open_run(run)
    (name,) = opened.folders
    with tempfile.TemporaryDirectory() as folder:
        random_sae(opened, k).save_pretrained(folder)
        lm = opened.inputs.lm
        settings = ScanSettings(per_interval=0, random=0)
        written = scan(
            lm.model, lm.tokenizer, {name: Path(folder)}, opened.rows(heldout=False),
            SCANNED, source={"model": lm.name}, settings=settings,
        )  # fmt: skip
        return clear_features(FeatureDictionary(written[name]))


def run_verb(*args: str) -> None:
    """One verb of the command line; stops here if it fails."""
    print(f"\n$ sae {' '.join(args)}", flush=True)
    if code := cli.main(args):
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=OUTPUT)
    output = parser.parse_args().output
    if output == OUTPUT:  # an earlier quickstart; another folder may be somebody's work
        shutil.rmtree(output, ignore_errors=True)
    start = time.perf_counter()
    run_verb("train", "configs/quickstart.yaml", "--output", output)
    trained = time.perf_counter()
    run_verb("features", output, "--tokens", str(SCANNED))
    run_verb("top", output, "--sample", str(SEED), "--limit", str(DRAWN))
    run_verb("evaluate", output)
    dictionary = FeatureDictionary(Run(output).features())
    ours, chance = clear_features(dictionary), clear_by_chance(Path(output), k=16)
    print(
        f"\n{ours} of {DRAWN} features drawn by seed {SEED} have the same peak token or left "
        f"neighbour in {AGREEING} of {EXAMPLES} top examples;\n{chance} of {DRAWN} for a randomly "
        f"initialised SAE.\nTraining took {trained - start:.0f} s, all of it "
        f"{time.perf_counter() - start:.0f} s. Next:\n"
        f"  .venv/bin/sae browse {output}\n"
        f"  .venv/bin/sae top {output} --search import\n"
        f"  .venv/bin/sae top {output} --feature {dictionary.sample(1, SEED)[0]}\n"
        f"  .venv/bin/sae top {output} --text 'def area(self): return self.width'\n"
        f"  .venv/bin/sae export {output} --format parquet --out dictionary"
    )


if __name__ == "__main__":
    main()
