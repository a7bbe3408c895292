"""Proves that each sparsity follows its paper's formula, has the gradients of its loss, and comes
back from the disk as it was; and that the registry refuses the rest."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from variants import D_SAE, VARIANTS, build, randn

from sae import kernels, losses, steps
from sae.autoencoder import SparseAutoencoder
from sae.config import Moment
from sae.errors import ConfigError
from sae.sparsity import (
    _KINDS,
    SMALL,
    BatchTopK,
    Gated,
    JumpRelu,
    ReluL1,
    Sparsity,
    TopK,
    make_sparsity,
    power,
    slope_of_power,
)

# -------------------------------------------------------------------------- every kind, by table

each_kind = pytest.mark.parametrize("kind", VARIANTS)


def loss_of(sae: SparseAutoencoder, x: Tensor, y: Tensor, now: Moment, **options) -> float:
    return steps.step(sae, x, y, now, **options).loss.item()


def in_training(sae: SparseAutoencoder, x: Tensor, now: Moment) -> tuple[Tensor, Tensor]:
    """Pre-activations and the activations of a training step on x."""
    pre = sae.pre(x).detach()
    return pre, sae.sparsity.in_training(pre, now, sae.sparsity.cut([pre], len(pre), now))


def planted(seed: int, n: int) -> Tensor:
    """n tokens of 48 sparse features in 16 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(n, 48, generator=generator) < 0.08
    directions = torch.nn.functional.normalize(randn(48, 16), dim=1)
    return (on * torch.rand(n, 48, generator=generator)) @ directions


def test_the_table_holds_every_kind():
    assert {name.split()[0] for name in VARIANTS} == _KINDS.keys()
    assert all(variant.make().kind == name.split()[0] for name, variant in VARIANTS.items())


@each_kind
def test_activations_have_the_shape_of_pre_and_are_not_negative(kind: str):
    sae = build(VARIANTS[kind].make())
    for shape in ((D_SAE,), (3, D_SAE), (2, 3, D_SAE)):
        acts = sae.sparsity(randn(*shape))
        assert acts.shape == shape and acts.min() >= 0 and acts.dtype == torch.float32
    sae = build(VARIANTS[kind].make(), dtype=torch.bfloat16)
    assert sae.encode(randn(5, 6)).dtype == torch.bfloat16


@each_kind
def test_a_token_is_encoded_as_in_any_company(kind: str):
    sae, x = build(VARIANTS[kind].make()), randn(9, 6)
    torch.testing.assert_close(sae.encode(x)[4], sae.encode(x[4]))


@each_kind
def test_what_is_not_active_is_exactly_zero(kind: str):
    variant, x = VARIANTS[kind], randn(50, 6)
    sae = build(variant.make())
    pre, acts = in_training(sae, x, variant.now)
    assert torch.equal(acts > 0, variant.active(pre, sae.sparsity))
    assert 0 < (acts > 0).float().mean() < 0.9


@each_kind
@pytest.mark.parametrize("d_out", [6, 5])
def test_gradients_are_those_of_the_loss_by_finite_differences(kind: str, d_out: int):
    """Of every weight outside the sparsity: its own have tests below, where it has any."""
    variant, h = VARIANTS[kind], 1e-6
    sae = build(variant.make(), d_out=d_out, dtype=torch.float64)
    x, y = randn(7, 6, seed=50, dtype=torch.float64), randn(7, d_out, seed=51, dtype=torch.float64)
    loss_of(sae, x, y, variant.now)
    found = {n: p.grad.clone() for n, p in sae.named_parameters() if p.grad is not None}
    encoder, decoder = ("W_enc", "b_enc"), ("W_dec", "b_dec")
    for name in encoder if variant.freezes_decoder else (*encoder, *decoder):
        flat = sae.get_parameter(name).data.view(-1)
        for i in range(0, len(flat), 5):
            before = flat[i].item()
            flat[i] = before + h
            above = loss_of(sae, x, y, variant.now)
            flat[i] = before - h
            slope = (above - loss_of(sae, x, y, variant.now)) / (2 * h)
            flat[i] = before
            assert slope == pytest.approx(found[name].view(-1)[i].item(), rel=1e-5, abs=1e-7), name


