"""Proves that the evaluation's numbers are what their formulas say.

An autoencoder that copies scores FVU 0 and recovers all cross-entropy; one that writes the mean, or
zeros, scores what that ablation scores by definition; everything else is compared with one-shot
formulas on all activations at once. Special tokens are never counted nor replaced, and how the text
is cut into batches does not matter.
"""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from sae import evaluation
from sae.autoencoder import SparseAutoencoder
from sae.data import TokenBatch
from sae.errors import DataError, HookpointError
from sae.evaluation import Estimate, baseline, bootstrap_ratio, evaluate, resamples
from sae.hooks import Hookpoint, capture, mlp_weights, replace
from sae.losses import fvu, l0
from sae.routes import Route
from sae.sparsity import ReluL1, TopK

ACT, OUT = Hookpoint("layers.1.mlp_act"), Hookpoint("layers.1.mlp_out")
VOCAB, SEQ, D, D_MLP = 40, 12, 16, 24


def gpt2(activation: str = "relu") -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=SEQ, n_embd=D, n_layer=3, n_head=2, n_inner=D_MLP,
        activation_function=activation, initializer_range=0.4, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB, max_position_embeddings=SEQ, hidden_size=D, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=D_MLP,
    )  # fmt: skip
    return BertModel(config).eval()


