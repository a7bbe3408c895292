"""Neuronpedia's batches from the feature dictionary beside SAEDashboard's own of the same SAE and
tokens: do the numbers agree, and how long does a feature take?

Trains a small SAE (or takes --run), scans text, exports, and lets SAEDashboard, in an environment
of its own, make the same dashboards for 128 of the features, which is as many as it takes at a
time. It cannot run our topk SAEs (it scales decoder rows, which moves a top-k). Takes some ten
minutes, most of it SAEDashboard and installing it.

    make dashboards    # or: python scripts/neuronpedia.py [--peers FOLDER] [--run RUN]
                       #         [--features 128] [--tokens 262144]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from exchange import environment

from sae import builtin, formats, hooks, planning, training
from sae.config import resolve
from sae.features import AFTER, BEFORE
from sae.formats import hookpoints
from sae.memory import keep_freed_memory
from sae.records import FeatureDictionary
from sae.runs import open_run, scan_run
from sae.store import Run, write_atomic

WORKER = Path(__file__).with_name("neuronpedia_worker.py")
PACKAGES = ("sae-dashboard", "pyarrow<22")
"""sae-dashboard 0.8 wants numpy 1, which newer releases of pyarrow no longer work with."""
TRAINING = {
    "hookpoints": "layers.2.mlp_act",
    "sae.d_sae": "1024",
    "sae.sparsity.kind": "batchtopk",
    "sae.sparsity.k": "16",
    "tokens": "300000",
    "data.context": "128",
    "data.eval_tokens": "5000",
    "optim.pool": "32768",
    "optim.dead_after": "30000",
}
ROUNDED = 1.1e-3
"""SAEDashboard 0.8 keeps 3 decimals."""
GOAL = 10
"""Of the ratio of CPU times; the clock counts what else the machine does."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="virtual environments")
    parser.add_argument("--run", type=Path, help="a run of the bundled model with one SAE")
    parser.add_argument("--features", type=int, default=128, help="that SAEDashboard makes")
    parser.add_argument("--tokens", type=int, default=262_144, help="tokens to scan")
    args = parser.parse_args()
    keep_freed_memory()  # as `sae features` does
    python, version = environment(args.peers, *PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        run = args.run or train(root / "run")
        ours, own = dictionary(run, root, args.tokens)
        d_sae = len(ours)
        chosen = list(range(0, d_sae, max(1, d_sae // args.features)))[: args.features]
        found = dashboards(python, run, root, chosen)
        repeated = repeating(run, chosen)
    theirs = {feature["feature_index"]: feature for feature in found["batch"]["features"]}
    print(f"sae-dashboard {version}: its classes parse our batch: {found['parsed']}")
    agree = compare([(ours[i], theirs[i]) for i in chosen], repeated)
    print(f"{d_sae} features by us, {len(chosen)} by SAEDashboard; {args.tokens:,} tokens")
    ratios = []
    for kind, ours_s, theirs_s in zip(("clock", "CPU"), own, found["seconds"], strict=True):
        each = (1000 * ours_s / d_sae, 1000 * theirs_s / len(chosen))
        ratios.append(each[1] / each[0])
        print(
            f"{kind} time of a feature: {each[0]:.1f} ms, SAEDashboard {each[1]:.1f} ms "
            f"({ours_s:.1f} s and {theirs_s:.1f} s in all), {ratios[-1]:.1f} times more"
        )
    sys.exit(int(not (agree and found["parsed"] and ratios[-1] >= GOAL)))


def train(run: Path) -> Path:
    """A small SAE on the neurons of the bundled model."""
    training.train(planning.plan(resolve(None, TRAINING | {"output": str(run)})))
    return run


def dictionary(run: Path, root: Path, tokens: int) -> tuple[dict[int, Any], list[float]]:
    """Our features by number, and the seconds for scan and export, by the clock and of the CPU."""
    opened = open_run(run, device="cpu")
    clocks = (time.perf_counter, time.process_time)
    started = [clock() for clock in clocks]
    scan_run(opened, n_tokens=tokens)
    formats.write("neuronpedia", Run(run).sae(), root / "np")
    seconds = [clock() - start for clock, start in zip(clocks, started, strict=True)]
    formats.write("saelens", Run(run).sae(), root / "lens")
    made: dict[int, Any] = {}
    for file in (root / "np").glob("batch-*.json"):
        made |= {f["feature_index"]: f for f in json.loads(file.read_text())["features"]}
    return made, seconds


def dashboards(python: Path, run: Path, root: Path, chosen: list[int]) -> dict[str, Any]:
    """What SAEDashboard makes of the same SAE and tokens, and its seconds, by clock and of CPU."""
    sae_folder = Run(run).sae()
    point = hooks.Hookpoint.parse(sae_folder.name)
    job = {
        "model": str(builtin.model_path("builtin:")),
        "sae": str(root / "lens"),
        "tokens": str(sae_folder / "features" / "tokens.safetensors"),
        "hook": hookpoints.to_transformer_lens(point).name,
        "layer": point.layer,
        "features": chosen,
        "batch": str(root / "np" / "batch-0.json"),
        "out": str(root / "theirs.json"),
    }
    write_atomic(root / "job.json", json.dumps(job))
    subprocess.run([python, WORKER, root / "job.json"], check=True, stdout=subprocess.DEVNULL)
    return json.loads((root / "theirs.json").read_text())


Pair = tuple[dict[str, Any], dict[str, Any]]


def repeating(run: Path, chosen: list[int]) -> set[int]:
    """The features with a strongest text that comes again elsewhere, which ours shows once."""
    top = FeatureDictionary(Run(run).features()).examples(chosen, "top")
    return {example.feature for example in top if example.duplicates}


def compare(pairs: list[Pair], repeated: set[int]) -> bool:
    """Print for each kind of number how many features agree within rounding."""
    live = [pair for pair in pairs if pair[0]["frac_nonzero"] > 0]
    silent = sum(theirs["frac_nonzero"] == 0 for ours, theirs in pairs if not ours["frac_nonzero"])
    print(f"{len(live)} of {len(pairs)} features fire; of the others it has {silent} silent too")
    checks: dict[str, Callable[[Pair], bool]] = {
        "frac_nonzero": lambda p: close(p[0]["frac_nonzero"], p[1]["frac_nonzero"], 2e-5),
        "top 20: values": lambda p: close(values(p[0]), values(p[1])),
        "top 20: positions": lambda p: positions(*p),
        "logit tables": lambda p: all(
            close(p[0][n], p[1][n]) for n in ("pos_values", "neg_values")
        ),
        "logit histogram": same_histogram,
        "bin counts": same_bins,
        "examples lie in their interval": lambda p: all(map(inside, p)),
        "neuron alignment": lambda p: close(*[f["neuron_alignment_values"] for f in p][:2]),
    }
    good = True
    once = [pair for pair in live if pair[0]["feature_index"] not in repeated]
    print(
        f"{len(live) - len(once)} of them have a strongest text that comes again, shown once by us"
    )
    for name, check in checks.items():
        compared = once if name == "top 20: values" else live
        right = [check(pair) for pair in compared]
        print(f"{name}: {sum(right)} of {len(compared)}")
        good &= all(right)
    return good


def close(a: Any, b: Any, tolerance: float = ROUNDED) -> bool:
    """Numbers or lists of the same length, within rounding."""
    one, other = np.asarray(a, float), np.asarray(b, float)
    return one.shape == other.shape and bool((abs(one - other) <= tolerance).all())


def strongest(feature: dict[str, Any]) -> list[tuple[dict[str, Any], int]]:
    """Of the 20 strongest tokens, those above 0 that are shown: the sequence and the column."""
    top = [a for a in feature["activations"] if a["bin_min"] == -1]
    at = [(a, a["qualifying_token_index"]) for a in top]
    return [(a, i) for a, i in at if i >= 0 and a["values"][i] > ROUNDED]


def values(feature: dict[str, Any]) -> list[float]:
    """Of the strongest tokens."""
    return [a["values"][i] for a, i in strongest(feature)]


def marks(feature: dict[str, Any]) -> dict[tuple[str, int], tuple[float, str]]:
    """By sequence and column of the strongest tokens: the value, and the text around it."""
    found = {}
    for a, i in strongest(feature):
        texts = [*map(plain, a["tokens"])]
        around = " ".join(texts[max(0, i - BEFORE) : i + AFTER + 1])
        found["".join(texts), i] = (a["values"][i], around)
    return found


def plain(token: str) -> str:
    """Letters and digits alone: its texts of other bytes are those of the vocabulary's file."""
    return "".join(c for c in token if c.isascii() and c.isalnum())


def positions(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """The same tokens, but for those whose value, rounded, is that of its last, and those amid the
    same text as one that we show."""
    own, others = marks(ours), marks(theirs)
    last = min((value for value, _ in others.values()), default=0) + ROUNDED
    shown = {around for _, around in own.values()}
    missing = [at for at in others.keys() - own.keys() if others[at][1] not in shown]
    strange = own.keys() - others.keys()
    return not any(others[at][0] > last for at in missing) and not any(
        own[at][0] > last for at in strange
    )


def same_histogram(pair: Pair) -> bool:
    """Heights on the same edges; a logit within rounding of an edge may lie on either side."""
    heights = [np.cumsum(f["logits_hist_data_bar_heights"]) for f in pair]
    middles = [f["logits_hist_data_bar_values"] for f in pair]
    return close(*middles) and bool((abs(heights[0] - heights[1]) <= 2).all())


def same_bins(pair: Pair) -> bool:
    """The share of all tokens in each interval that both have examples of; edges are the same."""
    ours, theirs = (intervals(feature) for feature in pair)
    both = sorted(ours.keys() & theirs.keys())
    return bool(both) and all(
        close(ours[i]["bin_contains"], theirs[i]["bin_contains"], 3e-5)
        and close(ours[i]["bin_max"], theirs[i]["bin_max"])
        for i in both
    )


def intervals(feature: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """An example of each interval, 5 the strongest."""
    largest = feature["activations"][0]["bin_max"]
    shown = [a for a in feature["activations"] if a["bin_min"] != -1]
    return {round(5 * a["bin_max"] / largest): a for a in shown}


def inside(feature: dict[str, Any]) -> bool:
    """Whether the value of each example lies in its interval."""
    shown = [a for a in feature["activations"] if a["bin_min"] != -1]
    at = [(a, a["qualifying_token_index"]) for a in shown]
    return all(
        a["bin_min"] - ROUNDED <= a["values"][i] <= a["bin_max"] + ROUNDED for a, i in at if i >= 0
    )


if __name__ == "__main__":
    main()
