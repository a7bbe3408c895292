"""Does one unit stand for one concept? Neurons, features or directions against labelled text.

Of every pair of unit and concept the best threshold is found in one pass over the training split;
each concept then has its best unit, which is judged on other text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.concepts import ISOLATED, VARIABLES, Concept
from sae.geometry import effective_number

SHARES = np.geomspace(2e-4, 0.6, 64)
"""Shares of the tokens on which a unit may be on: the thresholds tried, in equal ratios."""
SAMPLED = 20_000
"""Tokens, evenly spread, from which a unit's quantiles are taken."""
UNITS_AT_ONCE = 64
RESAMPLES = 10_000


@dataclass(frozen=True)
class Choice:
    """Of each concept the unit and the threshold with the best F1 on the text they were chosen on.

    `f1` is that best F1; a unit is on where it is above the threshold.
    """

    unit: Int[Tensor, " concepts"]
    threshold: Float[Tensor, " concepts"]
    f1: Float[Tensor, " concepts"]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval over concepts or persons."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def choose(
    acts: Float[Tensor, "n units"],
    on: Int[Tensor, "n variables"],
    concepts: Sequence[Concept],
) -> Choice:
    """The best unit and threshold of each concept, over all units and SHARES of the tokens."""
    columns, sizes = _columns(on, concepts)
    best = Choice(
        torch.zeros(len(concepts), dtype=torch.long),
        torch.zeros(len(concepts)),
        torch.full((len(concepts),), -1.0),
    )
    for start in range(0, acts.shape[1], UNITS_AT_ONCE):
        chunk = acts[:, start : start + UNITS_AT_ONCE].T.contiguous()
        edges = _edges(chunk)
        score = _f1(_above(chunk, edges, columns, sizes), columns, sizes, concepts)
        f1, place = score.flatten(0, 1).max(0)
        unit, edge = place // edges.shape[1], place % edges.shape[1]
        better = f1 > best.f1
        best = Choice(
            torch.where(better, start + unit, best.unit),
            torch.where(better, edges[unit, edge], best.threshold),
            torch.where(better, f1, best.f1),
        )
    return best


def judge(
    choice: Choice,
    acts: Float[Tensor, "n units"],
    on: Int[Tensor, "n variables"],
    concepts: Sequence[Concept],
) -> Float[Tensor, " concepts"]:
    """F1 of each concept's unit and threshold on other text; 0 where it is never right."""
    said = acts[:, choice.unit] > choice.threshold
    truth = active(on, concepts)
    return 2 * (said & truth).sum(0) / (said.sum(0) + truth.sum(0)).clamp_min(1)


def active(on: Int[Tensor, "n variables"], concepts: Sequence[Concept]) -> Bool[Tensor, "n c"]:
    """Whether each concept is on at each token."""
    columns = torch.tensor([concept.column for concept in concepts])
    return on[:, columns] == torch.tensor([concept.value for concept in concepts])


def _columns(
    on: Int[Tensor, "n variables"], concepts: Sequence[Concept]
) -> tuple[Int[np.ndarray, "variables n"], list[int]]:
    """Of each variable the value at each token, from 1 (0: none), and how many values there are."""
    columns = on.T.numpy() + 1
    asked = [max((c.value for c in concepts if c.column == i), default=-1) + 2
             for i in range(len(VARIABLES))]  # fmt: skip
    return columns, [max(int(c.max()) + 1, size) for c, size in zip(columns, asked, strict=True)]


def _edges(acts: Float[Tensor, "units n"]) -> Float[Tensor, "units edges"]:
    """Thresholds, ascending, above which a unit is on SHARES of the tokens."""
    sample = acts[:, :: max(acts.shape[1] // SAMPLED, 1)].sort(dim=1, descending=True).values
    ranks = (SHARES[::-1] * sample.shape[1]).astype(int).clip(max=sample.shape[1] - 1)
    return sample[:, ranks.copy()].contiguous()


def _above(
    acts: Float[Tensor, "units n"],
    edges: Float[Tensor, "units edges"],
    columns: Int[np.ndarray, "variables n"],
    sizes: list[int],
) -> list[Int[np.ndarray, "units edges values"]]:
    """Of each variable how many tokens of each value lie above each edge.

    Each token has one value of each variable, so counting costs the same for any number of values.
    """
    units, n_edges = edges.shape
    place = torch.searchsorted(edges, acts).numpy()  # the number of edges below each activation
    place += np.arange(units)[:, None] * (n_edges + 1)
    found = []
    for column, size in zip(columns, sizes, strict=True):
        counts = np.bincount(
            (place * size + column).ravel(), minlength=units * (n_edges + 1) * size
        )
        counts = counts.reshape(units, n_edges + 1, size)
        found.append(counts[:, ::-1].cumsum(1)[:, ::-1][:, 1:])
    return found


def _f1(
    above: list[Int[np.ndarray, "units edges values"]],
    columns: Int[np.ndarray, "variables n"],
    sizes: list[int],
    concepts: Sequence[Concept],
) -> Float[Tensor, "units edges concepts"]:
    """2·TP / (said + true) of every unit, threshold and concept."""
    said = above[0].sum(2)
    true = [
        np.bincount(column, minlength=size) for column, size in zip(columns, sizes, strict=True)
    ]
    score = np.empty((*said.shape, len(concepts)), dtype=np.float32)
    for index, concept in enumerate(concepts):
        hits = above[concept.column][:, :, concept.value + 1]
        score[:, :, index] = (
            2 * hits / np.maximum(said + true[concept.column][concept.value + 1], 1)
        )
    return torch.from_numpy(score)


def participation(
    acts: Float[Tensor, "n units"], on: Int[Tensor, "n variables"], concepts: Sequence[Concept]
) -> Float[Tensor, " concepts"]:
    """Over how many units each concept is spread: (Σw²)² / Σw⁴.

    w: how far a unit's mean where the concept is on lies from its mean elsewhere, in standard
    deviations of the unit. 1 if only one unit knows the concept; units that never vary count 0.
    """
    truth = active(on, concepts).float()
    n_on = truth.sum(0)[:, None]
    with_it, total = truth.T @ acts, acts.sum(0)
    apart = with_it / n_on - (total - with_it) / (len(acts) - n_on)
    deviation = acts.std(0)
    return effective_number(torch.where(deviation > 0, apart / deviation, 0))


def bootstrap(values: Float[Tensor, " n"], seed: int = 0) -> Interval:
    """Mean and 95 % interval over resampled concepts or persons.

    Of differences it is a paired test: an interval without 0 is significant at 5 %.
    """
    generator = np.random.default_rng(seed)
    array = values.double().numpy()
    means = array[generator.integers(len(array), size=(RESAMPLES, len(array)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(array.mean()), float(low), float(high))


def isolated(f1: Float[Tensor, " concepts"]) -> Float[Tensor, " concepts"]:
    """1 for each concept with F1 of at least ISOLATED, otherwise 0."""
    return (f1 >= ISOLATED).double()
