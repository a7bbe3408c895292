"""CSV: numbers as they are, lists and texts as JSON in their cells, absent values empty."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from sae.formats.card import is_plain
from sae.formats.tables import Rows, export, rows_of

_NOTE = "\nIn the CSV files lists and texts are JSON: read them with `json.loads`."


def write(sae_folder: Path, out: Path, features: list[int] | None = None) -> list[str]:
    """Write features.csv and examples.csv to the new folder `out`."""
    return export(sae_folder, out, features, "csv", _write_table, _NOTE)


def _write_table(file: Path, schema: pa.Schema, batches: Rows) -> None:
    plain = {field.name for field in schema if is_plain(field)}
    with file.open("w", encoding="utf-8", newline="") as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(schema.names)
        for row in rows_of(batches):
            writer.writerow([_cell(row[name], name in plain) for name in schema.names])


def _cell(value: Any, plain: bool) -> Any:
    if value is None or plain:
        return value
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
