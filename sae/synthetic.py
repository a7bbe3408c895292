"""Activations made of features that were planted: the truth a dictionary is scored against.

x = Σ_i a_i · reads_i + noise, where few of the activations a_i are not 0.

More features than dimensions, frequencies after Zipf, as language has them (the set-up of Sharkey
et al. 2022, "Taking features out of superposition with sparse autoencoders").
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.activations import Batch
from sae.errors import ConfigError


@dataclass(frozen=True)
class PlantedConfig:
    """What is planted; raises ConfigError where the settings do not fit together."""

    d_in: int = 128
    """Width of the activations, of each site where there are several."""
    n_features: int = 256
    """Number of true features, most frequent first."""
    active: float = 4.0
    """True features active on average."""
    exponent: float = 1.0
    """The i-th feature's frequency is ∝ i^-exponent, at most 1; 0 makes all equally frequent."""
    magnitude_std: float = 0.3
    """Active features have the magnitude |N(1, magnitude_std)|."""
    noise: float = 0.0
    """Standard deviation of the Gaussian noise on every dimension."""
    groups: int = 0
    """Groups of features that tend to be active together; feature i is in group i mod groups."""
    correlation: float = 0.0
    """Correlation, in [0, 1), of the Gaussians behind the features of one group."""
    children: int = 0
    """Children of each of the most frequent features, active only where their parent is."""
    d_out: int | None = None
    """Where given, y has this width and other directions, as for a transcoder."""
    sites: int = 1
    """Sites side by side in x, each with directions of its own, as for a crosscoder."""
    private: float = 0.0
    """Share of the features that are at one of the sites only."""

    def __post_init__(self) -> None:
        for name in ("d_in", "n_features", "sites"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)}: expected at least 1")
        if not 0 < self.active <= self.n_features:
            raise ConfigError(f"active {self.active}: expected up to n_features {self.n_features}")
        for name, low, high in (("correlation", 0, 1), ("private", 0, 1 + 1e-9)):
            if not low <= getattr(self, name) < high:
                raise ConfigError(f"{name} {getattr(self, name)}: expected a share from 0 to 1")
        if self.correlation and self.groups < 1:
            raise ConfigError("correlation: give the number of groups too")
        if self.sites > 1 and self.d_out is not None:
            raise ConfigError("sites and d_out: a crosscoder's y is its x; give one of them")


class PlantedFeatures:
    """True features with frequencies, directions and relations, drawn from `seed`."""

    def __init__(self, config: PlantedConfig, seed: int = 0):
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        self.frequencies = zipf(config.n_features, config.active, config.exponent)
        self.parent = _parents(config)
        self._conditional = self.frequencies.clone()
        has = self.parent >= 0
        self._conditional[has] /= self.frequencies[self.parent[has]]
        sites = [directions(config.n_features, config.d_in, generator) for _ in range(config.sites)]
        self.reads = torch.cat(_private(sites, config.private, generator), dim=1)
        """[n_features d_in · sites] what each feature adds to x."""
        self.writes = self.reads
        """[n_features d_out] what each feature adds to y; `reads` where y is x."""
        if config.d_out is not None:
            self.writes = directions(config.n_features, config.d_out, generator)

    def draw(self, n: int, generator: torch.Generator) -> Float[Tensor, "n features"]:
        """The true activations of `n` samples, all ≥ 0."""
        active = self._uniform(n, generator) < self._conditional
        has = self.parent >= 0
        active[:, has] &= active[:, self.parent[has]]
        acts = torch.zeros(active.shape)
        magnitudes = torch.randn(int(active.sum()), generator=generator)
        acts[active] = magnitudes.mul_(self.config.magnitude_std).add_(1).abs_()
        return acts

    def embed(
        self, acts: Float[Tensor, "n features"], generator: torch.Generator
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        """x and y of these activations, with noise of their own; y is x unless `d_out` is given."""
        x = self._noisy(acts @ self.reads, generator)
        return x, x if self.writes is self.reads else self._noisy(acts @ self.writes, generator)

    def batches(self, batch: int, seed: int = 0) -> Iterator[Batch]:
        """Batches without end; every sample is a document of its own."""
        generator = torch.Generator().manual_seed(seed)
        position = torch.zeros(batch, dtype=torch.long)
        document = torch.arange(batch)
        while True:
            x, y = self.embed(self.draw(batch, generator), generator)
            yield Batch(x, y, torch.stack([document, position], dim=1))
            document = document + batch

    def _uniform(self, n: int, generator: torch.Generator) -> Float[Tensor, "n features"]:
        """Uniform numbers; those of parentless features of a group are correlated."""
        config, shape = self.config, (n, self.config.n_features)
        if not config.correlation:
            return torch.rand(shape, generator=generator)
        shared = torch.randn(n, config.groups, generator=generator)
        group = torch.arange(config.n_features) % config.groups
        weight = torch.where(self.parent < 0, config.correlation, 0.0)
        own = torch.randn(shape, generator=generator)
        mixed = weight.sqrt() * shared[:, group] + (1 - weight).sqrt() * own
        return torch.special.ndtr(mixed)

    def _noisy(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if not self.config.noise:
            return x
        return torch.randn(x.shape, generator=generator).mul_(self.config.noise).add_(x)


def zipf(n: int, active: float, exponent: float) -> Float[Tensor, " n"]:
    """n frequencies ∝ rank^-exponent that add up to `active`, none above 1."""
    weights = torch.arange(1, n + 1, dtype=torch.float64) ** -exponent
    certain = 0
    while True:
        rest = weights[certain:] * ((active - certain) / weights[certain:].sum())
        above = int((rest > 1 + 1e-9).sum())
        if not above:
            return torch.cat([torch.ones(certain), rest.float()])
        certain += above


def directions(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    """Unit vectors of random direction."""
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)


def _parents(config: PlantedConfig) -> Tensor:
    """[n_features] the parent of each feature, -1 for those that have none.

    The first n / (1 + children) features are parents, so that each is more frequent than its
    children.
    """
    roots = math.ceil(config.n_features / (1 + config.children))
    feature = torch.arange(config.n_features)
    return torch.where(feature < roots, -1, feature % roots)


def _private(sites: list[Tensor], share: float, generator: torch.Generator) -> list[Tensor]:
    """The directions [n d] of each site, 0 where a private feature is at another."""
    n = len(sites[0])
    if not share or len(sites) == 1:
        return sites
    home = torch.randint(len(sites), (n,), generator=generator)
    everywhere = torch.randperm(n, generator=generator) >= round(share * n)
    return [rows * (everywhere | (home == site))[:, None] for site, rows in enumerate(sites)]
