"""How good autoencoders are on unseen text: FVU, L0, dead features, cross-entropy recovered.

The text is kept as token ids and read through the model up to three times: for the mean at each
hookpoint, for the autoencoders, and for the baseline of the k largest neurons. Everything is summed
by sequence in fp64; the standard errors resample the sequences. docs/metrics.md has the formulas.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from sae.autoencoder import SparseAutoencoder
from sae.data import TokenBatch
from sae.errors import DataError, HookpointError
from sae.hooks import Hookpoint, capture, masked, replace, resolve, width
from sae.language_model import predicts
from sae.memory import MicroBatch
from sae.routes import Route

RESAMPLES = 200
DENSE = 0.1
"""A feature active on a larger share of the tokens is dense."""
BINS_PER_DECADE = 4
ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Numbers of one kind (logits and activations, features) in memory at a time.

On the CPU 1 << 24 peaks at 670 MiB in all, 1 << 22 at 560 MiB, of which the imports take most
(60k tokens, 4 layers of width 128, 4,096 features).
"""

Swap = Mapping[Hookpoint, Callable[[Float[Tensor, "n d"]], Tensor]]
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


# ----------------------------------------------------------------------------------- the results


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error; None where it is undefined or was not estimated."""

    value: float | None
    se: float | None = None


@dataclass(frozen=True)
class CrossEntropy:
    """Nats per predicted token: of the model as it is, and with the activation replaced.

    `recovered_mean`, `recovered_zero`: (ablated − sae) / (ablated − model), 1 is perfect.
    """

    model: Estimate
    sae: Estimate
    mean_ablated: Estimate
    zero_ablated: Estimate
    recovered_mean: Estimate
    recovered_zero: Estimate


@dataclass(frozen=True)
class NeuronBaseline:
    """What the `k` largest neurons of each token keep, the others set to their mean."""

    k: int
    fvu: Estimate
    ce_recovered_mean: Estimate | None


@dataclass(frozen=True)
class Density:
    """Number of features in each bin of log10(share of tokens on which the feature is active).

    `log10_edges` has one more entry than `counts`; features that never fired are in no bin.
    """

    log10_edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class SiteEvaluation:
    """One of several hookpoints that a map writes to, the others left as the model has them."""

    hookpoint: str
    fvu: Estimate
    cross_entropy: CrossEntropy | None


@dataclass(frozen=True)
class Evaluation:
    """One autoencoder on held-out text; `dead` and `dense` are shares of its features.

    Of a map FVU is that of its targets, and cross-entropy that with all of them replaced by what it
    makes of the model's own activations at its inputs; `sites` says the same of each target alone,
    where there are several.

    `dead` means never active on these `n_tokens` tokens. `cross_entropy` is None without a
    language-model head, `baseline` empty where there are no neurons, `neurons_l0` None where the
    neurons are not sparse. `notes` say in words what is missing and why.
    """

    hookpoint: str
    d_in: int
    d_out: int
    d_sae: int
    n_tokens: int
    n_sequences: int
    fvu: Estimate
    l0: Estimate
    dead: Estimate
    dense: Estimate
    density: Density
    cross_entropy: CrossEntropy | None
    baseline: tuple[NeuronBaseline, ...]
    neurons_l0: Estimate | None
    sites: tuple[SiteEvaluation, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: no NaN and no infinity, None instead."""
        return asdict(self)


