"""One training step of any sparsity: its loss, and the gradients of that loss.

`step` takes the way written out by hand in `kernels` where there is one, and autograd's elsewhere;
both work on some tokens at a time, and what is chosen or averaged over the batch is so however the
batch is split.
"""

import itertools
from collections.abc import Iterator, Sequence
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
    prefixes: Sequence[int] = (),
    auxk: int = 0,
    auxk_coef: float = 0.0,
    dead: Bool[Tensor, " d_sae"] | None = None,
    push: Float[Tensor, "batch d_out"] | None = None,
    matmul_dtype: torch.dtype | None = None,
) -> StepStats:
    """Set the gradients of reconstruction + now.coef · penalty + auxk_coef · `losses.auxk`.

    And of the sparsity's own auxiliary loss, where it has one. `chunk`: the most tokens worked on
    at once; `prefixes`: numbers of first features that rebuild y by themselves, the last of them
    d_sae, or none; `auxk`: dead features used a token, 0 for none; `dead`: which features are;
    `push`: the gradient of some other loss at the reconstruction, whose place is then taken by
    (reconstruction + Σ push · recon) / 2; `matmul_dtype`: type of the large products.
    """
    dtype, plain = matmul_dtype or sae.W_enc.dtype, len(prefixes) <= 1
    if isinstance(sae.sparsity, ReluL1) and plain and push is None:
        return kernels.relu_l1_step(sae, x, y, now.coef, chunk, p=now.p, matmul_dtype=matmul_dtype)
    if isinstance(sae.sparsity, TopK) and plain and push is None:
        revive = {"auxk": auxk, "auxk_coef": auxk_coef, "dead": dead}
        return kernels.topk_step(sae, x, y, now.k, chunk, **revive, matmul_dtype=matmul_dtype)
    aux = Auxk(dead, auxk, auxk_coef, dtype) if dead is not None and auxk else None
    options = {"prefixes": prefixes, "aux": aux, "dead": dead, "push": push}
    return autograd_step(sae, x, y, now, chunk, **options, matmul_dtype=dtype)


@torch.no_grad()
def reconstruct(
    sae: Autoencoder,
    x: Float[Tensor, "batch d_in"],
    now: Moment,
    *,
    matmul_dtype: torch.dtype | None = None,
) -> Float[Tensor, "batch d_out"]:
    """What a step has for the reconstruction: the features active are those of training."""
    dtype = matmul_dtype or sae.W_enc.dtype
    centred, parts, cut = _chosen(sae, x, now, None, dtype)
    found = []
    for tokens in parts:
        acts = sae.sparsity.in_training(_pre(sae, centred[tokens], dtype), now, cut)
        nothing = x.new_zeros(len(acts), sae.W_dec.shape[1])
        left = kernels.left_over(sae, centred[tokens].to(dtype), nothing)
        found.append(-_residuals(sae, acts, left, (), dtype)[-1])
    return torch.cat(found)


def _chosen(
    sae: Autoencoder, x: Tensor, now: Moment, chunk: int | None, dtype: torch.dtype
) -> tuple[Tensor, list[slice], Tensor | None]:
    """The centred input, the tokens to work on at a time, and what the sparsity chose over all."""
    centred = x - sae.b_dec if sae.subtract_b_dec else x.to(sae.W_enc.dtype)
    parts = list(_parts(len(x), kernels.at_once(x.device, chunk)))
    pre = (_pre(sae, centred[tokens], dtype) for tokens in parts)
    return centred, parts, sae.sparsity.cut(pre, len(x), now)


