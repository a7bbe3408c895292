"""The toy model of superposition (Elhage et al. 2022): what sparsity does to features without room.

    python scripts/study_toy_model.py [--out docs/figures] [--quick]    # 26 s on one core

1. Two features in one dimension, over importance and sparsity: which are kept, against the line on
   which the exact losses of the two solutions meet.
2. Twenty features in five dimensions, over sparsity: how many are represented, and the share of a
   dimension that each of them has (½: antipodal pairs, 2/5: pentagons).
3. The directions of five features in two dimensions, dense to sparse.
In 2 and 3 each feature is less important than the one before, so that there is a best few.

Writes toy_phase.png, toy_dimensionality.png and toy_directions.png.
"""

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from sae.superposition import ToyModels, dimensionality, pair_threshold, represented, train_toy

KEPT = 0.5
"""Norm from which a feature counts as represented."""
STATES = ("only the first", "only the second", "both, as opposites", "both, not as opposites")
COLOURS = ("#4c78a8", "#9ecae9", "#f58518", "#b9b9b9")


def phases(size: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """importance [size] of the second feature, active [size], state [active importance]."""
    importance, active = torch.logspace(-1, 1, size), torch.logspace(-2, 0, size)
    pairs = torch.stack([torch.ones(size * size), importance.repeat(size)], dim=1)
    toy = train_toy(1, pairs, active.repeat_interleave(size), steps=steps, batch=128, restarts=10)
    first, second = toy.W[..., 0].view(size, size, 2).unbind(-1)
    both = torch.where(first * second < 0, 2, 3)
    single = torch.where(first.abs() > second.abs(), 0, 1)
    kept = (first.abs() > KEPT) & (second.abs() > KEPT)
    return importance, active, torch.where(kept, both, single)


def agreement(importance: Tensor, active: Tensor, state: Tensor) -> float:
    """Share of the models that are on the side of the line where the exact losses put them."""
    line = torch.tensor([pair_threshold(float(i)) for i in importance])
    return float(((state == 2) == (active[:, None] < line)).float().mean())


def draw_phases(importance: Tensor, active: Tensor, state: Tensor, file: Path) -> None:
    """The phase diagram with the exact line."""
    figure, axes = plt.subplots(figsize=(4.6, 3.6), layout="constrained")
    axes.pcolormesh(
        importance, 1 / active, state, cmap=ListedColormap(COLOURS), vmin=-0.5, vmax=3.5,
        shading="nearest",
    )  # fmt: skip
    fine = torch.logspace(-1, 1, 200)
    axes.plot(fine, [1 / pair_threshold(float(i)) for i in fine], "k-", lw=1.5)
    axes.set(xscale="log", yscale="log", xlim=(0.1, 10), ylim=(1, 100))
    axes.set(xlabel="importance of the second feature", ylabel="1 / probability to be active")
    shown = [Patch(color=COLOURS[i]) for i in state.unique().tolist()]
    labels = [STATES[i] for i in state.unique().tolist()]
    exact = Line2D([], [], color="k")
    figure.legend([*shown, exact], [*labels, "exact losses are equal"], loc="outside lower center",
                  ncols=2, frameon=False)  # fmt: skip
    axes.set_title("Two features, one dimension: which are kept", fontsize=10)
    figure.savefig(file, dpi=150)


def sharing(rows: int, steps: int, n: int = 20, d: int = 5) -> tuple[Tensor, ToyModels]:
    """active [rows] from 1 to 1 %, and models of n equally important features in d dimensions."""
    active, importance = torch.logspace(0, -2, rows), 0.97 ** torch.arange(n)
    return active, train_toy(
        d, importance.repeat(rows, 1), active, steps=steps, batch=512, restarts=2, seed=1
    )


def draw_sharing(active: Tensor, toy: ToyModels, file: Path) -> None:
    """Features represented and the share of a dimension of each, over sparsity."""
    _, n, d = toy.W.shape
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.2), layout="constrained")
    norms = toy.W.norm(dim=-1)
    left.plot(1 / active, (norms > KEPT).sum(-1), "o-", ms=3, label=f"norm above {KEPT}")
    left.plot(1 / active, represented(toy.W), "s-", ms=3, label="‖W‖²")
    left.axhline(d, color="0.6", lw=0.8, ls="--")
    left.annotate("dimensions", (90, d + 0.5), color="0.4", fontsize=8, ha="right")
    left.set(xscale="log", ylabel=f"features represented, of {n}")
    left.legend(frameon=False)
    shares = dimensionality(toy.W)
    kept = norms > KEPT
    x = (1 / active)[:, None].expand_as(shares)
    right.plot(x[kept], shares[kept], ".", ms=4, alpha=0.5)
    for share, name in ((1, "its own"), (1 / 2, "pair ½"), (2 / 5, "pentagon 2/5")):
        right.axhline(share, color="0.6", lw=0.8, ls="--")
        right.annotate(
            name, (1.02, share), xycoords=("axes fraction", "data"), color="0.3", fontsize=8,
            va="center", annotation_clip=False,
        )  # fmt: skip
    right.set(xscale="log", ylim=(0, 1.05), ylabel="share of a dimension")
    figure.supxlabel("1 / probability to be active", fontsize=10)
    figure.savefig(file, dpi=150)


