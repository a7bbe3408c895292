"""How `recover_planted.py` and `compare_planted.py` train on planted features."""

from collections.abc import Iterable
from itertools import chain, islice
from types import SimpleNamespace
from typing import Any

import torch

from sae import config as settings
from sae.activations import Batch, Statistics
from sae.autoencoder import SparseAutoencoder
from sae.config import TrainConfig
from sae.learner import Learner
from sae.planning import sparsity_of

BATCH = 512
"""Samples a step: the number of steps matters more than samples per step."""
LR = 1e-2
POOL_BATCHES = 64
"""Batches behind the mean and the mean norm of the activations."""

RECIPES: dict[str, dict[str, Any]] = {
    "relu_l1": {"sparsity.kind": "relu_l1", "sparsity.l1": 5, "sparsity.l1_warmup": 0.5},
    "topk": {"sparsity.kind": "topk", "sparsity.k": 4},
    "batchtopk": {"sparsity.kind": "batchtopk", "sparsity.k": 4},
    "jumprelu": {
        "sparsity.kind": "jumprelu",
        "sparsity.l0_coef": 5,
        "sparsity.l0_warmup": 0.5,
        "sparsity.bandwidth": 1,
    },
}
"""Settings of `sae` by variant, for 256 features in 128 dimensions, 4 active."""


def config(variant: str, samples: int, d_sae: int, seed: int, **changes: Any) -> TrainConfig:
    """The training of a variant; `changes` are other settings by their dotted names."""
    recipe = {f"sae.{name}": value for name, value in RECIPES[variant].items()}
    return settings.resolve(
        None,
        {
            "sae.d_sae": d_sae,
            "optim.lr": LR,
            "optim.batch": BATCH,
            "tokens": samples,
            "seed": seed,
            "device": "cpu",
            "model.dtype": "float32",
        }
        | recipe
        | changes,
    )


def fit(batches: Iterable[Batch], config: TrainConfig) -> SparseAutoencoder:
    """The autoencoder, for raw activations, trained on `config.tokens` of these samples."""
    stream = iter(batches)
    pool = list(islice(stream, POOL_BATCHES))
    x, y = torch.cat([b.x for b in pool]), torch.cat([b.y for b in pool])
    own = y.shape == x.shape and torch.equal(x, y)
    statistics = Statistics(x.mean(0), x.norm(dim=1).mean().item())
    sae = SparseAutoencoder(
        x.shape[1], config.sae.width(x.shape[1]), sparsity_of(config), y.shape[1], own
    )
    plan: Any = SimpleNamespace(config=config, dtype=torch.float32, device=torch.device("cpu"))
    learner = Learner(plan, sae, statistics.scale)
    sae.initialise(y.mean(0) * statistics.scale, learner.generator)
    done = 0
    for batch in chain(pool, stream):
        if done >= config.tokens:
            break
        share = done / config.tokens
        learner.apply(batch, learner.gradients(batch, share), share)
        done += len(batch.x)
    return sae.folded(statistics.scale)
