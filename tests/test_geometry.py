"""Angles against brute force and exact densities; packings against configurations that are known:
six lines through an icosahedron's corners, 28 lines in seven dimensions."""

import math

import pytest
import torch

from sae import geometry
from sae.errors import ConfigError
from sae.geometry import (
    angle_counts,
    angle_density,
    coherence,
    effective_number,
    first_collision,
    guaranteed,
    keep_apart,
    pair_probability,
    spread,
    welch_limit,
)

THREE_LINES = 30.0
"""ε of three lines in the plane at 60°."""
ICOSAHEDRON = math.degrees(math.asin(1 / math.sqrt(5)))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "CHUNK", 16)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.degrees(math.acos(float(a @ b / a.norm() / b.norm())))


def test_every_pair_is_counted_once() -> None:
    vectors = torch.cat([randn(50, 6), torch.zeros(1, 6)])
    expected = [0] * 18
    for i in range(50):
        for j in range(i):
            expected[int(angle(vectors[i], vectors[j]) // 10)] += 1
    assert angle_counts(vectors, bins=18).tolist() == expected


def test_pairs_between_two_sets() -> None:
    vectors, others = randn(40, 6), randn(30, 6, seed=1)
    expected = [0] * 18
    for a in vectors:
        for b in others:
            expected[int(angle(a, b) // 10)] += 1
    assert angle_counts(vectors, others, bins=18).tolist() == expected


@pytest.mark.parametrize("d", [2, 3, 17])
def test_angles_of_random_vectors_follow_their_density(d: int) -> None:
    grid = torch.linspace(0, 180, 18001)
    density = angle_density(d, grid)
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-3)
    shares = angle_counts(randn(1500, d), bins=18) / (1500 * 1499 / 2)
    exact = torch.stack([torch.trapezoid(density[i * 1000 : i * 1000 + 1001], dx=0.01)
                         for i in range(18)])  # fmt: skip
    torch.testing.assert_close(shares, exact.float(), atol=5e-3, rtol=0)
    inside = (grid >= 70) & (grid <= 110)
    outside = 1 - torch.trapezoid(density[inside], grid[inside]).item()
    assert pair_probability(d, 20) == pytest.approx(outside, abs=1e-3)


def test_coherence_is_the_largest_cosine() -> None:
    vectors = randn(40, 5)
    rows = vectors / vectors.norm(dim=1, keepdim=True)
    cosines = (rows @ rows.T).abs().fill_diagonal_(0)
    assert coherence(vectors) == pytest.approx(cosines.max().item())
    assert coherence(vectors[:1]) == 0


def test_effective_number() -> None:
    rows = torch.tensor([[2.0, 0, 0, 0], [1, -1, 1, 1], [3, 3, 0, 0]])
    assert effective_number(rows).tolist() == [1, 4, 2]
    assert effective_number(randn(50, 3000)).mean().item() == pytest.approx(1000, rel=0.02)
    assert effective_number(torch.zeros(1, 3)).isnan().all()


@pytest.mark.parametrize(
    ("d", "degrees", "lines"),
    [(2, THREE_LINES, 3), (3, ICOSAHEDRON, 6), (7, math.degrees(math.asin(1 / 3)), 28)],
)
def test_lines_that_are_known_to_be_the_most_meet_the_welch_bound(
    d: int, degrees: float, lines: int
) -> None:
    assert welch_limit(d, degrees) == pytest.approx(lines)


@pytest.mark.parametrize(("d", "degrees"), [(8, 10), (64, 20), (256, 20), (1024, 10)])
def test_what_is_guaranteed_is_not_above_the_limit(d: int, degrees: float) -> None:
    n, outside = guaranteed(d, degrees), pair_probability(d, degrees)
    assert d <= n <= welch_limit(d, degrees)
    if n > d:
        assert n * (n - 1) / 2 * outside < 1 <= (n + 1) * n / 2 * outside


def test_those_kept_fit_and_those_dropped_do_not() -> None:
    vectors, limit = randn(200, 16), math.sin(math.radians(20))
    kept = keep_apart(vectors, 20)
    assert coherence(kept) <= limit
    rows = vectors / vectors.norm(dim=1, keepdim=True)
    expected: list[torch.Tensor] = []
    for row in rows:
        if all(abs(float(row @ other)) <= limit for other in expected):
            expected.append(row)
    torch.testing.assert_close(kept, torch.stack(expected))


@pytest.mark.parametrize("n", [5, 16, 17, 40])
def test_the_first_collision(n: int) -> None:
    vectors = torch.eye(64)[
        torch.cat([torch.arange(n), torch.tensor([n - 1]), torch.arange(60, 64)])
    ]
    assert first_collision(vectors, 20) == n
    assert first_collision(vectors[:n], 20) == n


def test_spreading_finds_the_icosahedron() -> None:
    found = max((spread(randn(6, 3, seed=seed), ICOSAHEDRON + 0.3) for seed in range(3)), key=len)
    assert len(found) == 6
    assert coherence(found) <= math.sin(math.radians(ICOSAHEDRON + 0.3))


def test_spreading_more_than_fit_drops_some() -> None:
    found = spread(randn(12, 3), ICOSAHEDRON + 0.3, steps=100)
    assert 3 <= len(found) <= 6
    assert coherence(found) <= math.sin(math.radians(ICOSAHEDRON + 0.3))


def test_spreading_packs_more_than_drawing() -> None:
    assert len(spread(randn(40, 16), 20)) == 40 > 1.3 * len(keep_apart(randn(5000, 16), 20))


@pytest.mark.parametrize(("d", "degrees"), [(1, 10), (8, 0), (8, 90), (8, math.nan)])
def test_impossible_questions_are_refused(d: int, degrees: float) -> None:
    with pytest.raises(ConfigError, match="expected"):
        welch_limit(d, degrees)
