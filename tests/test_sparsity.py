"""Proves that each sparsity follows its paper's formula and that the registry refuses the rest."""

import pytest
import torch

from sae.errors import ConfigError
from sae.sparsity import ReluL1, TopK, make_sparsity


def test_relu_l1_is_relu_and_weights_the_penalty_by_decoder_norms():
    pre = torch.tensor([[1.0, -2.0, 3.0], [-1.0, 0.0, 2.0]])
    sparsity = ReluL1(l1=5.0)
    acts = sparsity(pre)
    assert torch.equal(acts, torch.tensor([[1.0, 0.0, 3.0], [0.0, 0.0, 2.0]]))
    norms = torch.tensor([1.0, 10.0, 0.5])
    assert sparsity.penalty(acts, norms).item() == ((1 + 1.5) + 1.0) / 2


def test_the_penalty_does_not_change_when_scale_moves_between_activation_and_decoder():
    acts, norms = torch.rand(4, 6).double(), torch.rand(6).double()
    scale = torch.rand(6).double() + 0.5
    sparsity = ReluL1(1.0)
    torch.testing.assert_close(
        sparsity.penalty(acts * scale, norms / scale), sparsity.penalty(acts, norms)
    )


@pytest.mark.parametrize("k", [1, 3, 8])
def test_topk_keeps_the_largest_of_each_token(k):
    pre = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    acts = TopK(k)(pre)
    for row, out in zip(pre, acts, strict=True):
        bound = row.sort(descending=True).values[k - 1]
        assert torch.equal(out, torch.where(row >= bound, row, 0).relu())


def test_topk_never_activates_what_is_negative_and_has_no_penalty():
    pre = -torch.rand(2, 3, 8)
    assert TopK(4)(pre).count_nonzero() == 0
    assert TopK(4).penalty(torch.rand(2, 8), torch.rand(8)) == 0


def test_topk_passes_gradients_to_the_kept_features_only():
    pre = torch.tensor([[3.0, 1.0, 2.0, -1.0]], requires_grad=True)
    TopK(2)(pre).sum().backward()
    assert torch.equal(pre.grad, torch.tensor([[1.0, 0.0, 1.0, 0.0]]))


@pytest.mark.parametrize("sparsity", [ReluL1(2.5), TopK(7)])
def test_a_config_makes_the_same_sparsity_again(sparsity):
    again = make_sparsity(sparsity.kind, **sparsity.config())
    assert type(again) is type(sparsity)
    assert again.config() == sparsity.config()
    assert sparsity.l0_knob in sparsity.config()
    assert sparsity.revival in ("resample", "auxk")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("topkk", {"k": 3}, "did you mean 'topk'"),
        ("topk", {"l1": 3}, "wrong settings"),
        ("topk", {"k": 0}, "k 0"),
        ("relu_l1", {"l1": -1.0}, "l1 -1.0"),
        ("relu_l1", {"l1": float("nan")}, "l1 nan"),
    ],
)
def test_mistakes_are_config_errors(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_sparsity(kind, **settings)


def test_k_must_fit_the_dictionary():
    with pytest.raises(ConfigError, match="only 8 features"):
        TopK(9).check(8)