# ------------------------------------------------------------------------------------ the verbs


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    saes: Mapping[K, SparseAutoencoder],
    batches: Iterable[TokenBatch],
    *,
    n_tokens: int,
    routes: Mapping[K, Route] | None = None,
    ks: Sequence[int] = (),
    baselines: bool = False,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[K, Evaluation]:
    """Every autoencoder (raw activations in and out) on the first rows with `n_tokens` kept tokens.

    `saes` goes by hookpoint, or by names of any kind where `routes` says what each reads and
    rebuilds. Where that is one mlp_act or mlp_out the k largest neurons stand beside it, for k =
    its L0, rounded, and each of `ks`; their cross-entropy takes a forward pass a k and is computed
    with `baselines`. The model should be fp32. `progress` hears the tokens done, n_tokens (to the
    full row) in all.
    Where memory runs out, fewer rows are read at a time, and a warning says so.

    Raises:
        DataError: no kept token.
        HookpointError: a hookpoint does not exist or has another width than its autoencoder.
    """
    if not saes:
        return {}
    along = {key: routes[key] if routes else Route.at(cast(Hookpoint, key)) for key in saes}
    saes = {key: _ready(model, along[key], sae) for key, sae in saes.items()}
    with _as_deployed(model):
        bench = _Bench(model, along, batches, n_tokens, seed, progress)
        n_neurons = sum(point is not None for point in bench.neurons.values())
        n_views = sum(len(_views(route)) for route in along.values())
        bench.plan(1 + n_views * (3 if bench.head else 0) + 1 + n_neurons * (2 + len(ks)))
        sites = _read_sites(bench)
        scores = _score(bench, saes, sites)
        found = {}
        for key, sae in saes.items():
            l0 = bench.ratio(scores[key][0]["active"], bench.kept)
            wanted = {round(l0.value or 0), *ks}
            neurons = _largest_neurons(bench, key, sites, scores[key][0], wanted, baselines)
            found[key] = _summary(bench, key, sae, sites, scores[key], neurons)
        bench.finish()
    return found


@torch.no_grad()
def baseline(
    model: PreTrainedModel,
    hookpoint: Hookpoint,
    batches: Iterable[TokenBatch],
    *,
    n_tokens: int,
    ks: Sequence[int],
    seed: int = 0,
) -> list[NeuronBaseline]:
    """What the k largest neurons of each token keep at mlp_act or mlp_out, for each of `ks`.

    k counts at most all neurons. Raises HookpointError at another place, DataError without text.
    """
    with _as_deployed(model):
        along = {hookpoint: Route.at(hookpoint)}
        bench = _Bench(model, along, batches, n_tokens, seed, None)
        if bench.neurons[hookpoint] is None:
            raise HookpointError(
                f"hookpoint {hookpoint}: the neurons are a baseline for mlp_act and mlp_out of "
                "layers with one set of neurons, not here"
            )
        sites = _read_sites(bench)
        (scores,) = _score(bench, {}, sites)[hookpoint]
        return list(_largest_neurons(bench, hookpoint, sites, scores, ks, bench.head))


def bootstrap_ratio(
    top: Float[np.ndarray, " sequences"],
    bottom: Float[np.ndarray, " sequences"],
    weights: Float[np.ndarray, "resamples sequences"] | None,
) -> Estimate:
    """Σ top / Σ bottom and its standard deviation over resamples of the sequences.

    `weights` says how often each resample drew each sequence; None: no standard error.
    """
    with np.errstate(all="ignore"):
        value = float(top.sum() / bottom.sum())
        se = (
            math.nan
            if weights is None
            else float(np.std((weights @ top) / (weights @ bottom), ddof=1))
        )
    finite = math.isfinite(value)
    return Estimate(value if finite else None, se if finite and math.isfinite(se) else None)


def resamples(sequences: int, seed: int) -> Float[np.ndarray, "resamples sequences"] | None:
    """How often each of RESAMPLES draws with replacement took each sequence; None for only one."""
    if sequences < 2:
        return None
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(sequences, np.full(sequences, 1 / sequences), size=RESAMPLES)
    return drawn.astype(np.float64)


# ------------------------------------------------------------------------- text through the model


