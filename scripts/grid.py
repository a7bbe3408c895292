"""SAEs over a grid of settings, for sweep.py and study_scaling.py.

The activations are read once and kept in memory; every SAE of the grid is trained on the same ones,
in the same order (a seed changes where it starts), and measured on the same held-out ones. Rows are
appended to a file as they are made, so that a grid that was interrupted goes on, and one that is
complete is only drawn again.

The grids of `sae train` (docs/grid.md) are for SAEs to keep: in one run of one budget, trained side
by side, evaluated by `sae evaluate`. Here tokens may be an axis, a point that is added to a grid is
trained alone, L0 is measured on text of the training too, and only the numbers stay. They are not
those of a run to the bit: it takes the normalisation from its first pool, `fit` from the first
batches (FVU by up to 0.0004 of 0.7, in four SAEs of 20,000 tokens each).
"""

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import hooks, losses
from sae.activations import ActivationStream, Batch, read
from sae.autoencoder import SparseAutoencoder
from sae.config import TrainConfig, resolve
from sae.errors import ConfigError
from sae.fitting import fit
from sae.planning import Inputs, open_inputs, pick_device, pick_dtype

Row = dict[str, Any]
"""The settings of an SAE on the grid, with fvu, l0 and dead (a share) on held-out text, train_l0 on
batches from all over the training, and seconds."""

TRAINED = 50
"""The most batches for train_l0."""
CHUNK = 4096


def run_grid(
    config: str | None, base: Mapping[str, Any], axes: Mapping[str, Sequence[Any]], file: Path
) -> list[Row]:
    """One row for each combination, the last axis changing fastest; `axes` includes tokens.

    Raises ConfigError where the config has more than one hookpoint.
    """
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    missing = [point for point in points if not _rows_of(rows, point)]
    file.parent.mkdir(parents=True, exist_ok=True)
    for row in _train_missing(config, base, missing):
        rows.append(row)
        with file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        settings = ", ".join(f"{key} {row[key]}" for key in axes)
        print(f"  {settings}: FVU {row['fvu']:.4f}", flush=True)
    return [_rows_of(rows, point)[0] for point in points]


def _train_missing(
    config: str | None, base: Mapping[str, Any], missing: Sequence[Row]
) -> Iterator[Row]:
    if not missing:
        return
    first = _resolve(config, base, {"tokens": max(point["tokens"] for point in missing)})
    inputs = open_inputs(first, pick_device(first.device))
    batches, heldout = _activations(inputs, first)
    for point in missing:
        yield point | _measured(_resolve(config, base, point), batches, heldout)


def _rows_of(rows: Sequence[Row], point: Mapping[str, Any]) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in point.items())]


def _resolve(config: str | None, *settings: Mapping[str, Any]) -> TrainConfig:
    merged = {key: str(value) for each in settings for key, value in each.items()}
    return resolve(config, merged)


def _activations(inputs: Inputs, config: TrainConfig) -> tuple[list[Batch], Tensor]:
    """Batches of `config.tokens` in all, mixed as in training; `data.eval_tokens` held out."""
    points = hooks.resolve(inputs.lm.model, config.hookpoints)
    if len(points) != 1:
        raise ConfigError(f"hookpoints: {len(points)} came, a grid is over one")
    optim, (point,) = config.optim, points
    dtype = pick_dtype(config.model.dtype, inputs.device)
    stream = ActivationStream(
        inputs.lm.model, points, inputs.source.train(optim.llm_batch), batch=optim.batch,
        pool=optim.pool, dtype=dtype, generator=torch.Generator().manual_seed(config.seed),
        max_norm=optim.max_norm,
    )  # fmt: skip
    wanted = -(-config.tokens // optim.batch)
    batches = [drawn[point] for drawn in itertools.islice(stream, wanted)]
    heldout = torch.cat(list(_heldout(inputs, point, config, dtype)))
    return batches, heldout[: config.data.eval_tokens]


def _heldout(
    inputs: Inputs, point: hooks.Hookpoint, config: TrainConfig, dtype: torch.dtype
) -> Iterator[Tensor]:
    have = 0
    for rows in inputs.source.heldout(config.optim.llm_batch):
        acts, _ = read(inputs.lm.model, [point], rows, dtype)
        yield acts[point].float()
        have += len(acts[point])
        if have >= config.data.eval_tokens:
            return


@torch.no_grad()
def score(sae: SparseAutoencoder, heldout: Tensor) -> Row:
    """FVU, L0, and the share of features that are never active."""
    outs = [sae(chunk) for chunk in heldout.split(CHUNK)]
    recon = torch.cat([out.recon for out in outs])
    fired = torch.stack([(out.acts != 0).sum(0) for out in outs]).sum(0)
    return {
        "fvu": losses.fvu(heldout, recon).item(),
        "l0": fired.sum().item() / len(heldout),
        "dead": (fired == 0).double().mean().item(),
    }


def _measured(config: TrainConfig, batches: Sequence[Batch], heldout: Tensor) -> Row:
    start = time.perf_counter()
    sae = fit(batches, config)
    seconds = round(time.perf_counter() - start, 1)
    used = batches[: -(-config.tokens // config.optim.batch)]
    trained = score(sae, torch.cat([batch.x for batch in used[:: -(-len(used) // TRAINED)]]))
    return score(sae, heldout) | {"train_l0": trained["l0"], "seconds": seconds}
