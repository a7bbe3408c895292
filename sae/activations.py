"""Tokens → shuffled batches of activations, for every hookpoint from one forward pass.

All hookpoints share one order, so the n-th row of every batch is the same token.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sae.data import TokenBatch
from sae.errors import ConfigError, DataError, ModelError
from sae.hooks import Hookpoint, capture
from sae.memory import MicroBatch


@dataclass(frozen=True)
class Batch:
    """Activations `x` to encode, `y` to reconstruct, and the document and position of each row."""

    x: Float[Tensor, "batch d_in"]
    y: Float[Tensor, "batch d_out"]
    source: Int[Tensor, "batch 2"]


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
    source = torch.stack([tokens.document[tokens.kept], tokens.position[tokens.kept]], dim=1)
    return {point: _joined([acts[point] for acts in found]) for point in hookpoints}, source


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matmuls in `dtype` on `device`; float32 leaves everything as it is."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@dataclass(frozen=True)
class Statistics:
    """What normalisation needs of one hookpoint's activations, from the first full pool."""

    mean: Float[Tensor, " d"]
    mean_norm: float

    @property
    def scale(self) -> float:
        """The factor that brings the mean norm to √d_in."""
        return math.sqrt(len(self.mean)) / self.mean_norm


class ActivationStream:
    """Shuffled batches at several hookpoints from one forward pass of the model a token.

    A pool of `pool` tokens stays on the model's device. It is drawn from at random without
    replacement, and filled up again each time half of it is gone. At the end of the text less than
    a batch is left over.

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
    ):
        passes = forward_passes()
        self._blocks = (read(model, hookpoints, rows, dtype, passes) for rows in tokens)
        self._batch, self._pool, self._generator = batch, pool, generator
        self._waiting = next(self._blocks, None)
        if self._waiting is None:
            raise DataError("data.source: no text to read; give more text")
        acts, source = self._waiting
        self._acts = {point: a.new_empty(pool, a.shape[1]) for point, a in acts.items()}
        self._source = source.new_empty(pool, 2)
        self._drawn = torch.arange(pool)
        self._order = torch.empty(0, dtype=torch.long)
        self._fill()
        if len(self._order) < batch:
            raise DataError(
                f"data.source: {len(self._order)} tokens came, less than optim.batch {batch}; give "
                "more text or a smaller batch"
            )

    def statistics(self) -> dict[Hookpoint, Statistics]:
        """Mean and mean norm of what the pool holds now, in fp32.

        Raises:
            ModelError: activations that are all zero, or not finite.
        """
        found, n = {}, len(self._order)
        for point, acts in self._acts.items():
            total, norms = torch.zeros(acts.shape[1], device=acts.device), 0.0
            for rows in self._order.split(4096):
                part = acts[rows].float()
                total += part.sum(0)
                norms += part.norm(dim=1).sum().item()
            if not 0 < norms < math.inf:
                raise ModelError(
                    f"hookpoints: activations at {point} have a mean norm of {norms / n}; wanted "
                    "finite ones, not all zero: check the model, and try --model.dtype float32"
                )
            found[point] = Statistics(total / n, norms / n)
        return found

    def __len__(self) -> int:
        """Tokens in the pool that were not drawn yet."""
        return len(self._order)

    def __iter__(self) -> Iterator[dict[Hookpoint, Batch]]:
        while True:
            if len(self._order) < max(self._pool // 2, self._batch) and self._waiting is not None:
                self._fill()
            if len(self._order) < self._batch:
                return
            yield self._draw()

    def _fill(self) -> None:
        """Put new tokens in place of the drawn ones, then mix all anew."""
        kept, free = self._order, self._drawn
        while self._waiting is not None and len(self._waiting[1]) <= len(free):
            acts, source = self._waiting
            rows, free = free[: len(source)], free[len(source) :]
            for point, values in acts.items():
                self._acts[point][rows] = values
            self._source[rows] = source
            kept = torch.cat([kept, rows])
            self._waiting = next(self._blocks, None)
        if self._waiting is not None and len(kept) < self._batch:
            raise ConfigError(
                f"optim.pool: {self._pool} has no room for {len(self._waiting[1])} more tokens "
                f"beside {len(kept)}; raise it, or lower optim.llm_batch or data.context"
            )
        self._drawn = free
        self._order = kept[torch.randperm(len(kept), generator=self._generator)]

    def _draw(self) -> dict[Hookpoint, Batch]:
        rows, self._order = self._order[: self._batch], self._order[self._batch :]
        self._drawn = torch.cat([self._drawn, rows])
        source = self._source[rows]
        drawn = {point: acts[rows] for point, acts in self._acts.items()}
        return {point: Batch(values, values, source) for point, values in drawn.items()}
