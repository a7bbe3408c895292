"""Which features mention a text: in their tokens, and in the text of their examples."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

pc: Any = pyarrow.compute  # its functions are made at import: type checkers do not know them


def mentions(folder: Path, text: str, *, examples: bool) -> list[int]:
    """Features whose tokens (or examples' text) hold `text`, upper and lower case alike.

    Reads one row group at a time.
    """
    found: set[int] = set()
    for batch in _batches(folder / "features.parquet", ["feature", "top_tokens", "writes"]):
        for column in ("top_tokens", "writes"):
            pieces = pc.struct_field(pc.list_flatten(batch[column]), "piece")
            rows = pc.list_parent_indices(batch[column])
            found.update(_where(pieces, text, batch["feature"].take(rows)))
    if examples:
        parts = ["before", "token", "after"]
        for batch in _batches(folder / "examples.parquet", ["feature", *parts]):
            joined = pc.binary_join_element_wise(*(batch[part] for part in parts), "")
            found.update(_where(joined, text, batch["feature"]))
    return sorted(found)


def _where(texts: pa.Array, wanted: str, features: pa.Array) -> list[int]:
    hits = pc.fill_null(pc.match_substring(texts, wanted, ignore_case=True), False)
    return pc.unique(features.filter(hits)).to_pylist()


def _batches(file: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(file) as table:
        yield from table.iter_batches(8192, columns=columns, use_threads=False)
