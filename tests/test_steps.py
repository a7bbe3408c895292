"""Proves that autograd's step gives what the hand-written ones give, however the batch is split,
and that each sparsity takes the step meant for it."""

import dataclasses
from collections.abc import Callable, Sequence
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
PREFIXES = pytest.mark.parametrize(
    "prefixes", [(), (5, 12, variants.D_SAE)], ids=["plain", "matryoshka"]
)


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


def assert_slopes(
    sae: SparseAutoencoder, loss: Callable[[], float], names: Sequence[str], every: int, h=1e-6
):
    """The gradients that `loss` sets are its finite differences, at `every`-th weights."""
    loss()
    for name in names:
        flat, grad = sae.get_parameter(name).data.view(-1), sae.get_parameter(name).grad
        assert grad is not None
        wanted = grad.clone().view(-1)
        for i in range(0, len(flat), every):
            before = flat[i].item()
            flat[i] = before + h
            above = loss()
            flat[i] = before - h
            slope = (above - loss()) / (2 * h)
            flat[i] = before
            assert slope == pytest.approx(wanted[i].item(), rel=1e-5, abs=1e-7), name


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


SHAPES = {
    "skip": {"skip": True},
    "sites": {"sites": (2, 3)},
    "both": {"skip": True, "sites": (2, 3)},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("sparse_below", [0.0, 1.0])
def test_gradients_of_skips_and_sites_by_finite_differences(
    kind: str, shape: dict, sparse_below: float, monkeypatch: pytest.MonkeyPatch
):
    """Of W_skip, and of the decoder, whose norms are summed over the sites; both ways of ReLU."""
    monkeypatch.setattr(kernels, "SPARSE_BELOW", sparse_below)
    variant, double = VARIANTS[kind], {"dtype": torch.float64}
    sae = variants.build(variant.make(), d_out=5, **double, **shape)
    x, y = variants.randn(7, 6, seed=50, **double), variants.randn(7, 5, seed=51, **double)

    def loss() -> float:
        return steps.step(sae, x, y, variant.now).loss.item()

    names = () if variant.freezes_decoder else ("W_skip",) * ("skip" in shape) + ("W_dec",)
    assert_slopes(sae, loss, names, every=4)


@PREFIXES
@pytest.mark.parametrize("kind", VARIANTS)
def test_the_gradients_of_a_push_by_finite_differences(kind: str, prefixes: tuple[int, ...]):
    """It weighs as much as the reconstruction, and a step says what it pushes."""
    variant, double = VARIANTS[kind], {"dtype": torch.float64}
    sae = variants.build(variant.make(), d_out=5, skip=True, **double)
    x, y, push = (
        variants.randn(7, width, seed=seed, **double) for seed, width in enumerate((6, 5, 5), 50)
    )

    def loss() -> float:
        return steps.step(sae, x, y, variant.now, 3, prefixes=prefixes, push=push).loss.item()

    plain = steps.step(sae, x, y, variant.now)
    recon = steps.reconstruct(sae, x, variant.now)
    torch.testing.assert_close((recon - y).square().sum(1).mean(), plain.mse)
    if not prefixes:
        pushed = plain.loss.item() + ((push * recon).sum() - plain.mse).item() / 2
        assert loss() == pytest.approx(pushed)
    found = []
    for pushes in (push, torch.zeros_like(push)):
        steps.step(sae, x, y, variant.now, prefixes=prefixes, push=pushes)
        assert sae.b_dec.grad is not None
        found.append(sae.b_dec.grad.clone())
    torch.testing.assert_close(found[0] - found[1], push.sum(0) / 2)
    names = () if variant.freezes_decoder else ("b_dec", "W_skip", "W_dec")
    assert_slopes(sae, loss, names, every=7)


@PREFIXES
@pytest.mark.parametrize("kind", VARIANTS)
def test_a_skip_leaves_the_features_what_it_does_not_rebuild(kind: str, prefixes: tuple[int, ...]):
    """Loss and gradients are those of y − x @ W_skip, however the batch is split."""
    variant, x, y = VARIANTS[kind], randn(30, 6), randn(30, 5, seed=1)
    skip = variants.build(variant.make(), d_out=5, skip=True)
    plain = variants.build(variant.make(), d_out=5)
    plain.load_state_dict({n: t for n, t in skip.state_dict().items() if n != "W_skip"})
    assert skip.W_skip is not None
    left = y - x @ skip.W_skip.detach()
    want = steps.step(plain, x, left, variant.now, prefixes=prefixes)
    whole = steps.step(skip, x, y, variant.now, prefixes=prefixes)
    grad = skip.W_skip.grad
    got = steps.step(skip, x, y, variant.now, 7, prefixes=prefixes)
    torch.testing.assert_close(skip.W_skip.grad, grad)
    torch.testing.assert_close(got.loss, whole.loss)
    torch.testing.assert_close(got.loss, want.loss)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(skip.get_parameter(name).grad, parameter.grad, msg=name)


@PREFIXES
@pytest.mark.parametrize("kind", VARIANTS)
def test_a_skip_learns_what_b_dec_does_at_each_token(kind: str, prefixes: tuple[int, ...]):
    """Of one token the gradient of W_skip is x times that of b_dec."""
    variant, x, y = VARIANTS[kind], randn(1, 6), randn(1, 5, seed=1)
    sae = variants.build(variant.make(), d_out=5, skip=True)
    steps.step(sae, x, y, variant.now, prefixes=prefixes)
    assert sae.W_skip is not None and sae.b_dec.grad is not None
    torch.testing.assert_close(sae.W_skip.grad, x.T * sae.b_dec.grad)
