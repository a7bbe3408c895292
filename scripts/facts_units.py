"""Which single unit says best that a concept of `builtin:facts` is on; for study_facts.py."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae import concepts, hooks, isolation
from sae.activations import Batch
from sae.concepts import Concept, Labelled
from sae.config import TrainConfig
from sae.fitting import fit
from sae.hooks import Hookpoint
from sae.intervention import Autoencoders
from sae.isolation import bootstrap, isolated
from sae.language_model import LanguageModel

ROWS = 32
"""Documents that the model reads at a time."""
RIDGE = 10.0
"""What the probes' normal equations are stiffened by, for standardised inputs."""

Place = Callable[[Labelled], Tensor]
"""Which tokens [rows seq] are read."""
Acts = dict[Hookpoint, Tensor]
Bank = Callable[[Hookpoint, Tensor], Tensor]
"""Raw activations [n d] at a hookpoint → units [n units]."""


@dataclass
class Side:
    """The read tokens of one side of the text: activations [n d], and the values that are on."""

    acts: Acts
    on: Tensor


@torch.no_grad()
def read(
    lm: LanguageModel,
    points: Sequence[Hookpoint],
    place: Place,
    *,
    heldout: bool,
    documents: int | None = None,
) -> Side:
    """Read the first `documents` (default all) of one side of the text."""
    text = concepts.read(lm.tokenizer, heldout=heldout, documents=documents)
    wanted = place(text)
    parts: dict[Hookpoint, list[Tensor]] = {point: [] for point in points}
    for rows in torch.arange(len(wanted)).split(ROWS):
        with hooks.capture(lm.model, list(points)) as acts:
            lm.model(text.tokens[rows])
        for point in points:
            parts[point].append(acts[point][wanted[rows]])
    return Side({point: torch.cat(part) for point, part in parts.items()}, text.values[wanted])


def train(acts: Acts, config: TrainConfig) -> Autoencoders:
    """One SAE for each hookpoint, on the same tokens in the same order."""
    return {
        point: fit(batches(x, config), config).requires_grad_(False) for point, x in acts.items()
    }


def batches(x: Tensor, config: TrainConfig) -> Iterator[Batch]:
    """The rows of x in a new order on each pass, until `config.tokens` are drawn."""
    generator = torch.Generator().manual_seed(config.seed)
    size, left = config.optim.batch, config.tokens
    while left > 0:
        for rows in torch.randperm(len(x), generator=generator).split(size)[: len(x) // size]:
            yield Batch(x[rows], x[rows], torch.zeros(size, 2, dtype=torch.long))
            left -= size


# ---------------------------------------------------------------------------------------- banks


def features(*saes: Autoencoders) -> Bank:
    """What the SAEs encode, side by side where there are several at a hookpoint."""
    return lambda point, x: torch.cat([each[point].encode(x) for each in saes], dim=1)


def themselves(_: Hookpoint, x: Tensor) -> Tensor:
    """The activations as they are: neurons at `mlp_act`."""
    return x


def directions(units: int) -> Bank:
    """So many random directions."""

    def project(point: Hookpoint, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return x @ normalize(torch.randn(x.shape[1], units, generator=generator), dim=0)

    return project


def components(acts: Acts) -> Bank:
    """Principal components of the training activations, each with both signs."""
    found = {
        point: torch.linalg.svd(x - x.mean(0), full_matrices=False)[2] for point, x in acts.items()
    }

    def project(point: Hookpoint, x: Tensor) -> Tensor:
        scores = x @ found[point].T
        return torch.cat([scores, -scores], dim=1)

    return project


def probes(side: Side, listed: Sequence[Concept]) -> Bank:
    """A ridge regression for each concept, which is told the labels: what linear reading can do."""
    truth = isolation.active(side.on, listed).float()
    found = {}
    for point, x in side.acts.items():
        mean, deviation = x.mean(0), x.std(0).clamp_min(1e-6)
        z = (x - mean) / deviation
        stiff = z.T @ z + RIDGE * torch.eye(z.shape[1])
        weights = torch.linalg.solve(stiff, z.T @ (truth - truth.mean(0)))
        found[point] = mean, deviation, weights

    def project(point: Hookpoint, x: Tensor) -> Tensor:
        mean, deviation, weights = found[point]
        return (x - mean) / deviation @ weights

    return project


# --------------------------------------------------------------------------------------- scores


@torch.no_grad()
def score(
    bank: Bank, sides: tuple[Side, Side], listed: Sequence[Concept], *, spread: bool = False
) -> dict[str, Any]:
    """Each concept's best unit over all hookpoints, by the first side, and its F1 on the second.

    With `spread`, also over how many units each concept is spread, at the hookpoint with fewest.
    """
    chosen, tested, units, over = [], [], 0, []
    for point in sides[0].acts:
        first, second = (bank(point, side.acts[point]) for side in sides)
        choice = isolation.choose(first, sides[0].on, listed)
        chosen.append(choice.f1)
        tested.append(isolation.judge(choice, second, sides[1].on, listed))
        units += first.shape[1]
        over += [isolation.participation(first, sides[0].on, listed)] if spread else []
    where = torch.stack(chosen).argmax(0)
    f1 = torch.stack(tested).gather(0, where[None])[0]
    return {
        "units": units,
        "train": torch.stack(chosen).amax(0).tolist(),
        "f1": f1.tolist(),
        "where": [str(list(sides[0].acts)[i]) for i in where.tolist()],
        "spread": torch.stack(over).nan_to_num(torch.inf).amin(0).tolist() if spread else None,
    }


def table(results: Mapping[str, Mapping[str, Any]], listed: Sequence[Concept]) -> Iterator[str]:
    """One row a bank in Markdown; differences are to the first bank, paired by concept."""
    variables = list(dict.fromkeys(concept.variable for concept in listed))
    heads = ("units", "number", "isolated", "less than features", "mean F1", *variables)
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    ours = isolated(torch.tensor(next(iter(results.values()))["f1"]))
    for name, result in results.items():
        f1 = torch.tensor(result["f1"])
        own = isolated(f1)
        less = "" if torch.equal(own, ours) else bootstrap(ours - own)
        shares = []
        for variable in variables:
            mine = torch.tensor([concept.variable == variable for concept in listed])
            shares.append(f"{own[mine].mean():.0%}")
        cells = (name, f"{result['units']:,}", bootstrap(own), less, f"{f1.mean():.3f}", *shares)
        yield f"| {' | '.join(map(str, cells))} |"
