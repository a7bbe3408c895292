"""Bring dead features back: resampling, for sparsities with a penalty.

(TopK's cure, the auxiliary loss, is part of its step: `losses.auxk`.)
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.memory import MicroBatch

ENCODER_SHARE = 0.2
"""A revived feature's encoder norm, as a share of the living ones' mean."""


@torch.no_grad()
def resample(
    sae: SparseAutoencoder,
    optimizer: torch.optim.Optimizer,
    x: Float[Tensor, "batch d_in"],
    y: Float[Tensor, "batch d_out"],
    dead: Bool[Tensor, " d_sae"],
    generator: torch.Generator,
    tokens: MicroBatch | None = None,
    *,
    tied: bool | None = None,
) -> Bool[Tensor, " d_sae"]:
    """Point dead features at what the others reconstruct worst; returns which were moved.

    At most as many as there are tokens that are not reconstructed exactly.

    Tokens are drawn with probability ∝ squared loss, without replacement. A feature's decoder row
    becomes the direction of its token's residual (Bricken et al. 2023 take the token itself; the
    residual leaves out what other features already say) at the living rows' mean norm, its encoder
    column the same direction at ENCODER_SHARE of theirs, its bias 0; the sparsity and Adam forget
    its past. Unless `tied`, and where d_out ≠ d_in, the encoder column becomes the direction of the
    token's x. `tokens`: how many are encoded at a time.
    """
    tokens = tokens or MicroBatch("resampling", "tokens", "lower optim.batch or sae.d_sae")
    parts = tokens.split(len(x), lambda rows: y[rows] - sae(x[rows]).recon)
    residual = torch.cat([part for _, part in parts])
    weights = residual.square().sum(1).square()
    index = dead.nonzero().squeeze(1)[: int((weights > 0).sum())]
    moved = torch.zeros_like(dead)
    moved[index] = True
    if len(index) == 0:
        return moved
    drawn = torch.multinomial(weights.cpu(), len(index), generator=generator).to(x.device)
    directions = torch.nn.functional.normalize(residual[drawn], dim=1)
    alive = dead if dead.all() else ~dead  # their norms are the measure
    encoder_norm = sae.W_enc[:, alive].norm(dim=0).mean() * ENCODER_SHARE
    sae.W_dec[index] = directions * torch.linalg.vector_norm(sae.W_dec, dim=-1)[alive].mean()
    if sae.d_in == sae.d_out if tied is None else tied:
        sae.W_enc[:, index] = (directions * encoder_norm).T
    else:
        towards = torch.nn.functional.normalize(x[drawn], dim=1)
        sae.W_enc[:, index] = (towards * encoder_norm).T
    sae.b_enc[index] = 0
    sae.sparsity.renew(index)
    own = [(parameter, 0) for parameter in sae.sparsity.parameters()]
    for parameter, axis in ((sae.W_enc, 1), (sae.W_dec, 0), (sae.b_enc, 0), *own):
        for name in ("exp_avg", "exp_avg_sq"):
            if name in optimizer.state[parameter]:
                optimizer.state[parameter][name].index_fill_(axis, index, 0)
    return moved
