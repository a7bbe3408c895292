"""Directions of features, and the match of two dictionaries by them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from sae.errors import RunError
from sae.store import WEIGHTS
from sae.untrusted import read_header

AT_ONCE = 1 << 24
"""Cosines in memory at a time."""
SAME, KIN = 0.7, 0.4
"""Cosines from which two features are the same, and from which they have to do with each other."""
KINDS = ("shared", "split", "moved", "lost")


def decoder(sae_folder: Path) -> Float[ndarray, "d_sae d_out"]:
    """The decoder directions of an SAE, each of norm 1 (0 for one without a direction)."""
    file = sae_folder / WEIGHTS
    entry = read_header(file).get("W_dec")
    kinds = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    if entry is None or len(entry.shape) != 2 or entry.dtype not in kinds:
        raise RunError(f"{file} has no decoder W_dec of two dimensions")
    with file.open("rb") as data:
        start = 8 + int.from_bytes(data.read(8), "little") + entry.begin
    raw = np.fromfile(file, kinds[entry.dtype], entry.shape[0] * entry.shape[1], offset=start)
    if entry.dtype == "BF16":
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    rows = raw.astype(np.float32).reshape(entry.shape)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def match(ours: Float[ndarray, "n d"], theirs: Float[ndarray, "m d"]) -> Mapping[str, Any]:
    """For each of our features the nearest of theirs, its cosine, how many have us as nearest.

    kind (an index into KINDS): shared, each other's nearest from SAME; split, the nearest of
    several of theirs, from KIN; lost, below KIN to all; else moved. Raises RunError where the
    directions are of different spaces.
    """
    if ours.shape[1] != theirs.shape[1]:
        raise RunError(
            f"features of {ours.shape[1]} and of {theirs.shape[1]} dimensions have no cosine; "
            "compare SAEs of one hookpoint"
        )
    nearest, cosine = _nearest(ours, theirs)
    back, back_cosine = _nearest(theirs, ours)
    children = np.bincount(back[back_cosine >= KIN], minlength=len(ours))
    mutual = back[nearest] == np.arange(len(ours))
    kind = np.full(len(ours), KINDS.index("moved"))
    kind[cosine < KIN] = KINDS.index("lost")
    kind[children > 1] = KINDS.index("split")
    kind[mutual & (cosine >= SAME)] = KINDS.index("shared")
    return {"nearest": nearest, "cosine": cosine, "children": children, "kind": kind}


def _nearest(
    ours: Float[ndarray, "n d"], theirs: Float[ndarray, "m d"]
) -> tuple[Int[ndarray, " n"], Float[ndarray, " n"]]:
    step = max(1, AT_ONCE // max(1, len(theirs)))
    nearest, cosine = np.empty(len(ours), np.int64), np.empty(len(ours), np.float32)
    for start in range(0, len(ours), step):
        cosines = ours[start : start + step] @ theirs.T
        best = cosines.argmax(1)
        nearest[start : start + step] = best
        cosine[start : start + step] = cosines[np.arange(len(best)), best]
    return nearest, cosine
