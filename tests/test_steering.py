"""Proves that the controller finds the coefficient of its target on a model of training: L0 is a
power of the coefficient, follows it slowly, drifts as features improve, and is measured with
noise."""

import itertools
import math

import pytest
import torch

from sae.steering import HEAD_START, L0Control

STEPS = 1000
DECAY = 0.2
DRIFT = 1.5


def trained(
    control: L0Control,
    power: float,
    start: float,
    lag: float,
    noise: float = 0.03,
    resampled: int = STEPS,
):
    """The L0 of each step where coefficient 1 gives the target at first, exp(−DRIFT) at last.

    Features are `resampled` every so many steps until the learning rate falls: it then looks seven
    times too high, and half of that in e-folds two steps later.
    """
    generator = torch.Generator().manual_seed(0)
    held, drifted, rise, found = math.log(30.0), 0.0, 0.0, []  # L0 is high at first
    for step in range(STEPS):
        speed = min(1.0, (1 - step / STEPS) / DECAY)
        drifted += DRIFT * speed / STEPS
        wanted = -power * (math.log(start) + control.log_factor + drifted)
        held += (wanted - held) * speed / lag
        found.append(control.target * math.exp(held))
        rise = 2.0 if step and step % resampled == 0 and speed == 1 else 0.7 * rise
        seen = held + rise + noise * torch.randn((), generator=generator).item()
        control.observe(control.target * math.exp(seen), speed, early=step < 0.05 * STEPS)
    return found


@pytest.mark.parametrize("target", [8.0, 64.0])
@pytest.mark.parametrize("start", [1 / 30, 1.0, 30.0])
@pytest.mark.parametrize("power", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("lag", [5, 20])
def test_l0_lands_at_the_target_without_oscillation(target, start, power, lag):
    found = trained(L0Control(target, 10), power, start, lag)
    assert found[-1] == pytest.approx(target, rel=0.02)
    off = [math.log(l0 / target) for l0 in found[STEPS // 2 :]]
    assert max(map(abs, off)) < 0.05
    far = [error for error in (math.log(l0 / target) for l0 in found) if abs(error) > 0.1]
    assert sum(a * b < 0 for a, b in itertools.pairwise(far)) <= 2


def test_a_steady_drift_leaves_no_error_behind():
    """What a controller without the trend cannot do: it lags by drift / gain."""
    found = trained(L0Control(16, 10), 1.0, 1.0, 10, noise=0.0)
    assert found[700] == pytest.approx(16, rel=0.005)


@pytest.mark.parametrize("power", [0.7, 1.5])
@pytest.mark.parametrize("lag", [5, 20])
def test_resampled_features_are_waited_out(power, lag):
    """An answer would leave L0 at a half at first, and 4 % too high in the end."""
    found = trained(L0Control(8, 15), power, 1.0, lag, resampled=50)
    assert found[-1] == pytest.approx(8, rel=0.015)
    assert min(found[STEPS // 2 :]) > 0.8 * 8


@pytest.mark.parametrize("pull", [0.01, -0.01])
@pytest.mark.parametrize("power", [0.3, 1.5])
def test_thresholds_are_held_against_what_pulls_at_them(power, pull):
    """The reconstruction moves them by `pull` e-folds a step, at the speed of the learning rate."""
    generator = torch.Generator().manual_seed(0)
    control, off = L0Control(64, 20), math.log(2.0)
    for step in range(600):
        speed = min(1.0, (1 - step / 600) / DECAY)
        seen = off + 0.01 * torch.randn((), generator=generator).item()
        by = control.observe(64 * math.exp(seen), speed)
        assert step < 300 or abs(off) < 0.05
        off -= power * (by + pull * speed)
    assert abs(off) < 0.012


@pytest.mark.parametrize("limit", [0.0035, 0.02])
@pytest.mark.parametrize("unpenalised", [0.8, 2.0])
def test_thresholds_hold_an_l0_that_follows_the_coefficient_slowly(limit, unpenalised):
    """Steps of at most `limit` e-folds, as Adam's; and L0 may be too low without any penalty."""
    control, off, found = L0Control(64, 20), math.log(2.0), []
    for step in range(600):
        early = step < 120
        coef = control.factor * min(1.0, step / 120)
        off += max(-limit, min(limit, 0.005 * (math.log(unpenalised) - off - coef)))
        found.append(off)
        off -= control.observe(64 * math.exp(off), early=early)
    assert max(map(abs, found[300:])) < 0.1
    assert abs(found[-1]) < 0.02


def test_thresholds_stay_early_in_the_training_and_move_by_bounded_steps():
    control = L0Control(8, 10)
    assert control.observe(0.0, early=True) == control.observe(99.0, early=True) == 0
    assert 0 < control.observe(99.0) < 0.05


def test_a_control_goes_on_from_its_state():
    one, other = L0Control(8, 10), L0Control(8, 10)
    for l0 in (90.0, *[8.5] * 9):
        one.observe(l0)
    other.restore(one.state())
    for control in (one, other):
        control.observe(20.0, 0.5)
    assert other.state().tolist() == one.state().tolist() and one.trend != 0


def test_where_nothing_is_active_the_coefficient_falls_by_a_bounded_step():
    control = L0Control(8, 10)
    control.observe(0.0)
    assert 1 / 2 < control.factor * HEAD_START < 1


def test_nothing_is_learnt_before_l0_has_been_too_high_unless_it_never_is():
    control = L0Control(8, 10)
    control.observe(0.0, early=True)
    assert control.factor * HEAD_START == pytest.approx(1)
    control.observe(9.0, early=True)
    control.observe(0.0, early=True)
    assert control.factor * HEAD_START < 1