def text(rows: int = 20) -> TokenBatch:
    """Rows that begin with token 0 and hold it inside now and then: the only special token."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (rows, SEQ), generator=generator)
    tokens[:, 0] = 0
    document = torch.arange(rows)[:, None].expand(-1, SEQ)
    position = torch.arange(SEQ).expand(rows, -1)
    return TokenBatch(tokens, document, position, tokens != 0)


def split(batch: TokenBatch, size: int) -> list[TokenBatch]:
    return [batch[i : i + size] for i in range(0, len(batch), size)]


def activations(model: PreTrainedModel, point: Hookpoint, batch: TokenBatch) -> torch.Tensor:
    with torch.no_grad(), capture(model, [point]) as found:
        model(batch.tokens)
    return found[point][batch.kept]


def loss(model: PreTrainedModel, batch: TokenBatch) -> float:
    """Mean cross-entropy of predicting the kept tokens."""
    with torch.no_grad():
        logits = model(batch.tokens).logits[:, :-1]
    return cross_entropy(logits[batch.kept[:, 1:]], batch.tokens[:, 1:][batch.kept[:, 1:]]).item()


def random_sae(d: int, d_sae: int = 64, k: int = 5) -> SparseAutoencoder:
    return SparseAutoencoder(d, d_sae, TopK(k))


@torch.no_grad()
def copying(d: int) -> SparseAutoencoder:
    """relu(x) − relu(−x) = x."""
    sae = SparseAutoencoder(d, 2 * d, ReluL1(1.0))
    eye = torch.cat([torch.eye(d), -torch.eye(d)])
    sae.W_enc.copy_(eye.T)
    sae.W_dec.copy_(eye)
    return sae


@torch.no_grad()
def constant(value: torch.Tensor) -> SparseAutoencoder:
    """No feature ever fires, so it writes b_dec."""
    sae = SparseAutoencoder(len(value), 8, ReluL1(1.0))
    sae.b_enc.fill_(-1e9)
    sae.b_dec.copy_(value)
    return sae


def run(model: PreTrainedModel, point: Hookpoint, sae: SparseAutoencoder, **settings):
    settings = {"n_tokens": 10**6, "seed": 0} | settings
    return evaluate(model, {point: sae}, [text()], **settings)[point]


def value(estimate: Estimate | None) -> float:
    assert estimate is not None and estimate.value is not None
    return estimate.value


@pytest.mark.parametrize("point", [ACT, OUT, Hookpoint("layers.0.resid_post")])
def test_a_copying_autoencoder_is_perfect(point: Hookpoint):
    model = gpt2()
    result = run(model, point, copying(D_MLP if point == ACT else D))
    assert value(result.fvu) == pytest.approx(0, abs=1e-10)
    assert result.cross_entropy is not None
    assert value(result.cross_entropy.recovered_mean) == pytest.approx(1, abs=1e-6)
    assert value(result.cross_entropy.recovered_zero) == pytest.approx(1, abs=1e-6)
    assert value(result.cross_entropy.model) == pytest.approx(loss(model, text()), rel=1e-6)


def test_the_mean_and_zero_score_what_their_ablations_score():
    model = gpt2("gelu_new")
    y = activations(model, ACT, text())
    mean, zero = run(model, ACT, constant(y.mean(0))), run(model, ACT, constant(0 * y[0]))
    assert mean.cross_entropy and zero.cross_entropy
    assert value(mean.fvu) == pytest.approx(1, abs=1e-6)
    assert value(mean.cross_entropy.recovered_mean) == pytest.approx(0, abs=1e-4)
    assert value(zero.cross_entropy.recovered_zero) == pytest.approx(0, abs=1e-6)
    assert value(zero.fvu) > 1
    assert value(mean.l0) == 0 and value(mean.dead) == 1 and sum(mean.density.counts) == 0


def test_numbers_equal_the_formulas_on_all_activations_at_once():
    model, sae = gpt2(), random_sae(D_MLP)
    result = run(model, ACT, sae)
    y = activations(model, ACT, text())
    with torch.no_grad():
        _, acts, recon = sae(y)
    share = (acts > 0).double().mean(0)
    assert result.n_tokens == len(y) and result.n_sequences == 20
    assert value(result.fvu) == pytest.approx(fvu(y, recon).item(), rel=1e-6)
    assert value(result.l0) == pytest.approx(l0(acts).item(), rel=1e-9)
    assert value(result.dead) == pytest.approx((share == 0).double().mean().item())
    assert value(result.dense) == pytest.approx((share > 0.1).double().mean().item())
    assert value(result.neurons_l0) == pytest.approx(l0(y).item(), rel=1e-9)
    assert sum(result.density.counts) == (share > 0).sum().item()
    whole = recon.new_zeros(*text().tokens.shape, D_MLP)
    whole[text().kept] = recon

    def swap(x: torch.Tensor) -> torch.Tensor:
        return torch.where(text().kept[..., None], whole, x)

    with replace(model, ACT, swap):
        expected = loss(model, text())
    assert result.cross_entropy is not None
    assert value(result.cross_entropy.sae) == pytest.approx(expected, rel=1e-6)


# --------------------------------------------------------------------------------------- maps


def along(model: PreTrainedModel, route: Route, sae: SparseAutoencoder, **settings):
    settings = {"n_tokens": 10**6, "routes": {"map": route}} | settings
    return evaluate(model, {"map": sae}, [text()], **settings)["map"]


@torch.no_grad()
def the_mlp_itself(model: GPT2LMHeadModel) -> SparseAutoencoder:
    """The neurons of layer 1 as features: what a transcoder would be if it found them."""
    sae = SparseAutoencoder(D, D_MLP, ReluL1(1.0), D, subtract_b_dec=False)
    mlp = model.transformer.h[1].mlp
    tensors = (mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight, mlp.c_proj.bias)
    for own, theirs in zip((sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), tensors, strict=True):
        own.copy_(theirs)
    return sae


def test_the_mlp_itself_is_a_perfect_transcoder():
    """It is read at mlp_in and put in place of mlp_out; its L0 is that of the neurons."""
    model = gpt2()
    route = Route((Hookpoint("layers.1.mlp_in"),), (OUT,))
    found = along(model, route, the_mlp_itself(model), baselines=True)
    assert value(found.fvu) == pytest.approx(0, abs=1e-10)
    assert found.cross_entropy is not None and found.sites == ()
    assert value(found.cross_entropy.recovered_mean) == pytest.approx(1, abs=1e-5)
    assert value(found.l0) == value(found.neurons_l0)
    (neurons,) = found.baseline
    wanted = baseline(model, OUT, [text()], n_tokens=10**6, ks=[round(value(found.l0))])
    assert value(neurons.fvu) == value(wanted[0].fvu)
    assert (found.hookpoint, found.d_in, found.d_out) == (str(route), D, D)


ALL = tuple(Hookpoint(f"layers.{layer}.mlp_out") for layer in range(3))


def test_a_crosscoder_is_judged_at_all_hookpoints_and_at_each():
    """A copy is perfect; one that copies two of three, the mean in the third, is so at those."""
    model = gpt2()
    sae = copying(3 * D)
    perfect = along(model, Route.at(*ALL), sae)
    assert perfect.baseline == () and perfect.cross_entropy is not None
    assert value(perfect.fvu) == pytest.approx(0, abs=1e-10)
    assert value(perfect.cross_entropy.recovered_mean) == pytest.approx(1, abs=1e-5)
    y = [activations(model, point, text()) for point in ALL]
    with torch.no_grad():
        sae.W_dec[:, 2 * D :] = 0
        sae.W_enc[2 * D :] = 0
        sae.b_dec[2 * D :] = y[2].mean(0)
    found = along(model, Route.at(*ALL), sae)
    missed, variation = ((y[2] - y[2].mean(0)).square().sum(), torch.cat(y, 1))
    variation = (variation - variation.mean(0)).square().sum()
    assert value(found.fvu) == pytest.approx((missed / variation).item(), rel=1e-5)
    assert [site.hookpoint for site in found.sites] == [*map(str, ALL)]
    assert [value(site.fvu) for site in found.sites] == pytest.approx([0, 0, 1], abs=1e-5)
    recovered = [value(s.cross_entropy and s.cross_entropy.recovered_mean) for s in found.sites]
    assert recovered == pytest.approx([1, 1, 0], abs=1e-3)
    assert found.cross_entropy is not None
    mean = found.sites[2].cross_entropy  # the other two are copied
    assert mean and value(found.cross_entropy.sae) == pytest.approx(value(mean.sae), rel=1e-5)


def test_a_skip_transcoder_is_spliced_in_with_its_skip():
    model, route = gpt2(), Route((Hookpoint("layers.0.mlp_in"),), (OUT,))
    sae = SparseAutoencoder(D, 32, TopK(3), D, subtract_b_dec=False, skip=True)
    assert sae.W_skip is not None
    torch.nn.init.normal_(sae.W_skip)
    x, y = (activations(model, *side, text()) for side in (route.inputs, route.targets))
    with torch.no_grad():
        assert value(along(model, route, sae).fvu) == pytest.approx(fvu(y, sae(x).recon).item())


def test_a_map_of_other_widths_is_refused():
    route = Route((ACT,), (OUT,))
    with pytest.raises(HookpointError, match=f"width {D_MLP} and {D}, the autoencoder reads {D}"):
        along(gpt2(), route, random_sae(D))


def test_density_histogram_bins_by_quarter_decades():
    share = np.array([0.0, 1e-3, 1.1e-3, 0.5, 1.0])
    histogram = evaluation.density_histogram(share, 1000)
    by_edge = dict(zip(histogram.log10_edges[:-1], histogram.counts, strict=True))
    assert (histogram.log10_edges[0], histogram.log10_edges[-1]) == (-3, 0)
    assert by_edge[-3] == 2 and by_edge[-0.5] == 1 and by_edge[-0.25] == 1
    assert sum(histogram.counts) == 4


def test_all_neurons_are_an_exact_baseline_and_none_the_mean():
    for point in (ACT, OUT):
        for k, expected in ((D_MLP, 0.0), (10**9, 0.0), (0, 1.0)):
            [found] = baseline(gpt2(), point, [text()], n_tokens=10**6, ks=[k])
            assert found.k == min(k, D_MLP)
            assert value(found.fvu) == pytest.approx(expected, abs=1e-6)
            assert value(found.ce_recovered_mean) == pytest.approx(1 - expected, abs=1e-4)


def test_largest_neurons_at_mlp_out_equal_the_formula_through_w_down():
    model, k = gpt2("gelu_new"), 4
    a, y = activations(model, ACT, text()), activations(model, OUT, text())
    kth = a.abs().sort(1, descending=True).values[:, k - 1 : k]
    kept = torch.where(a.abs() >= kth, a, a.mean(0))
    weights = mlp_weights(model, 1)
    assert weights is not None and weights.b_down is not None
    expected = {ACT: fvu(a, kept), OUT: fvu(y, kept @ weights.W_down.T + weights.b_down)}
    for point, wanted in expected.items():
        [found] = baseline(model, point, [text()], n_tokens=10**6, ks=[k])
        assert value(found.fvu) == pytest.approx(wanted.item(), rel=1e-5)


def test_evaluate_reports_the_baseline_at_the_l0_and_at_given_k():
    model, sae = gpt2(), random_sae(D_MLP, k=3)
    result = run(model, ACT, sae, ks=[7], baselines=True)
    assert [b.k for b in result.baseline] == [round(value(result.l0)), 7]
    alone = baseline(model, ACT, [text()], n_tokens=10**6, ks=[b.k for b in result.baseline])
    assert list(result.baseline) == alone
    without = run(model, ACT, sae, ks=[7])
    assert [b.fvu for b in without.baseline] == [b.fvu for b in alone]
    assert all(b.ce_recovered_mean is None for b in without.baseline)


def test_gated_neurons_have_a_baseline_but_no_l0():
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=D, intermediate_size=D_MLP, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=SEQ,
    )  # fmt: skip
    result = run(LlamaForCausalLM(config).eval(), OUT, random_sae(D), ks=[D_MLP])
    assert result.neurons_l0 is None
    assert value(result.baseline[-1].fvu) == pytest.approx(0, abs=1e-10)


def test_several_autoencoders_at_once_equal_one_at_a_time():
    model, points = gpt2(), {ACT: random_sae(D_MLP), OUT: random_sae(D)}
    together = evaluate(model, points, [text()], n_tokens=10**6, baselines=True)
    for point, sae in points.items():
        assert together[point] == run(model, point, sae, baselines=True)


def test_bootstrap_error_of_a_mean_is_the_analytic_one():
    x = np.random.default_rng(0).normal(size=400)
    found = bootstrap_ratio(x, np.ones(400), resamples(400, seed=0))
    assert value(found) == pytest.approx(x.mean())
    # 200 resamples know a standard error to 5 %.
    assert found.se == pytest.approx(x.std(ddof=1) / math.sqrt(400), rel=0.15)


def test_standard_errors_follow_the_seed_and_need_two_sequences():
    model, sae = gpt2(), random_sae(D_MLP)
    first, again, other = (run(model, ACT, sae, seed=seed) for seed in (0, 0, 1))
    assert first == again and first.fvu.value == other.fvu.value and first.fvu.se != other.fvu.se
    single = evaluate(model, {ACT: sae}, [text(1)], n_tokens=1)[ACT]
    assert single.fvu.value is not None and single.fvu.se is None
    assert any("one sequence" in note for note in single.notes)


def test_a_model_without_head_says_so():
    result = run(bert(), ACT, random_sae(D_MLP), ks=[D_MLP], baselines=True)
    assert result.to_dict()["cross_entropy"] is None
    assert any("no head" in note for note in result.notes)
    assert result.neurons_l0 is None  # GELU
    assert value(result.baseline[-1].fvu) == pytest.approx(0, abs=1e-10)
    assert all(b.ce_recovered_mean is None for b in result.baseline)


def test_special_tokens_are_neither_counted_nor_replaced(monkeypatch):
    model, batch = gpt2(), text()
    down, seen = model.transformer.h[1].mlp.c_proj, []
    forward = down.forward
    monkeypatch.setattr(down, "forward", lambda x: (seen.append(x.clone()), forward(x))[1])
    result = run(model, ACT, constant(torch.full((D_MLP,), 9.0)))
    clean, [swapped] = seen[0], [x for x in seen if (x == 9).any()]
    assert result.n_tokens == batch.kept.sum().item() < batch.kept.numel()
    assert torch.equal(swapped[~batch.kept], clean[~batch.kept])
    assert (swapped[batch.kept] == 9).all()


@pytest.mark.parametrize("elements", [1, 1 << 24])
def test_cutting_the_text_into_batches_changes_nothing(elements: int, monkeypatch):
    model, sae, whole = gpt2(), random_sae(D_MLP), text()
    n_tokens = int(whole[:13].kept.sum()) - 1
    reference = evaluate(model, {ACT: sae}, [whole[:13]], n_tokens=10**6, baselines=True)[ACT]
    monkeypatch.setattr(evaluation, "ELEMENTS", {"cpu": elements})
    for size in (1, 3, 20):
        found = evaluate(
            model, {ACT: sae}, iter(split(whole, size)), n_tokens=n_tokens, baselines=True
        )[ACT]
        assert found.n_sequences == 13
        # fp32 rounds differently by batch size; ratios of small loss differences magnify it.
        assert flat(found.to_dict()) == pytest.approx(flat(reference.to_dict()), rel=1e-3)


def flat(tree: dict) -> list[float]:
    """Every number of a result, in order."""
    numbers = []
    for item in tree.values():
        for leaf in item if isinstance(item, list | tuple) else [item]:
            if isinstance(leaf, dict):
                numbers += flat(leaf)
            elif isinstance(leaf, int | float):
                numbers.append(leaf)
    return numbers


def test_results_are_plain_json_even_of_a_broken_autoencoder():
    result = run(gpt2(), ACT, constant(torch.full((D_MLP,), torch.nan)), baselines=True)
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["fvu"] == {"value": None, "se": None}
    assert plain["hookpoint"] == "layers.1.mlp_act"
    assert any("not finite" in note for note in result.notes)


def test_model_and_autoencoder_stay_as_they_were():
    model, sae = gpt2().train(), random_sae(D_MLP).to(torch.bfloat16)
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    told: list[int] = []
    result = run(model, ACT, sae, ks=[2], baselines=True, progress=told.append)
    assert [module.training for module in model.modules()] == modes
    assert sae.dtype == torch.bfloat16
    assert sum(told) == result.n_tokens and min(told) > 0
    assert result == run(model.eval(), ACT, sae, ks=[2], baselines=True)


@pytest.mark.parametrize("model", [gpt2(), bert()], ids=["gpt2", "bert"])
def test_no_autoencoder_is_no_work(model: PreTrainedModel):
    assert evaluate(model, {}, [text()], n_tokens=10, baselines=True) == {}


def test_mistakes_are_named():
    model = gpt2()
    with pytest.raises(HookpointError, match=r"width 24.*reads 16"):
        run(model, ACT, random_sae(D))
    with pytest.raises(DataError, match="no held-out text"):
        evaluate(model, {ACT: random_sae(D_MLP)}, [], n_tokens=10)
    with pytest.raises(HookpointError, match="mlp_act and mlp_out"):
        baseline(model, Hookpoint("layers.0.resid_pre"), [text()], n_tokens=10, ks=[1])
    short = run(model, ACT, random_sae(D_MLP))
    assert any("the text ended after" in note for note in short.notes)