@each_kind
@pytest.mark.parametrize("chunk", [1, 7, 30])
def test_a_step_is_the_same_however_it_is_split(kind: str, chunk: int):
    variant, x = VARIANTS[kind], randn(40, 6)
    whole, split = build(variant.make()), build(variant.make())
    dead = torch.arange(D_SAE) % 3 == 0
    options = {"auxk": 4, "auxk_coef": 2.0, "dead": dead}
    want = steps.step(whole, x, x, variant.now, **options)
    got = steps.step(split, x, x, variant.now, chunk, **options)
    assert torch.equal(got.fired, want.fired)
    torch.testing.assert_close(got.loss, want.loss)
    for name, parameter in split.named_parameters():
        torch.testing.assert_close(parameter.grad, whole.get_parameter(name).grad)


@each_kind
def test_saved_and_loaded_is_the_same_to_the_bit(kind: str, tmp_path: Path):
    sae, x = build(VARIANTS[kind].make()), randn(9, 6)
    sae.save_pretrained(tmp_path, inputs=x)
    again = SparseAutoencoder.from_pretrained(tmp_path)
    assert again.config() == sae.config()
    assert again.state_dict().keys() == sae.state_dict().keys()
    assert all(torch.equal(again.state_dict()[n], t) for n, t in sae.state_dict().items())
    assert torch.equal(again.encode(x), sae.encode(x))


@each_kind
def test_folding_leaves_the_activations_as_they_are(kind: str):
    sae, raw = build(VARIANTS[kind].make(), dtype=torch.float64), randn(9, 6).double()
    torch.testing.assert_close(sae.folded(0.2)(raw).acts, sae(raw * 0.2).acts)
    torch.testing.assert_close(sae.folded(0.2)(raw).recon, sae(raw * 0.2).recon / 0.2)


@each_kind
def test_a_config_makes_the_same_sparsity_again(kind: str):
    sparsity = VARIANTS[kind].make()
    again = make_sparsity(sparsity.kind, **sparsity.config())
    assert type(again) is type(sparsity)
    assert again.config() == sparsity.config()
    assert sparsity.l0_knob in sparsity.config()
    assert sparsity.revival in ("resample", "auxk", "auxiliary")


# ------------------------------------------------------------------------------------- one by one


def test_relu_l1_is_relu_and_weights_the_penalty_by_decoder_norms():
    pre = torch.tensor([[1.0, -2.0, 3.0], [-1.0, 0.0, 2.0]])
    sparsity = ReluL1(l1=5.0)
    acts = sparsity(pre)
    assert torch.equal(acts, torch.tensor([[1.0, 0.0, 3.0], [0.0, 0.0, 2.0]]))
    norms = torch.tensor([1.0, 10.0, 0.5])
    assert sparsity.penalty(pre, acts, norms, Moment()).item() == ((1 + 1.5) + 1.0) / 2


@pytest.mark.parametrize("p", [1.0, 0.3])
def test_the_penalty_does_not_change_when_scale_moves_between_activation_and_decoder(p: float):
    acts, norms = torch.rand(4, 6).double(), torch.rand(6).double()
    scale = torch.rand(6).double() + 0.5
    sparsity, now = ReluL1(1.0), Moment(p=p)
    torch.testing.assert_close(
        sparsity.penalty(acts, acts * scale, norms / scale, now),
        sparsity.penalty(acts, acts, norms, now),
    )


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_a_power_is_nearly_exact_where_it_matters_and_its_slope_is_finite_at_0(p: float):
    size = torch.tensor([0.0, 1.0, 5.0, 30.0], dtype=torch.float64, requires_grad=True)
    found = power(size, p)
    assert found[0] == 0
    found.sum().backward()
    assert size.grad is not None and size.grad.isfinite().all()
    torch.testing.assert_close(size.grad, slope_of_power(size.detach(), p))
    torch.testing.assert_close(
        found[1:].detach() + SMALL**p, size[1:].detach() ** p, rtol=0.01, atol=0
    )


