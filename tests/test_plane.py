"""Planted planes are found again, and UMAP is asked where it is there and the rows fit."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sae import plane
from sae.plane import AXES, UMAP, places, principal_axes


@pytest.mark.parametrize("at_once", [320, 10**6])
def test_the_axes_are_the_principal_components(at_once: int) -> None:
    """Planted: points on a plane in ten dimensions, in a frame of its own; 8 rows show it too."""
    random = np.random.default_rng(1)
    flat = random.standard_normal((500, 2)) * [5, 1]
    frame, _ = np.linalg.qr(random.standard_normal((10, 10)))
    found = principal_axes((flat @ frame[:2] + 3).astype(np.float32), at_once)
    distances = np.linalg.norm(flat[:50, None] - flat[None, :50], axis=-1)
    np.testing.assert_allclose(
        np.linalg.norm(found[:50, None] - found[None, :50], axis=-1), distances, atol=1e-3
    )


def test_one_dimension_is_a_line() -> None:
    found = principal_axes(np.arange(3, dtype=np.float32)[:, None])
    assert np.abs(found[:, 0]).tolist() == [1, 0, 1] and not found[:, 1].any()


def rows(n: int, d: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, d), np.float32)


def test_umap_is_asked_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Fit:
        def __init__(self, **settings: Any) -> None:
            asked.append(settings)

        def fit_transform(self, given: np.ndarray) -> np.ndarray:
            return given[:, :2] * 3.0

    given = rows(50, 4)
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Fit))
    found, how = places(given)
    assert how == UMAP and (found == given[:, :2] * 3).all()
    assert asked[0]["metric"] == "cosine" and asked[0]["random_state"] == 0
    assert places(given[:5])[1] == AXES  # fewer than UMAP's neighbours
    monkeypatch.setattr(plane, "UMAP_BYTES", 4 * given.size - 1)
    assert places(given)[1] == AXES
    monkeypatch.setitem(sys.modules, "umap", None)
    monkeypatch.setattr(plane, "UMAP_BYTES", 4 * given.size)
    found, how = places(given)
    assert how == AXES and (found == principal_axes(given)).all()
