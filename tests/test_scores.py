"""Dictionaries whose scores are known: the true one, parts of it, and ones made to fail."""

import dataclasses

import pytest
import torch
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.scores import Exam, f1, match, regression, thresholds
from sae.sparsity import ReluL1, TopK
from sae.synthetic import PlantedConfig, PlantedFeatures

D = 16


@pytest.fixture(scope="module")
def exam() -> Exam:
    """As many features as dimensions, so that a linear encoder can be exact."""
    return Exam(PlantedFeatures(PlantedConfig(d_in=D, n_features=D, active=3)), n=2000)


def exact(exam: Exam) -> SparseAutoencoder:
    """The true features, read without interference."""
    sae = SparseAutoencoder(D, D, ReluL1(0), subtract_b_dec=False)
    with torch.no_grad():
        sae.W_dec.copy_(exam.features.writes)
        sae.W_enc.copy_(torch.linalg.inv(exam.features.writes))
        sae.b_enc.fill_(-1e-3)
    return sae


def acts(exam: Exam) -> tuple[Tensor, Tensor]:
    return exam.tuning.true.clone(), exam.test.true.clone()


def test_the_true_dictionary_is_perfect_in_any_order_at_any_scale(exam: Exam) -> None:
    sae = exact(exam)
    found = exam.score(sae)
    assert found.mmc == pytest.approx(1)
    assert found.f1 > 0.999
    assert (found.recovered, found.split, found.absorbed) == (1, 0, 0)
    order = torch.randperm(D, generator=torch.Generator().manual_seed(0))
    tuning, test = (3 * a[:, order] for a in acts(exam))
    judged = exam.judge(exam.features.writes[order] / 3, tuning, test)
    assert dataclasses.astuple(judged) == pytest.approx((1, 1, 1, 0, 0), abs=1e-3)


def test_ideal_reads_exactly_where_a_linear_encoder_can(exam: Exam) -> None:
    found = exam.ideal()
    assert found.mmc == pytest.approx(1)
    assert found.f1 > 0.999


def test_ideal_under_topk_loses_what_is_beyond_k(exam: Exam) -> None:
    """Exact activations and k = 1: of each sample only the largest is found."""
    largest = torch.zeros_like(exam.test.true)
    value, place = exam.test.true.max(1, keepdim=True)
    largest.scatter_(1, place, value)
    expected = f1(largest > 0, exam.test.true > 0).nanmean().item()
    assert exam.ideal(k=1).f1 == pytest.approx(expected, abs=0.02)
    assert exam.ideal(k=1).f1 < exam.ideal(k=4).f1 < exam.ideal(k=D).f1


def test_half_a_dictionary_recovers_half(exam: Exam) -> None:
    tuning, test = acts(exam)
    found = exam.judge(exam.features.writes[::2], tuning[:, ::2], test[:, ::2])
    assert found.recovered == 0.5
    assert found.f1 == 0.5
    assert 0.5 < found.mmc < 0.9


def test_dead_features_have_no_f1(exam: Exam) -> None:
    tuning, test = acts(exam)
    tuning[:, 3], test[:, 3] = 0, 0
    found = exam.judge(exam.features.writes, tuning, test)
    assert found.mmc == pytest.approx(1)
    assert found.f1 == pytest.approx(1 - 1 / D, abs=1e-3)


def test_noise_below_the_threshold_does_no_harm(exam: Exam) -> None:
    generator = torch.Generator().manual_seed(0)
    noisy = [a + 0.01 * torch.rand(a.shape, generator=generator) for a in acts(exam)]
    assert exam.judge(exam.features.writes, noisy[0], noisy[1]).f1 > 0.99


def test_a_child_that_writes_its_parent_absorbs_it(exam: Exam) -> None:
    """Where feature 5 is on, feature 0 is silent, and 5 writes both."""
    W_dec = exam.features.writes.clone()
    W_dec[5] += W_dec[0]
    tuning, test = acts(exam)
    for a in (tuning, test):
        a[a[:, 5] > 0, 0] = 0
    found = exam.judge(W_dec, tuning, test)
    assert (found.split, found.absorbed) == (0, 1)


def test_a_feature_in_two_halves_is_split(exam: Exam) -> None:
    """Two features of one direction, one for each half of the samples."""
    W_dec = torch.cat([exam.features.writes, exam.features.writes[:1]])
    halves = []
    for a in acts(exam):
        late = (torch.arange(len(a)) % 2 == 0)[:, None]
        halves.append(torch.cat([a, a[:, :1] * late], dim=1))
        halves[-1][:, 0] *= ~late[:, 0]
    found = exam.judge(W_dec, halves[0], halves[1])
    assert (found.split, found.absorbed) == (1, 0)
    assert found.mmc == pytest.approx(1)
    assert 0.9 < found.f1 < 1


def test_matching_takes_the_best_sum_not_the_best_pair() -> None:
    similar = torch.tensor([[0.9, 0.8], [0.8, 0.1], [0.1, 0.0]])
    assert match(similar).tolist() == [1, 0, -1]
    assert match(similar.T).tolist() == [1, 0]


def test_thresholds_are_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(200, 3, generator=generator).round(decimals=1)
    active = values + torch.rand(200, 3, generator=generator) > 1
    best = torch.stack([f1(values > t, active) for t in torch.linspace(0, 1, 101)]).amax(0)
    torch.testing.assert_close(f1(values > thresholds(values, active), active), best)


def test_regression_is_exact_on_a_linear_relation() -> None:
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(50, 4, generator=generator), torch.randn(4, 3, generator=generator)
    found, bias = regression(x, x @ W + 2)
    torch.testing.assert_close(found, W, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bias, torch.full((3,), 2.0), atol=1e-5, rtol=1e-5)


def test_a_map_is_judged_by_what_it_writes() -> None:
    features = PlantedFeatures(PlantedConfig(d_in=D, n_features=D, active=3, d_out=D + 4))
    exam = Exam(features, n=1000)
    found = exam.ideal()
    assert found.mmc == pytest.approx(1)
    assert found.f1 > 0.999
    sae = SparseAutoencoder(D, 8, TopK(2), D + 4, subtract_b_dec=False)
    assert exam.score(sae).recovered == 0
