"""How directions lie to each other: their angles, how many are nearly perpendicular, and bounds.

In d dimensions at most d vectors are perpendicular, but exponentially many are nearly so. Here
"nearly" means that every pair is within 90° ± ε, that is |cosine| ≤ sin ε, in the same sense for
vectors and their opposites.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from scipy.special import betainc
from torch import Tensor
from torch.nn.functional import normalize

from sae.errors import ConfigError

CHUNK = 1024
"""Rows whose cosines with all others are in memory at a time."""
ORDERS = 200
"""Orders k of the Welch bounds that are tried."""


def angle_counts(
    vectors: Float[Tensor, "n d"], others: Float[Tensor, "m d"] | None = None, bins: int = 180
) -> Int[Tensor, " bins"]:
    """Pairs by their angle, in equal bins from 0° to 180°: all pairs of `vectors`, or all between
    `vectors` and `others`. Vectors of length 0 are left out."""
    counts = torch.zeros(bins, dtype=torch.long)
    for cosines in _cosines(vectors, others):
        degrees = torch.rad2deg(torch.arccos(cosines.clamp(-1, 1)))
        counts += torch.histc(degrees, bins, 0, 180).long()
    return counts


def _cosines(
    vectors: Float[Tensor, "n d"], others: Float[Tensor, "m d"] | None
) -> Iterator[Float[Tensor, " pairs"]]:
    """The cosine of each pair once, some rows at a time."""
    rows = _directions(vectors)
    columns = rows if others is None else _directions(others)
    for start in range(0, len(rows), CHUNK):
        cosines = rows[start : start + CHUNK] @ columns.T
        if others is not None:
            yield cosines.flatten()
        else:
            upper = torch.triu(torch.ones_like(cosines, dtype=torch.bool), diagonal=start + 1)
            yield cosines[upper]


def _directions(vectors: Tensor) -> Tensor:
    return normalize(vectors[vectors.norm(dim=1) > 0].float(), dim=1)


def coherence(vectors: Float[Tensor, "n d"]) -> float:
    """The largest |cosine| of any two of the vectors."""
    return max((float(c.abs().max()) for c in _cosines(vectors, None) if len(c)), default=0.0)


def effective_number(weights: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows"]:
    """How many entries of each row carry it, (Σw²)² / Σw⁴: 1 for one entry, d for equal ones.

    The expectation for Gaussian rows is near d/3. A row of zeros gives NaN.
    """
    squares = weights.double().square()
    return (squares.sum(-1).square() / squares.square().sum(-1)).to(weights.dtype)


# ------------------------------------------------------------------- how many are nearly at 90°


def pair_probability(d: int, degrees: float) -> float:
    """Probability that two random vectors are *not* within 90° ± `degrees`, exactly.

    Their squared cosine has the distribution Beta(½, (d − 1)/2).
    """
    _check(d, degrees)
    return float(betainc((d - 1) / 2, 0.5, math.cos(math.radians(degrees)) ** 2))


def angle_density(d: int, degrees: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Density, per degree, of the angle between two random vectors: ∝ sin(angle)^(d − 2)."""
    constant = math.lgamma(d / 2) - math.lgamma((d - 1) / 2) - math.log(math.pi) / 2
    log_sine = torch.sin(torch.deg2rad(degrees.double())).clamp_min(1e-300).log()
    return (constant + (d - 2) * log_sine).exp() * (math.pi / 180)


def guaranteed(d: int, degrees: float) -> int:
    """As many vectors as surely fit, by the argument of Johnson and Lindenstrauss.

    Of n random vectors the expected number of pairs outside is n(n − 1)/2 · `pair_probability`;
    where that is below 1, some draw has none. Grows like exp(d · sin²ε / 4). At least d, as an
    orthogonal basis always fits.
    """
    outside = pair_probability(d, degrees)
    return max(d, math.ceil((1 + math.sqrt(1 + 8 / outside)) / 2) - 1) if outside else 2**62


