"""Proves that the hand-written steps give the loss and gradients of the plain formulas."""

import dataclasses

import pytest
import torch

from sae import losses
from sae.autoencoder import SparseAutoencoder
from sae.config import Moment
from sae.kernels import StepStats, _nonzero, _strongest, relu_l1_step, topk_step
from sae.sparsity import ReluL1, Sparsity, TopK

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def build(sparsity: Sparsity, d_in=16, d_sae=64, d_out=16, centred=True, dtype=torch.float32):
    """An autoencoder whose parameters are all random, so that every gradient counts."""
    sae = SparseAutoencoder(d_in, d_sae, sparsity, d_out, centred, dtype=dtype)
    for i, p in enumerate(sae.parameters()):
        p.data = randn(*p.shape, seed=i, dtype=dtype) * 0.3
    return sae


def plain(
    sae: SparseAutoencoder,
    x: torch.Tensor,
    y: torch.Tensor,
    l1: float = 0.0,
    p: float = 1.0,
    dead: torch.Tensor | None = None,
    auxk: int = 0,
    auxk_coef: float = 0.0,
) -> StepStats:
    """The formulas by autograd; leaves the gradients in `.grad`."""
    sae.zero_grad()
    out = sae(x)
    mse = losses.reconstruction(out.recon, y)
    penalty = sae.sparsity.penalty(out.pre, out.acts, sae.decoder_norms, Moment(p=p))
    aux = mse.new_zeros(())
    if dead is not None:
        aux = losses.auxk(out.pre, y - out.recon, dead, sae.W_dec, auxk)
    loss = mse + l1 * penalty + auxk_coef * aux
    loss.backward()
    return StepStats(loss, mse, penalty, aux, losses.l0(out.acts), (out.acts > 0).sum(0))