@dataclass(frozen=True)
class _Chunk:
    """Some rows of the text, on the model's device; `rows` says which."""

    rows: slice
    tokens: Tensor
    kept: Tensor

    def by_row(self, values: Float[Tensor, " n"]) -> np.ndarray:
        """Sums of the kept tokens' values, one for each row, fp64."""
        # No index_add_: on CUDA its order of summation changes from run to run.
        grid = torch.zeros(self.kept.shape, dtype=torch.float64, device=values.device)
        grid[self.kept] = values.double()
        return grid.sum(1).cpu().numpy()

    def targets(self) -> Tensor:
        """[batch seq] the next token, −100 where it is special or there is none."""
        next_kept = self.kept.roll(-1, 1)
        next_kept[:, -1] = False
        return self.tokens.roll(-1, 1).masked_fill(~next_kept, -100)

    def losses(self, logits: Float[Tensor, "batch seq vocab"]) -> np.ndarray:
        """Cross-entropy in nats of predicting the kept tokens, summed by row."""
        # Shifting the targets, not the logits, saves a copy of the logits.
        flat = logits.float().flatten(0, 1)
        each = cross_entropy(flat, self.targets().flatten(), reduction="none")
        return each.double().view(self.tokens.shape).sum(1).cpu().numpy()


class _Sums(defaultdict[str, np.ndarray]):
    """Named sums, one number for each sequence."""

    def __init__(self, sequences: int):
        super().__init__(partial(np.zeros, sequences))
        self.fired: Tensor | None = None  # [d_sae] tokens on which each feature is active


