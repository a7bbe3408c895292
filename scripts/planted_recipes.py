"""How `recover_planted.py` and `compare_planted.py` train on planted features."""

from typing import Any

from sae import config as settings
from sae.config import TrainConfig

BATCH = 512
"""Samples a step: the number of steps matters more than samples per step."""
LR = 1e-2
POOL = 64 * BATCH
"""Samples behind the mean and the mean norm of the activations."""

RECIPES: dict[str, dict[str, Any]] = {
    "relu_l1": {"sparsity.kind": "relu_l1", "sparsity.l1": 5, "sparsity.l1_warmup": 0.5},
    "p_anneal": {
        "sparsity.kind": "relu_l1",
        "sparsity.l1": 2.5,
        "sparsity.l1_warmup": 0.5,
        "sparsity.p_end": 0.2,
    },
    "topk": {"sparsity.kind": "topk", "sparsity.k": 4},
    "batchtopk": {"sparsity.kind": "batchtopk", "sparsity.k": 4},
    "matryoshka": {
        "sparsity.kind": "batchtopk",
        "sparsity.k": 4,
        "prefixes": (0.0625, 0.125, 0.25, 0.5, 1),
    },
    "jumprelu": {
        "sparsity.kind": "jumprelu",
        "sparsity.l0_coef": 5,
        "sparsity.l0_warmup": 0.5,
        "sparsity.bandwidth": 1,
    },
    "gated": {"sparsity.kind": "gated", "sparsity.l1": 5, "sparsity.l1_warmup": 0.5},
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
            "optim.pool": POOL,
            "tokens": samples,
            "seed": seed,
            "device": "cpu",
            "model.dtype": "float32",
        }
        | recipe
        | changes,
    )
