"""Records → what the pages show, in parts small enough to load one at a time.

Each part has a key, and becomes a classic script, `SAE.put(key, {…})`, since pages opened from a
disk may load scripts but fetch nothing. The server answers with the same scripts.
"""

import base64
import json
import math
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sae.browser.geometry import KINDS, decoder, match
from sae.browser.history import history
from sae.browser.tables import FeatureRows
from sae.errors import RunError
from sae.labels import PERSON, run_of
from sae.plane import AXES, principal_axes
from sae.records import Example, FeatureDictionary, FeatureRecord, check_features
from sae.store import read_manifest

ROWS, FEATURES, TEXT = 64, 8, 16
"""Features of the list, feature pages, and sequences of text in one part."""
AROUND = 16
"""Tokens each side of the mark that come with an example; the rest is in the text parts."""
SEARCHABLE = 100_000
"""Features up to which a static page can search labels and tokens."""
PIECES = 5
"""Tokens of each kind that stand in a line of the list."""
LONGEST = 400
"""Characters of a token that a line of the list shows."""
NUMBERS = ("density", "max", "mean", "participation")
WHOLE = ("columns", "more", "labels", "search", "map", "run")
"""Parts that are about all features."""
PREFIX = "SAE.put("


def script(key: str, value: Any) -> str:
    """A part as a classic script. No `<` is in it, nor anything but ASCII."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f"{PREFIX}{json.dumps(key)},{text});\n"


class Pages:
    """The parts of one dictionary; `features` restricts it to some. Raises as FeatureDictionary."""

    def __init__(self, folder: Path, features: Sequence[int] | None = None) -> None:
        self.dictionary = FeatureDictionary(folder)
        self.folder, self.run = folder, run_of(folder)
        self.manifest = read_manifest(folder)
        self.d_sae = len(self.dictionary)
        chosen = None if features is None else check_features(list(features), self.d_sae)
        self.chosen = None if chosen is None else sorted(set(chosen))
        self._features = FeatureRows(folder / "features.parquet")
        self._examples = FeatureRows(folder / "examples.parquet")

    @cached_property
    def _labelled(self) -> bool:
        """Whether the table itself has labels, beside those of the run."""
        return self._features.has_values("label")

    @property
    def name(self) -> str:
        """RUN / SAE, as far as the folder says."""
        sae = self.folder.absolute().parent.name
        return f"{self.run.name} / {sae}" if self.run else sae

    def about(self) -> dict[str, Any]:
        """Where the dictionary came from."""
        names = ("model", "revision", "hookpoint", "data", "data_fingerprint", "tokens", "context",
                 "sae_sha256", "versions")  # fmt: skip
        facts = {name: self.manifest.get(name) for name in names}
        return facts | {
            "name": self.name,
            "d_sae": self.d_sae,
            "shown": self.d_sae if self.chosen is None else len(self.chosen),
            "parts": {"rows": ROWS, "features": FEATURES, "text": TEXT},
            "command": f"sae browse {self.run or 'RUN'}",
        }

    def columns(self) -> dict[str, Any]:
        """The numbers of all features, in order: little-endian fp32 in base64, NaN for none."""
        table = self._columns("density", "max", "participation")
        ids = None if self.chosen is None else _packed(table["feature"], "<i4")
        return {"n": len(table), "features": ids} | _numbers(table)

    def more(self) -> dict[str, Any]:
        """The numbers that only an exported selection needs, as in `columns`."""
        return _numbers(self._columns("mean", "n_fired"))

    def _columns(self, *names: str) -> pa.Table:
        """The feature's number and some columns, of the features that are shown."""
        table = self._features.columns(["feature", *names])
        if self.chosen is not None:
            table = table.filter(pa.array(np.isin(table["feature"], self.chosen)))
        return table

    def labels(self) -> dict[str, Any]:
        """Labels as [feature, text, whether a machine made it]."""
        given = self.dictionary.labels()
        rows = {feature: label.text for feature, label in given.items() if feature < self.d_sae}
        if self._labelled:
            column = self.dictionary.table(["feature", "label"])
            there = column.filter(column["label"].is_valid())
            pairs = zip(there["feature"].to_pylist(), there["label"].to_pylist(), strict=True)
            rows = dict(pairs) | rows
        made = {feature for feature, label in given.items() if label.by != PERSON}
        found = [[f, rows[f], f in made] for f in sorted(rows) if self._has(f)]
        return {"labels": found, "editable": self.run is not None}

    def rows(self, part: int) -> list[Any]:
        """A line for each feature of a part: tokens fired on and promoted, the strongest example.

        [feature, [piece, …], [piece, …], [before, token, after] or null], only those chosen.
        """
        start, stop = self._range(part, ROWS)
        shown = ["feature", "kind", "rank", "before", "token", "after"]
        examples = self._examples.between(start, stop, shown).to_pylist()
        best = {
            e["feature"]: [_short(e["before"], False), _short(e["token"]), _short(e["after"])]
            for e in examples
            if e["kind"] == "top" and e["rank"] == 0
        }
        table = self._features.between(start, stop, ["feature", "top_tokens", "writes"])
        return [
            [r["feature"], _pieces(r["top_tokens"]), _pieces(r["writes"]), best.get(r["feature"])]
            for r in table.to_pylist()
            if self._has(r["feature"])
        ]

    def features(self, part: int) -> dict[str, Any]:
        """The feature pages of a part, with one table of the tokens in their examples."""
        start, stop = self._range(part, FEATURES)
        strings: dict[tuple[int, str], int] = {}
        pages = {}
        for row in self._features.between(start, stop).to_pylist():
            if self._has(row["feature"]):
                pages[row["feature"]] = _page(FeatureRecord.from_row(row)) | {"examples": []}
        for row in self._examples.between(start, stop).to_pylist():
            if row["feature"] in pages:
                shown = self._example(Example(**row), strings)
                pages[row["feature"]]["examples"].append(shown)
        return {"tokens": [list(token) for token in strings], "pages": pages}

    def text(self, part: int) -> list[Any]:
        """Sequences of a part: [[token id, …], [piece, …]]."""
        n = self.dictionary.n_rows()
        rows = range(part * TEXT, min((part + 1) * TEXT, n))
        if part < 0 or not rows:
            raise RunError(f"there is no text {part}; there are {n} sequences")
        return [list(self._row(row)) for row in rows]

    def search(self) -> dict[str, Any]:
        """For every feature the text of its tokens, in the order of the columns."""
        if self.d_sae > SEARCHABLE and self.chosen is None:
            return {"texts": None, "limit": SEARCHABLE}
        table = self.dictionary.table(["feature", "top_tokens", "writes"])
        rows = (row for row in table.to_pylist() if self._has(row["feature"]))
        return {
            "texts": [
                "\n".join(_pieces(r["top_tokens"], 99) + _pieces(r["writes"], 99)) for r in rows
            ]
        }

    def history(self) -> dict[str, Any]:
        """How the training went; without a run, nothing is known."""
        if self.run is None:
            raise RunError("this dictionary is not in a run, so nothing is known of its training")
        return history(self.run, self.folder.absolute().parent)

    def map(self) -> dict[str, Any]:
        """A place in two dimensions for each feature, in the order of the columns, and its making.

        That of the dictionary where `sae features` made one, else principal components.
        """
        column = self.dictionary.table(["map_xy"])["map_xy"]
        if column.null_count == 0 and len(column):
            xy = np.array(column.to_pylist(), np.float32)
            how = str(self.manifest.get("map") or "stored with the dictionary")
        else:
            xy, how = principal_axes(self._decoder), AXES
        xy = xy if self.chosen is None else xy[self.chosen]
        return {"xy": base64.b64encode(xy.astype("<f4").tobytes()).decode(), "how": how}

    def comparable(self, other: "Pages") -> bool:
        """Whether the two write into a space of the same dimensions."""
        return self._decoder.shape[1] == other._decoder.shape[1]

    def compare(self, other: "Pages") -> dict[str, Any]:
        """Our features matched to another dictionary's, see `geometry.match`.

        `overlap`: the share of our top examples that are top examples of the match too, null where
        the two have not read the same text.
        """
        found = match(self._decoder, other._decoder)
        facts = {"kinds": KINDS, "nearest": found["nearest"].tolist()}
        facts |= {name: found[name].tolist() for name in ("children", "kind")}
        facts["cosine"] = [_number(float(x)) for x in found["cosine"]]
        same_text = all(
            self.manifest.get(k) == other.manifest.get(k) is not None
            for k in ("data_fingerprint", "tokens", "model")
        )
        tops = zip(self._tops, (other._tops[j] for j in facts["nearest"]), strict=True)
        overlap = [round(len(a & b) / len(a), 3) if a else None for a, b in tops]
        return facts | {"overlap": overlap if same_text else None}

    @cached_property
    def _decoder(self) -> np.ndarray:
        return decoder(self.folder.parent)

    @cached_property
    def _tops(self) -> list[set[tuple[int, int]]]:
        """Where in the text the top examples of every feature are."""
        found: list[set[tuple[int, int]]] = [set() for _ in range(self.d_sae)]
        names = ["feature", "kind", "document", "position"]
        for start in range(0, self.d_sae, 4096):
            table = self._examples.between(start, start + 4096, names)
            for feature, kind, *place in zip(*(table[n].to_pylist() for n in names), strict=True):
                if kind == "top":
                    found[feature].add((place[0], place[1]))
        return found

    def parts(self) -> Iterator[tuple[str, Any]]:
        """Every part with its key, one at a time."""
        for key in WHOLE:
            if key != "run" or self.run is not None:
                yield key, self.part(key)
        for kind, size in (("rows", ROWS), ("features", FEATURES)):
            wanted = range(self.d_sae) if self.chosen is None else self.chosen
            for part in dict.fromkeys(feature // size for feature in wanted):
                yield f"{kind}-{part}", getattr(self, kind)(part)
        for part in range(-(-self.dictionary.n_rows() // TEXT)):
            yield f"text-{part}", self.text(part)

    def part(self, key: str) -> Any:
        """One part by its key; RunError where there is none."""
        kind, _, number = key.partition("-")
        if key in WHOLE:
            return getattr(self, "history" if key == "run" else key)()
        if kind in ("rows", "features", "text") and number.isdecimal() and len(number) < 10:
            return getattr(self, kind)(int(number))
        raise RunError(f"there is no part {key[:40]!r}")

    def _has(self, feature: int) -> bool:
        return self._chosen is None or feature in self._chosen

    @cached_property
    def _chosen(self) -> frozenset[int] | None:
        return None if self.chosen is None else frozenset(self.chosen)

    def _range(self, part: int, size: int) -> tuple[int, int]:
        start = part * size
        if not 0 <= start < self.d_sae:
            raise RunError(f"there is no part {part}: this SAE has features 0–{self.d_sae - 1}")
        return start, min(start + size, self.d_sae)

    @cached_property
    def _row(self) -> Any:
        return lru_cache(maxsize=4096)(self.dictionary.row)

    def _example(self, example: Example, strings: dict[tuple[int, str], int]) -> dict[str, Any]:
        """An example with the tokens around its mark as indices into `strings`."""
        ids, pieces = self._row(example.row)
        start = max(0, example.column - AROUND)
        window = slice(start, example.column + AROUND + 1)
        tokens = zip(ids[window], pieces[window], strict=True)
        names = ("kind", "rank", "document", "position", "row", "column", "duplicates", "indices")
        return {name: getattr(example, name) for name in names} | {
            "peak": _number(example.peak),
            "low": _number(example.low),
            "high": _number(example.high),
            "values": [_number(value) for value in example.values],
            "start": start,
            "tokens": [strings.setdefault(token, len(strings)) for token in tokens],
        }


def _page(record: FeatureRecord) -> dict[str, Any]:
    """A record as the page reads it: lists instead of objects, five digits, no NaN."""
    tokens, others = ("top_tokens", "writes", "suppresses", "reads"), (
        "neurons", "neighbours", "cofiring", "correlated_neurons")  # fmt: skip
    found = {f: _number(getattr(record, f)) for f in ("density", "max", "mean", "participation")}
    found |= {"n_fired": record.n_fired, "intervals": record.intervals}
    for name in ("histogram", "logit_histogram"):
        histogram = getattr(record, name)
        found[name] = histogram and vars(histogram)
    for name in (*tokens, *others):
        items = getattr(record, name)
        found[name] = items and [[_number(v) for v in vars(item).values()] for item in items]
    return found


def _number(value: Any) -> Any:
    """Five significant digits of a float, null where it is not finite; anything else as it is."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _numbers(table: pa.Table) -> dict[str, str]:
    return {name: _packed(table[name], "<f4") for name in table.column_names if name != "feature"}


def _packed(column: pa.ChunkedArray, dtype: str) -> str:
    values = column.to_numpy(zero_copy_only=False)
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode()


def _pieces(tokens: list[dict[str, Any]] | None, n: int = PIECES) -> list[str]:
    return [_short(token["piece"]) for token in (tokens or [])[:n]]


def _short(text: str, start: bool = True) -> str:
    """The start, or the end, of a text that is far too long for a line."""
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}…" if start else f"…{text[-LONGEST:]}"
