"""Neuronpedia: batch-0.json, batch-1.json, … as SAEDashboard writes them, and under exports/ the
files of Neuronpedia's bulk import. Both are made from the feature dictionary.

As in SAEDashboard, decoder rows are scaled to norm 1, so activations are ours times ‖W_dec‖, and
logits are W_dec · [W_down at mlp_act] · W_U, without the final norm's gain. Its 20 strongest tokens
come here from the sequences that the dictionary keeps, of which none repeats another's text around
the mark. Its histogram of activations starts at the smallest, ours at 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae import hooks
from sae.autoencoder import SparseAutoencoder
from sae.formats import foreign, neuronpedia_bulk
from sae.formats.foreign import Notes
from sae.formats.neuronpedia_bulk import Source
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


def write(sae_folder: Path, out: Path, features: list[int] | None = None) -> Notes:
    """Write the batches and the files of the bulk import to the new folder `out`.

    Loads the language model for the logits. Raises RunError without a feature dictionary,
    FormatError for a hookpoint that belongs to no layer, ModelError without the model.
    """
    folder = features_folder(sae_folder)
    dictionary, manifest = FeatureDictionary(folder), read_manifest(folder)
    every = list(range(len(dictionary)))
    chosen = every if features is None else check_features(features, len(every))
    point = Hookpoint.parse(str(manifest["hookpoint"]))
    if point.layer is None:
        raise foreign.refuse("neuronpedia", f"{point}, which has no layer", "use --format parquet")
    sae = SparseAutoencoder.from_pretrained(sae_folder)
    sequences, width = read_header(folder / TOKENS)["tokens"].shape
    source = Source.of(point, sae.sparsity.kind, manifest, (sequences, width))
    facts = provenance(manifest, features)
    with staged(out, extra=facts) as staging:
        logits = _logits(
            foreign.model_of(sae_folder, str(manifest["model"]), point, sae.d_out), point
        )
        maker = _Maker(dictionary, source, sae, logits)
        bulk = neuronpedia_bulk.Writer(staging / "exports", source)
        for number, start in enumerate(range(0, len(chosen), BATCH)):
            part = chosen[start : start + BATCH]
            made = maker.features(part)
            batch = neuronpedia_bulk.to_json({**source.head(), "features": made})
            write_atomic(staging / f"batch-{number}.json", batch)
            bulk.add(number, made, maker.directions[part])
        write_json(staging / "run_settings.json", source.settings(BATCH))
        write_json(staging / "skipped_indexes.json", source.skipped(every, chosen))
        write_json(staging / foreign.PROVENANCE, facts)
    return [] if logits else [f"{point}: no matrix leads from it to the logits; they are empty"]


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
    _texts: dict[int, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        W_dec = self.sae.W_dec.detach().float()
        norms = torch.linalg.vector_norm(W_dec, dim=-1)
        self.directions = W_dec / norms.clamp_min(1e-12)[:, None]
        self.norms = norms.tolist()

    @torch.no_grad()
    def features(self, chosen: list[int]) -> list[dict[str, Any]]:
        """One object for each."""
        examples: dict[int, list[Example]] = {feature: [] for feature in chosen}
        for example in self.dictionary.examples(chosen):
            examples[example.feature].append(example)
        self._texts.clear()
        rows = zip(self.dictionary.records(chosen), self._of_weights(chosen), strict=True)
        return [
            {
                "feature_index": record.feature,
                **weights,
                **_company(record),
                **self._counts(record),
                **self.source.prompts(),
                "decoder_weights_dist": [],
                "vector": [],
                "activations": list(self._activations(record, examples[record.feature])),
            }
            for record, weights in rows
        ]

    def _of_weights(self, chosen: list[int]) -> Iterator[dict[str, Any]]:
        """Logits, and the neurons a decoder row points to."""
        directions = self.directions[chosen]
        values, neurons = directions.topk(min(NEIGHBOURS, directions.shape[1]), dim=1)
        shares = values.abs() / directions.abs().sum(1, keepdim=True).clamp_min(1e-12)
        logits = None if self.logits is None else self.logits.of(directions)
        for i in range(len(chosen)):
            yield {
                "neuron_alignment_indices": neurons[i].tolist(),
                "neuron_alignment_values": _rounded(values[i].tolist()),
                "neuron_alignment_l1": _rounded(shares[i].tolist()),
                **self._of_logits(None if logits is None else logits[i]),
            }

    def _of_logits(self, logits: Float[Tensor, " vocab"] | None) -> dict[str, Any]:
        """Tables of the tokens raised and lowered most, and a histogram over the vocabulary."""
        found: dict[str, Any] = {}
        for name, largest in (("pos", True), ("neg", False)):
            found |= {f"{name}_str": [], f"{name}_values": []}
            if logits is not None and self.logits is not None:
                values, ids = logits.topk(min(LISTED, len(logits)), largest=largest)
                texts = [self.logits.pieces.piece(i) for i in ids.tolist()]
                found |= {f"{name}_str": texts, f"{name}_values": _rounded(values.tolist())}
        names = ("logits_hist_data_bar_heights", "logits_hist_data_bar_values")
        if logits is None or not logits.max() > logits.min():
            return found | {name: [] for name in names}
        edges = torch.linspace(logits.min().item(), logits.max().item(), BINS + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        bars = (torch.histc(logits, BINS).tolist(), _rounded(middles.tolist()))
        return found | dict(zip(names, bars, strict=True))

    def _counts(self, record: FeatureRecord) -> dict[str, Any]:
        """The share of all tokens it fires on, special ones counted too, and its histogram."""
        norm, histogram = self.norms[record.feature], record.histogram or Histogram([], [])
        edges = zip(histogram.edges, histogram.edges[1:], strict=False)
        return {
            "frac_nonzero": round(record.n_fired / self.source.tokens, PLACES),
            "freq_hist_data_bar_values": _rounded([(a + b) / 2 * norm for a, b in edges]),
            "freq_hist_data_bar_heights": [float(count) for count in histogram.counts],
        }

    def _activations(
        self, record: FeatureRecord, examples: list[Example]
    ) -> Iterator[dict[str, Any]]:
        """The 20 strongest tokens, then examples of five equal parts of (0, max]."""
        norm = self.norms[record.feature]
        top = {"bin_min": -1, "bin_max": round(record.max * norm, PLACES), "bin_contains": -1}
        for example, column in _strongest([e for e in examples if e.kind == "top"]):
            yield top | self._sequence(example, column)
        zeros = self.source.tokens - record.n_fired
        shares = {}
        for low, high, count in record.intervals:
            share = (count + (zeros if low == 0 else 0)) / self.source.tokens
            shares[high] = {
                "bin_min": round(low * norm, PLACES),
                "bin_max": round(high * norm, PLACES),
                "bin_contains": round(share, PLACES),
            }
        for example in examples:
            if example.kind == "interval":
                yield shares[example.high] | self._sequence(example, example.column)

    def _sequence(self, example: Example, column: int) -> dict[str, Any]:
        """The whole sequence but its first token, as SAEDashboard has it."""
        if example.row not in self._texts:
            self._texts[example.row] = self.dictionary.context(example).pieces
        texts = self._texts[example.row]
        values, norm = [0.0] * len(texts), self.norms[example.feature]
        for index, value in zip(example.indices, example.values, strict=True):
            values[index] = round(value * norm, PLACES)
        return {"tokens": texts[1:], "values": values[1:], "qualifying_token_index": column - 1}


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
