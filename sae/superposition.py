"""The toy model of superposition: more features than dimensions, and which of them find room.

h = Wᵀx        x̂ = ReLU(W h + b)        loss = Σ_i importance_i · (x_i − x̂_i)²

Elhage et al. 2022, "Toy Models of Superposition" (transformer-circuits.pub/2022/toy_model). Many
models of one size train at once, each with its own importances and sparsity, so that a whole phase
diagram takes seconds.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import ConfigError

SCORED = 16
"""Batches on which the starts of one model are compared."""


@dataclass(frozen=True)
class ToyModels:
    """Trained toy models; the rows of `W` are the directions of the features."""

    W: Float[Tensor, "models n_features d_hidden"]
    b: Float[Tensor, "models n_features"]

    def __call__(
        self, x: Float[Tensor, "models batch n_features"]
    ) -> Float[Tensor, "models batch n_features"]:
        """The reconstruction ReLU(W Wᵀ x + b)."""
        return torch.baddbmm(self.b[:, None], x @ self.W, self.W.mT).relu_()


def draw(
    active: Float[Tensor, " models"], batch: int, n_features: int, generator: torch.Generator
) -> Float[Tensor, "models batch n_features"]:
    """Features that are uniform in [0, 1] with probability `active`, and 0 otherwise.

    All models see the same random numbers and differ in which of them count.
    """
    chance, values = torch.rand(2, batch, n_features, generator=generator)
    return torch.where(chance < active[:, None, None], values, 0.0)


def train_toy(
    d_hidden: int,
    importance: Float[Tensor, "models n_features"],
    active: Float[Tensor, " models"],
    *,
    steps: int = 1000,
    batch: int = 256,
    lr: float = 1e-2,
    restarts: int = 1,
    seed: int = 0,
) -> ToyModels:
    """Train one model for each row of `importance`, with the sparsity 1 − `active`.

    Adam with the learning rate falling to 0 along a cosine, weights starting from small normal
    numbers; of `restarts` starts the one of lowest loss is kept, as in the paper. Each model's loss
    is divided by its mean number of active features, so that Adam treats all alike. Raises
    ConfigError where the shapes do not fit or a probability is not in (0, 1].
    """
    _check(d_hidden, importance, active)
    rows, n = importance.shape
    importance, active = importance.repeat(restarts, 1), active.repeat(restarts)
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(len(active), n, d_hidden, generator=generator).div_(math.sqrt(n))
    toy = ToyModels(W.requires_grad_(), torch.zeros(len(active), n).requires_grad_())
    adam = torch.optim.Adam([toy.W, toy.b], lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    weight = importance / active[:, None]
    for _ in range(steps):
        adam.zero_grad()
        toy_loss(toy, draw(active, batch, n, generator), weight).sum().backward()
        adam.step()
        schedule.step()
    with torch.no_grad():
        drawn = (draw(active, batch, n, generator) for _ in range(SCORED))
        losses = torch.stack([toy_loss(toy, x, importance) for x in drawn]).sum(0)
    best = losses.view(restarts, rows).argmin(0) * rows + torch.arange(rows)
    return ToyModels(toy.W.detach()[best], toy.b.detach()[best])


def toy_loss(
    toy: ToyModels,
    x: Float[Tensor, "models batch n_features"],
    importance: Float[Tensor, "models n_features"],
) -> Float[Tensor, " models"]:
    """Mean over the batch of Σ_i importance_i · (x_i − x̂_i)²."""
    return ((toy(x) - x).square().mean(1) * importance).sum(-1)


def dimensionality(W: Float[Tensor, "*models n d"]) -> Float[Tensor, "*models n"]:
    """The share of a dimension that each feature has to itself: ‖w_i‖² / Σ_j (ŵ_i · w_j)².

    1 where it is orthogonal to all others, ½ in an antipodal pair, 2/5 in a pentagon, 0 where the
    feature is not represented. The sum over the features is at most d.
    """
    squares = W.square().sum(-1)
    return squares / (squares + interference(W)).clamp_min(torch.finfo(W.dtype).tiny)


def interference(W: Float[Tensor, "*models n d"]) -> Float[Tensor, "*models n"]:
    """What the others write on each feature's direction, Σ_{j≠i} (ŵ_i · w_j)²."""
    directions = torch.nn.functional.normalize(W, dim=-1)
    squares = (directions @ W.mT).square()
    return squares.sum(-1) - squares.diagonal(dim1=-2, dim2=-1)


def represented(W: Float[Tensor, "*models n d"]) -> Float[Tensor, "*models"]:
    """How many features are represented: ‖W‖², since ‖w_i‖ is near 1 for those and near 0 else."""
    return W.square().sum((-2, -1))


def pair_threshold(importance: float) -> float:
    """Activity below which two features share one dimension, the second of this importance.

    Compared are the exact losses of two features (p: probability to be active) in one dimension:
    with w = (1, −1) both are kept, at the cost of E[min(x_1, x_2)²] · (1 + importance) =
    p² (1 + importance) / 6; with w = (1, 0) the second stays at its mean, at the cost of
    importance · Var(x_2) = importance · (p/3 − p²/4), and likewise for the first. The threshold is
    where the better single one costs as much as the pair.
    """
    if not importance > 0:
        raise ConfigError(f"importance {importance}: expected more than 0")
    less = min(importance, 1.0)
    return 4 * less / (2 * (1 + importance) + 3 * less)


def _check(d_hidden: int, importance: Tensor, active: Tensor) -> None:
    if importance.ndim != 2 or active.shape != importance.shape[:1]:
        raise ConfigError(
            f"expected importance [models n_features] and active [models], got "
            f"{list(importance.shape)} and {list(active.shape)}"
        )
    if d_hidden < 1:
        raise ConfigError(f"d_hidden {d_hidden}: expected at least 1")
    if not bool(((active > 0) & (active <= 1)).all()):
        raise ConfigError("active: expected probabilities above 0 and at most 1")
