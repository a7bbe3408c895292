"""Tokens → shuffled batches of activations, for every hookpoint from one forward pass.

All hookpoints share one order, so the n-th row of every batch is the same token.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sae.autoencoder import Scale
from sae.data import TokenBatch
from sae.errors import ConfigError, DataError, FormatError, ModelError
from sae.hooks import Hookpoint, capture
from sae.memory import MicroBatch
from sae.routes import Route

Downstream = Callable[[Float[Tensor, "batch d_out"]], tuple[Tensor, Tensor]]
"""What another reconstruction does to the model's predictions: a loss [], and its gradient."""


@dataclass(frozen=True)
class Batch:
    """Activations `x` to encode, `y` to reconstruct, and the document and position of each row.

    `downstream`: of whole sequences, while these are fine-tuned on.
    """

    x: Float[Tensor, "batch d_in"]
    y: Float[Tensor, "batch d_out"]
    source: Int[Tensor, "batch 2"]
    downstream: Downstream | None = field(default=None, kw_only=True)

    @classmethod
    def along(cls, route: Route, batches: "Mapping[Hookpoint, Batch]") -> "Batch":
        """What one SAE reads and rebuilds of the same tokens' activations at the hookpoints."""
        acts = {point: batches[point].x for point in route.points}
        x = route.x(acts)
        return cls(x, route.y(acts) if route.is_map else x, batches[route.inputs[0]].source)


def forward_passes() -> MicroBatch:
    """How many rows `read` gives the language model at a time."""
    return MicroBatch("the language model", "rows", "lower data.context")


@torch.no_grad()
def read(
    model: PreTrainedModel,
    hookpoints: list[Hookpoint],
    tokens: TokenBatch,
    dtype: torch.dtype,
    passes: MicroBatch | None = None,
) -> tuple[dict[Hookpoint, Float[Tensor, "n d"]], Int[Tensor, "n 2"]]:
    """The activations of the kept tokens at each hookpoint, and their document and position.

    The language model computes in `dtype` (autocast) and stops behind the last hookpoint. Rows that
    do not fit into memory are split; `passes` remembers how from one call to the next.
    """
    device = next(model.parameters()).device

    def one_pass(rows: slice) -> dict[Hookpoint, Tensor]:
        with autocast(device, dtype), capture(model, hookpoints) as acts:
            model(tokens.tokens[rows].to(device))
        kept = tokens.kept[rows].to(device)
        return {point: acts[point][kept] for point in hookpoints}

    passes = passes or forward_passes()
    found = [acts for _, acts in passes.split(len(tokens), one_pass)]
    return {point: _joined([a[point] for a in found]) for point in hookpoints}, tokens.source


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matmuls in `dtype` on `device`; float32 leaves everything as it is."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@dataclass(frozen=True)
class Sites:
    """Hookpoints side by side: how wide each is, and what its activations are multiplied by."""

    widths: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def width(self) -> int:
        """Of all of them."""
        return sum(self.widths)

    def scale(self, device: torch.device) -> Scale:
        """One number for one hookpoint, one for each dimension for several."""
        if len(self.scales) == 1:
            return self.scales[0]
        pairs = zip(self.widths, self.scales, strict=True)
        return torch.cat([torch.full((width,), scale, device=device) for width, scale in pairs])

    def plain(self) -> float | list[float]:
        """The scales for the metadata of an SAE."""
        return self.scales[0] if len(self.scales) == 1 else list(self.scales)

    def rescaled(self, plain: Any) -> "Sites":
        """With the scales that `plain` gave, those here where it is None; raises FormatError."""
        if plain is None:
            return self
        scales = plain if isinstance(plain, list) else [plain]
        if len(scales) != len(self.widths) or not all(isinstance(s, int | float) for s in scales):
            raise FormatError(f"scale {str(plain)[:60]}: expected {len(self.widths)} numbers")
        return Sites(self.widths, tuple(map(float, scales)))

    def state(self) -> Float[Tensor, "sites 2"]:
        """All of it for a checkpoint, fp64."""
        return torch.tensor([self.widths, self.scales], dtype=torch.float64).T

    @classmethod
    def restored(cls, state: Float[Tensor, "sites 2"]) -> "Sites":
        """Those whose `state` this is."""
        widths, scales = state.T.tolist()
        return cls(tuple(map(int, widths)), tuple(scales))


