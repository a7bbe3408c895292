"""What the formats that hold the dictionary's two tables have in common."""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae.formats.card import TABLES, write_card
from sae.labels import Label
from sae.records import TOKENS, check_dictionary, check_features, labels_of, with_labels
from sae.store import OWN_KEYS, features_folder, read_manifest, staged, write_json

BATCH_ROWS = 4096

Rows = Iterable[pa.RecordBatch]


def export(
    sae_folder: Path,
    out: Path,
    features: list[int] | None,
    suffix: str,
    write_table: Callable[[Path, pa.Schema, Rows], None],
    note: str = "",
) -> list[str]:
    """Write both tables by `write_table`, with the tokens they refer to, card and provenance."""
    source = features_folder(sae_folder)
    check_dictionary(source)
    manifest = read_manifest(source)
    if features is not None:
        check_features(features, manifest["d_sae"])
    facts = provenance(manifest, features)
    with staged(out, extra=facts) as folder:
        for name, schema in TABLES.items():
            rows = _selected(source / f"{name}.parquet", features, labels_of(source))
            write_table(folder / f"{name}.{suffix}", schema, rows)
        shutil.copy(source / TOKENS, folder)
        write_card(folder, suffix, manifest, note)
        write_json(folder / "provenance.json", facts)
    return []


def provenance(manifest: Mapping[str, Any], features: list[int] | None) -> dict[str, Any]:
    """Where the numbers came from: what the manifest says, and which features were chosen."""
    return {k: v for k, v in manifest.items() if k not in OWN_KEYS} | {"features": features}


def rows_of(batches: Rows) -> Iterator[dict[str, Any]]:
    """Row by row, as Python values; what is not finite becomes None, since JSON has no NaN."""
    for batch in batches:
        for row in batch.to_pylist():
            yield {name: _finite(value) for name, value in row.items()}


def _selected(
    file: Path, features: list[int] | None, labels: dict[int, Label]
) -> Iterator[pa.RecordBatch]:
    """The rows of the chosen features, with the run's labels."""
    with pq.ParquetFile(file) as table:
        for batch in table.iter_batches(BATCH_ROWS):
            if features is not None:
                batch = batch.filter(pa.array(np.isin(batch["feature"], features)))
            yield from with_labels(pa.Table.from_batches([batch]), labels).to_batches()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return value