def gradients(sae: SparseAutoencoder) -> dict[str, torch.Tensor]:
    found = {name: getattr(sae, name).grad for name in NAMES}
    assert all(grad.dtype == sae.dtype and grad.is_contiguous() for grad in found.values())
    return {name: grad.clone() for name, grad in found.items()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def assert_same(sae, expected: StepStats, wanted, got: StepStats, rel: float) -> None:
    for name, grad in gradients(sae).items():
        assert relative(grad, wanted[name]) < rel, name
    for field in dataclasses.fields(StepStats):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        if a is b is None:
            continue
        assert not a.requires_grad
        tolerance = max(rel, 1e-6) if field.name == "l0" else rel  # counts divide in fp32
        torch.testing.assert_close(a.double(), b.detach().double(), rtol=tolerance, atol=1e-9)


SHAPES = [
    {},
    {"centred": False},
    {"d_out": 24, "centred": False},
    {"d_sae": 61},
    {"dtype": torch.float64},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sparse_below", [0.0, 2.0], ids=["dense", "sparse"])
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("p", [1.0, 0.4])
def test_relu_l1_step_is_autograd(shape, sparse_below, chunk, p):
    sae = build(ReluL1(1.0), **shape)
    x, y = randn(33, sae.d_in, dtype=sae.dtype), randn(33, sae.d_out, seed=9, dtype=sae.dtype)
    expected, wanted = plain(sae, x, y, l1=0.7, p=p), gradients(sae)
    got = relu_l1_step(sae, x, y, 0.7, chunk, p=p, sparse_below=sparse_below)
    assert_same(sae, expected, wanted, got, rel=1e-5 if sae.dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("shape", [*SHAPES, {"d_sae": 512}], ids=str)
@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("chunk", [None, 7])
def test_topk_step_is_autograd(shape, k, chunk):
    sae = build(TopK(k), **shape)
    x, y = randn(33, sae.d_in, dtype=sae.dtype), randn(33, sae.d_out, seed=9, dtype=sae.dtype)
    expected, wanted = plain(sae, x, y), gradients(sae)
    got = topk_step(sae, x, y, k, chunk)
    assert_same(sae, expected, wanted, got, rel=1e-5 if sae.dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("n_dead", [0, 1, 30, 64])
def test_topk_step_adds_the_auxiliary_loss_over_dead_features(n_dead):
    sae = build(TopK(4))
    x = randn(33, 16)
    dead = torch.arange(64) < n_dead
    expected = plain(sae, x, x, dead=dead, auxk=8, auxk_coef=3.0)
    wanted = gradients(sae)
    got = topk_step(sae, x, x, 4, 10, auxk=8, auxk_coef=3.0, dead=dead)
    assert_same(sae, expected, wanted, got, rel=1e-5)


@pytest.mark.parametrize("sparse_below", [0.0, 2.0], ids=["dense", "sparse"])
@pytest.mark.parametrize("p", [1.0, 0.4])
def test_relu_l1_step_matches_finite_differences(sparse_below, p):
    sae = build(ReluL1(1.0), d_in=3, d_sae=7, d_out=3, dtype=torch.float64)
    x = randn(5, 3, dtype=torch.float64)

    def loss() -> float:
        return relu_l1_step(sae, x, x, 0.7, p=p, sparse_below=sparse_below).loss.item()

    loss()
    assert_finite_differences(sae, loss)


def test_topk_step_reconstruction_matches_finite_differences():
    sae = build(TopK(2), d_in=3, d_sae=7, d_out=3, dtype=torch.float64)
    x = randn(5, 3, dtype=torch.float64)

    def loss() -> float:
        return topk_step(sae, x, x, 2).loss.item()

    loss()
    assert_finite_differences(sae, loss)


def assert_finite_differences(sae: SparseAutoencoder, loss, step: float = 1e-6) -> None:
    for name, grad in gradients(sae).items():
        values = getattr(sae, name).data.view(-1)
        for i in range(0, len(values), 2):
            before = values[i].item()
            values[i] = before + step
            above = loss()
            values[i] = before - step
            below = loss()
            values[i] = before
            assert (above - below) / (2 * step) == pytest.approx(grad.view(-1)[i].item(), abs=1e-6)


@pytest.mark.parametrize("kind", ["relu dense", "relu sparse", "topk"])
def test_bf16_products_come_close_and_keep_fp32_gradients(kind):
    sae = build(TopK(8) if kind == "topk" else ReluL1(1.0), d_sae=256)
    x = randn(200, 16)
    if kind == "topk":
        expected, wanted = plain(sae, x, x), gradients(sae)
        got = topk_step(sae, x, x, 8, matmul_dtype=torch.bfloat16)
    else:
        expected, wanted = plain(sae, x, x, l1=0.7), gradients(sae)
        below = 2.0 if kind == "relu sparse" else 0.0
        got = relu_l1_step(sae, x, x, 0.7, matmul_dtype=torch.bfloat16, sparse_below=below)
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=0.02)
    assert got.loss.dtype == torch.float32
    for name, grad in gradients(sae).items():
        assert relative(grad, wanted[name]) < 0.1, name


def test_both_ways_of_relu_l1_agree_where_nothing_and_everything_is_active():
    for bias in (-100.0, 100.0):
        sae = build(ReluL1(1.0))
        sae.b_enc.data.fill_(bias)
        x = randn(20, 16)
        dense, wanted = relu_l1_step(sae, x, x, 0.7, sparse_below=0), gradients(sae)
        sparse = relu_l1_step(sae, x, x, 0.7, sparse_below=2)
        assert dense.l0 == sparse.l0 == (0 if bias < 0 else 64)
        for name, grad in gradients(sae).items():
            torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-4)


def test_the_relu_step_chooses_its_way_by_the_share_of_active_features(monkeypatch):
    from sae import kernels

    taken = []
    real = kernels._sparse_step
    monkeypatch.setattr(kernels, "_sparse_step", lambda *a: taken.append(1) or real(*a))
    sae = build(ReluL1(1.0))
    relu_l1_step(sae, randn(20, 16), randn(20, 16), 0.7)
    assert taken == []
    sae.b_enc.data.fill_(-3.0)
    relu_l1_step(sae, randn(20, 16), randn(20, 16), 0.7)
    assert taken == [1]


def test_gradients_replace_those_of_the_step_before():
    sae = build(TopK(4))
    x = randn(20, 16)
    topk_step(sae, x, x, 4)
    first = gradients(sae)
    topk_step(sae, x, x, 4)
    for name, grad in gradients(sae).items():
        assert torch.equal(grad, first[name])


def test_the_inputs_and_weights_stay_as_they_were():
    for sae in (build(TopK(4)), build(ReluL1(1.0))):
        x, y = randn(20, 16), randn(20, 16, seed=1)
        tensors = [x, y, *(p.data for p in sae.parameters())]
        before = [t.clone() for t in tensors]
        topk_step(sae, x, y, 4, auxk=8, dead=torch.arange(64) < 9)
        relu_l1_step(sae, x, y, 0.7, sparse_below=0)
        relu_l1_step(sae, x, y, 0.7, sparse_below=2)
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("step", ["topk", "dense", "sparse"])
@pytest.mark.parametrize("where", ["x", "W_enc", "W_dec"])
def test_nan_shows_in_the_loss(step, where):
    sae, x = build(TopK(4), d_sae=512), randn(20, 16)
    (x if where == "x" else getattr(sae, where).data)[3, 3] = torch.nan
    if step == "topk":
        stats = topk_step(sae, x, randn(20, 16), 4)
    else:
        stats = relu_l1_step(sae, x, randn(20, 16), 0.7, sparse_below=2.0 * (step == "sparse"))
    if where == "W_dec" and step != "dense":
        return  # a feature that is not active is not read
    assert stats.loss.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("columns", [64, 61])
def test_nonzero_finds_what_nonzero_finds(dtype, columns):
    values = randn(9, columns, dtype=dtype).sub(1).relu()
    values[3, 7] = torch.nan
    assert torch.equal(_nonzero(values), values.view(-1).nonzero().view(-1))


@pytest.mark.parametrize("d_sae", [64, 256, 500, 4096])
@pytest.mark.parametrize("k", [1, 16, 33])
@pytest.mark.parametrize("shift", [0.0, -2.0, -9.0, 9.0])
def test_strongest_is_relu_of_topk_also_where_few_are_positive(d_sae, k, shift):
    pre = randn(40, d_sae) + shift
    expected = TopK(k)(pre)
    found = _strongest(pre.clone(), k, first_token=0)
    got = torch.zeros_like(pre)
    got[found.token, found.feature] = found.value
    assert torch.equal(got, expected)
    assert (found.token.diff() >= 0).all()


def test_strongest_picks_k_among_ties():
    pre = torch.full((3, 256), 2.0)
    found = _strongest(pre, 5, first_token=0)
    assert torch.bincount(found.token).tolist() == [5, 5, 5]
    assert len(set(zip(found.token.tolist(), found.feature.tolist(), strict=True))) == 15


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", ["relu dense", "relu sparse", "topk"])
def test_steps_on_cuda_are_autograd(kind):
    sae = build(TopK(8) if kind == "topk" else ReluL1(1.0), d_sae=256).cuda()
    x = randn(200, 16).cuda()
    l1 = 0.0 if kind == "topk" else 0.7
    expected, wanted = plain(sae, x, x, l1=l1), gradients(sae)
    if kind == "topk":
        got = topk_step(sae, x, x, 8)
    else:
        got = relu_l1_step(sae, x, x, l1, sparse_below=2.0 * (kind == "relu sparse"))
    assert_same(sae, expected, wanted, got, rel=1e-4)
