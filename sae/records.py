"""What a feature is on disk: the two tables of a dictionary, their rows, and how to read them.

features.parquet holds a row for every feature, examples.parquet rows of text where it fires, and
tokens.safetensors the scanned text, once. Values are null where a thing does not exist; never NaN.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import safe_open

from sae import labels
from sae.errors import FormatError, RunError, suggest
from sae.labels import Label
from sae.store import check_files, read_manifest
from sae.untrusted import read_header

KINDS = ("top", "interval", "random")
INTERVALS = 5
SORTS = ("feature", "density", "max", "mean", "n_fired")

_TOKENS = pa.list_(
    pa.struct([("token", pa.int32()), ("piece", pa.string()), ("value", pa.float32())])
)
_FEATURES = pa.list_(pa.struct([("feature", pa.int32()), ("value", pa.float32())]))
_NEURONS = pa.list_(pa.struct([("neuron", pa.int32()), ("value", pa.float32())]))
_HISTOGRAM = pa.struct([("edges", pa.list_(pa.float32())), ("counts", pa.list_(pa.int64()))])

FEATURES_SCHEMA = pa.schema(
    [
        ("feature", pa.int32()),
        ("density", pa.float64()),
        ("n_fired", pa.int64()),
        ("max", pa.float32()),
        ("mean", pa.float32()),
        ("histogram", _HISTOGRAM),
        ("logit_histogram", _HISTOGRAM),
        ("top_tokens", _TOKENS),
        ("writes", _TOKENS),
        ("suppresses", _TOKENS),
        ("reads", _TOKENS),
        ("neurons", _NEURONS),
        ("participation", pa.float32()),
        ("neighbours", _FEATURES),
        ("cofiring", _FEATURES),
        ("correlated_neurons", _NEURONS),
        ("map_xy", pa.list_(pa.float32())),
        ("label", pa.string()),
    ]
)
EXAMPLES_SCHEMA = pa.schema(
    [
        ("feature", pa.int32()),
        ("kind", pa.string()),
        ("rank", pa.int32()),
        ("document", pa.int64()),
        ("position", pa.int32()),
        ("row", pa.int32()),
        ("column", pa.int32()),
        ("peak", pa.float32()),
        ("low", pa.float32()),
        ("high", pa.float32()),
        ("duplicates", pa.int32()),
        ("before", pa.string()),
        ("token", pa.string()),
        ("after", pa.string()),
        ("indices", pa.list_(pa.int32())),
        ("values", pa.list_(pa.float32())),
    ]
)
TABLES = {"features.parquet": FEATURES_SCHEMA, "examples.parquet": EXAMPLES_SCHEMA}
TOKENS = "tokens.safetensors"


@dataclass(frozen=True)
class TokenValue:
    """A token of the vocabulary, its text, and what the feature has to do with it."""

    token: int
    piece: str
    value: float


@dataclass(frozen=True)
class FeatureValue:
    """Another feature, and how close it is."""

    feature: int
    value: float


@dataclass(frozen=True)
class NeuronValue:
    """A neuron of the hookpoint, and its weight."""

    neuron: int
    value: float


@dataclass(frozen=True)
class Histogram:
    """Counts between edges: bin i holds edges[i] < x <= edges[i + 1] (the first, its low edge)."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class FeatureRecord:
    """One row of features.parquet; None where a thing does not exist or is not computed."""

    feature: int
    density: float
    """Share of the scanned tokens on which the activation is above 0."""
    n_fired: int
    max: float
    mean: float | None
    """Mean over the tokens on which it fires; None for a feature that never does."""
    histogram: Histogram | None
    """Of the activations above 0, over 50 equal bins of (0, max]."""
    logit_histogram: Histogram | None
    """Of what the feature adds to each token's logit, over the vocabulary."""
    top_tokens: list[TokenValue]
    """The tokens it fires on, each with its share of the summed activation."""
    writes: list[TokenValue] | None
    """The tokens whose logits it raises most, per unit of activation."""
    suppresses: list[TokenValue] | None
    """The tokens whose logits it lowers most, lowest first."""
    reads: list[TokenValue] | None
    """The tokens whose embedding excites it most."""
    neurons: list[NeuronValue] | None
    """Its largest decoder weights by size, where decoder rows are neurons."""
    participation: float | None
    """Effective number of neurons it writes to, (Σw²)² / Σw⁴."""
    neighbours: list[FeatureValue]
    """The features with the most similar decoder direction, by cosine."""
    cofiring: list[FeatureValue] | None
    """The features that fire on the same tokens, by φ, the correlation of firing with firing."""
    correlated_neurons: list[NeuronValue] | None
    """The neurons whose activations go with its own, by Pearson's r; none where it is too rare."""
    map_xy: list[float] | None
    """A place on a plane, near features of a like direction; the manifest says how it was found."""
    label: str | None

    @property
    def intervals(self) -> list[tuple[float, float, int]]:
        """(low, high, number of activations) of the 5 equal parts of (0, max], highest first."""
        if self.histogram is None:
            return []
        edges, counts = self.histogram.edges, self.histogram.counts
        step = len(counts) // INTERVALS
        starts = range(0, len(counts), step)
        found = [(edges[i], edges[i + step], sum(counts[i : i + step])) for i in starts]
        return found[::-1]

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "FeatureRecord":
        """A row of the table, as pyarrow gives it, to a record; None for columns not read."""
        return cls(**{f.name: _typed(f.name, row.get(f.name)) for f in fields(cls)})


