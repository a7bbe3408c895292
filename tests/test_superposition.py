"""Toy models find the solutions that are known: the most important features where all are active,
antipodal pairs and a pentagon where few are; and the measures give what such weights must."""

import math

import pytest
import torch

from sae.errors import ConfigError
from sae.superposition import (
    ToyModels,
    dimensionality,
    draw,
    interference,
    pair_threshold,
    represented,
    toy_loss,
    train_toy,
)

PENTAGON = torch.tensor(
    [[math.cos(2 * math.pi * i / 5), math.sin(2 * math.pi * i / 5)] for i in range(5)]
)
ANTIPODAL = torch.tensor([[1.0], [-1.0]])


@pytest.mark.parametrize(
    ("W", "share"),
    [(torch.eye(3), 1.0), (ANTIPODAL, 1 / 2), (PENTAGON, 2 / 5), (3 * PENTAGON, 2 / 5)],
)
def test_dimensions_of_known_shapes(W: torch.Tensor, share: float) -> None:
    torch.testing.assert_close(dimensionality(W), torch.full((len(W),), share))
    assert dimensionality(W).sum().item() == pytest.approx(W.shape[1])


def test_a_feature_without_direction_has_no_dimension() -> None:
    W = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert dimensionality(W).tolist() == [1, 0]
    assert interference(W).tolist() == [0, 0]
    assert represented(W).item() == 1


def test_interference_is_what_the_others_write() -> None:
    W = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(0))
    for model, found in zip(W, interference(W), strict=True):
        for i, row in enumerate(model):
            others = model[torch.arange(7) != i] @ (row / row.norm())
            assert found[i].item() == pytest.approx(others.square().sum().item(), rel=1e-4)


def test_the_forward_pass_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    W, b = torch.randn(2, 5, 3, generator=generator), torch.randn(2, 5, generator=generator)
    x = torch.rand(2, 4, 5, generator=generator)
    for model in range(2):
        for sample in range(4):
            hidden = W[model].T @ x[model, sample]
            expected = torch.relu(W[model] @ hidden + b[model])
            torch.testing.assert_close(ToyModels(W, b)(x)[model, sample], expected)


def test_features_are_active_as_often_as_asked() -> None:
    x = draw(torch.tensor([0.03, 0.5, 1.0]), 20_000, 3, torch.Generator().manual_seed(0))
    share = (x > 0).float().mean((1, 2))
    torch.testing.assert_close(share, torch.tensor([0.03, 0.5, 1.0]), atol=0.01, rtol=0)
    assert x[2].mean().item() == pytest.approx(0.5, abs=0.01)


def test_dense_features_give_the_most_important_ones() -> None:
    """As PCA does: each of these has a dimension to itself, the others none."""
    importance = 0.5 ** torch.arange(6.0)
    norms = train_toy(3, importance[None], torch.ones(1), steps=500).W[0].norm(dim=1)
    assert norms[:3].tolist() == pytest.approx([1, 1, 1], abs=0.05)
    assert norms[3:].max() < 0.2


def test_two_sparse_features_share_a_dimension_as_opposites() -> None:
    toy = train_toy(1, torch.ones(1, 2), torch.tensor([0.05]), steps=400, batch=512, restarts=8)
    first, second = toy.W[0, :, 0].tolist()
    assert first * second == pytest.approx(-1, abs=0.15)
    assert dimensionality(toy.W).flatten().tolist() == pytest.approx([0.5, 0.5], abs=0.05)


def test_five_sparse_features_in_two_dimensions_make_a_pentagon() -> None:
    W = train_toy(2, torch.ones(1, 5), torch.tensor([0.05]), steps=500, batch=512, restarts=4).W[0]
    angles = torch.atan2(W[:, 1], W[:, 0]).sort().values
    steps = angles.diff(append=angles[:1] + 2 * math.pi)
    assert torch.rad2deg(steps).tolist() == pytest.approx([72] * 5, abs=3)


def test_the_threshold_is_where_exact_losses_meet() -> None:
    """Against the losses of both solutions on a million samples."""
    generator = torch.Generator().manual_seed(0)
    for weight in (0.3, 1.0, 3.0):
        p, importance = pair_threshold(weight), torch.tensor([[1.0, weight]])
        x = draw(torch.tensor([p]), 1_000_000, 2, generator)
        pair = ToyModels(ANTIPODAL[None], torch.zeros(1, 2))
        kept = 0 if weight < 1 else 1
        single = ToyModels(torch.eye(2)[None, :, kept : kept + 1], torch.full((1, 2), p / 2))
        single.b[0, kept] = 0
        both = toy_loss(pair, x, importance).item()
        assert both == pytest.approx(toy_loss(single, x, importance).item(), rel=0.01)


def test_the_same_seed_gives_the_same_models() -> None:
    runs = [train_toy(2, torch.ones(2, 3), torch.full((2,), 0.5), steps=5).W for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("d_hidden", "importance", "active", "message"),
    [
        (0, torch.ones(1, 2), torch.ones(1), "d_hidden 0"),
        (1, torch.ones(2), torch.ones(1), "got \\[2\\]"),
        (1, torch.ones(2, 2), torch.ones(1), "active \\[models\\]"),
        (1, torch.ones(1, 2), torch.zeros(1), "above 0"),
        (1, torch.ones(1, 2), torch.full((1,), torch.nan), "above 0"),
    ],
)
def test_what_does_not_fit_is_refused(
    d_hidden: int, importance: torch.Tensor, active: torch.Tensor, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train_toy(d_hidden, importance, active)


def test_importances_have_a_threshold_only_above_0() -> None:
    with pytest.raises(ConfigError, match="importance 0"):
        pair_threshold(0)
    assert pair_threshold(1) == pytest.approx(4 / 7)
