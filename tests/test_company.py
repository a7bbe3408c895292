"""φ and Pearson's r over a scan in batches are those over the whole matrix of activations."""

from pathlib import Path

import numpy as np
import pytest

from sae import company
from sae.company import Cofiring, NeuronSample

N, D_SAE, NEURONS = 3000, 40, 12
ALWAYS, NEVER, COMMON = 7, 11, 20


@pytest.fixture(scope="module")
def acts() -> np.ndarray:
    """Half of the features come in pairs; one always fires and one never; gaps between tokens."""
    random = np.random.default_rng(0)
    acts = np.maximum(random.standard_normal((N, D_SAE)) - random.uniform(0.5, 2.5, D_SAE), 0)
    acts[:, : D_SAE // 2 : 2] *= random.random((N, D_SAE // 4)) < 0.9
    acts[:, 1 : D_SAE // 2 : 2] = acts[:, : D_SAE // 2 : 2] * (random.random((N, 1)) < 0.8)
    acts[:, ALWAYS], acts[:, NEVER] = 1, 0
    acts[:, COMMON] = np.maximum(random.standard_normal(N), 0)
    return acts


TOKENS = 2 * np.arange(N) + 1


def gathered(acts: np.ndarray, file: Path) -> Cofiring:
    found = Cofiring(file, D_SAE)
    for part in np.array_split(np.arange(N), 7):
        token, feature = (acts[part] > 0).nonzero()
        found.add(feature, TOKENS[part[token]], TOKENS[part])
    return found


def fires(acts: np.ndarray, feature: int) -> np.ndarray:
    return TOKENS[acts[:, feature] > 0]


def test_cofiring_is_the_correlation_of_firing(acts: np.ndarray, tmp_path: Path) -> None:
    found = gathered(acts, tmp_path / "fired")
    on = (acts > 0).astype(float)
    varies = [f for f in range(D_SAE) if f not in (ALWAYS, NEVER)]
    phi = np.zeros((D_SAE, D_SAE))
    phi[np.ix_(varies, varies)] = np.corrcoef(on[:, varies].T) - np.eye(len(varies))
    phi[on.T @ on < company.SHARED] = 0
    for feature in range(D_SAE):
        own = found.of(feature, fires(acts, feature), 5)
        wanted = [x for x in np.sort(phi[feature])[::-1][:5] if x > 0]
        assert [x for _, x in own] == pytest.approx(wanted)
        assert [x for _, x in own] == pytest.approx([phi[feature, other] for other, _ in own])
    assert found.of(ALWAYS, fires(acts, ALWAYS), 5) == found.of(NEVER, fires(acts, NEVER), 5) == []


@pytest.mark.parametrize(("name", "most"), [("TOKENS_COUNTED", 200), ("FIRINGS_COUNTED", 2000)])
def test_evenly_spaced_tokens_stand_for_all(
    acts: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, most: int
) -> None:
    found = gathered(acts, tmp_path / "fired")
    features = range(0, D_SAE // 2, 2)
    exact = [found.of(feature, fires(acts, feature), 1)[0] for feature in features]
    monkeypatch.setattr(company, name, most)
    for feature, (best, phi) in zip(features, exact, strict=True):
        ((same, roughly), *_) = found.of(feature, fires(acts, feature), 1)
        assert same == best and roughly == pytest.approx(phi, abs=0.12)


def sampled(x: np.ndarray) -> NeuronSample:
    sample = NeuronSample(NEURONS)
    for part in np.array_split(np.arange(N), 9):
        sample.add(TOKENS[part], lambda kept, part=part: x[part][kept])
    return sample


def neurons_of(acts: np.ndarray) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((N, NEURONS)).astype(np.float32)
    x[:, 3] += 2 * acts[:, COMMON]
    x[:, 5] -= acts[:, COMMON]
    x[:, 8] = 4
    return x


def test_correlation_with_neurons_is_pearsons(acts: np.ndarray) -> None:
    x = neurons_of(acts)
    sample = sampled(x)
    for feature in (0, 1, COMMON, 33):
        on = acts[:, feature] > 0
        found = sample.of(TOKENS[on], acts[on, feature].astype(np.float32), NEURONS)
        for neuron, r in found:
            wanted = 0 if neuron == 8 else np.corrcoef(x[:, neuron], acts[:, feature])[0, 1]
            assert r == pytest.approx(wanted, abs=1e-5)
        sizes = [abs(r) for _, r in found]
        assert len(found) == NEURONS and sizes == sorted(sizes, reverse=True)
    assert sample.of(TOKENS[:4], np.ones(4, np.float32), 3) == []


def test_the_drawn_tokens_are_as_many_as_fit_and_evenly_spread(
    acts: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(company, "SAMPLE_BYTES", 500 * 4 * NEURONS)
    x = neurons_of(acts)
    sample = sampled(x)
    drawn = sample._token[: sample._n]
    assert 250 <= len(drawn) <= 500 and (np.diff(drawn) > 0).all()
    assert np.histogram(drawn, 5, (0, 2 * N))[0].min() > len(drawn) / 5 / 1.5
    assert (sample._x[: sample._n] == x[(drawn - 1) // 2]).all()
    on = acts[:, COMMON] > 0
    ((neuron, r), *_) = sample.of(TOKENS[on], acts[on, COMMON], 3)
    assert neuron == 3
    assert r == pytest.approx(np.corrcoef(x[:, 3], acts[:, COMMON])[0, 1], abs=0.1)
