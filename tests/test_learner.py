"""Proves what a learner does from step to step: a penalty whose power falls keeps its size."""

from itertools import islice
from typing import Any

import pytest
import torch

from sae.activations import Batch, Statistics
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
