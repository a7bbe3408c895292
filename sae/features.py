"""One streaming scan of text → the whole feature dictionary of one SAE or many.

The model reads the text once. Activations above 0 are set down on disk as they come, in blocks of
features; then each block is small enough to hold, and everything about a feature (statistics,
histogram, examples) is exact, because all the tokens on which it fires are at hand. Memory holds
one chunk of activations and one block at a time, never the [tokens d_sae] matrix: beside the
model's and the SAEs' own weights it takes at most `ScanSettings.memory`, 1 GB, whatever d_sae is,
128 MB of neurons for SAEs on neurons, and some 150 bytes for every scanned token.
scripts/measure_scan_memory.py measures it.
"""

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from safetensors.numpy import save_file
from torch import Tensor

from sae import hooks
from sae.activations import forward_passes, read
from sae.autoencoder import SparseAutoencoder, read_metadata
from sae.company import Cofiring, NeuronSample
from sae.data import TokenBatch
from sae.errors import DataError, ModelError
from sae.formats.card import write_card
from sae.geometry import effective_number
from sae.hooks import Hookpoint
from sae.memory import MicroBatch
from sae.plane import places
from sae.records import EXAMPLES_SCHEMA, FEATURES_SCHEMA, INTERVALS
from sae.routes import Route
from sae.store import WEIGHTS, sha256, staged
from sae.text import TokenPieces

BEFORE, AFTER = 10, 5
"""Tokens around the mark that are kept as text, and that make two examples duplicates."""
FEATURES_AT_ONCE = 64
"""Rows of the tables that are Python objects at a time, 100 to 200 kB each."""
COLUMNS_AT_ONCE = 4096
"""Columns of a matrix that is not fp32 that are converted at a time."""
TRY_CPU = "use --device cpu, or a machine with more memory"

_ADDED = frozenset({"mlp_act", "mlp_out", "attn_out"})
"""Sites whose vectors are added to the residual stream."""
_WRITING = _ADDED | {"resid_pre", "resid_post"}
"""Sites whose vectors reach the logits along it."""
_READING = frozenset({"mlp_in", "mlp_act", "resid_pre", "resid_post"})
"""Sites that the embedding reaches without passing an earlier nonlinearity."""


@dataclass(frozen=True)
class ScanSettings:
    """How much of each feature to keep, and how much memory to use."""

    top: int = 20
    per_interval: int = 5
    random: int = 5
    bins: int = 50
    listed: int = 10
    """Length of the lists of tokens, neurons and neighbours."""
    seed: int = 0
    memory: int = 10**9
    """Bytes for the scan, beside the weights of the model and the SAEs and the text itself.

    Less is slower. On a GPU the same again may be used on the device.
    """
    blocks: int = 64
    """Parts that the features are divided in while their activations lie on disk."""

    @property
    def chunk_bytes(self) -> int:
        """The largest matrix of activations or logits made at once.

        One that is all active has six times its size in (feature, token, value) entries, and
        sorting and copying those takes several times more.
        """
        return self.memory // 64


def scan(
    model: Any,
    tokenizer: Any,
    saes: Mapping[str, Path],
    batches: Iterable[TokenBatch],
    n_tokens: int,
    *,
    source: Mapping[str, Any],
    settings: ScanSettings | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Path]:
    """Read `n_tokens` kept tokens and write features/ into the folder of every SAE.

    `saes` maps name → folder that holds sae.safetensors; the name is the hookpoint where the folder
    says no other; `source` (model, revision, data fingerprint) joins the manifest; the model
    computes in `dtype`; `progress` hears the tokens of each batch. Returns name → features folder.
    Where memory runs out all the same, fewer rows,
    tokens or features are taken at a time, and a warning says so. Raises DataError without text,
    ModelError on activations that are not finite.
    """
    settings = settings or ScanSettings()
    with contextlib.ExitStack() as stack:
        spills = []
        for name, path in saes.items():
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".scan-", dir=path))
            sae = SparseAutoencoder.from_pretrained(path, device=model.device)
            route = Route.parse(name, read_metadata(path))
            spills.append(_Spill(Path(folder), route, sae, settings, len(saes)))
        batches = _upto(batches, n_tokens)
        text = _Text(_read(model, spills, batches, dtype, progress), TokenPieces(tokenizer))
        written = {}
        for (name, path), spill in zip(saes.items(), spills, strict=True):
            effects = _Effects(model, spill.route, spill.sae, text.pieces, settings)
            written[name] = _write(path, spill, effects, text, source, settings)
        return written


