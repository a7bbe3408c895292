"""A unit planted for a concept is found with its threshold, whatever the other units do."""

import torch
from torch import Tensor

from sae import isolation
from sae.concepts import VARIABLES, Concept

CONCEPTS = [
    Concept("relation", 0, "sport", 9),
    Concept("relation", 2, "capital", 9),
    Concept("template", 1, "template", 9),
]
N = 3000


def labels() -> Tensor:
    """Three relations and four templates, each off at times."""
    generator = torch.Generator().manual_seed(0)
    on = torch.full((N, len(VARIABLES)), -1)
    on[:, 0] = torch.randint(-1, 3, (N,), generator=generator)
    on[:, 3] = torch.randint(-1, 4, (N,), generator=generator)
    return on


def planted(on: Tensor, seed: int = 1) -> Tensor:
    """100 noisy units; 7, 70 and 99 know the three concepts, above 2, -1 and 0."""
    acts = torch.randn(N, 100, generator=torch.Generator().manual_seed(seed))
    truth = isolation.active(on, CONCEPTS).float()
    spread = 0.4 * torch.rand(N, 3, generator=torch.Generator().manual_seed(seed + 1))
    acts[:, [7, 70, 99]] = 2 * truth + spread + torch.tensor([0.8, -2.2, -1.2])
    return acts


def test_planted_units_are_chosen_and_hold_on_other_text() -> None:
    on = labels()
    choice = isolation.choose(planted(on), on, CONCEPTS)
    assert choice.unit.tolist() == [7, 70, 99]
    assert (choice.f1 > 0.93).all()  # thresholds are a tenth apart in the share of tokens
    f1 = isolation.judge(choice, planted(on, seed=5), on, CONCEPTS)
    assert (f1 > 0.93).all()
    assert isolation.isolated(f1).tolist() == [1, 1, 1]


def test_a_sparse_unit_may_have_the_threshold_zero() -> None:
    on = labels()
    acts = isolation.active(on, CONCEPTS).float()
    choice = isolation.choose(acts, on, CONCEPTS)
    assert torch.equal(choice.threshold, torch.zeros(3))
    assert torch.equal(choice.f1, torch.ones(3))


def test_the_best_f1_is_that_of_the_definition() -> None:
    on = labels()[:500]
    acts = torch.randn(500, 5, generator=torch.Generator().manual_seed(3))
    choice = isolation.choose(acts, on, CONCEPTS)
    truth = isolation.active(on, CONCEPTS)
    assert torch.allclose(isolation.judge(choice, acts, on, CONCEPTS), choice.f1)
    for concept in range(len(CONCEPTS)):
        true = truth[:, concept, None, None]
        every = acts[:, :, None] > acts.sort(0).values.T[None]
        best = (2 * (every & true).sum(0) / (every.sum(0) + true.sum())).max()
        assert best - 0.05 < choice.f1[concept] <= best + 1e-6


def test_chance_isolates_nothing() -> None:
    on = labels()
    acts = torch.randn(N, 100, generator=torch.Generator().manual_seed(4))
    assert isolation.isolated(isolation.choose(acts, on, CONCEPTS).f1).sum() == 0


def test_participation_counts_the_units_a_concept_is_spread_over() -> None:
    on = labels()
    truth = isolation.active(on, CONCEPTS).float()
    acts = torch.cat([truth[:, :1], truth[:, 1:2].expand(-1, 8)], dim=1)
    noise = 0.01 * torch.randn(N, 9, generator=torch.Generator().manual_seed(6))
    for concept, expected in enumerate((1, 8)):
        own = acts[:, :1] if concept == 0 else acts[:, 1:]
        silent = torch.zeros(N, 3)
        units = torch.cat([own + noise[:, : own.shape[1]], silent], dim=1)
        found = isolation.participation(units, on, CONCEPTS[concept : concept + 1])
        assert torch.allclose(found, torch.tensor([float(expected)]), rtol=1e-3)


def test_intervals_hold_the_mean_and_shrink_with_n() -> None:
    values = (torch.arange(400) % 2).double()
    wide, narrow = isolation.bootstrap(values[:20]), isolation.bootstrap(values)
    assert wide.mean == narrow.mean == 0.5
    assert wide.low < narrow.low < 0.5 < narrow.high < wide.high
    assert abs((narrow.high - narrow.low) - 2 * 1.96 * 0.5 / 20) < 0.01
    assert isolation.bootstrap(torch.ones(9).double()) == isolation.Interval(1, 1, 1)