@dataclass(frozen=True)
class Example:
    """One row of examples.parquet: a token at which the feature fires, and its context."""

    feature: int
    kind: str
    """"top": the strongest, one a sequence; "interval": from one of 5 equal parts of (0, max];
    "random": drawn evenly from all tokens on which the feature fires."""
    rank: int
    document: int
    position: int
    """The marked token's index in its document."""
    row: int
    column: int
    """Where the marked token is in tokens.safetensors."""
    peak: float
    """The activation at the marked token."""
    low: float | None
    high: float | None
    """For intervals: low < peak <= high."""
    duplicates: int
    """Sequences left out because the tokens around the mark are the same (top examples only)."""
    before: str
    token: str
    after: str
    indices: list[int]
    values: list[float]
    """The activations above 0 over the whole row of tokens, and their columns."""


@dataclass(frozen=True)
class Context:
    """The tokens of an example's sequence with the feature's activation at each."""

    pieces: list[str]
    acts: list[float]
    peak: int

    def window(self, before: int, after: int) -> "Context":
        """At most so many tokens on each side of the marked one."""
        start = max(0, self.peak - before)
        stop = self.peak + after + 1
        return Context(self.pieces[start:stop], self.acts[start:stop], self.peak - start)


@dataclass(frozen=True)
class Reading:
    """A token of a text and its strongest features, [(feature, activation), …], strongest first."""

    piece: str
    features: list[tuple[int, float]]


@dataclass(frozen=True)
class Change:
    """What a feature's activation becomes: act · scale + add. Ablated: scale 0, add 0."""

    scale: float = 1.0
    add: float = 0.0


@dataclass(frozen=True)
class Continuation:
    """What a model says after a text: the likeliest next tokens with their probabilities, and the
    pieces of the text it goes on with."""

    likeliest: list[TokenValue]
    pieces: list[str]


class Probe(Protocol):
    """Something that can ask the model itself."""

    def read(self, text: str, k: int) -> list[Reading]:
        """The `k` strongest features on each token of a text."""
        ...

    def steer(
        self,
        text: str,
        changes: Mapping[int, Change],
        *,
        tokens: int,
        temperature: float,
        seed: int,
    ) -> Continuation:
        """How the model goes on with a text while some features are changed."""
        ...


