"""The statement behind superposition, measured: many directions fit into few dimensions.

    python scripts/study_geometry.py [RUN] [--out docs/figures] [--quick]   # 90 s on one core

1. Angles between random vectors concentrate at 90° as the dimension grows.
2. How many vectors fit within 90° ± ε: drawn until the first pair does not fit, chosen from many
   draws, and moved apart by gradient descent; against what Johnson and Lindenstrauss' argument
   guarantees and Welch's bounds allow.
3. Angles between the features of a trained dictionary, the rows of W_up and the columns of W_down,
   each against random vectors of the same dimension. Without RUN, a TopK SAE with 1,024 features is
   trained on the bundled model's layers.2.mlp_out first (300,000 tokens).

Writes geometry_angles.png, geometry_packing.png and geometry_dictionary.png.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.config import resolve
from sae.geometry import (
    angle_counts,
    angle_density,
    coherence,
    effective_number,
    first_collision,
    guaranteed,
    keep_apart,
    pair_probability,
    spread,
    welch_limit,
)
from sae.hooks import Hookpoint, mlp_weights
from sae.planning import plan
from sae.runs import open_run
from sae.store import Run
from sae.training import train

DICTIONARY = {
    "data.repeat": "true",
    "hookpoints": "layers.2.mlp_out",
    "sae.d_sae": "1024",
    "sae.sparsity.kind": "topk",
    "sae.sparsity.k": "16",
    "sae.init": "data",
    "model.dtype": "float32",
    "optim.pool": "32768",
}
ANGLES = (2, 3, 8, 32, 128, 512)
WITHIN = 10.0
MOST = 300
"""Vectors that are moved apart at once, at most."""


class Fit(NamedTuple):
    """How many vectors fit in `d` dimensions; `spread` is None above what was tried."""

    d: int
    guaranteed: int
    first: float
    chosen: int
    spread: int | None
    limit: float


def randn(n: int, d: int, seed: int = 0) -> Tensor:
    """Vectors of random direction."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def moments(counts: Tensor) -> tuple[float, float]:
    """Mean and standard deviation, in degrees, of a histogram over 0° to 180°."""
    middle = (torch.arange(len(counts)) + 0.5) * (180 / len(counts))
    share = counts.double() / counts.sum()
    mean = (share * middle).sum()
    return float(mean), float((share * (middle - mean).square()).sum().sqrt())


def within(counts: Tensor, degrees: float = WITHIN) -> float:
    """Share of the pairs within 90° ± `degrees`, a whole number of bins."""
    half, bins = len(counts) // 2, round(degrees * len(counts) / 180)
    return float(counts[half - bins : half + bins].sum() / counts.sum())


def study_angles(n: int, file: Path) -> None:
    """Table and figure of the angles of random vectors."""
    print(f"angles between {n} random vectors\n      d   std   1/√d   within 90° ± 10°   exactly")
    figure, axes = plt.subplots(figsize=(4.8, 3.2), layout="constrained")
    grid = torch.linspace(0, 180, 721)
    for d, colour in zip(ANGLES, plt.get_cmap("viridis")(torch.linspace(0, 0.9, 6)), strict=True):
        counts = angle_counts(randn(n, d), bins=180)
        _, std = moments(counts)
        exactly = 1 - pair_probability(d, WITHIN)
        print(
            f"  {d:5} {std:5.1f}  {57.296 / d**0.5:5.1f}   {within(counts):16.1%}   {exactly:7.1%}"
        )
        middle = torch.arange(180) + 0.5
        axes.plot(middle, counts / counts.sum(), ".", ms=3, color=colour, label=f"{d}")
        axes.plot(grid, angle_density(d, grid), "-", lw=0.8, color=colour)
    axes.set(xlabel="angle (degrees)", ylabel="share per degree", xlim=(0, 180), ylim=(0, 0.17))
    axes.set(xticks=range(0, 181, 30))
    axes.legend(title="dimension", frameon=False)
    axes.set_title("Random vectors (dots) and the exact density (lines)", fontsize=9)
    figure.savefig(file, dpi=150)


def fits(d: int, degrees: float, draws: int, most: int) -> Fit:
    """One row of the table."""
    first = statistics.median(first_collision(randn(draws, d, s), degrees) for s in range(5))
    chosen = len(keep_apart(randn(draws, d), degrees))
    found = best_spread(d, degrees, max(chosen, d), most)
    return Fit(d, guaranteed(d, degrees), first, chosen, found, welch_limit(d, degrees))


