"""Neuronpedia: batch-0.json, batch-1.json, … as SAEDashboard writes them, and under exports/ the
files of Neuronpedia's bulk import. Both are made from the feature dictionary.

As in SAEDashboard, decoder rows are scaled to norm 1, so activations are ours times ‖W_dec‖, and
logits are W_dec · [W_down at mlp_act] · W_U, without the final norm's gain. Its 20 strongest tokens
come here from the sequences that the dictionary keeps, of which none repeats another's text around
the mark. Its histogram of activations starts at the smallest, ours at 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae import hooks
from sae.autoencoder import SparseAutoencoder
from sae.formats import foreign, neuronpedia_bulk
from sae.formats.foreign import Notes
from sae.formats.neuronpedia_bulk import (
    Interval,
    Shown,
    Source,
    in_list,
    spliced,
    to_bytes,
    to_json,
)
from sae.formats.tables import provenance
from sae.hooks import Hookpoint
from sae.language_model import LanguageModel
from sae.records import TOKENS, Example, FeatureDictionary, FeatureRecord, Histogram, check_features
from sae.store import features_folder, read_manifest, staged, write_atomic, write_json
from sae.text import TokenPieces
from sae.untrusted import read_header

BATCH = 128
TOP, LISTED, NEIGHBOURS, BINS = 20, 10, 3, 50
PLACES = 5
"""Decimals of every number."""
COLUMNS = ("feature", "n_fired", "max", "histogram", "cofiring", "correlated_neurons")
"""Of the dictionary, that are looked at."""
TEXTS = 1 << 14
"""Sequences whose text is kept at hand, 1 kB each."""
_BARS = ("logits_hist_data_bar_heights", "logits_hist_data_bar_values")


def write(sae_folder: Path, out: Path, features: list[int] | None = None) -> Notes:
    """Write the batches and the files of the bulk import to the new folder `out`.

    A transcoder belongs to the layer it reads. Loads the language model for the logits. Raises
    RunError without a feature dictionary, FormatError for several hookpoints side by side, or one
    that belongs to no layer, ModelError without the model.
    """
    folder = features_folder(sae_folder)
    dictionary, manifest = FeatureDictionary(folder), read_manifest(folder)
    every = list(range(len(dictionary)))
    chosen = every if features is None else check_features(features, len(every))
    read, point = foreign.ends_of("neuronpedia", sae_folder, manifest)
    for end in (read, point):
        if end.layer is None:
            what = f"{end}, which has no layer"
            raise foreign.refuse("neuronpedia", what, "use --format parquet")
    sae = SparseAutoencoder.from_pretrained(sae_folder)
    sequences, width = read_header(folder / TOKENS)["tokens"].shape
    source = Source.of(read, point, sae.sparsity.kind, manifest, (sequences, width))
    facts = provenance(manifest, features)
    with staged(out, extra=facts) as staging:
        logits = _logits(
            foreign.model_of(sae_folder, str(manifest["model"]), point, sae.d_out), point
        )
        maker = _Maker(dictionary, source, sae, logits)
        bulk = neuronpedia_bulk.Writer(staging / "exports", source)
        for number, start in enumerate(range(0, len(chosen), BATCH)):
            part = chosen[start : start + BATCH]
            records = dictionary.records(part, COLUMNS)
            made, shown = maker.features(records), maker.shown(records)
            batch = spliced(source.head(), features=in_list(map(_dashboard, made, shown)))
            write_atomic(staging / f"batch-{number}.json", to_bytes(batch))
            bulk.add(number, made, shown, maker.directions[part])
        write_json(staging / "run_settings.json", source.settings(BATCH))
        write_json(staging / "skipped_indexes.json", source.skipped(every, chosen))
        write_json(staging / foreign.PROVENANCE, facts)
    return [] if logits else [f"{point}: no matrix leads from it to the logits; they are empty"]


def _dashboard(made: dict[str, Any], shown: list[Shown]) -> str:
    """A feature as SAEDashboard's batches have it, as JSON."""
    return spliced(made, activations=in_list(own.dashboard() for own in shown))