class FeatureDictionary:
    """A features/ folder, read as needed; no model and no tokenizer are loaded."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "features.parquet").is_file():
            raise RunError(f"{folder} holds no features.parquet; make it with: sae features RUN")
        check_dictionary(self.folder)

    def __len__(self) -> int:
        """The number of features."""
        with _reading(self.folder / "features.parquet") as file:
            return pq.read_metadata(file).num_rows

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The feature table, or some columns of it; `label` holds what the run's labels.json says.

        That column needs the column `feature` beside it.
        """
        with _reading(self.folder / "features.parquet") as file:
            return with_labels(pq.read_table(file, columns=columns), self.labels())

    def labels(self) -> dict[int, Label]:
        """The labels that the run holds for these features, as they are now."""
        return labels_of(self.folder)

    def records(
        self, features: Iterable[int], columns: Sequence[str] | None = None
    ) -> list[FeatureRecord]:
        """The records of some features, in the order asked for; RunError out of range.

        With `columns`, `feature` among them, all others are None.
        """
        wanted = check_features(list(features), len(self))
        table = self._rows("features.parquet", wanted, columns)
        by_feature = {row["feature"]: FeatureRecord.from_row(row) for row in table.to_pylist()}
        if missing := set(wanted) - by_feature.keys():
            raise self._unsound(f"features.parquet has no row for feature {min(missing)}")
        return [by_feature[feature] for feature in wanted]

    def examples(self, features: Iterable[int], kind: str | None = None) -> list[Example]:
        """Examples of some features, of one kind or all, as stored: by feature, kind and rank."""
        wanted = check_features(list(features), len(self))
        rows = self._rows("examples.parquet", wanted).to_pylist()
        return [Example(**row) for row in rows if kind in (None, row["kind"])]

    def row(self, row: int) -> tuple[list[int], list[str]]:
        """A sequence of the scanned text: its token ids and their pieces."""
        pieces = self._row_pieces(row)
        return self._text.get_slice("tokens")[row : row + 1][0].tolist(), pieces

    def n_rows(self) -> int:
        """The number of sequences that were scanned."""
        return self._shape[0]

    def check_example(self, example: Example) -> None:
        """Raise FormatError where one lies outside the scanned text, or is not of numbers."""
        width = self._check_row(example.row)
        columns = [*example.indices, example.column]
        inside = 0 <= min(columns) <= max(columns) < width
        if not inside or len(example.values) != len(example.indices):
            raise self._unsound(f"an example of feature {example.feature} lies outside its text")
        if not math.isfinite(sum(example.values)):
            raise self._unsound(f"an activation of feature {example.feature} is not finite")

    def context(self, example: Example) -> Context:
        """The example's whole sequence."""
        self.check_example(example)
        pieces = self._row_pieces(example.row)
        acts = [0.0] * len(pieces)
        for index, value in zip(example.indices, example.values, strict=True):
            acts[index] = value
        return Context(pieces, acts, example.column)

    def ranked(self, sort: str = "max", search: str = "") -> list[int]:
        """All features by `sort`, largest first ("feature": by number), those that never fire last.

        `search` keeps those whose label, promoted tokens or tokens fired on hold the text.
        Raises RunError on an unknown `sort`.
        """
        if sort not in SORTS:
            raise RunError(f"--sort {sort}: choose one of {', '.join(SORTS)}{suggest(sort, SORTS)}")
        columns = dict.fromkeys(["feature", "n_fired", "label", "top_tokens", "writes", sort])
        table = self.table(list(columns))
        if search:
            table = table.filter(pa.array(_mentions(table, search)))
        order = "ascending" if sort == "feature" else "descending"
        dead = pa.array([n == 0 for n in table["n_fired"].to_pylist()])
        keys = {"dead": "ascending", sort: order, "feature": "ascending"}
        table = table.append_column("dead", dead).sort_by(list(keys.items()))
        return table["feature"].to_pylist()

    def sample(self, n: int, seed: int) -> list[int]:
        """`n` of the features that fire (all, if fewer do), drawn evenly by `seed`, ascending."""
        live = self.table(["feature", "n_fired"]).filter(pc.field("n_fired") > 0)
        features = sorted(live["feature"].to_pylist())
        return sorted(Random(seed).sample(features, min(n, len(features))))

    def _rows(
        self, name: str, features: list[int], columns: Sequence[str] | None = None
    ) -> pa.Table:
        with _reading(self.folder / name) as file, pq.ParquetFile(file) as opened:
            groups = [i for i in range(opened.num_row_groups) if _may_hold(opened, i, features)]
            table = opened.read_row_groups(groups, columns=columns and list(columns))
            wanted = set(features)
            kept = [number in wanted for number in table["feature"].to_pylist()]
            table = table.filter(pa.array(kept, pa.bool_()))
        return with_labels(table, self.labels()) if "label" in table.column_names else table

    @cached_property
    def _text(self) -> Any:
        return safe_open(self.folder / TOKENS, framework="numpy")

    @cached_property
    def _shape(self) -> tuple[int, int]:
        """Sequences that were scanned, and tokens in each."""
        height, width = self._text.get_slice("tokens").get_shape()
        return height, width

    def _check_row(self, row: int) -> int:
        """The number of tokens in a row; FormatError where there is no such row."""
        height, width = self._shape
        if not 0 <= row < height:
            raise self._unsound(f"there is no row {row} in {TOKENS}")
        return width

    def _row_pieces(self, row: int) -> list[str]:
        """The text of each token of a row: piece i is bytes offsets[i] to offsets[i + 1]."""
        width = self._check_row(row)
        offsets = self._text.get_slice("piece_offsets")[row * width : (row + 1) * width + 1]
        cuts = [int(offset) for offset in offsets]
        (size,) = self._text.get_slice("piece_bytes").get_shape()
        if len(cuts) != width + 1 or cuts != sorted(cuts) or not 0 <= cuts[0] <= cuts[-1] <= size:
            raise self._unsound(f"the pieces of row {row} in {TOKENS} do not follow each other")
        text = self._text.get_slice("piece_bytes")[cuts[0] : cuts[-1]].tobytes()
        start = cuts[0]
        return [
            text[a - start : b - start].decode(errors="replace")
            for a, b in itertools.pairwise(cuts)
        ]

    def _unsound(self, problem: str) -> FormatError:
        return FormatError(f"{self.folder}: {problem}; make it again with: sae features RUN")