@torch.no_grad()
def prompt_features(
    model: Any, tokenizer: Any, sae: SparseAutoencoder, route: Route | str, text: str, k: int = 5
) -> list[tuple[str, list[tuple[int, float]]]]:
    """The `k` strongest features on each token of `text`: (piece, [(feature, activation), …]).

    `route`: what the SAE reads and rebuilds, or the hookpoint that is both. Special tokens have no
    features. Raises DataError for text longer than the model can read.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    special = set(tokenizer.all_special_ids)
    kept = [i not in special for i in ids]
    limit = getattr(model.config, "max_position_embeddings", None) or len(ids)
    if len(ids) > limit or not any(kept):
        raise DataError(f"the text has {len(ids)} tokens; the model reads 1 to {limit}")
    where = torch.arange(len(ids))[None]
    rows = TokenBatch(torch.tensor([ids]), where * 0, where, torch.tensor([kept]))
    route = Route.at(Hookpoint.parse(route)) if isinstance(route, str) else route
    with _evaluating(model):
        acts, _ = read(model, [*dict.fromkeys(route.inputs)], rows, torch.float32)
    x = route.x(acts).to(sae.dtype)
    most = _tokens_at_once(sae, ScanSettings())
    chunk = MicroBatch(f"the SAE of {route}", "tokens", TRY_CPU, most)
    count = min(k, sae.d_sae)
    tops = (top for _, top in chunk.split(len(x), lambda t: sae.encode(x[t]).float().topk(count)))
    strongest = (pair for v, f in tops for pair in zip(f.tolist(), v.tolist(), strict=True))
    found = []
    for piece, keep in zip(TokenPieces(tokenizer).pieces(ids), kept, strict=True):
        pairs = zip(*next(strongest), strict=True) if keep else ()
        found.append((piece, [(feature, act) for feature, act in pairs if act > 0]))
    return found


def _tokens_at_once(sae: SparseAutoencoder, settings: ScanSettings) -> int:
    return max(1, settings.chunk_bytes // (4 * sae.d_sae))


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Dropout off inside the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _upto(batches: Iterable[TokenBatch], n_tokens: int) -> Iterator[TokenBatch]:
    """The fewest first rows that hold `n_tokens` kept tokens, or all there are."""
    left = n_tokens
    for batch in batches:
        total = batch.kept.sum(1).cumsum(0)
        yield batch[: int((total < left).sum()) + 1]
        left -= int(total[-1])
        if left <= 0:
            return


@torch.no_grad()
def _read(
    model: Any,
    spills: "Sequence[_Spill]",
    batches: Iterable[TokenBatch],
    dtype: torch.dtype,
    progress: Callable[[int], None] | None,
) -> TokenBatch:
    """The streaming pass: every SAE's activations above 0 to its spill; returns the rows read."""
    rows: list[TokenBatch] = []
    first, passes = 0, forward_passes()
    points = list(dict.fromkeys(point for spill in spills for point in spill.route.inputs))
    with _evaluating(model):
        for batch in batches:
            acts, _ = read(model, points, batch, dtype, passes)
            numbers = first + batch.kept.flatten().nonzero().squeeze(1)
            for spill in spills:
                spill.add(spill.route.x(acts), numbers)
            rows.append(replace(batch, latents=None))
            first += batch.tokens.numel()
            if progress is not None:
                progress(len(numbers))
    if not any(batch.kept.any() for batch in rows):
        raise DataError("there is no text to scan: the source gave no tokens")
    return TokenBatch.join(rows)


