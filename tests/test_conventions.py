"""θ survives as log θ, "from θ on" as "above the number before θ", and a gate's magnitude computes
the same without the gate's bias."""

import pytest
import torch

from sae.errors import FormatError
from sae.formats import conventions
from sae.sparsity import BatchTopK, Gated, JumpRelu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_exp_has_a_log(dtype: torch.dtype) -> None:
    """Thresholds that came from a log θ are found to the bit, over the range of real ones."""
    logs = torch.linspace(-8, 5, 20_001).to(dtype)
    theta = logs.exp()
    found, notes = conventions.log_thresholds(theta, "file")
    assert torch.equal(found.exp(), theta) and not notes
    assert ((found - logs).abs() <= torch.finfo(dtype).eps * logs.abs().clamp_min(1)).all()


def test_what_has_no_log_is_close_and_told() -> None:
    """Near 1 logs are denser than numbers, near 30 they are not."""
    near_one, near_thirty = 1 + 0.5 * torch.rand(1000), 30 + torch.rand(1000)
    assert conventions.log_thresholds(near_one, "file")[1] == []
    found, (note,) = conventions.log_thresholds(near_thirty, "file")
    torch.testing.assert_close(found.exp(), near_thirty, rtol=2e-7, atol=0)
    assert "not bit for bit" in note and "of 1,000 thresholds" in note


@pytest.mark.parametrize("dtype", DTYPES)
def test_thresholds_of_zero_and_below_are_zero(dtype: torch.dtype) -> None:
    found, notes = conventions.log_thresholds(torch.tensor([0.0, -1.0], dtype=dtype), "file")
    assert torch.equal(found.exp(), torch.zeros(2, dtype=dtype)) and not notes
    assert found.isfinite().all()


@pytest.mark.parametrize("theta", [float("nan"), float("inf")])
def test_thresholds_are_finite(theta: float) -> None:
    with pytest.raises(FormatError, match=r"ae\.pt: a threshold is not a finite number"):
        conventions.log_thresholds(torch.tensor([1.0, theta]), "ae.pt")


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_a_number_on_is_above_the_one_before(dtype: torch.dtype) -> None:
    theta = torch.cat([torch.zeros(1), randn(999).abs()]).to(dtype)
    below = conventions.just_below(theta)
    assert (below < theta).all() and torch.equal(conventions.just_above(below), theta)
    if dtype != torch.float16:
        assert torch.equal(below, torch.nextafter(theta, torch.full_like(theta, -1)))
    assert conventions.just_above(torch.tensor(-1.0)) == 0  # as dictionary_learning has it unset


def test_batchtopk_is_a_jumprelu_of_one_threshold() -> None:
    """Even where a pre-activation is exactly at the threshold."""
    sparsity = BatchTopK(3)
    sparsity.threshold.fill_(0.3)
    pre = torch.cat([randn(50, 20), torch.full((1, 20), 0.3)])
    theta = conventions.outward("batchtopk", {**sparsity.state_dict(), "b_enc": pre[0]})[0]
    assert torch.equal(sparsity(pre), pre * (pre > theta["threshold"]))
    again, tensors, _ = conventions.jump(theta["threshold"], 3, {}, "file")
    assert again.config() == {"k": 3} and torch.equal(tensors["threshold"], sparsity.threshold)


def test_without_k_it_stays_a_jumprelu() -> None:
    found, tensors, notes = conventions.jump(torch.full((20,), 1.3), None, {}, "file")
    assert isinstance(found, JumpRelu) and not notes
    assert torch.equal(tensors["log_threshold"].exp(), torch.full((20,), 1.3))


def test_a_gate_is_the_same_without_its_bias() -> None:
    sparsity = Gated()
    sparsity.allocate(20)
    with torch.no_grad():
        for seed, parameter in enumerate(sparsity.parameters()):
            parameter.copy_(torch.randn(20, generator=torch.Generator().manual_seed(seed)))
    b_enc, before = randn(20), randn(50, 20) * 3
    ours = {**sparsity.state_dict(), "b_enc": b_enc}
    theirs, notes = conventions.outward("gated", ours)
    magnitude = theirs["r_mag"].exp() * before + theirs["b_mag"]
    active = before + b_enc > 0
    torch.testing.assert_close(sparsity(before + b_enc), active * magnitude.relu())
    again, _ = conventions.gate(theirs)
    torch.testing.assert_close(again["b_mag"], ours["b_mag"], rtol=0, atol=1e-6)
    assert "not bit for bit" in notes[0]