def test_the_penalty_adds_up_the_power_it_is_given():
    acts, norms = torch.tensor([[4.0, 0.0], [1.0, 9.0]]), torch.tensor([1.0, 4.0])
    got = ReluL1(1.0).penalty(acts, acts, norms, Moment(p=0.5))
    assert got.item() == pytest.approx((2 + 1 + 6) / 2 - 1.5 * SMALL**0.5, rel=0.01)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_topk_keeps_the_largest_of_each_token(k):
    pre = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    acts = TopK(k)(pre)
    for row, out in zip(pre, acts, strict=True):
        bound = row.sort(descending=True).values[k - 1]
        assert torch.equal(out, torch.where(row >= bound, row, 0).relu())


def test_topk_of_all_features_is_relu():
    pre = randn(5, 8)
    assert torch.equal(TopK(8)(pre), pre.relu())


def test_topk_never_activates_what_is_negative_and_has_no_penalty():
    pre = -torch.rand(2, 3, 8)
    assert TopK(4)(pre).count_nonzero() == 0
    assert TopK(4).penalty(pre, torch.rand(2, 8), torch.rand(8), Moment()) == 0


def test_topk_passes_gradients_to_the_kept_features_only():
    pre = torch.tensor([[3.0, 1.0, 2.0, -1.0]], requires_grad=True)
    TopK(2)(pre).sum().backward()
    assert pre.grad is not None
    assert torch.equal(pre.grad, torch.tensor([[1.0, 0.0, 1.0, 0.0]]))


def test_batchtopk_on_a_batch_of_one_is_topk():
    now = Moment(k=3)
    for seed in range(20):
        pre = randn(1, 8, seed=seed)
        sparsity = BatchTopK(3)
        acts = sparsity.in_training(pre, now, sparsity.cut([pre], 1, now))
        assert torch.equal(acts, TopK(3)(pre))


def test_batchtopk_chooses_the_same_however_the_batch_comes():
    """Also where fewer than n·k are positive, which are then all of them."""
    pre, now = randn(40, 8), Moment(k=2)
    for shift in (0.0, 1.5):
        cuts = [BatchTopK(2).cut((pre - shift).split(size), 40, now) for size in (40, 13, 1)]
        assert len({cut.item() for cut in cuts}) == 1
        acts = BatchTopK(2).in_training(pre - shift, now, cuts[0])
        assert (acts > 0).sum() == min(80, int((pre > shift).sum()))


def test_the_threshold_of_batchtopk_gives_the_l0_of_the_training():
    """On data with planted features, learning from each step as a run does."""
    sparsity, now = BatchTopK(3), Moment(k=3)
    sae = SparseAutoencoder(16, 64, sparsity)
    adam = torch.optim.Adam(sae.parameters(), lr=3e-3)
    steps_ = 400
    for step in range(steps_):
        adam.param_groups[0]["lr"] = 3e-3 * min(1, 5 * (1 - step / steps_))
        x = planted(step, 256)
        sparsity.observe(steps.step(sae, x, x, now).cut)
        adam.step()
    x = planted(steps_, 8192)
    training = losses.l0(in_training(sae, x, now)[1]).item()
    assert training == pytest.approx(3, rel=1e-3)
    assert losses.l0(sae.encode(x)).item() == pytest.approx(training, rel=0.02)


def test_jumprelu_at_threshold_0_is_relu():
    sparsity, pre = JumpRelu(), randn(5, 8)
    sparsity.allocate(8)
    sparsity.log_threshold.data.fill_(-torch.inf)
    assert torch.equal(sparsity(pre), pre.relu())