def best_spread(d: int, degrees: float, start: int, most: int) -> int | None:
    """The most vectors that moving apart packs, a fifth more tried as long as that helps."""
    best, n = 0, start
    while n <= most:
        found = len(spread(randn(n, d), degrees))
        if found <= best:
            return best
        best, n = found, n + max(1, n // 5)
    return None


def study_packing(epsilons: tuple[int, ...], dims: list[int], draws: int, most: int, file: Path):
    """Tables and figure of how many vectors fit."""
    figure, panels = plt.subplots(
        1, len(epsilons), figsize=(4 * len(epsilons), 3.6), layout="constrained", sharey=True
    )
    for axes, degrees in zip(panels, epsilons, strict=True):
        rows = [fits(d, degrees, draws, most) for d in dims]
        print(f"within 90° ± {degrees}°, of {draws} draws")
        print("      d  guaranteed  first pair out  chosen  moved apart  Welch's limit")
        for row in rows:
            moved = f"> {most}" if row.spread is None else row.spread
            print(
                f"  {row.d:5} {row.guaranteed:11} {row.first:15} {row.chosen:7} {moved:>12}"
                f"  {row.limit:13.4g}"
            )
        axes.fill_between(dims, [r.guaranteed for r in rows], [r.limit for r in rows], alpha=0.08)
        lines = {
            "Welch: no more than": ([r.limit for r in rows], "k-"),
            "moved apart": ([r.spread for r in rows], "s-"),
            "chosen from draws": ([r.chosen for r in rows], "o-"),
            "Johnson–Lindenstrauss: at least": ([r.guaranteed for r in rows], "k--"),
            "drawn until a pair does not fit": ([r.first for r in rows], "^-"),
        }
        for name, (values, style) in lines.items():
            shown = [(d, v) for d, v in zip(dims, values, strict=True) if v is not None]
            axes.plot(*zip(*shown, strict=True), style, ms=4, lw=1.2, label=name)
        axes.plot(dims, dims, ":", color="0.5", lw=1, label="as many as dimensions")
        axes.set(xscale="log", yscale="log", ylim=(1, 1e6), xlabel="dimension")
        axes.set_xscale("log", base=2)
        axes.set_xticks(dims, [str(d) for d in dims])
        axes.set_title(f"within 90° ± {degrees}°", fontsize=10)
    panels[0].set_ylabel("vectors")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def quick_dictionary(folder: str, tokens: int) -> tuple[Any, dict[Hookpoint, SparseAutoencoder]]:
    """The bundled model and an SAE trained on it."""
    planned = plan(resolve(None, DICTIONARY | {"tokens": tokens, "output": f"{folder}/run"}))
    sae = SparseAutoencoder.from_pretrained(Run(train(planned)).sae())
    return planned.lm.model, {planned.hookpoints[0]: sae}


def vectors_of(
    model: Any, saes: Mapping[Hookpoint, SparseAutoencoder]
) -> Iterator[tuple[str, Tensor]]:
    """The decoder of every SAE, then W_up's rows and W_down's columns of their layers."""
    for point, sae in saes.items():
        yield f"features, {point}", sae.W_dec.detach().cpu()
    for layer in dict.fromkeys(point.layer for point in saes if point.layer is not None):
        if (weights := mlp_weights(model, layer)) is not None:
            yield f"W_up rows, layer {layer}", weights.W_up.float().cpu()
            yield f"W_down columns, layer {layer}", weights.W_down.T.float().cpu()


def study_dictionary(sets: list[tuple[str, Tensor]], file: Path) -> None:
    """Table and figure of trained directions beside random ones."""
    figure, panels = plt.subplots(
        1, len(sets), figsize=(3 * len(sets), 3), layout="constrained", sharey=True, squeeze=False
    )
    print("trained directions (in brackets: as many random ones)")
    print(f"  {'':28}    n     d   mean angle   std           largest |cosine|   effective d")
    for axes, (name, rows) in zip(panels[0], sets, strict=True):
        n, d = rows.shape
        random = randn(n, d)
        counts, chance = angle_counts(rows, bins=90), angle_counts(random, bins=90)
        (mean, std), (_, random_std) = moments(counts), moments(chance)
        print(
            f"  {name:28} {n:4} {d:5}   {mean:10.1f}   {std:4.1f} ({random_std:.1f})   "
            f"{coherence(rows):9.2f} ({coherence(random):.2f})   "
            f"{effective_number(rows).nanmean():9.0f} ({effective_number(random).mean():.0f})"
        )
        middle = (torch.arange(90) + 0.5) * 2
        axes.stairs(counts / counts.sum() / 2, range(0, 181, 2), fill=True, alpha=0.6)
        axes.plot(middle, angle_density(d, middle), "k-", lw=1, label=f"random, d = {d}")
        axes.set(yscale="log", ylim=(1e-7, 1), xlim=(0, 180), xticks=range(0, 181, 45))
        axes.set(xlabel="angle (degrees)")
        axes.set_title(name, fontsize=9)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    panels[0, 0].set_ylabel("share of pairs per degree")
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, help="a trained run; without, one is trained")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="for the figures")
    parser.add_argument("--quick", action="store_true", help="a coarse look, 40 seconds")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    study_angles(500 if args.quick else 1500, args.out / "geometry_angles.png")
    dims, draws, most = [4, 8, 16, 32, 64, 128, 256], 20_000, MOST
    if args.quick:
        dims, draws, most = [4, 8, 16, 32, 64], 2_000, 100
    study_packing((10, 20), dims, draws, most, args.out / "geometry_packing.png")
    if args.run:
        opened = open_run(args.run)
        model, found = opened.inputs.lm.model, opened.autoencoders()
        saes = {opened.routes[name].targets[0]: sae for name, sae in found.items()}
    else:
        with tempfile.TemporaryDirectory() as folder:
            model, saes = quick_dictionary(folder, 100_000 if args.quick else 300_000)
    study_dictionary(list(vectors_of(model, saes)), args.out / "geometry_dictionary.png")
    print(f"{time.perf_counter() - start:.0f} s; figures in {args.out}")


if __name__ == "__main__":
    main()
