"""Proves what a learner does from step to step: a penalty whose power falls keeps its size, and few
features stay dead, for each cure, on activations whose mean is 20 times as large as their spread.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch

from sae.activations import Batch, Statistics
from sae.autoencoder import SparseAutoencoder
from sae.config import resolve
from sae.learner import Learner
from sae.synthetic import PlantedConfig, PlantedFeatures

BATCH, STEPS, D_SAE = 256, 200, 64


def learner(batches: list[Batch], **changes: Any) -> Learner:
    """A new one for these batches."""
    given = {
        "sae.d_sae": D_SAE,
        "optim.batch": BATCH,
        "optim.lr": 0.005,
        "tokens": BATCH * len(batches),
        "model.dtype": "float32",
    }
    config = resolve(None, given | changes)
    statistics = Statistics.of((batch.x for batch in batches[:8]), "x")
    return Learner.begin(config, statistics, dtype=torch.float32)


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Of 64 planted features in 16 dimensions."""
    planted = PlantedFeatures(PlantedConfig(16, D_SAE, 3, 0.5))
    return list(islice(planted.batches(BATCH), STEPS))


@pytest.mark.parametrize("target", [None, 4.0])
def test_the_penalty_is_as_large_after_its_power_falls_as_before(
    batches: list[Batch], target: float | None
) -> None:
    """Also where its coefficient is steered."""
    changes = {"p_end": 0.3, "p_ramp": [0.25, 0.25], "target_l0": target}
    one = learner(batches, **{f"sae.sparsity.{name}": v for name, v in changes.items()})
    assert [one.config.sae.sparsity.at(done).p for done in (0.24, 0.25)] == [1, 0.3]
    added = []
    for number, batch in enumerate(batches[: STEPS // 4 + 1]):
        stats = one.gradients(batch, number / STEPS)
        added.append((stats.loss - stats.mse).item())
        one.apply(batch, stats, number / STEPS)
    assert added[-1] == pytest.approx(added[-2], rel=0.3)


# ----------------------------------------------------------------------------- dead features

TOPK = {"sae.sparsity.kind": "topk", "sae.sparsity.k": 3, "sae.sparsity.auxk": 16}
NO_AUXK = TOPK | {"sae.sparsity.auxk_coef": 0.0}
RELU = {"sae.sparsity.kind": "relu_l1", "sae.sparsity.l1": 0.05, "optim.lr_decay": 0.5}
NO_RESAMPLING = RELU | {"optim.lr_decay": 0.9, "optim.lr_warmup": 0.1}
"""Features are resampled until the learning rate falls: here before any is dead."""


@pytest.fixture(scope="module")
def far_off(batches: list[Batch]) -> list[Batch]:
    """The same with a mean of 20 times the root of their variance."""
    x = torch.cat([batch.x for batch in batches])
    mean = torch.nn.functional.normalize(torch.ones(16), dim=0) * 20 * x.std(0).norm()
    moved = [batch.x - x.mean(0) + mean for batch in batches]
    return [Batch(x, x, batch.source) for x, batch in zip(moved, batches, strict=True)]


def as_begun(sae: SparseAutoencoder) -> None:
    """b_dec at the mean of the activations."""


def without_mean(sae: SparseAutoencoder) -> None:
    sae.b_dec.data.zero_()


def faint(sae: SparseAutoencoder) -> None:
    """Half the features never are among the k largest."""
    sae.W_enc.data[:, ::2] /= 20


def silent(sae: SparseAutoencoder) -> None:
    """Half the features are negative on every token."""
    sae.b_enc.data[::2] = -100


@pytest.mark.parametrize(
    ("settings", "start", "low", "high"),
    [
        (NO_AUXK, as_begun, 0.0, 0.1),
        (NO_AUXK, without_mean, 0.5, 1.0),
        (NO_AUXK, faint, 0.4, 1.0),
        (TOPK, faint, 0.0, 0.1),
        (NO_RESAMPLING, silent, 0.4, 1.0),
        (RELU, silent, 0.0, 0.1),
    ],
)
def test_each_cure_leaves_few_features_dead(
    far_off: list[Batch],
    settings: dict[str, Any],
    start: Callable[[SparseAutoencoder], None],
    low: float,
    high: float,
) -> None:
    """Starting at the mean; AuxK where features are too faint; resampling where they are silent."""
    one = learner(far_off, **settings | {"optim.dead_after": 10 * BATCH})
    start(one.sae)
    for number, batch in enumerate(far_off):
        one.apply(batch, one.gradients(batch, number / STEPS), number / STEPS)
    assert low <= one.dead.float().mean() <= high
