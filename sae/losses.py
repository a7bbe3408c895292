"""What training minimises and what tells how good an autoencoder is, as plain formulas."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def reconstruction(
    recon: Float[Tensor, "batch d_out"], y: Float[Tensor, "batch d_out"]
) -> Float[Tensor, ""]:
    """Mean over tokens of ‖recon − y‖², the squares summed over dimensions."""
    return (recon - y).square().sum(-1).mean()


def auxk(
    pre: Float[Tensor, "batch d_sae"],
    residual: Float[Tensor, "batch d_out"],
    dead: Bool[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_out"],
    k: int,
) -> Float[Tensor, ""]:
    """How badly the `k` strongest dead features of each token explain what is left unexplained.

    Σ‖e − ê‖² / Σ‖e − ē‖² with e = `residual` = y − recon, detached here, ē its mean over the
    batch, ê = ReLU(top-k of the dead pre-activations) @ W_dec without b_dec. 0 and without a
    gradient where nothing is dead. Gao et al. 2024, arXiv:2406.04093, A.2; the normalisation is
    that of their code.
    """
    if not dead.any():
        return residual.new_zeros(())
    residual = residual.detach()
    pre = pre[:, dead]
    values, features = pre.topk(min(k, pre.shape[-1]), dim=-1, sorted=False)
    acts = torch.zeros_like(pre).scatter(-1, features, values.relu())
    missed = (residual - acts @ W_dec[dead]).square().sum()
    return missed * inverse_variation(residual)


def inverse_variation(residual: Float[Tensor, "batch d_out"]) -> Float[Tensor, ""]:
    """1 / Σ‖e − ē‖², and 0 where that sum is 0, so that a constant residual asks for nothing."""
    variation = (residual - residual.mean(0)).square().sum()
    return torch.where(variation > 0, variation.reciprocal(), torch.zeros_like(variation))


def fvu(y: Float[Tensor, "batch d_out"], recon: Float[Tensor, "batch d_out"]) -> Float[Tensor, ""]:
    """Fraction of variance unexplained, pooled: Σ‖y − ŷ‖² / Σ‖y − ȳ‖², ȳ the mean of all tokens."""
    y, recon = y.double(), recon.double()
    return (y - recon).square().sum() / (y - y.mean(0)).square().sum()


def l0(acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, ""]:
    """Mean number of active features per token."""
    return (acts != 0).sum(-1).double().mean()
