"""A place on a plane for every feature, near others of a like direction: UMAP, or two axes."""

import contextlib
import importlib
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float
from numpy import ndarray

AT_ONCE = 1 << 24
"""Bytes of rows that are made at a time."""
FITTED = 4096
"""Rows that the axes are fitted on."""
UMAP_BYTES = 1 << 28
"""Of rows, up to which they are given to UMAP."""
ROUNDS = 12
NEIGHBOURS = 15
AXES, UMAP = "principal components of the decoder", "UMAP of the decoder directions, by cosine"


class Rows(Protocol):
    """Vectors that are made when asked for, [n d] all together."""

    def __len__(self) -> int: ...

    def __getitem__(self, which: Any, /) -> Any: ...


def places(rows: Rows, at_once: int = AT_ONCE) -> tuple[Float[ndarray, "n 2"], str]:
    """A place for each row, and how it was found.

    By UMAP (McInnes et al. 2018, arXiv:1802.03426) where the package umap-learn is installed and
    the rows take at most UMAP_BYTES, else by principal components; `at_once` bytes of rows are made
    at a time for those.
    """
    d = rows[np.zeros(1, int)].shape[1]
    if len(rows) > NEIGHBOURS and 4 * d * len(rows) <= UMAP_BYTES:
        with contextlib.suppress(ImportError):
            umap = importlib.import_module("umap")
            return _umap(umap, rows[np.arange(len(rows))]), UMAP
    return principal_axes(rows, at_once), AXES


def _umap(umap: Any, rows: Float[ndarray, "n d"]) -> Float[ndarray, "n 2"]:
    fit = umap.UMAP(n_neighbors=NEIGHBOURS, metric="cosine", random_state=0, n_jobs=1)
    return np.asarray(fit.fit_transform(rows), np.float32)


def principal_axes(rows: Rows, at_once: int = AT_ONCE) -> Float[ndarray, "n 2"]:
    """The two principal components of rows, by subspace iteration on FITTED of them.

    `at_once` bytes of rows are made at a time.
    """
    random = np.random.default_rng(0)
    d = rows[np.zeros(1, int)].shape[1]
    many = max(1, at_once // (4 * d))
    chosen = random.permutation(len(rows))[:FITTED]
    sample = np.concatenate(
        [rows[chosen[a : a + many]] for a in range(0, len(chosen), many)], dtype=np.float32
    )
    mean = sample.mean(0)
    sample = sample - mean
    axes = random.standard_normal((d, min(8, d)), np.float32)
    for _ in range(ROUNDS):
        axes, _ = np.linalg.qr(sample.T @ (sample @ axes))
    _, _, turn = np.linalg.svd(sample @ axes, full_matrices=False)
    axes = axes @ turn[:2].T
    found = np.zeros((len(rows), 2), np.float32)
    for start in range(0, len(rows), many):
        part = np.arange(start, min(start + many, len(rows)))
        found[part, : axes.shape[1]] = (rows[part] - mean) @ axes
    return found