def draw_directions(active: Tensor, toy: ToyModels, file: Path) -> None:
    """The directions of features in two dimensions, one panel for each sparsity."""
    figure, panels = plt.subplots(1, len(active), figsize=(1.6 * len(active), 2), layout="tight")
    for axes, p, W in zip(panels, active.tolist(), toy.W, strict=True):
        for x, y in W.tolist():
            axes.plot([0, x], [0, y], "-", color="#f58518", lw=1.5)
            axes.plot([x], [y], "o", color="#f58518", ms=3)
        axes.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal", xticks=[], yticks=[])
        axes.set_title(f"active {p:.0%}", fontsize=9)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="for the figures")
    parser.add_argument("--quick", action="store_true", help="a coarse look, 5 seconds")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    size, rows, steps = (8, 6, 300) if args.quick else (20, 14, 500)
    start = time.perf_counter()

    found = phases(size, steps)
    draw_phases(*found, args.out / "toy_phase.png")
    print(f"two features, one dimension, {size * size} models, best of 10 starts each:")
    for i, name in enumerate(STATES):
        print(f"  {name:24}{(found[2] == i).float().mean():6.1%}")
    print(f"  {agreement(*found):.1%} are where the exact losses put them")

    active, toy = sharing(rows, steps)
    draw_sharing(active, toy, args.out / "toy_dimensionality.png")
    print("twenty features, five dimensions:\n  active   represented   ‖W‖²   share, median")
    for p, W in zip(active.tolist(), toy.W, strict=True):
        kept = W.norm(dim=-1) > KEPT
        share = dimensionality(W)[kept].median()
        print(f"  {p:6.1%}   {int(kept.sum()):11}   {represented(W):4.1f}   {share:.2f}")

    few = torch.tensor([1.0, 0.5, 0.2, 0.1, 0.03])
    importance = (0.7 ** torch.arange(5)).repeat(len(few), 1)
    five = train_toy(2, importance, few, steps=steps, batch=512, restarts=4)
    draw_directions(few, five, args.out / "toy_directions.png")
    print("five features, two dimensions:\n  active   represented   share, median")
    for p, W in zip(few.tolist(), five.W, strict=True):
        kept = W.norm(dim=-1) > KEPT
        print(f"  {p:6.0%}   {int(kept.sum()):11}   {dimensionality(W)[kept].median():.2f}")
    print(f"{time.perf_counter() - start:.0f} s; figures in {args.out}")


if __name__ == "__main__":
    main()
