"""How FVU falls with width and training tokens at one L0, and the power law in it.

    python scripts/study_scaling.py [--k 16] [--widths 128 256 512 1024]
                                    [--tokens 50000 100000 200000] [--quick]
                                    [--rows checkpoints/scaling.jsonl] [--out docs/figures]

TopK SAEs, so that L0 is k in all, at the bundled model's layers.2.mlp_out, on held-out text. Two
laws are fitted to log FVU by least squares:
    FVU = A · width^-α · tokens^-β                 a straight line in both, and
    FVU = E + a · width^-α + b · tokens^-β         with a part that neither takes away
                                                   (Hoffmann et al. 2022, arXiv:2203.15556).
The second is printed only where it leaves less of the spread per degree of freedom. Rows that are
in the file already are kept. The default is 12 SAEs: one minute on one core. Writes scaling.png.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from grid import Row, run_grid
from matplotlib.ticker import ScalarFormatter
from scipy.optimize import curve_fit

BASE = {
    "data.eval_tokens": "30000",
    "data.repeat": "true",
    "hookpoints": "layers.2.mlp_out",
    "model.dtype": "float32",
    "optim.pool": "32768",
    "sae.init": "data",
    "sae.sparsity.kind": "topk",
}
WIDTH, TOKENS = 512, 100_000
"""Where the constants of the laws are given: they are the FVU's parts there."""


class Law(NamedTuple):
    """A fitted law: its parameters with standard errors, and the spread of log FVU around it."""

    names: tuple[str, ...]
    values: np.ndarray
    errors: np.ndarray
    spread: float

    def __call__(self, width: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return np.exp(LAWS[self.names]((width, tokens), *self.values))

    def lines(self) -> str:
        """One parameter a line."""
        each = zip(self.names, self.values, self.errors, strict=True)
        return "\n".join(f"  {name:2} {value:7.4f} ± {error:.4f}" for name, value, error in each)


def power(x: tuple[np.ndarray, np.ndarray], A: float, alpha: float, beta: float) -> np.ndarray:
    """log FVU of the straight law."""
    width, tokens = x
    return np.log(A) - alpha * np.log(width / WIDTH) - beta * np.log(tokens / TOKENS)


def floored(
    x: tuple[np.ndarray, np.ndarray], E: float, a: float, alpha: float, b: float, beta: float
) -> np.ndarray:
    """log FVU of the law with a floor."""
    width, tokens = x
    return np.log(E + a * (width / WIDTH) ** -alpha + b * (tokens / TOKENS) ** -beta)


LAWS = {("A", "α", "β"): power, ("E", "a", "α", "b", "β"): floored}
STARTS = {power: (0.1, 0.1, 0.1), floored: (0.03, 0.05, 0.5, 0.05, 0.5)}


def fit(rows: Sequence[Row]) -> list[Law]:
    """The straight law, then the one with a floor where there are rows enough for it."""
    x = tuple(np.array([row[key] for row in rows], float) for key in ("sae.d_sae", "tokens"))
    y = np.log([row["fvu"] for row in rows])
    laws = []
    for names, law in LAWS.items():
        free = len(rows) - len(names)
        if free < 2:
            continue
        bounds = (1e-6, 5.0) if law is floored else (-5.0, 5.0)
        values, covariance = curve_fit(law, x, y, STARTS[law], bounds=bounds, max_nfev=20_000)
        spread = float(np.sqrt(np.square(law(x, *values) - y).sum() / free))
        laws.append(Law(names, values, np.sqrt(np.diag(covariance)), spread))
    return laws


def draw(rows: Sequence[Row], law: Law, k: int, file: Path) -> None:
    """FVU over width and over tokens, measured (dots) and fitted (lines)."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
    keys = ("sae.d_sae", "tokens")
    for axes, over, other in zip(panels, keys, reversed(keys), strict=True):
        groups = sorted({row[other] for row in rows})
        for value, colour in zip(
            groups, plt.get_cmap("viridis")(np.linspace(0, 0.85, len(groups))), strict=True
        ):
            own = sorted((row for row in rows if row[other] == value), key=lambda row: row[over])
            xs = np.array([row[over] for row in own], float)
            grid = np.geomspace(xs[0], xs[-1], 50)
            same = np.full(50, float(value))
            fitted = law(grid, same) if over == keys[0] else law(same, grid)
            axes.plot(xs, [row["fvu"] for row in own], "o", ms=4, color=colour, label=f"{value:,}")
            axes.plot(grid, fitted, "-", lw=1, color=colour)
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(sorted({row[over] for row in rows}))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.minorticks_off()
    for axes, name, legend in zip(
        panels, ("width (features)", "training tokens"), ("tokens", "width"), strict=True
    ):
        axes.set_xlabel(name)
        axes.legend(title=legend, frameon=False, fontsize=8)
    fvus = [row["fvu"] for row in rows]
    panels[0].set_yticks(np.round(np.geomspace(min(fvus), max(fvus), 5), 3))
    panels[0].yaxis.set_major_formatter(ScalarFormatter())
    panels[0].set_ylabel(f"held-out FVU at L0 {k}")
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--k", type=int, default=16, help="active features a token")
    parser.add_argument("--widths", nargs="+", type=int, default=[128, 256, 512, 1024])
    parser.add_argument("--tokens", nargs="+", type=int, default=[50_000, 100_000, 200_000])
    parser.add_argument("--rows", type=Path, default=Path("checkpoints/scaling.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="for the figure")
    parser.add_argument("--quick", action="store_true", help="3 widths, 2 token budgets")
    args = parser.parse_args()
    if args.quick:
        args.widths, args.tokens = args.widths[:3], args.tokens[:2]
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    axes = {"sae.sparsity.k": [args.k], "sae.d_sae": args.widths, "tokens": args.tokens}
    rows = run_grid(None, BASE, axes, args.rows)
    print("width    tokens   L0      FVU      dead")
    for row in rows:
        print(
            f"{row['sae.d_sae']:5} {row['tokens']:9,}   {row['l0']:4.1f}   {row['fvu']:.4f}   "
            f"{row['dead']:5.1%}"
        )
    laws = fit(rows)
    best = min(laws, key=lambda law: law.spread)
    for law in laws if best is laws[-1] else laws[:1]:
        print(
            f"law in {', '.join(law.names)}, log FVU within {law.spread:.3f} of it\n{law.lines()}"
        )
    draw(rows, best, args.k, args.out / "scaling.png")
    print(f"{time.perf_counter() - start:.0f} s; rows in {args.rows}, figure in {args.out}")


if __name__ == "__main__":
    main()