@torch.no_grad()
def autograd_step(
    sae: Autoencoder,
    x: Float[Tensor, "batch d_in"],
    y: Float[Tensor, "batch d_out"],
    now: Moment,
    chunk: int | None = None,
    *,
    prefixes: Sequence[int] = (),
    aux: Auxk | None = None,
    dead: Bool[Tensor, " d_sae"] | None = None,
    push: Float[Tensor, "batch d_out"] | None = None,
    matmul_dtype: torch.dtype,
) -> StepStats:
    """The step of any sparsity from its formulas, dense: about ten times a kernel's time.

    Two passes over the batch where the sparsity chooses over all of it, one elsewhere. With
    `prefixes` the reconstruction loss is the mean over those of every prefix of the features, which
    puts the general ones first: Bussmann et al. 2025, arXiv:2503.17547.
    """
    if chunk is not None and chunk < len(x):
        kernels.forget_gradients(sae)
    centred, parts, cut = _chosen(sae, x, now, chunk, matmul_dtype)
    sums = _Sums(sae, len(x), now.coef)
    for tokens in parts:
        with torch.enable_grad():
            pre = _pre(sae, centred[tokens], matmul_dtype)
            acts = sae.sparsity.in_training(pre, now, cut)
            left = kernels.left_over(sae, centred[tokens].to(matmul_dtype), y[tokens])
            residuals = _residuals(sae, acts, left, prefixes, matmul_dtype)
            norms = kernels.site_norms(sae.W_dec, sae.sites).sum(0)
            penalty = sae.sparsity.penalty(pre, acts, norms, now)
            decoder = sae.W_dec.detach(), sae.b_dec.detach()
            own = sae.sparsity.auxiliary(pre, left.detach(), decoder, dead)
            pushed = None if push is None else (push[tokens] * (y[tokens] - residuals[-1])).sum()
            sums.add(acts, residuals, penalty, own, pushed)
    missed = sums.loss.new_zeros(())
    if aux is not None:
        missed = aux.add(sae, centred, torch.cat(sums.residual), sums.grads, chunk)
        sums.loss += aux.coef * missed
    return sums.finish(missed, cut)


def _parts(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _pre(sae: Weights, centred: Tensor, dtype: torch.dtype) -> Float[Tensor, "chunk d_sae"]:
    """Pre-activations, in the type of the weights: a threshold may be closer than bf16 can tell."""
    return (centred.to(dtype) @ sae.W_enc.to(dtype)).to(sae.W_enc.dtype) + sae.b_enc


def _residuals(
    sae: Weights, acts: Tensor, y: Tensor, prefixes: Sequence[int], dtype: torch.dtype
) -> list[Float[Tensor, "chunk d_out"]]:
    """y minus what each prefix of the features rebuilds, that of all features last."""
    acts, W_dec = acts.to(dtype), sae.W_dec.to(dtype)
    recon, found = sae.b_dec, []
    for start, stop in itertools.pairwise((0, *(prefixes or [len(W_dec)]))):
        recon = (acts[:, start:stop] @ W_dec[start:stop]).to(y.dtype) + recon
        found.append(y - recon)
    return found


class _Sums:
    """What a batch adds up to, chunk after chunk; `finish` makes it the gradients of the weights.

    The input is centred outside the graph, as in the kernels: `Gradients.write` adds that part.
    """

    def __init__(self, sae: Autoencoder, tokens: int, coef: float) -> None:
        zeros = sae.W_dec.new_zeros
        self.sae, self.tokens, self.coef = sae, tokens, coef
        self.grads = Gradients.zeros(sae)
        self.own = {p: torch.zeros_like(p) for p in sae.sparsity.parameters()}
        self.loss, self.mse, self.penalty = zeros(()), zeros(()), zeros(())
        self.fired = torch.zeros(len(sae.W_dec), dtype=torch.long, device=sae.W_dec.device)
        self.residual: list[Tensor] = []

    def add(
        self,
        acts: Tensor,
        residuals: list[Tensor],
        penalty: Tensor,
        auxiliary: Tensor,
        pushed: Tensor | None,
    ) -> None:
        """One chunk, with the gradients of its share of the loss."""
        share, squares = len(acts) / self.tokens, [r.square().sum() for r in residuals]
        mse = squares[-1] / self.tokens
        reconstruction = torch.stack(squares).mean() / self.tokens
        if pushed is not None:
            reconstruction = (reconstruction + pushed) / 2
        loss = reconstruction + share * (self.coef * penalty + auxiliary)
        into = {
            self.sae.W_enc: self.grads.W_enc_T.T,
            self.sae.b_enc: self.grads.b_enc,
            self.sae.W_dec: self.grads.W_dec,
            self.sae.b_dec: self.grads.b_dec,
            **self.own,
        }
        if self.sae.W_skip is not None and self.grads.W_skip is not None:
            into[self.sae.W_skip] = self.grads.W_skip
        found = torch.autograd.grad(loss, [*into], allow_unused=True)
        for total, grad in zip(into.values(), found, strict=True):
            if grad is not None:
                total.add_(grad)
        self.loss += loss.detach()
        self.mse += mse.detach()
        self.penalty += share * penalty.detach()
        self.fired += (acts.detach() > 0).sum(0)
        self.residual.append(residuals[-1].detach())

    def finish(self, missed: Tensor, cut: Tensor | None) -> StepStats:
        """Set the gradients."""
        self.grads.write(self.sae)
        for parameter, grad in self.own.items():
            parameter.grad = grad
        l0 = self.fired.sum() / self.tokens
        return StepStats(self.loss, self.mse, self.penalty, missed, l0, self.fired, cut)