class _Spill:
    """Activations above 0 on disk: a file for each block of features, tokens in order."""

    ENTRY = np.dtype([("feature", "<i4"), ("token", "<i8"), ("value", "<f4")])

    def __init__(
        self,
        folder: Path,
        route: Route,
        sae: SparseAutoencoder,
        settings: ScanSettings,
        shares: int,
    ) -> None:
        """`shares`: spills that are filled at the same time."""
        self.folder, self.route, self.sae = folder, route, sae
        most = _tokens_at_once(sae, settings)
        self.chunk = MicroBatch(f"the SAE of {route}", "tokens", TRY_CPU, most)
        self.entries_at_once = max(1, settings.memory // 16 // self.ENTRY.itemsize)
        self._waiting: list[ndarray] = []
        self._most_waiting = settings.chunk_bytes // shares // self.ENTRY.itemsize
        self.width = -(-sae.d_sae // settings.blocks)
        starts = range(0, sae.d_sae, self.width)
        self.blocks = [(a, min(a + self.width, sae.d_sae)) for a in starts]
        self.cofiring = Cofiring(folder / "fired", sae.d_sae)
        at_neurons = [point.site for point in route.inputs] == ["mlp_act"]
        self.neurons = NeuronSample(sae.d_in, shares) if at_neurons else None

    def add(self, x: Float[Tensor, "n d_in"], numbers: Int[Tensor, " n"]) -> None:
        """Encode and set down; `numbers` are the tokens' places in the scan, ascending."""
        for part, entries in self.chunk.split(len(x), lambda t: self._entries(x[t], numbers[t])):
            self._append(entries)
            self.cofiring.add(entries["feature"], entries["token"], numbers[part].numpy())
        if self.neurons is not None:
            self.neurons.add(numbers.numpy(), lambda kept: x[kept].float().cpu().numpy())

    def _entries(self, x: Float[Tensor, "n d_in"], numbers: Int[Tensor, " n"]) -> ndarray:
        """What fires, token after token."""
        acts = self.sae.encode(x.to(self.sae.dtype)).float()
        if not acts.sum().isfinite():
            raise ModelError(
                f"{self.route}: the activations are not finite; "
                "load the model with --model.dtype float32"
            )
        token, feature = (acts > 0).nonzero(as_tuple=True)
        entries = np.empty(len(feature), self.ENTRY)
        entries["feature"] = feature.cpu().numpy()
        entries["token"] = numbers[token.cpu()].numpy()
        entries["value"] = acts[token, feature].cpu().numpy()
        return entries

    def _append(self, entries: ndarray) -> None:
        """Set down what fires, many firings at a time, as there are as many files as blocks."""
        self._waiting.append(entries)
        if sum(map(len, self._waiting)) > self._most_waiting:
            self._set_down()

    def _set_down(self) -> None:
        """Write what waits, each block's behind what its file has."""
        entries, self._waiting = np.concatenate([np.empty(0, self.ENTRY), *self._waiting]), []
        blocks = entries["feature"] // self.width
        entries = entries[_order(blocks, len(self.blocks))]
        cuts = np.cumsum([0, *np.bincount(blocks)])
        for block, (a, b) in enumerate(itertools.pairwise(cuts)):
            if b > a:
                with (self.folder / str(block)).open("ab") as file:
                    file.write(entries[a:b].data)  # tofile does not say that a disk is full

    def firings(self, block: int) -> "Iterator[tuple[int, _Firings]]":
        """Every feature of a block, those that never fire too, with all its activations."""
        self._set_down()
        for start, stop in self._affordable(*self.blocks[block]):
            entries = self._load(block, start, stop)
            entries = entries[_order(entries["feature"] - start, stop - start)]
            cuts = np.searchsorted(entries["feature"], range(start, stop + 1))
            for feature in range(start, stop):
                own = entries[cuts[feature - start] : cuts[feature - start + 1]]
                yield feature, _Firings(own["token"].copy(), own["value"].copy())

    def company(self, feature: int, firings: "_Firings", listed: int) -> dict[str, Any]:
        """The columns of what fires with a feature."""
        found = {"cofiring": _paired("feature", self.cofiring.of(feature, firings.token, listed))}
        if self.neurons is not None:
            correlated = self.neurons.of(firings.token, firings.value, listed)
            found["correlated_neurons"] = _paired("neuron", correlated)
        return found

    def _affordable(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Features `start` to `stop` in runs of few enough entries: one, unless they are dense."""
        first, held, fired = start, 0, self.cofiring.fired
        for feature in range(start, stop):
            if held and held + fired[feature] > self.entries_at_once:
                yield first, feature
                first, held = feature, 0
            held += fired[feature]
        yield first, stop

    def _load(self, block: int, start: int, stop: int) -> ndarray:
        """The entries of features `start` to `stop` from their block's file."""
        file, parts = self.folder / str(block), [np.empty(0, self.ENTRY)]
        if not file.exists():
            return parts[0]
        with file.open("rb") as opened:
            while len(part := np.fromfile(opened, self.ENTRY, self.entries_at_once)):
                inside = (part["feature"] >= start) & (part["feature"] < stop)
                parts.append(part if inside.all() else part[inside])
        return parts[1] if len(parts) == 2 else np.concatenate(parts)


def _order(numbers: ndarray, below: int) -> ndarray:
    """The stable order of numbers from 0 to `below`; of at most 16 bits numpy sorts by radix."""
    return np.argsort(numbers.astype(np.min_scalar_type(below)), kind="stable")


class _Text:
    """The scanned tokens, their text, and a hash of each one's surroundings."""

    def __init__(self, rows: TokenBatch, pieces: TokenPieces) -> None:
        self.pieces = pieces
        self.ids = rows.tokens.numpy().astype(np.int32)
        self.document = rows.document.numpy().astype(np.int64)
        self.position = rows.position.numpy().astype(np.int32)
        self.kept = rows.kept.numpy()
        self.width = self.ids.shape[1]
        self.n_tokens = int(self.kept.sum())
        parts = [p.encode() for row in self.ids.tolist() for p in pieces.pieces(row)]
        self.offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        self.bytes = b"".join(parts)
        self.around = _window_hashes(self.ids).ravel()

    def between(self, start: ndarray, stop: ndarray) -> list[str]:
        """The text of tokens `start` to `stop` of the scan, for each pair."""
        cuts = zip(self.offsets[start].tolist(), self.offsets[stop].tolist(), strict=True)
        return [self.bytes[a:b].decode() for a, b in cuts]

    def save(self, file: Path) -> None:
        """Write tokens.safetensors: what examples refer to by row and column."""
        columns = {
            "tokens": self.ids,
            "document": self.document,
            "position": self.position,
            "kept": self.kept,
            "piece_bytes": np.frombuffer(self.bytes, np.uint8),
            "piece_offsets": self.offsets,
        }
        save_file({name: np.ascontiguousarray(column) for name, column in columns.items()}, file)


def _window_hashes(ids: ndarray) -> ndarray:
    """A 64-bit hash of the tokens from BEFORE to AFTER of each token, [rows context]."""
    width = ids.shape[1]
    padded = np.pad(ids.astype(np.uint64) + np.uint64(1), ((0, 0), (BEFORE, AFTER)))
    factors = np.random.default_rng(0).integers(1, 2**63, BEFORE + AFTER + 1, dtype=np.uint64)
    total = np.zeros(ids.shape, np.uint64)
    for offset, factor in enumerate(factors | np.uint64(1)):
        total += padded[:, offset : offset + width] * factor  # wraps around, as a hash may
    return total


@dataclass(frozen=True)
class _Firings:
    """All tokens on which one feature fires, in the order of the scan, with the activations."""

    token: ndarray
    value: ndarray

    def edges(self, bins: int) -> ndarray:
        """Edges of equal bins of (0, max], the last exactly the stored maximum."""
        edges = np.linspace(0, self.value.max(), bins + 1).astype(np.float32)
        edges[-1] = self.value.max()
        return edges

    def _strongest(self) -> Iterator[int]:
        """The firings by activation, largest first, the first of equal ones first.

        A few are sorted at a time, as mostly only the first ones are looked at.
        """
        most, done = 256, 0
        while done < len(self.value):
            least = np.partition(self.value, -most)[-most] if most < len(self.value) else 0
            among = np.flatnonzero(self.value >= least)
            order = among[np.argsort(-self.value[among], kind="stable")]
            yield from order[done:].tolist()
            most, done = 4 * most, len(order)

    def statistics(self, text: _Text, settings: ScanSettings) -> dict[str, Any]:
        """The columns of features.parquet that come from activations."""
        n = len(self.value)
        found = {"density": n / text.n_tokens, "n_fired": n, "max": 0.0, "top_tokens": []}
        if not n:
            return found
        edges = self.edges(settings.bins)
        counts = np.bincount(_bin(self.value, edges), minlength=settings.bins)
        ids, mass = _summed(text.ids.ravel()[self.token], self.value)
        best = np.argsort(-mass, kind="stable")[: settings.listed]
        share = mass[best] / mass.sum()
        return found | {
            "max": float(self.value.max()),
            "mean": float(self.value.mean(dtype=np.float64)),
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
            "top_tokens": _token_values(text.pieces, ids[best], share),
        }

    def examples(
        self, text: _Text, settings: ScanSettings, random: np.random.Generator
    ) -> "Iterator[_Pick]":
        """Top, interval and random examples, each kind by rank."""
        if not len(self.value):
            return
        row, window = self.token // text.width, text.around[self.token]
        for rank, i in enumerate(_distinct(self._strongest(), row, window, settings.top)):
            yield _Pick("top", rank, i, duplicates=_duplicates(i, row, window))
        edges = self.edges(settings.bins)[:: settings.bins // INTERVALS]
        shuffled = random.permutation(len(self.value))
        interval = _bin(self.value, edges)[shuffled]
        rank = 0
        for j in reversed(range(INTERVALS)):  # the strongest interval first
            members = shuffled[interval == j]
            for i in _distinct(members, row, window, settings.per_interval):
                yield _Pick("interval", rank, i, float(edges[j]), float(edges[j + 1]))
                rank += 1
        drawn = random.permutation(len(self.value))[: settings.random]
        for rank, i in enumerate(drawn.tolist()):
            yield _Pick("random", rank, i)


def _summed(ids: ndarray, values: ndarray) -> tuple[ndarray, ndarray]:
    """Which ids there are, ascending, and the sum of the values of each."""
    if len(ids) * 8 < ids.max():
        found, where = np.unique(ids, return_inverse=True)
        return found, np.bincount(where, values)
    found = np.bincount(ids).nonzero()[0]
    return found, np.bincount(ids, values)[found]


def _distinct(order: Iterable[int], row: ndarray, window: ndarray, wanted: int) -> list[int]:
    """The first of `order`, at most one in a sequence and one of several identical windows."""
    rows, windows, found = set(), set(), []
    for i in map(int, order):  # few are looked at, so the order does not become a list
        if len(found) == wanted:
            break
        if row[i] not in rows and window[i] not in windows:
            rows.add(row[i])
            windows.add(window[i])
            found.append(i)
    return found


def _duplicates(i: int, row: ndarray, window: ndarray) -> int:
    """Other sequences in which the feature fires amid the same tokens; `row` ascends."""
    same = row[window == window[i]]
    return int(np.count_nonzero(same[1:] != same[:-1]))


@dataclass(frozen=True)
class _Pick:
    """A chosen example: the index into the feature's firings, and what it stands for."""

    kind: str
    rank: int
    index: int
    low: float | None = None
    high: float | None = None
    duplicates: int = 0


_PICKED = ("kind", "rank", "low", "high", "duplicates")
"""Columns of examples.parquet that a pick says itself."""


def _bin(values: ndarray, edges: ndarray) -> ndarray:
    """The bin i of each value, edges[i] < value <= edges[i + 1]; exact, no arithmetic on values."""
    return np.searchsorted(edges, values, side="left") - 1


def _token_values(pieces: TokenPieces, ids: Any, values: Any) -> list[dict[str, Any]]:
    pairs = zip(np.asarray(ids).tolist(), np.asarray(values).tolist(), strict=True)
    return [{"token": i, "piece": pieces.piece(i), "value": value} for i, value in pairs]


class _Effects:
    """What weights alone say of a feature: tokens it writes and reads, neurons, neighbours.

    writes = W_dec · [W_down at mlp_act] · diag(final norm gain) · W_U, vocabulary mean removed;
    reads = W_E · [diag(norm gain) at mlp_in, mlp_act] · [W_up at mlp_act] · W_enc. Both leave out
    what depends on the input: the norms' scales, attention and the other layers. Several hookpoints
    are read together, and written to together where each adds to the residual stream.
    """

    def __init__(
        self,
        model: Any,
        route: Route,
        sae: SparseAutoencoder,
        pieces: TokenPieces,
        settings: ScanSettings,
    ) -> None:
        self.pieces, self.settings = pieces, settings
        self.W_enc, self.W_dec = sae.W_enc.detach(), sae.W_dec.detach()
        self.norms = torch.linalg.vector_norm(self.W_dec, dim=1, dtype=torch.float32)
        self.norms.clamp_min_(1e-12)  # a feature without a direction has cosine 0 with all
        self.at_neurons = [point.site for point in route.targets] == ["mlp_act"]
        self.writer = _writer(model, route.targets, pieces.n_ids)
        self.reader = _reader(model, route.inputs, pieces.n_ids)
        widths = [len(self.W_dec), *(pieces.n_ids for m in (self.writer, self.reader) if m)]
        most = min(FEATURES_AT_ONCE, max(1, settings.chunk_bytes // (4 * max(widths))))
        self.chunk = MicroBatch("what features write and read", "features", TRY_CPU, most)

    @torch.no_grad()
    def columns(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The weight columns of features.parquet for features `start` to `stop`, one by one."""

        def look(part: slice) -> dict[str, list[Any]]:
            part = slice(start + part.start, start + part.stop)
            columns = self._writes(part) | self._reads(part) | self._neurons(part)
            return columns | {"neighbours": self._neighbours(part)}

        for part, columns in self.chunk.split(stop - start, look):
            for i in range(part.stop - part.start):
                yield {name: column[i] for name, column in columns.items()}

    def _writes(self, part: slice) -> dict[str, list[Any]]:
        if self.writer is None:
            return {}
        to_norm, W_U, mean = self.writer
        written = self.W_dec[part].float() @ to_norm
        logits = _product(written, W_U).sub_((written @ mean)[:, None])
        return {
            "writes": self._strongest(logits),
            "suppresses": self._strongest(logits, largest=False),
            "logit_histogram": _histograms(logits, self.settings.bins),
        }

    def _reads(self, part: slice) -> dict[str, list[Any]]:
        if self.reader is None:
            return {}
        W_E, to_site = self.reader
        return {
            "reads": self._strongest(_product((to_site @ self.W_enc[:, part].float()).T, W_E.T))
        }

    def _neurons(self, part: slice) -> dict[str, list[Any]]:
        """Participation is None for a feature without a decoder direction."""
        if not self.at_neurons:
            return {}
        weights = self.W_dec[part].float()
        order = weights.abs().topk(min(self.settings.listed, weights.shape[1]), dim=1).indices
        effective = effective_number(weights)
        neurons = zip(order.tolist(), weights.gather(1, order).tolist(), strict=True)
        return {
            "neurons": [_pairs("neuron", ids, values) for ids, values in neurons],
            "participation": [x if np.isfinite(x) else None for x in effective.tolist()],
        }

    def _neighbours(self, part: slice) -> list[Any]:
        directions = self.W_dec[part].float() / self.norms[part, None]
        cosines = _product(directions, self.W_dec.T).div_(self.norms)
        own = torch.arange(part.start, part.stop, device=cosines.device)
        cosines[own - part.start, own] = -torch.inf
        values, features = cosines.topk(min(self.settings.listed, len(self.W_dec) - 1), dim=1)
        found = zip(features.tolist(), values.tolist(), strict=True)
        return [_pairs("feature", ids, cosines) for ids, cosines in found]

    def _strongest(self, scores: Float[Tensor, "n vocab"], largest: bool = True) -> list[Any]:
        listed = min(self.settings.listed, scores.shape[1])
        values, ids = scores.topk(listed, dim=1, largest=largest)
        rows = zip(ids.tolist(), values.tolist(), strict=True)
        return [_token_values(self.pieces, *row) for row in rows]


def _product(rows: Float[Tensor, "n d"], matrix: Tensor) -> Float[Tensor, "n m"]:
    """rows @ matrix in fp32; a matrix of another type is converted a few columns at a time."""
    if matrix.dtype == torch.float32:
        return rows @ matrix
    found = rows.new_empty(len(rows), matrix.shape[1])
    parts = (tensor.split(COLUMNS_AT_ONCE, dim=1) for tensor in (matrix, found))
    for columns, out in zip(*parts, strict=True):
        out.copy_(rows @ columns.float())
    return found


def _pairs(name: str, ids: list[int], values: list[float]) -> list[dict[str, Any]]:
    return _paired(name, zip(ids, values, strict=True))


def _paired(name: str, pairs: Iterable[tuple[int, float]]) -> list[dict[str, Any]]:
    return [{name: i, "value": value} for i, value in pairs]


def _histograms(scores: Float[Tensor, "n vocab"], bins: int) -> list[dict[str, Any] | None]:
    """A histogram of every row between its least and greatest value; None where all are equal."""
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    edges = low + (high - low) * torch.linspace(0, 1, bins + 1, device=scores.device)
    edges[:, -1:] = high
    where = (torch.searchsorted(edges, scores.contiguous()) - 1).clamp_min(0)
    counts = torch.zeros(len(scores), bins, dtype=torch.long, device=scores.device)
    counts.scatter_add_(1, where, where.new_ones(()).expand_as(where))
    rows = zip(edges.tolist(), counts.tolist(), (high > low).flatten().tolist(), strict=True)
    return [{"edges": e, "counts": c} if spread else None for e, c, spread in rows]


def _writer(
    model: Any, points: Sequence[Hookpoint], n_vocab: int
) -> tuple[Float[Tensor, "d_out d_model"], Tensor, Float[Tensor, " d_model"]] | None:
    """Decoder space → final norm, its gain applied; W_U; W_U's mean. None where nothing leads."""
    head = hooks.unembedding(model)
    leading = _WRITING if len(points) == 1 else _ADDED
    if head is None or any(point.site not in leading for point in points):
        return None
    W_U, gain = head
    W_U, gain = W_U[:, :n_vocab], gain.to(W_U.device)
    ways = [way for point in points if (way := _to_norm(model, point, gain)) is not None]
    if len(ways) < len(points):
        return None
    return torch.cat(ways), W_U, W_U.mean(1, dtype=torch.float32)


def _to_norm(
    model: Any, point: Hookpoint, gain: Float[Tensor, " d_model"]
) -> Float[Tensor, "d d_model"] | None:
    """What is added at a hookpoint → final norm, its gain applied."""
    if point.site != "mlp_act":
        return torch.diag(gain)
    weights = hooks.mlp_weights(model, point.layer or 0)
    if weights is None:
        return None
    to_residual = weights.W_down.float().T
    if weights.post_gain is not None:
        to_residual = to_residual * weights.post_gain.to(to_residual)
    return to_residual * gain


def _reader(
    model: Any, points: Sequence[Hookpoint], n_vocab: int
) -> tuple[Float[Tensor, "vocab d_model"], Float[Tensor, "d_model d_in"]] | None:
    """Embeddings → what the encoder reads; None where no matrix leads there."""
    W_E = hooks.embedding(model)
    if W_E is None or any(point.site not in _READING for point in points):
        return None
    W_E = W_E[:n_vocab]
    ways = [way for point in points if (way := _from_embedding(model, point, W_E)) is not None]
    return (W_E, torch.cat(ways, dim=1)) if len(ways) == len(points) else None


def _from_embedding(
    model: Any, point: Hookpoint, W_E: Float[Tensor, "vocab d_model"]
) -> Float[Tensor, "d_model d"] | None:
    """The residual stream → what lies at a hookpoint."""
    to_site = torch.eye(W_E.shape[1], device=W_E.device)
    if point.site in ("resid_pre", "resid_post"):
        return to_site
    gain = hooks.mlp_norm_gain(model, point.layer or 0)
    if gain is not None:
        to_site = to_site * gain.to(to_site)
    if point.site == "mlp_in":
        return to_site
    weights = hooks.mlp_weights(model, point.layer or 0)
    return None if weights is None else to_site @ weights.W_up.float().T


def _write(
    sae_folder: Path,
    spill: _Spill,
    effects: _Effects,
    text: _Text,
    source: Mapping[str, Any],
    settings: ScanSettings,
) -> Path:
    """One SAE's features folder: both tables, the tokens, the card, the manifest."""
    xy, how = places(_Directions(effects), settings.chunk_bytes)
    manifest = {
        **source,
        "hookpoint": str(spill.route),
        "sae_sha256": sha256(sae_folder / WEIGHTS),
        "d_sae": spill.sae.d_sae,
        "tokens": text.n_tokens,
        "sequences": len(text.ids),
        "map": how,
        **{name: getattr(settings, name) for name in ("seed", "top", "per_interval", "random")},
    }
    with staged(sae_folder / "features", extra=manifest, overwrite=True) as folder:
        _write_tables(folder, spill, effects, xy, text, settings)
        text.save(folder / "tokens.safetensors")
        write_card(folder, "parquet", manifest)
    return sae_folder / "features"


def _write_tables(
    folder: Path,
    spill: _Spill,
    effects: _Effects,
    xy: Float[ndarray, "d_sae 2"],
    text: _Text,
    settings: ScanSettings,
) -> None:
    """Few features at a time: statistics and weights to features.parquet, picks to examples.

    A row group is at most a block of features, and at most some megabytes.
    """
    most = settings.memory // 256
    with (
        _TableFile(folder / "features.parquet", FEATURES_SCHEMA, most) as features,
        _TableFile(folder / "examples.parquet", EXAMPLES_SCHEMA, most) as examples,
    ):
        for block, (start, stop) in enumerate(spill.blocks):
            weights = effects.columns(start, stop)
            rows, picks = [], _Examples(text)
            for (feature, firings), row in zip(spill.firings(block), weights, strict=True):
                row |= firings.statistics(text, settings)
                row |= spill.company(feature, firings, settings.listed)
                rows.append(row | {"feature": feature, "map_xy": xy[feature].tolist()})
                random = np.random.default_rng([settings.seed, feature])
                picks.add(feature, firings, [*firings.examples(text, settings, random)])
                if len(rows) == FEATURES_AT_ONCE or feature == stop - 1:
                    features.add(pa.Table.from_pylist(rows, FEATURES_SCHEMA))
                    examples.add(picks.table())
                    rows, picks = [], _Examples(text)
            features.flush()
            examples.flush()


class _Directions:
    """The decoder directions, each of norm 1, some at a time: rows for the map."""

    def __init__(self, effects: _Effects) -> None:
        self._effects = effects

    def __len__(self) -> int:
        return len(self._effects.W_dec)

    def __getitem__(self, which: ndarray) -> Float[ndarray, "m d_out"]:
        rows = self._effects.W_dec[which].float() / self._effects.norms[which, None]
        return rows.cpu().numpy()


class _TableFile:
    """A Parquet file that gathers tables into row groups of at most about `most` bytes."""

    def __init__(self, file: Path, schema: pa.Schema, most: int) -> None:
        self._writer, self._most = pq.ParquetWriter(file, schema), most
        self._tables: list[pa.Table] = []

    def __enter__(self) -> "_TableFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def add(self, table: pa.Table) -> None:
        """Keep it for the row group; write that once it is large."""
        self._tables.append(table)
        if sum(table.nbytes for table in self._tables) >= self._most:
            self.flush()

    def flush(self) -> None:
        """End the row group."""
        if self._tables:
            self._writer.write_table(pa.concat_tables(self._tables))
        self._tables = []


class _Examples:
    """Chosen examples, gathered column by column."""

    def __init__(self, text: _Text) -> None:
        self.text = text
        self.columns: dict[str, list[Any]] = {name: [] for name in EXAMPLES_SCHEMA.names}

    def add(self, feature: int, firings: _Firings, picks: Sequence[_Pick]) -> None:
        """The examples of a feature, each with its activations over the whole of its sequence."""
        text, index = self.text, np.array([pick.index for pick in picks], np.int64)
        at = firings.token[index]
        row, column = np.divmod(at, text.width)
        begin, end = row * text.width, (row + 1) * text.width
        cuts = (np.searchsorted(firings.token, edge).tolist() for edge in (begin, end))
        own = [slice(*cut) for cut in zip(*cuts, strict=True)]
        placed = zip(own, begin.tolist(), strict=True)
        columns = {
            "feature": [feature] * len(picks),
            **{name: [getattr(pick, name) for pick in picks] for name in _PICKED},
            "document": text.document[row, column].tolist(),
            "position": text.position[row, column].tolist(),
            "row": row.tolist(),
            "column": column.tolist(),
            "peak": firings.value[index].tolist(),
            "before": text.between(np.maximum(begin, at - BEFORE), at),
            "token": text.between(at, at + 1),
            "after": text.between(at + 1, np.minimum(end, at + 1 + AFTER)),
            "indices": [(firings.token[part] - start).astype(np.int32) for part, start in placed],
            "values": [firings.value[part] for part in own],
        }
        for name, values in columns.items():
            self.columns[name] += values

    def table(self) -> pa.Table:
        """The rows of examples.parquet."""
        arrays = [pa.array(self.columns[f.name], f.type) for f in EXAMPLES_SCHEMA]
        return pa.Table.from_arrays(arrays, schema=EXAMPLES_SCHEMA)
