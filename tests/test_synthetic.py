"""What is drawn has the frequencies, magnitudes, relations and directions that were asked for."""

import dataclasses
from itertools import islice

import pytest
import torch

from sae.errors import ConfigError
from sae.synthetic import PlantedConfig, PlantedFeatures, zipf

CONFIG = PlantedConfig(d_in=32, n_features=48, active=3)
N = 20_000


def draw(config: PlantedConfig, n: int = N) -> torch.Tensor:
    return PlantedFeatures(config).draw(n, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("active", [0.5, 3, 12, 48])
@pytest.mark.parametrize("exponent", [0, 1, 2])
def test_frequencies_follow_zipf_and_add_up(active: float, exponent: float) -> None:
    frequencies = zipf(48, active, exponent)
    assert frequencies.sum().item() == pytest.approx(active, rel=1e-5)
    assert frequencies.max() <= 1
    below = frequencies < 1
    ratio = frequencies * torch.arange(1, 49) ** exponent
    torch.testing.assert_close(ratio[below], ratio[below][-1:].expand(int(below.sum())))


def test_features_have_their_frequencies_and_magnitudes() -> None:
    acts = draw(CONFIG)
    frequencies = zipf(48, 3, 1)
    error = (frequencies * (1 - frequencies) / N).sqrt()
    assert (((acts > 0).float().mean(0) - frequencies).abs() < 4 * error).all()
    active = acts[acts > 0]
    assert active.mean().item() == pytest.approx(1, abs=0.01)
    assert active.std().item() == pytest.approx(0.3, abs=0.01)


def test_groups_are_active_together_and_frequencies_stay() -> None:
    config = dataclasses.replace(CONFIG, groups=6, correlation=0.8)
    active = (draw(config) > 0).float()
    frequencies = zipf(48, 3, 1)
    error = (frequencies * (1 - frequencies) / N).sqrt()
    assert ((active.mean(0) - frequencies).abs() < 4 * error).all()
    correlation = torch.corrcoef(active.T)
    group = torch.arange(48) % 6
    same = (group[:, None] == group) & ~torch.eye(48, dtype=torch.bool)
    assert correlation[same].min() > 0.05
    assert correlation[group[:, None] != group].abs().max() < 0.04


def test_children_are_active_only_where_their_parent_is() -> None:
    features = PlantedFeatures(dataclasses.replace(CONFIG, children=2))
    active = features.draw(N, torch.Generator().manual_seed(1)) > 0
    children = (features.parent >= 0).nonzero().squeeze(1)
    assert len(children) == 32
    assert not (active[:, children] & ~active[:, features.parent[children]]).any()
    frequencies = features.frequencies
    error = (frequencies * (1 - frequencies) / N).sqrt()
    assert ((active.float().mean(0) - frequencies).abs() < 4 * error).all()


def test_x_is_the_sum_of_the_active_directions_and_noise() -> None:
    features = PlantedFeatures(dataclasses.replace(CONFIG, noise=0.1))
    generator = torch.Generator().manual_seed(1)
    acts = features.draw(N, generator)
    x, y = features.embed(acts, generator)
    assert y is x
    noise = x - acts @ features.reads
    assert noise.std().item() == pytest.approx(0.1, rel=0.01)
    torch.testing.assert_close(features.reads.norm(dim=1), torch.ones(48))


def test_a_transcoder_writes_elsewhere_than_it_reads() -> None:
    features = PlantedFeatures(dataclasses.replace(CONFIG, d_out=20))
    generator = torch.Generator().manual_seed(1)
    acts = features.draw(5, generator)
    x, y = features.embed(acts, generator)
    torch.testing.assert_close(x, acts @ features.reads)
    torch.testing.assert_close(y, acts @ features.writes)
    assert y.shape == (5, 20)


def test_private_features_are_at_one_site_and_the_others_at_all() -> None:
    features = PlantedFeatures(dataclasses.replace(CONFIG, sites=3, private=0.25))
    at = features.reads.view(48, 3, 32).norm(dim=2).round().sum(1)
    assert sorted(at.tolist()) == [1] * 12 + [3] * 36
    assert next(features.batches(4)).x.shape == (4, 96)


def test_seeds_fix_the_stream_and_every_sample_has_a_source_of_its_own() -> None:
    first, second = islice(PlantedFeatures(CONFIG, seed=3).batches(8, seed=4), 2)
    again, _ = islice(PlantedFeatures(CONFIG, seed=3).batches(8, seed=4), 2)
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, second.x)
    assert not torch.equal(first.x, next(PlantedFeatures(CONFIG, seed=5).batches(8, seed=4)).x)
    assert not torch.equal(first.x, next(PlantedFeatures(CONFIG, seed=3).batches(8, seed=5)).x)
    assert len(torch.cat([first.source, second.source]).unique(dim=0)) == 16


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n_features": 0}, "n_features 0"),
        ({"active": 49}, "active 49.*48"),
        ({"correlation": 1}, "correlation 1"),
        ({"correlation": 0.5}, "groups"),
        ({"private": 1.5}, "private 1.5"),
        ({"sites": 2, "d_out": 3}, "give one"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, float], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        dataclasses.replace(CONFIG, **changes)  # pyright: ignore[reportArgumentType]
