"""An SAE from any stream of activations: a run's training, without a language model or a folder."""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch

from sae.activations import Batch, Statistics
from sae.autoencoder import SparseAutoencoder
from sae.config import FinetuneConfig, TrainConfig
from sae.errors import DataError, ModelError
from sae.learner import Learner

Report = Callable[[int, dict[str, float]], None]
"""Called with the tokens done and the metrics, after each step."""


def fit(
    batches: Iterable[Batch],
    config: TrainConfig,
    *,
    dtype: torch.dtype = torch.float32,
    report: Report | None = None,
) -> SparseAutoencoder:
    """Train on `config.tokens` rows of `batches`; the result takes and gives raw activations.

    Of `config` the SAE, its optimiser (without pool and reading), `tokens` and `seed` count. The
    first batches, `optim.pool` rows in all, are measured for the normalisation, then trained on
    like the others. Where y is not x, a map from x to y is trained. Batches lie on the device to
    compute on; large products are in `dtype`. A batch whose loss or gradients are not finite is
    skipped.

    Raises:
        DataError: there are fewer than `config.tokens` rows.
        ModelError: no batch is finite.
    """
    config = config.model_copy(update={"finetune": FinetuneConfig()})
    stream = iter(batches)
    pool = list(_rows(stream, min(config.optim.pool, config.tokens)))
    is_map = any(batch.x is not batch.y and not _same(batch) for batch in pool)
    learner = Learner.begin(
        config,
        Statistics.of((batch.x for batch in pool), "batches: x"),
        Statistics.of((batch.y for batch in pool), "batches: y") if is_map else None,
        _joined(pool) if config.sae.init == "data" else None,
        dtype=dtype,
    )
    tokens = 0
    for batch in _rows(itertools.chain(pool, stream), config.tokens):
        done = tokens / config.tokens
        stats = learner.gradients(batch, done)
        tokens += len(batch.x)
        if not learner.finite(stats):
            continue
        learner.apply(batch, stats, done)
        if report is not None:
            report(tokens, learner.metrics(stats, batch))
    if tokens < config.tokens:
        raise DataError(f"tokens: {config.tokens:,} wanted, {tokens:,} came; give more batches")
    if not learner.variance:
        raise ModelError("batches: no loss was finite; wanted finite x and y, or a lower optim.lr")
    return learner.raw()


def _rows(batches: Iterator[Batch], wanted: int) -> Iterator[Batch]:
    """The fewest batches that have the wanted number of rows, or all there are."""
    have = 0
    while have < wanted and (batch := next(batches, None)) is not None:
        have += len(batch.x)
        yield batch


def _same(batch: Batch) -> bool:
    return batch.x.shape == batch.y.shape and torch.equal(batch.x, batch.y)


def _joined(batches: list[Batch]) -> Batch:
    columns = zip(*((batch.x, batch.y, batch.source) for batch in batches), strict=True)
    return Batch(*map(torch.cat, columns))
