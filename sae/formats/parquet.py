"""Parquet: the dictionary's own tables, whole or for some features."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sae.formats.tables import Rows, export


def write(sae_folder: Path, out: Path, features: list[int] | None = None) -> list[str]:
    """Write features.parquet and examples.parquet to the new folder `out`."""
    return export(sae_folder, out, features, "parquet", _write_table)


def _write_table(file: Path, schema: pa.Schema, batches: Rows) -> None:
    with pq.ParquetWriter(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