class _Logits(NamedTuple):
    """The way from a decoder row to the logits, and the tokens' texts."""

    to_residual: Float[Tensor, "d_out d_model"] | None
    W_U: Float[Tensor, "d_model vocab"]
    pieces: TokenPieces

    def of(self, directions: Float[Tensor, "n d_out"]) -> Float[Tensor, "n vocab"]:
        """What each of the directions adds to the logits."""
        written = directions if self.to_residual is None else directions @ self.to_residual
        return written @ self.W_U


def _logits(lm: LanguageModel, point: Hookpoint) -> _Logits | None:
    """None where no matrix leads to the logits."""
    head, pieces = hooks.unembedding(lm.model), TokenPieces(lm.tokenizer)
    if head is None or point.site not in ("mlp_act", "mlp_out", "attn_out", *_RESIDUAL):
        return None
    W_U = head[0][:, : pieces.n_ids].float()
    if point.site != "mlp_act":
        return _Logits(None, W_U, pieces)
    weights = hooks.mlp_weights(lm.model, point.layer or 0)
    return None if weights is None else _Logits(weights.W_down.float().T, W_U, pieces)


_RESIDUAL = ("resid_pre", "resid_post")


@dataclass
class _Maker:
    """Turns records, examples and weights of some features into what SAEDashboard would write."""

    dictionary: FeatureDictionary
    source: Source
    sae: SparseAutoencoder
    logits: _Logits | None
    directions: Float[Tensor, "d_sae d_out"] = field(init=False)
    """The decoder rows at norm 1."""
    norms: list[float] = field(init=False)

    def __post_init__(self) -> None:
        W_dec = self.sae.W_dec.detach().float()
        norms = torch.linalg.vector_norm(W_dec, dim=-1)
        self.directions = W_dec / norms.clamp_min(1e-12)[:, None]
        self.norms = norms.tolist()
        self._text = lru_cache(TEXTS)(self._text_of)

    @torch.no_grad()
    def features(self, records: list[FeatureRecord]) -> list[dict[str, Any]]:
        """All but the activations of each."""
        chosen = [record.feature for record in records]
        rows = zip(records, self._of_weights(chosen), strict=True)
        return [
            {
                "feature_index": record.feature,
                **weights,
                **_company(record),
                **self._counts(record),
                **self.source.prompts(),
                "decoder_weights_dist": [],
                "vector": [],
            }
            for record, weights in rows
        ]

    def shown(self, records: list[FeatureRecord]) -> list[list[Shown]]:
        """The sequences of each."""
        examples: dict[int, list[Example]] = {record.feature: [] for record in records}
        for example in self.dictionary.examples(examples):
            examples[example.feature].append(example)
        return [list(self._shown(record, examples[record.feature])) for record in records]

    def _of_weights(self, chosen: list[int]) -> Iterator[dict[str, Any]]:
        """Logits, and the neurons a decoder row points to."""
        directions = self.directions[chosen]
        values, neurons = directions.topk(min(NEIGHBOURS, directions.shape[1]), dim=1)
        shares = values.abs() / directions.abs().sum(1, keepdim=True).clamp_min(1e-12)
        of_logits = self._of_logits(directions)
        for i in range(len(chosen)):
            yield {
                "neuron_alignment_indices": neurons[i].tolist(),
                "neuron_alignment_values": _rounded(values[i].tolist()),
                "neuron_alignment_l1": _rounded(shares[i].tolist()),
                **next(of_logits),
            }

    def _of_logits(self, directions: Float[Tensor, "n d_out"]) -> Iterator[dict[str, Any]]:
        """Tables of the tokens raised and lowered most, and a histogram over the vocabulary."""
        if self.logits is None:
            names = ("pos_str", "pos_values", "neg_str", "neg_values", *_BARS)
            yield from ({name: [] for name in names} for _ in directions)
            return
        logits, piece = self.logits.of(directions), self.logits.pieces.piece
        listed = min(LISTED, logits.shape[1])
        ends = [logits.topk(listed, dim=1, largest=largest) for largest in (True, False)]
        tables = [(end.values.tolist(), end.indices.tolist()) for end in ends]
        for i, own in enumerate(logits):
            found: dict[str, Any] = {}
            for name, (values, ids) in zip(("pos", "neg"), tables, strict=True):
                found[f"{name}_str"] = [piece(token) for token in ids[i]]
                found[f"{name}_values"] = _rounded(values[i])
            yield found | _histogram(own)

    def _counts(self, record: FeatureRecord) -> dict[str, Any]:
        """The share of all tokens it fires on, special ones counted too, and its histogram."""
        norm, histogram = self.norms[record.feature], record.histogram or Histogram([], [])
        edges = zip(histogram.edges, histogram.edges[1:], strict=False)
        return {
            "frac_nonzero": round(record.n_fired / self.source.tokens, PLACES),
            "freq_hist_data_bar_values": _rounded([(a + b) / 2 * norm for a, b in edges]),
            "freq_hist_data_bar_heights": [float(count) for count in histogram.counts],
        }

    def _shown(self, record: FeatureRecord, examples: list[Example]) -> Iterator[Shown]:
        """The 20 strongest tokens, then examples of five equal parts of (0, max]."""
        norm = self.norms[record.feature]
        top = Interval(-1, round(record.max * norm, PLACES), -1)
        for example, column in _strongest([e for e in examples if e.kind == "top"]):
            yield self._sequence(example, column, top)
        zeros = self.source.tokens - record.n_fired
        intervals = {}
        for low, high, count in record.intervals:
            share = (count + (zeros if low == 0 else 0)) / self.source.tokens
            edges = round(low * norm, PLACES), round(high * norm, PLACES)
            intervals[high] = Interval(*edges, round(share, PLACES))
        for example in examples:
            if example.kind == "interval":
                yield self._sequence(example, example.column, intervals[example.high])

    def _sequence(self, example: Example, column: int, interval: Interval) -> Shown:
        """The whole sequence but its first token, as SAEDashboard has it."""
        self.dictionary.check_example(example)
        n, norm = self.source.width - 1, self.norms[example.feature]
        pairs = zip(example.indices, example.values, strict=True)
        fired = [(index - 1, round(value * norm, PLACES)) for index, value in pairs if index]
        values = ["0.0"] * n
        for index, value in fired:
            values[index] = repr(value)
        best = max(fired, key=itemgetter(1), default=(0, 0.0))
        least = min(fired, key=itemgetter(1))[1] if len(fired) == n > 0 else 0.0
        tokens = self._text(example.row)
        return Shown(interval, tokens, in_list(values), column - 1, best, least)

    def _text_of(self, row: int) -> str:
        """The tokens of a sequence but the first, as JSON."""
        return to_json(self.dictionary.row(row)[1][1:])


