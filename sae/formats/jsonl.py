"""JSON Lines: an object a row, absent values null, numbers in full precision."""

import json
from pathlib import Path

import pyarrow as pa

from sae.formats.tables import Rows, export, rows_of


def write(sae_folder: Path, out: Path, features: list[int] | None = None) -> list[str]:
    """Write features.jsonl and examples.jsonl to the new folder `out`."""
    return export(sae_folder, out, features, "jsonl", _write_table)


def _write_table(file: Path, schema: pa.Schema, batches: Rows) -> None:
    with file.open("w", encoding="utf-8", newline="\n") as lines:
        for row in rows_of(batches):
            lines.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
