"""Train a grid of penalties × widths × seeds and draw FVU against L0 with its Pareto front.

    python scripts/sweep.py [CONFIG] [--amounts 0.75 1.6 3] [--widths 256 1024] [--seeds 0 1]
                            [--tokens 100000] [--rows checkpoints/sweep.jsonl]
                            [--out docs/figures] [--quick]

CONFIG is any training config with one hookpoint; without, ReLU-L1 at the bundled model's
layers.2.mlp_out. An amount is the value of the setting that moves L0 in the config's sparsity: l1,
or k in TopK. Each point is the mean over the seeds. Rows that are in the file already are kept, so
take another file for another config. The default is 12 SAEs: one minute on one core. Writes
sweep.png.
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from grid import Row, run_grid
from matplotlib.ticker import ScalarFormatter

from sae.config import resolve
from sae.planning import sparsity_of

BUNDLED = {
    "data.eval_tokens": "30000",
    "data.repeat": "true",
    "hookpoints": "layers.2.mlp_out",
    "model.dtype": "float32",
    "optim.pool": "32768",
}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, nan for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def plus_minus(error: float, form: str) -> str:
    """A standard error for a table; as many blanks where a single value has none."""
    single = math.isnan(error)
    text = f" ± {0.0 if single else error:{form}}"
    return " " * len(text) if single else text


class Point(NamedTuple):
    """One amount and width: means over the seeds and their standard errors."""

    amount: float
    width: int
    l0: float
    l0_error: float
    fvu: float
    fvu_error: float
    dead: float


def points_of(rows: Sequence[Row], knob: str) -> list[Point]:
    """The rows, seeds averaged, by width and L0."""
    groups: dict[tuple[float, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row[knob], row["sae.d_sae"]), []).append(row)
    points = []
    for (amount, width), group in groups.items():
        l0, fvu, dead = ([row[key] for row in group] for key in ("l0", "fvu", "dead"))
        dead_mean, _ = mean_and_error(dead)
        points.append(Point(amount, width, *mean_and_error(l0), *mean_and_error(fvu), dead_mean))
    return sorted(points, key=lambda point: (point.width, point.l0))


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both L0 and FVU, by L0."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.l0, p.fvu)):
        if not best or point.fvu < best[-1].fvu:
            best.append(point)
    return best


def draw(points: Sequence[Point], title: str, file: Path) -> None:
    """FVU against L0, a line for each width, the front behind them."""
    figure, axes = plt.subplots(figsize=(4.8, 3.6), layout="constrained")
    best = front(points)
    axes.plot([p.l0 for p in best], [p.fvu for p in best], "-", color="0.85", lw=7, zorder=0,
              label="Pareto front")  # fmt: skip
    for width in sorted({p.width for p in points}):
        own = [p for p in points if p.width == width]
        axes.errorbar(
            [p.l0 for p in own], [p.fvu for p in own], xerr=[p.l0_error for p in own],
            yerr=[p.fvu_error for p in own], fmt="o-", ms=4, lw=1.2, capsize=2,
            label=f"{width:,} features",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="L0 (active features a token)", ylabel="FVU")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(ScalarFormatter())
    axes.tick_params(which="minor", labelsize=8)
    axes.tick_params(which="major", labelsize=8)
    axes.legend(frameon=False)
    axes.set_title(title, fontsize=9)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?")
    parser.add_argument("--amounts", nargs="+", type=float, default=[0.75, 1.6, 3.0])
    parser.add_argument("--widths", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--tokens", type=int, default=100_000, help="that each SAE learns from")
    parser.add_argument("--rows", type=Path, default=Path("checkpoints/sweep.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="for the figure")
    parser.add_argument("--quick", action="store_true", help="2 amounts, 1 seed, 50,000 tokens")
    args = parser.parse_args()
    if args.quick:
        args.amounts, args.seeds, args.tokens = args.amounts[:2], args.seeds[:1], 50_000
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    base = {} if args.config else BUNDLED
    sparsity = sparsity_of(resolve(args.config, base), d_in=1)  # for its kind and knob
    knob = f"sae.sparsity.{sparsity.l0_knob}"
    amounts = [int(a) if sparsity.l0_knob == "k" else a for a in args.amounts]
    axes = {"seed": args.seeds, "tokens": [args.tokens], "sae.d_sae": args.widths, knob: amounts}
    points = points_of(run_grid(args.config, base, axes, args.rows), knob)
    best = front(points)
    print(f"width   {sparsity.l0_knob:>5}   L0             FVU                dead    on the front")
    for p in points:
        print(
            f"{p.width:5}   {p.amount:5g}   {p.l0:5.1f}{plus_minus(p.l0_error, '4.1f')}   "
            f"{p.fvu:.4f}{plus_minus(p.fvu_error, '.4f')}   {p.dead:6.1%}   "
            f"{'yes' if p in best else ''}"
        )
    draw(points, f"{sparsity.kind}, {args.tokens:,} tokens an SAE", args.out / "sweep.png")
    print(f"{time.perf_counter() - start:.0f} s; rows in {args.rows}, figure in {args.out}")


if __name__ == "__main__":
    main()