def _histogram(logits: Float[Tensor, " vocab"]) -> dict[str, Any]:
    """Counts in equal bins between the least and the largest, and the bins' middles."""
    low, high = logits.min().item(), logits.max().item()
    if not high > low:
        return {name: [] for name in _BARS}
    edges = torch.linspace(low, high, BINS + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    bars = (torch.histc(logits, BINS).tolist(), _rounded(middles.tolist()))
    return dict(zip(_BARS, bars, strict=True))


def _strongest(examples: list[Example]) -> list[tuple[Example, int]]:
    """The 20 strongest tokens of some sequences: which, and the column."""
    by_row = {example.row: example for example in examples}
    marks = [
        (-value, row, column)
        for row, example in by_row.items()
        for column, value in zip(example.indices, example.values, strict=True)
    ]
    return [(by_row[row], column) for _, row, column in sorted(marks)[:TOP]]


def _company(record: FeatureRecord) -> dict[str, Any]:
    """What it fires with; SAEDashboard's second number, a cosine, is left out."""
    neurons = (record.correlated_neurons or [])[:NEIGHBOURS]
    features = (record.cofiring or [])[:NEIGHBOURS]
    return {
        "correlated_neurons_indices": [n.neuron for n in neurons],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": _rounded([n.value for n in neurons]),
        "correlated_features_indices": [f.feature for f in features],
        "correlated_features_l1": [],
        "correlated_features_pearson": _rounded([f.value for f in features]),
    }


def _rounded(values: list[float]) -> list[float]:
    return [round(value, PLACES) for value in values]
