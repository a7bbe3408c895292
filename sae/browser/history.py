"""What a run's own files say of its training: metrics, events, evaluation, settings."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae.errors import FormatError, RunError
from sae.store import SETTINGS, Run, folder_name
from sae.untrusted import read_json

POINTS = 600
"""Steps that a curve has at most; of a longer log every n-th is taken."""
SHOWN = ("loss", "mse", "fvu", "l0", "dead", "lr")
EVENTS = 1000
CONFIG_BYTES = 1 << 20


def history(run: Path, sae_folder: Path | None) -> dict[str, Any]:
    """The curves of one SAE (None: of the first), events, eval.json and config.yaml."""
    rows = list(_lines(run / "metrics.jsonl"))
    sae = sae_folder.name if sae_folder else next(map(_sae, rows), None)
    own = [row for row in rows if _sae(row) == sae]
    step = max(1, -(-len(own) // POINTS))
    kept = own[::step] + ([own[-1]] if own and (len(own) - 1) % step else [])
    curves = {name: [_number(row.get(name)) for row in kept] for name in ("tokens", *SHOWN)}
    return {
        "hookpoint": str(own[0].get("hookpoint")) if own else None,
        "curves": curves,
        "seconds": _number(own[-1].get("seconds")) if own else None,
        "events": list(_lines(run / "events.jsonl"))[-EVENTS:],
        "evaluation": _evaluation(sae_folder) if sae_folder else None,
        "config": _text(run / SETTINGS),
    }


class Training:
    """The pages of a run that has no dictionary yet: how its training goes, and nothing else."""

    def __init__(self, run: Path) -> None:
        self.run, self.d_sae = Run(run).path, 0
        self.name = run.name

    def about(self) -> dict[str, Any]:
        """As Pages.about, without features."""
        return {"name": self.name, "d_sae": 0, "shown": 0, "command": f"sae browse {self.run}"}

    def part(self, key: str) -> Any:
        """The part "run"; RunError for any other."""
        if key != "run":
            raise RunError(f"{self.name} has no dictionary yet; make it with: sae features RUN")
        return history(self.run, None)

    def parts(self) -> Iterator[tuple[str, Any]]:
        """That one part."""
        yield "run", self.part("run")


def _sae(row: dict[str, Any]) -> str:
    """The folder of the SAE that a line of the log is about."""
    return folder_name(str(row.get("sae", row.get("hookpoint"))))


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a log; the last line may be half written, others may be damaged."""
    if not file.is_file():
        return
    with file.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float) or not abs(value) < float("inf"):
        return None
    return float(f"{value:.6g}")


def _evaluation(sae_folder: Path) -> dict[str, Any] | None:
    try:
        found = read_json(sae_folder / "eval.json")
    except (FileNotFoundError, FormatError):
        return None
    return found if isinstance(found, dict) else None


def _text(file: Path) -> str:
    with file.open("rb") as data:
        return data.read(CONFIG_BYTES).decode(errors="replace")