def jumprelu(threshold: float, bandwidth: float, **settings: float) -> SparseAutoencoder:
    """One feature, whose pre-activation is the input, and decoder norm 2."""
    sparsity = JumpRelu(bandwidth=bandwidth, **settings)
    sae = SparseAutoencoder(1, 1, sparsity, dtype=torch.float64)
    sae.W_enc.data.fill_(1.0)
    sae.W_dec.data.fill_(2.0)
    sparsity.log_threshold.data.fill_(math.log(threshold))
    return sae


def slope_of_log_threshold(sae: SparseAutoencoder, x: Tensor, now: Moment, **options) -> float:
    steps.step(sae, x, x, now, **options)
    grad = dict(sae.named_parameters())["sparsity.log_threshold"].grad
    assert grad is not None
    return grad.item()


def test_the_gradient_of_jumprelus_threshold_is_the_papers():
    """(11) and (12) of arXiv:2407.14435, times θ for the logarithm."""
    theta, width, coef = 0.5, 0.4, 3.0
    x = torch.tensor([[0.2], [0.45], [0.55], [0.65], [0.8]], dtype=torch.float64)
    near, above = torch.tensor([0, 1, 1, 1, 0]), (x > theta)[:, 0]
    d_acts = 2 * (2 * x * above[:, None] - x)[:, 0] * 2.0  # decoder norm 2
    wanted = (near / -width * (d_acts * theta + coef)).mean() * theta
    got = slope_of_log_threshold(jumprelu(theta, width), x, Moment(coef=coef))
    assert got == pytest.approx(wanted.item())


@pytest.mark.parametrize("tanh", [0.0, 1.5])
def test_the_gradient_of_jumprelus_threshold_is_that_of_the_mean_loss(
    tanh: float, monkeypatch: pytest.MonkeyPatch
):
    """Finite differences of the loss averaged over many samples of a normal distribution."""
    n = 400_000
    monkeypatch.setitem(kernels._CHUNK, "cpu", n)  # one feature: 512 at a time are 20 times slower
    ranks = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n
    x = torch.special.ndtri(ranks) * 0.6 + 0.3
    now, theta, h = Moment(coef=0.3), 0.5, 0.005
    got = slope_of_log_threshold(jumprelu(theta, 2 * h, tanh=tanh), x, now)
    above = loss_of(jumprelu(theta + h, 0.1, tanh=tanh), x, x, now)
    below = loss_of(jumprelu(theta - h, 0.1, tanh=tanh), x, x, now)
    assert got == pytest.approx(theta * (above - below) / (2 * h), rel=0.02)


def test_jumprelus_thresholds_move_in_training():
    """Each of them, by far more than rounding, and features end at different ones."""
    x = planted(0, 4096)
    sparsity = JumpRelu(bandwidth=0.1)
    sae = SparseAutoencoder(16, 64, sparsity)
    adam = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for step in range(300):
        rows = x[step * 13 % 4000 :][:256]
        steps.step(sae, rows, rows, Moment(coef=0.01))
        adam.step()
    moved = (sparsity.threshold / 0.1).log().abs()
    fires = (sae.encode(x) > 0).any(0)
    assert fires.float().mean() > 0.8
    assert (moved[fires] > 0.05).float().mean() > 0.95
    assert sparsity.threshold[fires].log().std() > 0.03


def test_jumprelu_lifts_the_dead_and_no_others():
    sae, dead = jumprelu(0.5, 0.1, preact_coef=0.25), torch.tensor([True])
    x = torch.tensor([[-1.0], [0.3]], dtype=torch.float64)
    args = sae.pre(x), x, (sae.W_dec.detach(), sae.b_dec.detach())
    loss = sae.sparsity.auxiliary(*args, dead)
    assert loss.item() == pytest.approx(0.25 * 2 * (1.5 + 0.2) / 2)
    loss.backward()
    assert sae.b_enc.grad is not None and sae.b_enc.grad.item() == pytest.approx(-0.5)
    assert sae.sparsity.auxiliary(*args, ~dead) == 0 == sae.sparsity.auxiliary(*args, None)


