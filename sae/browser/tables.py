"""Rows of a dictionary's tables by feature number, from as few row groups as hold them."""

from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

KEPT = 4
"""Reads of row groups that are kept, some megabytes each."""


class FeatureRows:
    """A Parquet table sorted by its column `feature`, kept open; safe to use from threads."""

    def __init__(self, file: Path) -> None:
        self._file, self._lock = pq.ParquetFile(file), Lock()
        self._meta = self._file.metadata
        paths = (self._meta.schema.column(i).path for i in range(len(self._meta.schema)))
        self._places = {path: i for i, path in enumerate(paths)}
        groups = range(self._meta.num_row_groups)
        bounds = [self._bounds(group) for group in groups]
        self._first = np.array([first for first, _ in bounds], np.int64)
        self._last = np.array([last for _, last in bounds], np.int64)

    def between(self, start: int, stop: int, columns: list[str] | None = None) -> pa.Table:
        """The rows of features start <= feature < stop; `columns` must hold "feature"."""
        groups = np.flatnonzero((self._last >= start) & (self._first < stop)).tolist()
        with self._lock:
            table = self._read(tuple(groups), None if columns is None else tuple(columns))
        feature = table["feature"].to_numpy()
        return table.filter(pa.array((feature >= start) & (feature < stop)))

    def columns(self, names: list[str]) -> pa.Table:
        """Some columns of all rows."""
        with self._lock:
            return self._file.read(names)

    def has_values(self, column: str) -> bool:
        """Whether a flat column holds anything but nulls, as far as the file's statistics say."""
        for group in range(self._meta.num_row_groups):
            rows = self._meta.row_group(group)
            found: Any = rows.column(self._places[column]).statistics
            if found is None or not found.has_null_count or found.null_count < rows.num_rows:
                return True
        return False

    @cached_property
    def _read(self) -> Callable[[tuple[int, ...], tuple[str, ...] | None], pa.Table]:
        """Row groups, the last read kept: neighbours are often asked for one after another."""

        def read(groups: tuple[int, ...], columns: tuple[str, ...] | None) -> pa.Table:
            chosen = None if columns is None else list(columns)
            return self._file.read_row_groups(list(groups), columns=chosen, use_threads=False)

        return lru_cache(maxsize=KEPT)(read)

    def _bounds(self, group: int) -> tuple[int, int]:
        """The least and greatest feature of a row group; an empty one has none."""
        meta = self._meta.row_group(group)
        if not meta.num_rows:
            return 1, 0
        column: Any = meta.column(self._places["feature"])
        if column.statistics is not None and column.statistics.has_min_max:
            return column.statistics.min, column.statistics.max
        values = self._file.read_row_group(group, columns=["feature"])["feature"].to_numpy()
        return int(values.min()), int(values.max())
