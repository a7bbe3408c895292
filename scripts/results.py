"""Train and evaluate every configs/builtin-layers.2.mlp_*.yaml and print README's results table.

    python scripts/results.py            # about 40 minutes on two cores; runs that exist are kept

Each row is one config on the bundled model, beside the k largest neurons (the others at their
mean) at the same number of active units.
"""

import json
import sys
from pathlib import Path

from sae import cli
from sae.store import read_manifest

CONFIGS = Path("configs")
RUNS = Path("checkpoints/results")


def evaluated(config: Path) -> dict:
    """The run's eval.json; trains (or goes on training) and evaluates where there is none."""
    run = RUNS / config.stem
    files = list(run.glob("saes/*/eval.json"))
    if not files:
        train = ["train", str(config), "--output", str(run), "--resume", "auto"]
        if code := cli.main(train) or cli.main(["evaluate", str(run)]):
            sys.exit(code)
        files = list(run.glob("saes/*/eval.json"))
    return json.loads(files[0].read_text()) | {"seconds": read_manifest(run)["seconds"]}


def estimate(number: dict, digits: int = 3) -> str:
    """value ± standard error."""
    return f"{number['value']:.{digits}f} ± {number['se']:.{digits}f}"


def row(config: Path, result: dict) -> str:
    """One line of the table."""
    site, kind, _ = order(config)
    k = round(result["l0"]["value"])
    neurons = next(b for b in result["baseline"] if b["k"] == k)
    return (
        f"| {site} | {kind} | {result['l0']['value']:.1f} | {estimate(result['fvu'])} "
        f"| {neurons['fvu']['value']:.3f} "
        f"| {estimate(result['cross_entropy']['recovered_mean'])} "
        f"| {neurons['ce_recovered_mean']['value']:.3f} | {result['dead']['value']:.1%} "
        f"| {result['seconds'] / 60:.1f} | `sae train {config}` |"
    )


def order(config: Path) -> tuple[str, str, int]:
    """By site, kind, then L0."""
    _, place, kind, l0 = config.stem.split("-")
    return place.rpartition(".")[2], kind, int(l0)


def main() -> None:
    configs = sorted(CONFIGS.glob("builtin-layers.*.mlp_*.yaml"), key=order)
    rows = [row(config, evaluated(config)) for config in configs]
    columns = "site, SAE, L0, FVU, k neurons, CE recovered, k neurons, dead, minutes, command"
    print("| " + columns.replace(", ", " | ") + " |")
    print("|---" * 10 + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