def test_gated_is_relu_before_training_and_the_gate_alone_decides_what_is_active():
    sparsity, pre = Gated(), randn(5, 8)
    sparsity.allocate(8)
    assert torch.equal(sparsity(pre), pre.relu())
    sparsity.r_mag.data.fill_(math.log(3.0))
    sparsity.b_mag.data.fill_(0.5)
    torch.testing.assert_close(sparsity(pre), torch.where(pre > 0, 3 * pre + 0.5, 0))


@pytest.mark.parametrize("name", ["r_mag", "b_mag"])
def test_the_gradients_of_gateds_magnitude_are_those_of_the_loss(name: str):
    sae = build(Gated(), dtype=torch.float64)
    x, now, h = randn(9, 6, dtype=torch.float64), Moment(coef=0.7), 1e-6
    steps.step(sae, x, x, now)
    parameter = sae.sparsity.get_parameter(name)
    assert parameter.grad is not None
    found = parameter.grad.clone()
    assert found.count_nonzero() > D_SAE / 2
    for i in range(D_SAE):
        before = parameter.data[i].item()
        parameter.data[i] = before + h
        above = loss_of(sae, x, x, now)
        parameter.data[i] = before - h
        slope = (above - loss_of(sae, x, x, now)) / (2 * h)
        parameter.data[i] = before
        assert slope == pytest.approx(found[i].item(), rel=1e-5, abs=1e-7)


def test_gateds_gate_learns_from_penalty_and_auxiliary_loss_alone():
    """(8) of arXiv:2404.16014, with all magnitudes off; the decoder learns from neither loss.

    Were the penalty to shorten its rows, r_mag would make up for it and the penalty vanish.
    """
    sae = build(Gated(), d_out=5, dtype=torch.float64)
    assert isinstance(sae.sparsity, Gated)
    sae.sparsity.b_mag.data.fill_(-100.0)
    x, y = randn(9, 6, dtype=torch.float64), randn(9, 5, seed=1, dtype=torch.float64)
    pre = sae.pre(x).detach()
    error = pre.relu() @ sae.W_dec + sae.b_dec - y
    d_pre = (2 * error @ sae.W_dec.T + 0.7 * sae.decoder_norms) * (pre > 0) / 9
    steps.step(sae, x, y, Moment(coef=0.7))
    torch.testing.assert_close(sae.W_enc.grad, x.T @ d_pre.detach())
    torch.testing.assert_close(sae.b_dec.grad, 2 * (sae.b_dec - y).mean(0).detach())
    torch.testing.assert_close(sae.W_dec.grad, torch.zeros_like(sae.W_dec))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("jumprelu", {"bandwidth": 0.0}, "bandwidth 0"),
        ("jumprelu", {"l0_coef": -1.0}, "l0_coef -1"),
        ("topkk", {"k": 3}, "did you mean 'topk'"),
        ("topk", {"l1": 3}, "wrong settings"),
        ("topk", {"k": 0}, "k 0"),
        ("batchtopk", {"k": 0}, "k 0"),
        ("relu_l1", {"l1": -1.0}, "l1 -1.0"),
        ("relu_l1", {"l1": float("nan")}, "l1 nan"),
    ],
)
def test_mistakes_are_config_errors(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_sparsity(kind, **settings)


@pytest.mark.parametrize("kind", [TopK, BatchTopK])
def test_k_must_fit_the_dictionary(kind: type[Sparsity]):
    with pytest.raises(ConfigError, match="only 8 features"):
        make_sparsity(kind.kind, k=9).check(8)
