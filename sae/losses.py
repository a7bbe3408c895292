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


class RunningFVU:
    """`fvu` over a stream, as exact as in one piece: batches are merged by their centred sums.

    Chan, Golub & LeVeque 1979. Sums are fp64, on the device of the first batch.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._mean: Tensor | None = None  # [d_out]
        self._variation = 0.0  # Σ‖y − ȳ‖²
        self._missed = 0.0  # Σ‖y − ŷ‖²

    def update(self, y: Float[Tensor, "batch d_out"], recon: Float[Tensor, "batch d_out"]) -> None:
        """Add a batch of targets and their reconstructions."""
        if len(y) == 0:
            return
        y = y.double()
        mean = y.mean(0)
        self._missed += (y - recon.double()).square().sum().item()
        self._variation += (y - mean).square().sum().item()
        self._merge_mean(mean, len(y))

    def _merge_mean(self, mean: Float[Tensor, " d_out"], count: int) -> None:
        total = self.tokens + count
        if self._mean is None:
            self._mean = mean
        else:
            shift = mean.to(self._mean.device) - self._mean
            self._variation += shift.square().sum().item() * self.tokens * count / total
            self._mean = self._mean + shift * (count / total)
        self.tokens = total

    @property
    def value(self) -> float:
        """The FVU of everything so far; NaN without tokens or where all targets are equal."""
        return self._missed / self._variation if self._variation > 0 else float("nan")

    @property
    def mean(self) -> Float[Tensor, " d_out"]:
        """The mean target in fp64; raises ValueError without tokens."""
        if self._mean is None:
            raise ValueError("no tokens yet: the mean of nothing is undefined")
        return self._mean
