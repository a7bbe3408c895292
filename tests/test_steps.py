"""Proves that autograd's step gives what the hand-written ones give, however the batch is split,
and that each sparsity takes the step meant for it."""

import dataclasses
from dataclasses import replace

import pytest
import torch
import variants
from variants import VARIANTS

from sae import kernels, steps
from sae.autoencoder import SparseAutoencoder
from sae.config import Moment
from sae.kernels import Auxk, StepStats
from sae.sparsity import ReluL1, Sparsity, TopK

NOW = Moment(coef=0.7, k=4)
DEAD = torch.arange(64) % 3 == 0


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(sparsity: Sparsity, d_out: int = 16) -> SparseAutoencoder:
    sae = SparseAutoencoder(16, 64, sparsity, d_out, subtract_b_dec=d_out == 16)
    for i, parameter in enumerate(sae.parameters()):
        parameter.data = randn(*parameter.shape, seed=i) * 0.3
    return sae


def assert_same(sae: SparseAutoencoder, got: StepStats, other: SparseAutoencoder, want: StepStats):
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, other.get_parameter(name).grad)
    for field in dataclasses.fields(StepStats):
        torch.testing.assert_close(getattr(got, field.name), getattr(want, field.name))


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("d_out", [16, 24])
@pytest.mark.parametrize("sparsity", [ReluL1(1.0), TopK(4)], ids=lambda s: s.kind)
def test_autograd_gives_what_the_kernels_give(sparsity: Sparsity, d_out: int, chunk: int | None):
    x, y = randn(30, 16, seed=8), randn(30, d_out, seed=9)
    by_hand, plain = build(sparsity, d_out), build(sparsity, d_out)
    aux = Auxk(DEAD, 8, 3.0, torch.float32) if isinstance(sparsity, TopK) else None
    want = steps.step(by_hand, x, y, NOW, auxk=8, auxk_coef=3.0, dead=DEAD)
    got = steps.autograd_step(plain, x, y, NOW, chunk, aux=aux, matmul_dtype=torch.float32)
    assert_same(plain, got, by_hand, want)


def test_bf16_products_give_nearly_the_same_gradients_in_fp32():
    x, sae, other = randn(40, 16), build(ReluL1(1.0)), build(ReluL1(1.0))
    steps.autograd_step(sae, x, x, NOW, matmul_dtype=torch.bfloat16)
    steps.autograd_step(other, x, x, NOW, matmul_dtype=torch.float32)
    for name, parameter in sae.named_parameters():
        grad, wanted = parameter.grad, other.get_parameter(name).grad
        assert grad is not None and wanted is not None and grad.dtype == torch.float32
        assert (grad - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize(
    ("sparsity", "taken"),
    [(ReluL1(1.0), "relu_l1_step"), (TopK(4), "topk_step")],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_relu_and_topk_take_their_kernels(
    sparsity: Sparsity, taken: str, monkeypatch: pytest.MonkeyPatch
):
    called = []
    monkeypatch.setattr(kernels, taken, lambda *args, **options: called.append(args[3]))
    steps.step(build(sparsity), randn(5, 16), randn(5, 16), NOW)
    assert called == [NOW.k if taken == "topk_step" else NOW.coef]


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_loss_of_prefixes_is_the_mean_of_what_each_rebuilds(kind: str):
    """Each alone is an autoencoder whose other decoder rows are 0."""
    variant, x = VARIANTS[kind], randn(30, 6)
    sae = variants.build(variant.make())
    now = replace(variant.now, coef=0.0)
    got = steps.step(sae, x, x, now, prefixes=(5, 12, variants.D_SAE))
    mse = []
    for size in (5, 12, variants.D_SAE):
        part = variants.build(variant.make())
        part.W_dec.data[size:] = 0
        mse.append(steps.step(part, x, x, now).mse)
    auxiliary = steps.step(sae, x, x, now).loss - mse[-1]
    torch.testing.assert_close(got.loss, torch.stack(mse).mean() + auxiliary)
    torch.testing.assert_close(got.mse, mse[-1])


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_lone_full_prefix_is_plain_to_the_bit(kind: str):
    variant, x = VARIANTS[kind], randn(30, 6)
    plain, full = variants.build(variant.make()), variants.build(variant.make())
    want = steps.step(plain, x, x, variant.now)
    got = steps.step(full, x, x, variant.now, prefixes=(variants.D_SAE,))
    assert torch.equal(got.loss, want.loss)
    for name, parameter in full.named_parameters():
        assert torch.equal(parameter.grad, plain.get_parameter(name).grad), name