def welch_limit(d: int, degrees: float) -> float:
    """A number that no such set exceeds, the least over the orders k of Welch's bound.

    Any n vectors have a |cosine| c with c^2k ≥ (n / C(d+k−1, k) − 1) / (n − 1). Welch 1974, "Lower
    bounds on the maximum cross correlation of signals".
    """
    _check(d, degrees)
    log_square, least = 2 * math.log(math.sin(math.radians(degrees))), math.inf
    for k in range(1, ORDERS + 1):
        log_binomial = _log_binomial(d + k - 1, k)
        if log_binomial + k * log_square < 0:  # else this order allows any number
            power, share = math.exp(k * log_square), math.exp(-log_binomial)
            least = min(least, (1 - power) / (share - power))
    return least


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def first_collision(vectors: Float[Tensor, "n d"], degrees: float) -> int:
    """How many of the vectors, from the first, are within 90° ± `degrees` of each other."""
    rows, limit = _directions(vectors), math.sin(math.radians(degrees))
    for start in range(0, len(rows), CHUNK):
        block = rows[start : start + CHUNK]
        near = (block @ rows[: start + CHUNK].T).abs() > limit
        collides = near.tril(diagonal=start - 1).any(1)
        if collides.any():
            return start + int(collides.int().argmax())
    return len(rows)


def keep_apart(vectors: Float[Tensor, "n d"], degrees: float) -> Float[Tensor, "kept d"]:
    """Those vectors, in their order, that are within 90° ± `degrees` of all kept before."""
    rows, limit = _directions(vectors), math.sin(math.radians(degrees))
    kept = rows[:0]
    for start in range(0, len(rows), CHUNK):
        fits = ((rows[start : start + CHUNK] @ kept.T).abs() <= limit).all(1)
        new = rows[start : start + CHUNK][fits]
        near = (new @ new.T).abs() > limit
        chosen = torch.zeros(len(new), dtype=torch.bool)
        for i in range(len(new)):
            chosen[i] = not bool((near[i] & chosen).any())
        kept = torch.cat([kept, new[chosen]])
    return kept


def spread(
    vectors: Float[Tensor, "n d"], degrees: float, steps: int = 300, lr: float = 0.02
) -> Float[Tensor, "kept d"]:
    """The vectors moved apart by gradient descent, then those that fit: how many optimising packs.

    The loss is Σ max(|cosine| − sin ε, 0)² over the pairs; a pair just inside is left alone. What
    still collides at the end is dropped, so that the result always keeps its promise.
    """
    limit = math.sin(math.radians(degrees))
    free = _directions(vectors).requires_grad_()
    adam = torch.optim.Adam([free], lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    diagonal = torch.eye(len(free), dtype=torch.bool)
    for _ in range(steps):
        rows = normalize(free, dim=1)
        cosines = (rows @ rows.T).masked_fill(diagonal, 0)
        adam.zero_grad()
        (cosines.abs() - 0.998 * limit).relu().square().sum().backward()
        adam.step()
        schedule.step()
    return _without_collisions(_directions(free.detach()), limit)


def _without_collisions(rows: Float[Tensor, "n d"], limit: float) -> Float[Tensor, "kept d"]:
    """Drop the vector that collides most often, again and again, until none does."""
    near = ((rows @ rows.T).abs() > limit).fill_diagonal_(False).int()
    collisions = near.sum(1)
    kept = torch.ones(len(rows), dtype=torch.bool)
    while len(rows) and collisions.max() > 0:
        worst = int(collisions.argmax())
        kept[worst] = False
        collisions -= near[worst]
        collisions[worst] = 0
        near[:, worst] = 0
    return rows[kept]


def _check(d: int, degrees: float) -> None:
    if d < 2:
        raise ConfigError(f"d {d}: expected at least 2 dimensions")
    if not 0 < degrees < 90:
        raise ConfigError(f"degrees {degrees}: expected more than 0 and less than 90")