@dataclass(frozen=True)
class Statistics:
    """What normalisation needs of some activations: in a run, those of the first full pool."""

    mean: Float[Tensor, " d"]
    mean_norm: float
    parts: "tuple[Statistics, ...]" = ()
    """Those of each hookpoint, where several lie side by side."""

    @classmethod
    def side_by_side(cls, parts: "Sequence[Statistics]") -> "Statistics":
        """Those of several hookpoints as one vector."""
        if len(parts) == 1:
            return parts[0]
        norm = math.hypot(*(part.mean_norm for part in parts))
        return cls(torch.cat([part.mean for part in parts]), norm, tuple(parts))

    @classmethod
    def of(cls, parts: Iterable[Float[Tensor, "n d"]], name: str) -> "Statistics":
        """Mean and mean norm in fp32; rows not finite do not count.

        Raises ModelError, naming the activations by `name`, where all are zero or not finite.
        """
        total, norms, n = torch.zeros(()), 0.0, 0
        for part in parts:
            part = part.float()
            norm = part.norm(dim=1)
            finite = norm.isfinite()
            total = total.to(part.device) + part[finite].sum(0)
            norms += norm[finite].sum().item()
            n += int(finite.sum())
        if not norms:
            raise ModelError(
                f"{name} are all zero or not finite; wanted finite ones: check the model, and try "
                "--model.dtype float32"
            )
        return cls(total / n, norms / n)

    @property
    def scale(self) -> float:
        """The factor that brings the mean norm to √d."""
        return math.sqrt(len(self.mean)) / self.mean_norm

    @property
    def sites(self) -> Sites:
        """Each hookpoint with a scale of its own, so that all of them weigh alike."""
        parts = self.parts or (self,)
        return Sites(tuple(len(p.mean) for p in parts), tuple(p.scale for p in parts))


@dataclass(frozen=True)
class Reading:
    """How much text a stream has read: batches of rows, their tokens, and the tokens left out."""

    batches: int = 0
    tokens: int = 0
    special: int = 0
    massive: int = 0

    def after(self, rows: TokenBatch, massive: int = 0) -> "Reading":
        """What it is once these are read too, `massive` of their tokens left out by norm."""
        n, special = rows.kept.numel(), int((~rows.kept).sum())
        sums = (1, n, special, massive)
        return Reading(*(a + b for a, b in zip(astuple(self), sums, strict=True)))

    @property
    def masked(self) -> float:
        """Share of the tokens left out, by id or by norm."""
        return (self.special + self.massive) / max(self.tokens, 1)


Block = tuple[dict[Hookpoint, Float[Tensor, "n d"]], Int[Tensor, "n 2"]]


