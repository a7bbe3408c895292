"""The table of sparsities: every kind there is, and what its tests need to know.

A new kind gets a line here, and all tests of properties, training and resuming run for it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny import RELU
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.config import Moment
from sae.sparsity import BatchTopK, Gated, JumpRelu, ReluL1, Sparsity, TopK

D_SAE = 24


def largest(pre: Tensor, count: int) -> Tensor:
    """Whether each of the numbers is among the `count` largest, by sorting."""
    bound = pre.flatten().sort(descending=True).values[count - 1]
    return pre >= bound


@dataclass(frozen=True)
class Variant:
    """One kind, named by the first word, or one way to train it.

    `active` is which features of [batch d_sae] a step of `now` has active.
    """

    make: Callable[[], Sparsity]
    active: Callable[[Tensor, Sparsity], Tensor]
    tiny: dict[str, str | None]
    """Settings of a tiny run, on top of those in `tiny.overrides`."""
    now: Moment = field(default_factory=Moment)
    freezes_decoder: bool = False
    """Whether part of the loss has a frozen decoder, whose gradient then is not the loss's."""


VARIANTS = {
    "relu_l1": Variant(
        make=lambda: ReluL1(5.0),
        active=lambda pre, _: pre > 0,
        tiny=RELU | {"optim.dead_after": "200"},
        now=Moment(coef=0.7),
    ),
    "relu_l1 annealed": Variant(
        make=lambda: ReluL1(5.0),
        active=lambda pre, _: pre > 0,
        tiny=RELU | {"optim.dead_after": "200", "sae.sparsity.p_end": "0.3"},
        now=Moment(coef=0.7, p=0.3),
    ),
    "topk": Variant(
        make=lambda: TopK(4),
        active=lambda pre, _: (pre > 0) & torch.stack([largest(row, 4) for row in pre]),
        tiny={},
        now=Moment(k=4),
    ),
    "batchtopk": Variant(
        make=lambda: BatchTopK(4),
        active=lambda pre, _: (pre > 0) & largest(pre, 4 * len(pre)),
        tiny={"sae.sparsity.kind": "batchtopk", "sae.sparsity.k_start": "2"},
        now=Moment(k=4),
    ),
    "jumprelu": Variant(
        make=lambda: JumpRelu(1.0, 0.3, tanh=2.0, preact_coef=0.1),
        active=lambda pre, sparsity: pre > sparsity.get_parameter("log_threshold").exp(),
        tiny={"sae.sparsity.kind": "jumprelu", "sae.sparsity.k": None},
        now=Moment(coef=0.7),
    ),
    "gated": Variant(
        make=lambda: Gated(5.0),
        active=lambda pre, sparsity: (
            (pre > 0)
            & (sparsity.get_parameter("r_mag").exp() * pre + sparsity.get_parameter("b_mag") > 0)
        ),
        tiny=RELU | {"sae.sparsity.kind": "gated", "optim.dead_after": "200"},
        now=Moment(coef=0.7),
        freezes_decoder=True,
    ),
}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def build(
    sparsity: Sparsity,
    d_in: int = 6,
    d_out: int = 6,
    d_sae: int = D_SAE,
    dtype: torch.dtype = torch.float32,
    **shape: Any,
) -> SparseAutoencoder:
    """An autoencoder whose tensors are all random, the sparsity's too; `shape`: skip, sites."""
    centred = d_in == d_out and not shape.get("skip")
    sae = SparseAutoencoder(d_in, d_sae, sparsity, d_out, centred, dtype=dtype, **shape)
    for i, (name, tensor) in enumerate(sae.state_dict().items()):
        drawn = randn(*tensor.shape, seed=i, dtype=dtype) * 0.4
        tensor.copy_(drawn.abs() if name.endswith("threshold") else drawn)
    return sae
