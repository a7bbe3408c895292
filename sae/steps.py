"""One training step of any sparsity: its loss, and the gradients of that loss.

`step` takes the way written out by hand in `kernels` where there is one, and autograd's elsewhere;
both work on some tokens at a time, and what is chosen or averaged over the batch is so however the
batch is split.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae import kernels
from sae.config import Moment
from sae.kernels import Auxk, Gradients, StepStats, Weights
from sae.sparsity import ReluL1, Sparsity, TopK


class Autoencoder(Weights, Protocol):
    """What a step needs of a `SparseAutoencoder`."""

    sparsity: Sparsity


def step(
    sae: Autoencoder,
    x: Float[Tensor, "batch d_in"],
    y: Float[Tensor, "batch d_out"],
    now: Moment,
    chunk: int | None = None,
    *,
    auxk: int = 0,
    auxk_coef: float = 0.0,
    dead: Bool[Tensor, " d_sae"] | None = None,
    matmul_dtype: torch.dtype | None = None,
) -> StepStats:
    """Set the gradients of reconstruction + now.coef · penalty + auxk_coef · `losses.auxk`.

    `chunk`: the most tokens worked on at once; `auxk`: dead features used a token, 0 for none;
    `dead`: which features are; `matmul_dtype`: type of the large products.
    """
    if isinstance(sae.sparsity, ReluL1):
        return kernels.relu_l1_step(sae, x, y, now.coef, chunk, matmul_dtype=matmul_dtype)
    if isinstance(sae.sparsity, TopK):
        revive = {"auxk": auxk, "auxk_coef": auxk_coef, "dead": dead}
        return kernels.topk_step(sae, x, y, now.k, chunk, **revive, matmul_dtype=matmul_dtype)
    dtype = matmul_dtype or sae.W_enc.dtype
    aux = Auxk(dead, auxk, auxk_coef, dtype) if dead is not None and auxk else None
    return autograd_step(sae, x, y, now, chunk, aux=aux, matmul_dtype=dtype)


@torch.no_grad()
def autograd_step(
    sae: Autoencoder,
    x: Float[Tensor, "batch d_in"],
    y: Float[Tensor, "batch d_out"],
    now: Moment,
    chunk: int | None = None,
    *,
    aux: Auxk | None = None,
    matmul_dtype: torch.dtype,
) -> StepStats:
    """The step of any sparsity from its formulas, dense: about ten times a kernel's time.

    Two passes over the batch where the sparsity chooses over all of it, one elsewhere.
    """
    if chunk is not None and chunk < len(x):
        kernels.forget_gradients(sae)
    centred = x - sae.b_dec if sae.subtract_b_dec else x.to(sae.W_enc.dtype)
    parts = list(_parts(len(x), kernels.at_once(x.device, chunk)))
    pre = (_pre(sae, centred[tokens], matmul_dtype) for tokens in parts)
    cut = sae.sparsity.cut(pre, len(x), now)
    sums = _Sums(sae, len(x))
    for tokens in parts:
        with torch.enable_grad():
            acts = sae.sparsity.in_training(_pre(sae, centred[tokens], matmul_dtype), now, cut)
            recon = (acts.to(matmul_dtype) @ sae.W_dec.to(matmul_dtype)).to(y.dtype) + sae.b_dec
            norms = torch.linalg.vector_norm(sae.W_dec, dim=-1)
            sums.add(y[tokens] - recon, acts, sae.sparsity.penalty(acts, norms), now.coef)
    missed = sums.mse.new_zeros(())
    if aux is not None:
        missed = aux.add(sae, centred, torch.cat(sums.residual), sums.grads, chunk)
    return sums.finish(now.coef, missed, aux.coef if aux else 0.0, cut)


def _parts(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _pre(sae: Weights, centred: Tensor, dtype: torch.dtype) -> Float[Tensor, "chunk d_sae"]:
    """Pre-activations, in the type of the weights: a threshold may be closer than bf16 can tell."""
    return (centred.to(dtype) @ sae.W_enc.to(dtype)).to(sae.W_enc.dtype) + sae.b_enc


class _Sums:
    """What a batch adds up to, chunk after chunk; `finish` makes it the gradients of the weights.

    The input is centred outside the graph, as in the kernels: `Gradients.write` adds that part.
    """

    def __init__(self, sae: Autoencoder, tokens: int) -> None:
        zeros = sae.W_dec.new_zeros
        (d_in, d_sae), d_out = sae.W_enc.shape, sae.W_dec.shape[1]
        self.sae, self.tokens = sae, tokens
        self.grads = Gradients(zeros(d_sae, d_in), zeros(d_sae), zeros(d_sae, d_out), zeros(d_out))
        self.own = {p: torch.zeros_like(p) for p in sae.sparsity.parameters()}
        self.mse, self.penalty = zeros(()), zeros(())
        self.fired = torch.zeros(d_sae, dtype=torch.long, device=sae.W_dec.device)
        self.residual: list[Tensor] = []

    def add(self, residual: Tensor, acts: Tensor, penalty: Tensor, coef: float) -> None:
        """One chunk, with what its loss gives as gradients."""
        mse, share = residual.square().sum() / self.tokens, len(acts) / self.tokens
        into = {
            self.sae.W_enc: self.grads.W_enc_T.T,
            self.sae.b_enc: self.grads.b_enc,
            self.sae.W_dec: self.grads.W_dec,
            self.sae.b_dec: self.grads.b_dec,
            **self.own,
        }
        found = torch.autograd.grad(mse + coef * share * penalty, [*into], allow_unused=True)
        for total, grad in zip(into.values(), found, strict=True):
            if grad is not None:
                total.add_(grad)
        self.mse += mse.detach()
        self.penalty += share * penalty.detach()
        self.fired += (acts.detach() > 0).sum(0)
        self.residual.append(residual.detach())

    def finish(self, coef: float, missed: Tensor, aux_coef: float, cut: Tensor | None) -> StepStats:
        """Set the gradients."""
        self.grads.write(self.sae)
        for parameter, grad in self.own.items():
            parameter.grad = grad
        loss = self.mse + coef * self.penalty + aux_coef * missed
        l0 = self.fired.sum() / self.tokens
        return StepStats(loss, self.mse, self.penalty, missed, l0, self.fired, cut)