class ActivationStream:
    """Shuffled batches at several hookpoints from one forward pass of the model a token.

    A pool of `pool` tokens stays on the model's device. It is drawn from at random without
    replacement, and filled up again each time half of it is gone. At the end of the text less than
    a batch is left over. `max_norm` leaves out tokens whose norm at any hookpoint is more than so
    many times the median of their forward pass.

    `stop` is asked between forward passes; once it says True the stream ends, in a state from which
    it can go on: a stream made with that `state()`, and `tokens` from its batch on, gives the very
    batches that this one would have given.

    Raises:
        DataError: the text has less than a batch.
        ConfigError: the pool has no room for another forward pass where less than a batch is left.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        hookpoints: list[Hookpoint],
        tokens: Iterator[TokenBatch],
        *,
        batch: int,
        pool: int,
        dtype: torch.dtype,
        generator: torch.Generator,
        max_norm: float | None = None,
        state: Mapping[str, Tensor] | None = None,
    ):
        self._model, self._hookpoints, self._dtype = model, hookpoints, dtype
        self._tokens, self._batch, self._pool = tokens, batch, pool
        self._generator, self._max_norm = generator, max_norm
        self.passes = forward_passes()
        self.stop: Callable[[], bool] = lambda: False
        self.reading = Reading()
        self._order = torch.empty(0, dtype=torch.long)
        self._rows: TokenBatch | None = None
        if state is not None:
            self._restore(state)
            return
        self._waiting = self._next_block()
        if self._waiting is None:
            raise DataError("data.source: no text to read; give more text")
        self._make_room(*self._waiting)
        self._fill()
        if len(self._order) < batch:
            raise DataError(
                f"data.source: {len(self._order)} tokens came, less than optim.batch {batch}; give "
                "more text or a smaller batch"
            )

    def statistics(self) -> dict[Hookpoint, Statistics]:
        """Those of what the pool holds now. Raises ModelError as `Statistics.of` does."""
        return {
            point: Statistics.of(
                (acts[rows] for rows in self._order.split(4096)),
                f"hookpoints: activations at {point}",
            )
            for point, acts in self._acts.items()
        }

    def __len__(self) -> int:
        """Tokens in the pool that were not drawn yet."""
        return len(self._order)

    def __iter__(self) -> Iterator[dict[Hookpoint, Batch]]:
        while (drawn := self.draw()) is not None:
            yield drawn

    def draw(self) -> dict[Hookpoint, Batch] | None:
        """The next batch; None at the end of the text, and when `stop` interrupts reading."""
        if len(self._order) < max(self._pool // 2, self._batch) and self._waiting is not None:
            self._fill()
            if self.stop():
                return None
        if len(self._order) < self._batch:
            return None
        rows, self._order = self._order[: self._batch], self._order[self._batch :]
        self._drawn = torch.cat([self._drawn, rows])
        source = self._source[rows]
        drawn = {point: acts[rows] for point, acts in self._acts.items()}
        return {point: Batch(values, values, source) for point, values in drawn.items()}

    def rows(self, n: int) -> TokenBatch | None:
        """The next `n` rows of text as they are, past the pool; at times fewer, None at the end."""
        if not self._rows:
            self._rows = next(self._tokens, None)
            if self._rows is None:
                return None
            self.reading = self.reading.after(self._rows)
        rows, self._rows = self._rows[:n], self._rows[n:]
        return rows

    def peek(self, n: int) -> dict[Hookpoint, Batch]:
        """The next `n` tokens, without drawing them; at the end of the text the last ones drawn."""
        rows = torch.cat([self._order, self._drawn.flip(0)])[:n]
        return {
            p: Batch(acts[rows], acts[rows], self._source[rows]) for p, acts in self._acts.items()
        }

    def state(self) -> dict[str, Tensor]:
        """What is needed to go on: the tokens not drawn, those read ahead, the generator."""
        tensors = {
            "generator": self._generator.get_state(),
            "reading": torch.tensor(astuple(self.reading)),
            "source": self._source[self._order],
        }
        tensors |= {f"acts/{point}": acts[self._order] for point, acts in self._acts.items()}
        if self._waiting is not None:
            acts, source = self._waiting
            tensors["waiting/source"] = source
            tensors |= {f"waiting/acts/{point}": values for point, values in acts.items()}
        if self._rows:
            tensors |= {f"rows/{name}": column for name, column in self._rows.columns().items()}
        return tensors

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        device = next(self._model.parameters()).device

        def block(prefix: str) -> Block:
            acts = {p: state[f"{prefix}acts/{p}"].to(device) for p in self._hookpoints}
            return acts, state[f"{prefix}source"]

        acts, source = block("")
        self._waiting = block("waiting/") if "waiting/source" in state else None
        if "rows/tokens" in state:
            self._rows = TokenBatch(**{n: state[f"rows/{n}"] for n in TokenBatch.COLUMNS})
        self._make_room(acts, source)
        self._put(torch.arange(len(source)), acts, source)
        self._order, self._drawn = torch.arange(self._pool).tensor_split([len(source)])
        self.reading = Reading(*state["reading"].tolist())
        self._generator.set_state(state["generator"])

    def _make_room(self, acts: dict[Hookpoint, Tensor], source: Tensor) -> None:
        self._acts = {point: a.new_empty(self._pool, a.shape[1]) for point, a in acts.items()}
        self._source = source.new_empty(self._pool, 2)
        self._drawn = torch.arange(self._pool)

    def _put(self, rows: Tensor, acts: dict[Hookpoint, Tensor], source: Tensor) -> None:
        for point, values in acts.items():
            self._acts[point][rows] = values
        self._source[rows] = source

    def _fill(self) -> None:
        """Put new tokens in place of the drawn ones, then mix all anew.

        When stopped on the way, what was read in vain is as if it had not been.
        """
        before = self._waiting, self.reading
        kept, free = self._order, self._drawn
        while self._waiting is not None and len(self._waiting[1]) <= len(free):
            if self.stop():
                self._waiting, self.reading = before
                return
            acts, source = self._waiting
            rows, free = free[: len(source)], free[len(source) :]
            self._put(rows, acts, source)
            kept = torch.cat([kept, rows])
            self._waiting = self._next_block()
        if self._waiting is not None and len(kept) < self._batch:
            raise ConfigError(
                f"optim.pool: {self._pool} has no room for {len(self._waiting[1])} more tokens "
                f"beside {len(kept)}; raise it, or lower optim.llm_batch or data.context"
            )
        self._drawn = free
        self._order = kept[torch.randperm(len(kept), generator=self._generator)]

    def _next_block(self) -> Block | None:
        """The activations of the next rows, without massive ones."""
        rows = next(self._tokens, None)
        if rows is None:
            return None
        acts, source = read(self._model, self._hookpoints, rows, self._dtype, self.passes)
        ordinary = is_ordinary(acts, self._max_norm)
        self.reading = self.reading.after(rows, int((~ordinary).sum()))
        if ordinary.all():
            return acts, source
        return {p: values[ordinary] for p, values in acts.items()}, source[ordinary.cpu()]


def is_ordinary(
    acts: Mapping[Hookpoint, Float[Tensor, "n d"]], max_norm: float | None
) -> Bool[Tensor, " n"]:
    """Which tokens are not massive at any hookpoint; attention sinks are, for instance."""
    first = next(iter(acts.values()))
    ordinary = torch.ones(len(first), dtype=torch.bool, device=first.device)
    if max_norm is None or not len(first):
        return ordinary
    for values in acts.values():
        norms = values.float().norm(dim=1)
        ordinary &= ~(norms > max_norm * norms.median())  # NaN is not massive
    return ordinary
