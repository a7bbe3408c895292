"""Proves the losses against their definitions and finite differences."""

import torch

from sae import losses
from sae.autoencoder import SparseAutoencoder
from sae.config import Moment
from sae.sparsity import ReluL1


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_reconstruction_sums_over_dimensions_and_averages_over_tokens():
    y, recon = torch.zeros(2, 3), torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    assert losses.reconstruction(recon, y) == (1 + 4 + 9) / 2


def test_auxk_uses_only_the_strongest_dead_features():
    pre, residual, W_dec = randn(6, 8), randn(6, 4, seed=1), randn(8, 4, seed=2)
    dead = torch.tensor([True, False, True, True, False, False, True, False])
    recon = torch.zeros(6, 4, dtype=torch.float64)
    for token in range(6):
        strongest = sorted(dead.nonzero().view(-1).tolist(), key=lambda f: -pre[token, f])[:2]
        for f in strongest:
            recon[token] += pre[token, f].relu() * W_dec[f]
    expected = ((recon - residual) ** 2).mean() / ((residual - residual.mean(0)) ** 2).mean()
    torch.testing.assert_close(losses.auxk(pre, residual, dead, W_dec, 2), expected)


def test_auxk_is_one_where_dead_features_explain_nothing_of_a_centred_residual():
    residual = randn(6, 4)
    residual -= residual.mean(0)
    dead = torch.ones(8, dtype=torch.bool)
    loss = losses.auxk(-torch.ones(6, 8).double(), residual, dead, randn(8, 4), 3)
    torch.testing.assert_close(loss.item(), 1.0)


def test_auxk_without_dead_features_is_zero_and_has_no_gradient():
    pre = randn(6, 8).requires_grad_()
    loss = losses.auxk(pre, randn(6, 4), torch.zeros(8, dtype=torch.bool), randn(8, 4), 3)
    assert loss == 0
    assert not loss.requires_grad


def test_auxk_of_a_constant_residual_asks_for_nothing():
    pre = randn(6, 8).requires_grad_()
    dead = torch.ones(8, dtype=torch.bool)
    losses.auxk(pre, torch.ones(6, 4).double(), dead, randn(8, 4), 3).backward()
    assert pre.grad is not None
    assert torch.equal(pre.grad, torch.zeros_like(pre))


def test_auxk_gradient_matches_finite_differences():
    dead = torch.tensor([True, False, True, True, False, True])
    residual = randn(5, 3, seed=3)

    def loss(pre: torch.Tensor, W_dec: torch.Tensor) -> torch.Tensor:
        return losses.auxk(pre, residual, dead, W_dec, 2)

    assert torch.autograd.gradcheck(
        loss, (randn(5, 6).requires_grad_(), randn(6, 3, seed=1).requires_grad_())
    )


def test_l1_with_decoder_norms_gradient_matches_finite_differences():
    sae = SparseAutoencoder(3, 6, ReluL1(1.0), dtype=torch.float64)
    x = randn(5, 3, seed=4)
    names = [name for name, _ in sae.named_parameters()]

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        values = dict(zip(names, tensors, strict=True))
        out = torch.func.functional_call(sae, values, (x,))
        norms = values["W_dec"].norm(dim=-1)
        penalty = sae.sparsity.penalty(out.pre, out.acts, norms, Moment())
        return losses.reconstruction(out.recon, x) + 0.7 * penalty

    inputs = [randn(*p.shape, seed=i).requires_grad_() for i, p in enumerate(sae.parameters())]
    assert torch.autograd.gradcheck(loss, inputs)


def test_fvu_is_zero_for_perfect_and_one_for_the_mean():
    y = randn(10, 4)
    assert losses.fvu(y, y) == 0
    torch.testing.assert_close(losses.fvu(y, y.mean(0).expand_as(y)).item(), 1.0)


def test_l0_counts_active_features_per_token():
    assert losses.l0(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]])) == 1.0