class _Bench(Generic[K]):
    """A model, the text it is tried on, and what is looked at: routes, and neurons behind some."""

    def __init__(
        self,
        model: PreTrainedModel,
        routes: Mapping[K, Route],
        batches: Iterable[TokenBatch],
        n_tokens: int,
        seed: int,
        progress: Callable[[int], None] | None,
    ):
        self.model, self.routes, self.wanted = model, routes, n_tokens
        self.points = list(dict.fromkeys(p for route in routes.values() for p in route.points))
        self.tokens, self.mask = _collect(batches, n_tokens)
        self.kept = self.mask.sum(1).double().numpy()
        self.head = predicts(model)
        self.neurons = {key: _neurons(model, route) for key, route in routes.items()}
        self._weights = resamples(len(self.tokens), seed)
        self._progress, self._share, self._done, self._told = progress, 0.0, 0.0, 0
        self._passes = 0
        self._rows = MicroBatch(
            "the evaluation", "rows", "lower data.context", self._rows_at_once()
        )

    @property
    def n_tokens(self) -> int:
        return int(self.kept.sum())

    @property
    def everything(self) -> list[Hookpoint]:
        """The hookpoints, and the neurons behind them."""
        return list(dict.fromkeys([*self.points, *filter(None, self.neurons.values())]))

    def sums(self) -> _Sums:
        return _Sums(len(self.tokens))

    def ratio(self, top: np.ndarray, bottom: np.ndarray) -> Estimate:
        """Σ top / Σ bottom over the sequences; every metric sees the same resamples."""
        return bootstrap_ratio(top, bottom, self._weights)

    def each(self, work: Callable[[_Chunk], T]) -> Iterator[T]:
        """`work` on all of the text, in pieces whose logits and activations fit into memory.

        A piece that does not fit is begun anew in halves, so `work` may overwrite its rows of the
        sums, but what it adds up over pieces it must return.
        """
        device = self.model.device

        def attempt(rows: slice) -> tuple[_Chunk, T]:
            chunk = _Chunk(rows, self.tokens[rows].to(device).long(), self.mask[rows].to(device))
            self._passes = 0
            return chunk, work(chunk)

        for _, (chunk, found) in self._rows.split(len(self.tokens), attempt):
            self._done += float(self.kept[chunk.rows].sum()) * self._share * self._passes
            self._report(min(int(self._done), self.n_tokens))
            yield found

    def run(
        self, chunk: _Chunk, read: list[Hookpoint], *, swap: Swap | None = None, predict: bool
    ) -> tuple[dict[Hookpoint, Float[Tensor, "n d"]], np.ndarray]:
        """Kept activations at `read`, behind a `swap`, and with `predict` each row's loss."""
        losses = np.zeros(len(chunk.tokens))
        with ExitStack() as stack:
            for point, fn in (swap or {}).items():
                stack.enter_context(replace(self.model, point, masked(chunk.kept, fn)))
            acts = stack.enter_context(capture(self.model, read, stop=not predict))
            output = self.model(chunk.tokens, **({"use_cache": False} if predict else {}))
            losses = chunk.losses(output.logits)  # not reached where the pass stops early
        self._passes += 1
        return {point: acts[point][chunk.kept] for point in read}, losses

    def plan(self, passes: int) -> None:
        """Announce how many times the text will go through the model."""
        self._share = 1 / passes

    def finish(self) -> None:
        """Report what is left of the announced work."""
        self._report(self.n_tokens)

    def _report(self, done: int) -> None:
        if self._progress is not None and done > self._told:
            self._progress(done - self._told)
            self._told = done

    def _rows_at_once(self) -> int:
        widths = sum(width(self.model, point) for point in self.everything)
        vocab = self.model.config.get_text_config().vocab_size if self.head else 0
        row = self.tokens.shape[1] * (widths + vocab)
        return max(1, _elements(self.model.device) // row)


def _elements(device: torch.device) -> int:
    return ELEMENTS.get(device.type, ELEMENTS["cpu"])


def _collect(batches: Iterable[TokenBatch], n_tokens: int) -> tuple[Tensor, Tensor]:
    """Tokens [rows seq] int32 and which are kept, of the first rows with `n_tokens` kept tokens."""
    tokens, kept, have = [], [], 0
    for batch in batches:
        counts = have + batch.kept.sum(1).cumsum(0)
        rows = int((counts < n_tokens).sum()) + 1
        tokens.append(batch.tokens[:rows].int())
        kept.append(batch.kept[:rows])
        have += int(kept[-1].sum())
        if have >= n_tokens:
            break
    if not have:
        raise DataError("no held-out text to evaluate on; give more text or a larger data.heldout")
    return torch.cat(tokens).cpu(), torch.cat(kept).cpu()


def _neurons(model: PreTrainedModel, route: Route) -> Hookpoint | None:
    """The mlp_act behind the one mlp_act or mlp_out that is rebuilt; None where there is no one."""
    point, *others = route.targets
    if others or point.site not in ("mlp_act", "mlp_out"):
        return None
    try:
        return resolve(model, [f"layers.{point.layer}.mlp_act"])[0]
    except HookpointError:
        return None


def _ready(model: PreTrainedModel, route: Route, sae: SparseAutoencoder) -> SparseAutoencoder:
    """The autoencoder in fp32 beside the model; a copy where that changes it."""
    d_in, d_out = (sum(width(model, p) for p in side) for side in (route.inputs, route.targets))
    if (sae.d_in, sae.d_out) != (d_in, d_out):
        widths = f"{d_in} and {d_out}" if route.is_map else d_in
        raise HookpointError(
            f"hookpoint {route}: its activations have width {widths}, the autoencoder reads "
            f"{sae.d_in} and writes {sae.d_out}; evaluate it where it was trained"
        )
    if (sae.dtype, sae.device) == (torch.float32, model.device):
        return sae
    return copy.deepcopy(sae).to(device=model.device, dtype=torch.float32)


@contextmanager
def _as_deployed(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout and autocast; every module's mode is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for module in training:
            module.training = True


# ------------------------------------------------------------------------------------ the passes


@dataclass
class _Site:
    """What the first pass learns of one hookpoint."""

    mean: Float[Tensor, " d"]  # fp64, over all kept tokens
    active: np.ndarray  # components that are not 0, by sequence
    lowest: float

    @property
    def sparse(self) -> bool:
        """Never below 0 and not always above it, as behind a ReLU."""
        return self.lowest == 0


def _read_sites(bench: _Bench) -> dict[Hookpoint, _Site]:
    """The exact mean of each hookpoint's activations over the evaluated tokens."""
    active = {point: np.zeros(len(bench.kept)) for point in bench.everything}

    def look(chunk: _Chunk) -> dict[Hookpoint, tuple[Tensor, float]]:
        """Sum and least component of a chunk's activations."""
        acts, _ = bench.run(chunk, bench.everything, predict=False)
        for point, x in acts.items():
            active[point][chunk.rows] = chunk.by_row((x != 0).sum(1))
        return {
            point: (x.sum(0, dtype=torch.float64), x.min().item() if x.numel() else math.inf)
            for point, x in acts.items()
        }

    sites: dict[Hookpoint, _Site] = {}
    for seen in bench.each(look):
        for point, (total, lowest) in seen.items():
            empty = _Site(torch.zeros_like(total), active[point], math.inf)
            site = sites.setdefault(point, empty)
            site.mean += total / bench.n_tokens
            site.lowest = min(site.lowest, lowest)
    return sites


def _views(route: Route) -> list[tuple[Hookpoint, ...]]:
    """What is replaced at a time: all targets; and where there are several, each alone."""
    return [route.targets, *([(p,) for p in route.targets] if len(route.targets) > 1 else ())]


def _score(
    bench: _Bench[K], saes: Mapping[K, SparseAutoencoder], sites: Mapping[Hookpoint, _Site]
) -> dict[K, list[_Sums]]:
    """Each sequence's sums of every view: squared errors, active features, cross-entropies.

    Without an autoencoder there is only what the baseline is measured against.
    """
    scores = {key: [bench.sums() for _ in _views(route)] for key, route in bench.routes.items()}
    at_once = {
        key: MicroBatch(
            f"the SAE of {key}", "tokens", "evaluate with --device cpu", _tokens_at_once(sae)
        )
        for key, sae in saes.items()
    }

    def score(chunk: _Chunk) -> dict[K, Tensor]:
        """How often each feature fires; everything else goes to the chunk's rows of `scores`."""
        acts, clean = bench.run(chunk, bench.points, predict=bench.head)
        fired: dict[K, Tensor] = {}
        for key, route in bench.routes.items():
            targets = {p: _Target(p, acts[p], sites[p].mean) for p in route.targets}
            if key in saes:
                x = route.x(acts).float()
                recon, active, fired[key] = _reconstruct(saes[key], x, at_once[key])
                scores[key][0]["active"][chunk.rows] = chunk.by_row(active)
                parts = recon.split([len(target.mean) for target in targets.values()], dim=1)
                for target, part in zip(targets.values(), parts, strict=True):
                    target.recon = part
            for sums, points in zip(scores[key], _views(route), strict=True):
                sums["ce_model"][chunk.rows] = clean
                _look_at(bench, chunk, sums, [targets[point] for point in points])
        return fired

    for fired in bench.each(score):
        for key, counts in fired.items():
            before = scores[key][0].fired
            scores[key][0].fired = counts if before is None else before + counts
    return scores


@dataclass
class _Target:
    """A hookpoint that is rebuilt: its activations, their mean, what an autoencoder makes of it."""

    point: Hookpoint
    y: Float[Tensor, "n d"]
    mean: Float[Tensor, " d"]
    recon: Float[Tensor, "n d"] | None = None


def _look_at(bench: _Bench, chunk: _Chunk, sums: _Sums, targets: Sequence[_Target]) -> None:
    """The errors at some targets, and cross-entropies with all of them replaced."""
    rebuilt = {target.point: target.recon for target in targets if target.recon is not None}
    means = {target.point: target.mean for target in targets}
    values = {"ce_mean": means}
    if rebuilt:
        values |= {"ce_zero": {p: torch.zeros_like(mean) for p, mean in means.items()}}
        values |= {"ce_sae": rebuilt}
        _set_errors(chunk, sums, [(t.y, rebuilt[t.point], t.mean) for t in targets])
    if not bench.head:
        return
    sums["predicted"][chunk.rows] = (chunk.targets() >= 0).sum(1).cpu().numpy()
    for name, by_point in values.items():
        swap = {point: partial(_constant, value) for point, value in by_point.items()}
        sums[name][chunk.rows] = bench.run(chunk, [], swap=swap, predict=True)[1]


def _tokens_at_once(sae: SparseAutoencoder) -> int:
    return max(1, _elements(sae.device) // sae.d_sae)


def _constant(value: Tensor, activation: Tensor) -> Tensor:
    return value.to(activation).expand_as(activation)


def _reconstruct(
    sae: SparseAutoencoder, x: Float[Tensor, "n d"], at_once: MicroBatch
) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"], Int[Tensor, " d_sae"]]:
    """The autoencoder's output, and how many features are active by token and by feature."""

    def look(tokens: slice) -> tuple[Tensor, Tensor, Tensor]:
        out = sae(x[tokens])
        fires = out.acts != 0
        return out.recon, fires.sum(1), fires.sum(0)

    parts = [found for _, found in at_once.split(len(x), look)]
    recon, active, fired = zip(*parts, strict=True)
    return torch.cat(recon), torch.cat(active), torch.stack(fired).sum(0)


def _set_errors(chunk: _Chunk, sums: _Sums, found: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Σ‖y − ŷ‖² and Σ‖y − ȳ‖² of each of the chunk's sequences, over the y, ŷ and ȳ `found`."""
    missed = [chunk.by_row((y.double() - recon).square().sum(1)) for y, recon, _ in found]
    variation = [chunk.by_row((y.double() - mean).square().sum(1)) for y, _, mean in found]
    sums["missed"][chunk.rows], sums["variation"][chunk.rows] = sum(missed), sum(variation)


def keep_largest(
    x: Float[Tensor, "n d"], k: int, mean: Float[Tensor, " d"]
) -> Float[Tensor, "n d"]:
    """The `k` components of largest |x| of each row as they are, the others at their mean."""
    largest = x.abs().topk(k, dim=1, sorted=False).indices
    return mean.to(x).repeat(len(x), 1).scatter(1, largest, x.gather(1, largest))


def _largest_neurons(
    bench: _Bench[K],
    key: K,
    sites: Mapping[Hookpoint, _Site],
    scores: _Sums,
    ks: Iterable[int],
    predict: bool,
) -> tuple[NeuronBaseline, ...]:
    """The baseline for every k; at mlp_out the model itself projects the neurons down."""
    neurons, predict = bench.neurons[key], predict and bench.head
    if neurons is None:
        return ()
    (point,) = bench.routes[key].targets
    mean = sites[neurons].mean
    by_k = {k: bench.sums() for k in sorted({min(k, len(mean)) for k in ks})}

    def compare(chunk: _Chunk) -> None:
        clean, _ = bench.run(chunk, [point], predict=False)
        for k, sums in by_k.items():
            swap = {neurons: partial(keep_largest, k=k, mean=mean)}
            acts, losses = bench.run(chunk, [point], swap=swap, predict=predict)
            _set_errors(chunk, sums, [(clean[point], acts[point], sites[point].mean)])
            sums["ce"][chunk.rows] = losses

    for _ in bench.each(compare):
        pass
    return tuple(
        NeuronBaseline(
            k,
            bench.ratio(sums["missed"], sums["variation"]),
            _recovered(bench, scores, scores["ce_mean"], sums["ce"]) if predict else None,
        )
        for k, sums in by_k.items()
    )


# ----------------------------------------------------------------------------------- summing up


def _recovered(bench: _Bench, sums: _Sums, ablated: np.ndarray, ce: np.ndarray) -> Estimate:
    """(ablated − ce) / (ablated − model)."""
    return bench.ratio(ablated - ce, ablated - sums["ce_model"])


def _cross_entropy(bench: _Bench, sums: _Sums) -> CrossEntropy | None:
    if not bench.head:
        return None
    nats = {
        name: bench.ratio(sums[name], sums["predicted"])
        for name in ("ce_model", "ce_sae", "ce_mean", "ce_zero")
    }
    return CrossEntropy(
        model=nats["ce_model"],
        sae=nats["ce_sae"],
        mean_ablated=nats["ce_mean"],
        zero_ablated=nats["ce_zero"],
        recovered_mean=_recovered(bench, sums, sums["ce_mean"], sums["ce_sae"]),
        recovered_zero=_recovered(bench, sums, sums["ce_zero"], sums["ce_sae"]),
    )


def density_histogram(share: Float[np.ndarray, " d_sae"], n_tokens: int) -> Density:
    """Features that fire, by log10 of their share of `n_tokens` tokens, in quarter decades."""
    first = math.floor(math.log10(1 / n_tokens) * BINS_PER_DECADE)
    edges = np.arange(min(first, -1), 1) / BINS_PER_DECADE
    counts, _ = np.histogram(np.log10(share[share > 0]), edges)
    return Density(tuple(edges.tolist()), tuple(counts.tolist()))


def _notes(bench: _Bench[K], key: K, fvu: Estimate) -> tuple[str, ...]:
    """What the numbers lack and why."""
    notes = []
    if not bench.head:
        notes.append("no cross-entropy: the model has no head that predicts the next token")
    if bench.model.dtype != torch.float32:
        notes.append(f"the language model computed in {bench.model.dtype}, not in float32")
    if bench.n_tokens < bench.wanted:
        notes.append(f"the text ended after {bench.n_tokens:,} of {bench.wanted:,} tokens")
    if len(bench.tokens) < 2:
        notes.append("no standard errors: only one sequence")
    if fvu.value is None:
        notes.append("no FVU: activations all equal, or a reconstruction that is not finite")
    if bench.neurons[key] is None:
        notes.append("no neuron baseline: only mlp_act and mlp_out have one set of neurons")
    return tuple(notes)


def _summary(
    bench: _Bench[K],
    key: K,
    sae: SparseAutoencoder,
    sites: Mapping[Hookpoint, _Site],
    scores: Sequence[_Sums],
    neurons: tuple[NeuronBaseline, ...],
) -> Evaluation:
    """The sums of one autoencoder as the numbers people compare."""
    sums, *alone = scores
    assert sums.fired is not None
    share = sums.fired.cpu().numpy() / bench.n_tokens
    fvu = bench.ratio(sums["missed"], sums["variation"])
    behind = bench.neurons[key]
    site = None if behind is None else sites[behind]
    return Evaluation(
        hookpoint=str(bench.routes[key]),
        d_in=sae.d_in,
        d_out=sae.d_out,
        d_sae=sae.d_sae,
        n_tokens=bench.n_tokens,
        n_sequences=len(bench.tokens),
        fvu=fvu,
        l0=bench.ratio(sums["active"], bench.kept),
        dead=Estimate(float((share == 0).mean())),
        dense=Estimate(float((share > DENSE).mean())),
        density=density_histogram(share, bench.n_tokens),
        cross_entropy=_cross_entropy(bench, sums),
        baseline=neurons,
        neurons_l0=bench.ratio(site.active, bench.kept) if site and site.sparse else None,
        sites=tuple(
            SiteEvaluation(
                str(point),
                bench.ratio(own["missed"], own["variation"]),
                _cross_entropy(bench, own),
            )
            for point, own in zip(bench.routes[key].targets, alone, strict=False)
        ),
        notes=_notes(bench, key, fvu),
    )
