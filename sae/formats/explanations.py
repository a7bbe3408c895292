"""Neuronpedia's explanations as labels: files of its bulk export (explanations/batch-N.jsonl.gz, a
row for each explanation), the same unpacked, and the JSON list that its API exports.

Of a row are read: modelId and layer (its source), index, description, and explanationModelName or
typeName, which say what made it. The embeddings beside them are passed over.
"""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sae.errors import FormatError
from sae.labels import LONGEST, PERSON, Label
from sae.text import counted
from sae.untrusted import parse_json, read_json

LINE = 1 << 20
"""Bytes of a row, most of them its embedding."""
LIST_BYTES = 1 << 28
MAKER = "Neuronpedia"
"""By whom, where a row does not say it."""


class Explanations(NamedTuple):
    """The labels by feature, the source they are of, and what was left out or cut."""

    labels: dict[int, Label]
    source: str
    notes: list[str]


def read(source: Path) -> Explanations:
    """The explanations of a file, or of all files in a folder; the first of each feature.

    Raises FormatError, naming file and row, where they are not of one source, or no such rows.
    """
    labels: dict[int, Label] = {}
    sources: dict[str, None] = {}
    again = cut = 0
    for where, row in _rows(source):
        feature, label, is_cut = _label(where, row)
        sources[_source(row)] = None
        if len(sources) > 1:
            raise FormatError(
                f"{where}: explanations of {' and '.join(sources)}; give those of one source"
            )
        again += feature in labels
        cut += is_cut and feature not in labels
        labels.setdefault(feature, label)
    if not labels:
        raise FormatError(f"{source} holds no explanations; give batch-N.jsonl.gz, or their folder")
    notes = [f"{counted(again, 'explanation')} left out: of features that have one"] * bool(again)
    notes += [f"{counted(cut, 'explanation')} cut at {LONGEST} characters"] * bool(cut)
    return Explanations(labels, next(iter(sources)), notes)


def _rows(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row, and where it stands."""
    files = [source]
    if source.is_dir():
        within = source / "explanations" if (source / "explanations").is_dir() else source
        files = sorted([*within.glob("*.jsonl.gz"), *within.glob("*.jsonl")])
    for file in files:
        for number, row in enumerate(_in_file(file), 1):
            where = f"{file}, row {number}"
            if not isinstance(row, dict):
                raise FormatError(f"{where}: expected an object, got {type(row).__name__}")
            yield where, row


def _in_file(file: Path) -> Iterable[Any]:
    if file.suffix == ".json":
        rows = read_json(file, LIST_BYTES)
        if not isinstance(rows, list):
            raise FormatError(f"{file}: expected a list of explanations")
        return rows
    return _lines(file)


def _lines(file: Path) -> Iterator[Any]:
    """The rows of a .jsonl or .jsonl.gz, one at a time, so that a small file stays small."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            while line := lines.readline(LINE + 1):
                if len(line) > LINE:
                    raise ValueError(f"a row has more than {LINE:,} bytes")
                if line.strip():
                    yield parse_json(line)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise FormatError(f"{file} cannot be read as explanations: {first}") from None


def _source(row: dict[str, Any]) -> str:
    """Model and layer, as far as the row names them."""
    named = [part for name in ("modelId", "layer") if isinstance(part := row.get(name), str)]
    return "/".join(filter(None, named)) or "an unnamed source"


def _label(where: str, row: dict[str, Any]) -> tuple[int, Label, bool]:
    """The feature of a row, its label, and whether that is cut."""
    index, text = str(row.get("index")), row.get("description")
    if not (index.isascii() and index.isdigit() and len(index) < 12):
        raise FormatError(f"{where}: index {index[:40]!r}: expected the number of a feature")
    if not isinstance(text, str) or not text.strip():
        raise FormatError(f"{where}: description {text!r:.40}: expected text")
    text = " ".join(text.split())
    is_cut = len(text) > LONGEST
    if is_cut:
        text = text[: LONGEST - 1] + "…"
    return int(index), Label(text, _maker(row)), is_cut


def _maker(row: dict[str, Any]) -> str:
    """Which machine made it. No file may call itself a person, whose labels are never replaced."""
    by = str(row.get("explanationModelName") or row.get("typeName") or MAKER)[:LONGEST]
    return MAKER if by == PERSON else by
