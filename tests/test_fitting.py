"""A fit is a run without a model and a folder: on the same batches it gives the same bits; what is
planted is found, on raw activations in and out, for maps too."""

from pathlib import Path

import pytest
import torch
from tiny import RELU, planned, save

from sae import training
from sae.activations import Batch, Statistics
from sae.autoencoder import SparseAutoencoder
from sae.config import TrainConfig, resolve
from sae.errors import DataError, ModelError
from sae.fitting import fit
from sae.synthetic import PlantedConfig, PlantedFeatures


def config(**changes: str) -> TrainConfig:
    given = {
        "sae.d_sae": "24",
        "sae.sparsity.kind": "topk",
        "sae.sparsity.k": "2",
        "optim.batch": "256",
        "optim.pool": "1024",
        "optim.lr": "0.01",
        "tokens": "100_000",
    }
    return resolve(None, given | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.mark.parametrize("changes", [{}, RELU | {"optim.dead_after": "300"}], ids=["topk", "relu"])
def test_a_fit_gives_the_bits_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    plan = planned(save(tmp_path), changes)
    fixed = Statistics(torch.linspace(-1, 1, *plan.widths.values()), 3.7)
    monkeypatch.setattr(Statistics, "of", lambda parts, name: fixed)
    batches = [drawn[plan.hookpoints[0]] for drawn in training.Training(plan).stream]
    fitted = fit(batches, plan.config, dtype=plan.dtype)
    trained = SparseAutoencoder.from_pretrained(training.train(plan))
    for name, weights in trained.state_dict().items():
        assert torch.equal(weights, fitted.state_dict()[name]), name


@pytest.mark.parametrize("d_out", [None, 20])
def test_it_rebuilds_what_is_planted_from_raw_activations(d_out: int | None) -> None:
    """The targets of the map are 300 times the size of its inputs."""
    planted = PlantedFeatures(PlantedConfig(16, 24, 1.5, 0.5, d_out=d_out))
    generator, size = torch.Generator().manual_seed(1), 1.0 if d_out is None else 300.0

    def scaled(batch: Batch) -> Batch:
        return Batch(batch.x, batch.x if d_out is None else size * batch.y, batch.source)

    reported: list[int] = []
    sae = fit(
        map(scaled, planted.batches(256)),
        config(),
        report=lambda tokens, _: reported.append(tokens),
    )
    x, y = planted.embed(planted.draw(2000, generator), generator)
    error = (sae(x).recon - size * y).square().sum() / (size * (y - y.mean(0))).square().sum()
    assert error < 0.25
    assert (sae.d_out, sae.subtract_b_dec) == (d_out or 16, d_out is None)
    assert reported == [256 * (step + 1) for step in range(len(reported))]
    assert reported[-2] < 100_000 <= reported[-1]


def test_batches_that_are_not_finite_are_skipped() -> None:
    planted = PlantedFeatures(PlantedConfig(16, 24, 1.5))
    good = [next(planted.batches(256, seed)) for seed in range(5)]
    bad = Batch(good[0].x / 0, good[0].x / 0, good[0].source)
    small = config(tokens="1280")
    mixed = fit([good[0], bad, *good[1:4]], small)
    assert all(weights.isfinite().all() for weights in mixed.parameters())
    with pytest.raises(ModelError, match="batches: x are all zero or not finite"):
        fit([bad] * 5, small)


def test_too_few_batches_are_refused() -> None:
    planted = PlantedFeatures(PlantedConfig(16, 24, 1.5))
    with pytest.raises(DataError, match="tokens: 100,000 wanted, 512 came"):
        fit([next(planted.batches(256))] * 2, config())