def labels_of(dictionary: Path) -> dict[int, Label]:
    """The labels that the run of a features/ folder holds for it; {} outside a run."""
    run = labels.run_of(dictionary)
    if run is None or not (run / labels.FILE).exists():
        return {}
    return labels.read(run, read_manifest(dictionary).get("sae_sha256", ""))


def with_labels(table: pa.Table, given: dict[int, Label]) -> pa.Table:
    """The table with its column `label` filled from `given`, where it has one."""
    if not given or "label" not in table.column_names:
        return table
    rows = zip(table["feature"].to_pylist(), table["label"].to_pylist(), strict=True)
    texts = [given[feature].text if feature in given else own for feature, own in rows]
    where = table.column_names.index("label")
    return table.set_column(where, "label", pa.array(texts, pa.string()))


def check_dictionary(folder: Path) -> None:
    """Refuse a dictionary whose files are not what its manifest says, or not what they claim.

    Raises RunError and FormatError, both naming the file.
    """
    check_files(folder, *TABLES, TOKENS)
    for name, schema in TABLES.items():
        if (folder / name).exists():
            _check_table(folder / name, schema)
    if (folder / TOKENS).exists():
        _check_tokens(folder / TOKENS)


@contextmanager
def _reading(file: Path) -> Iterator[Path]:
    """What goes wrong in reading a Parquet file is a FormatError that names it."""
    try:
        yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise FormatError(f"{file} is damaged or no Parquet file: {first}") from None


def _may_hold(file: pq.ParquetFile, group: int, features: list[int]) -> bool:
    """Whether a row group can have rows of some of the features, by its least and greatest."""
    columns = file.metadata.row_group(group)
    found = (columns.column(i) for i in range(columns.num_columns))
    own = next((c.statistics for c in found if c.path_in_schema == "feature"), None)
    if own is None or not own.has_min_max:
        return True
    return any(own.min <= feature <= own.max for feature in features)


def _check_table(file: Path, schema: pa.Schema) -> None:
    """FormatError where a file is no Parquet, or lacks a column or has it of another type."""
    with _reading(file):
        there = pq.read_schema(file)
    for field in schema:
        if field.name not in there.names or there.field(field.name).type != field.type:
            raise FormatError(
                f"{file} has no column {field.name!r} of type {str(field.type)[:60]}; "
                "make it again with: sae features RUN"
            )


def _check_tokens(file: Path) -> None:
    """FormatError where the tensors cannot be the scanned text."""
    found = {name: (entry.dtype, len(entry.shape)) for name, entry in read_header(file).items()}
    wanted = {"tokens": 2, "piece_offsets": 1, "piece_bytes": 1}
    for name, dimensions in wanted.items():
        if found.get(name, ("", 0))[1] != dimensions:
            raise FormatError(
                f"{file} has no tensor {name!r} of {dimensions} dimensions; "
                "make it again with: sae features RUN"
            )


def parse_features(text: str, d_sae: int) -> list[int]:
    """'1,5,10-20' to numbers, each once and in the order given; RunError names what is wrong."""
    found: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = part.partition("-")
        numbers = [first.strip(), last.strip()] if dash else [first.strip()]
        if not all(number.isdecimal() and len(number) < 20 for number in numbers):
            raise RunError(f"feature {part[:40]!r}: expected numbers and ranges such as 1,5,10-20")
        low, high = int(first), int(last or first)
        if high < low:
            raise RunError(f"feature {part}: a range runs from the smaller number to the larger")
        check_features([low, high], d_sae)
        found += range(low, high + 1)
    if not found:
        raise RunError("--feature is empty: expected numbers and ranges such as 1,5,10-20")
    return list(dict.fromkeys(found))


def check_features(features: list[int], d_sae: int) -> list[int]:
    """The same features; RunError for one the SAE does not have."""
    for feature in features:
        if not 0 <= feature < d_sae:
            raise RunError(f"feature {feature}: this SAE has features 0–{d_sae - 1}")
    return features


def _mentions(table: pa.Table, search: str) -> list[bool]:
    """Which rows hold the text in their label or tokens, upper and lower case alike."""
    wanted = search.casefold()

    def texts(row: dict[str, Any]) -> Iterator[str]:
        yield row["label"] or ""
        for column in ("top_tokens", "writes"):
            yield from (token["piece"] for token in row[column] or ())

    return [any(wanted in text.casefold() for text in texts(row)) for row in table.to_pylist()]


_ITEMS = {
    "top_tokens": TokenValue,
    "writes": TokenValue,
    "suppresses": TokenValue,
    "reads": TokenValue,
    "neurons": NeuronValue,
    "correlated_neurons": NeuronValue,
    "neighbours": FeatureValue,
    "cofiring": FeatureValue,
}


def _typed(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in ("histogram", "logit_histogram"):
        return Histogram(**value)
    return [_ITEMS[name](**item) for item in value] if name in _ITEMS else value
