"""What a feature fires with: other features on the same tokens, and neurons that rise with it.

Both are gathered while the text is scanned once. Which features fire on which token goes to disk, 4
bytes each, so co-firing is counted on every token; the neurons of evenly drawn tokens are kept, in
a buffer of 128 MB, for all SAEs together.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

TOKENS_COUNTED = 2048
"""Tokens on which a feature's co-firing is counted; evenly spaced ones where it fires on more."""
SHARED = 3
"""Tokens that two features must share before they are said to fire together."""
FIRINGS_COUNTED = 1 << 22
"""Firings of other features in memory at a time; where there would be more, fewer tokens count."""
SAMPLE_BYTES = 1 << 27
"""Of the neurons of drawn tokens."""
ROWS = 1024
"""Of them that are multiplied at a time."""
CACHED = 256
"""Rows that are summed or moved at a time."""
FIRINGS = 5
"""Drawn tokens that a feature must fire on before its correlations are told."""

Ranked = list[tuple[int, float]]


class Cofiring:
    """Which features fire on each token of a scan, in a file.

    Features fire together by φ, the correlation of "this one fires" with "that one fires" over all
    tokens: 1 where they fire on the same tokens, 0 where they meet as often as chance has it.
    """

    def __init__(self, file: Path, d_sae: int) -> None:
        self.fired = np.zeros(d_sae, np.int64)
        """Tokens that each feature fires on."""
        self._file, self._tokens, self._counts = file, [np.empty(0, np.int64)], [np.zeros(1, int)]
        file.touch()

    def add(
        self, feature: Int[ndarray, " n"], token: Int[ndarray, " n"], read: Int[ndarray, " m"]
    ) -> None:
        """The firings on the tokens `read`, both by token, ascending and after earlier calls'."""
        self.fired += np.bincount(feature, minlength=len(self.fired))
        with self._file.open("ab") as file:
            file.write(feature.astype("<i4").data)
        self._tokens.append(read)
        self._counts.append(np.bincount(np.searchsorted(read, token), minlength=len(read)))

    def of(self, feature: int, token: Int[ndarray, " n"], most: int) -> Ranked:
        """The `most` features with the largest φ with one that fires on `token`, if above 0."""
        fires = self.fired[feature]
        if not fires:
            return []
        counted = token[:: -(-len(token) // TOKENS_COUNTED)]
        place = np.searchsorted(self._order, counted)
        firings = int((self._ends[place + 1] - self._ends[place]).sum())
        place = place[:: max(1, -(-firings // FIRINGS_COUNTED))]
        others, shared = self._met(place)
        known = (others != feature) & (shared >= SHARED)
        others, shared = others[known], shared[known] * (fires / len(place))
        n, theirs = len(self._order), self.fired[others]
        spread = np.sqrt(fires * theirs) * np.sqrt((n - fires) * (n - theirs))
        phi = (n * shared - fires * theirs) / np.maximum(spread, 1e-9)
        phi[spread == 0] = 0  # one of them always fires
        best = np.argsort(-phi, kind="stable")[:most]
        return [(int(others[i]), min(1.0, float(phi[i]))) for i in best if phi[i] > 0]

    def _met(self, place: Int[ndarray, " n"]) -> tuple[ndarray, ndarray]:
        """The features that fire on some of the tokens at these places, and on how many."""
        members = self._features[_ranges(self._ends[place], self._ends[place + 1])]
        if len(members) * 8 > len(self.fired):
            counts = np.bincount(members, minlength=len(self.fired))
            others = counts.nonzero()[0]
            return others, counts[others]
        return np.unique(members, return_counts=True)

    @cached_property
    def _order(self) -> Int[ndarray, " tokens"]:
        return np.concatenate(self._tokens)

    @cached_property
    def _ends(self) -> Int[ndarray, " tokens_and_one"]:
        return np.cumsum(np.concatenate(self._counts))

    @cached_property
    def _features(self) -> ndarray:
        """Token after token the features that fire on it; pages of the file, read when needed."""
        if not self._file.stat().st_size:
            return np.empty(0, np.int32)
        return np.asarray(np.memmap(self._file, "<i4", "r"))


class NeuronSample:
    """The neurons of evenly drawn tokens; of them, Pearson's correlation with a feature."""

    def __init__(self, neurons: int, shares: int = 1) -> None:
        """`shares`: samples that there are at the same time, which share SAMPLE_BYTES."""
        size = max(16, SAMPLE_BYTES // shares // (4 * neurons))
        self._x = np.empty((size, neurons), np.float32)
        self._token = np.empty(len(self._x), np.int64)
        self._n, self._span = 0, 2**32

    def add(
        self,
        token: Int[ndarray, " n"],
        take: Callable[[Int[ndarray, " m"]], Float[ndarray, "m neurons"]],
    ) -> None:
        """Keep the tokens whose hash is low; where there is no room, halve what counts as low.

        `take` gives the neurons of some of the tokens, by their places among them.
        """
        while True:
            chosen = np.flatnonzero(_spread(token) < self._span)
            if self._n + len(chosen) <= len(self._x):
                break
            self._span //= 2
            kept = np.flatnonzero(_spread(self._token[: self._n]) < self._span)
            self._n = len(kept)
            self._token[: self._n] = self._token[kept]
            for start in range(0, self._n, CACHED):  # forwards only, so no row is lost
                part = slice(start, min(start + CACHED, self._n))
                self._x[part] = self._x[kept[part]]
        end = self._n + len(chosen)
        self._x[self._n : end], self._token[self._n : end] = take(chosen), token[chosen]
        self._n = end

    def of(self, token: Int[ndarray, " n"], value: Float[ndarray, " n"], most: int) -> Ranked:
        """The `most` neurons with the largest |r| with a feature of activation `value` on `token`.

        Over the drawn tokens, those on which it does not fire too.
        """
        n, drawn = self._n, self._token[: self._n]
        place = np.minimum(np.searchsorted(drawn, token), max(n - 1, 0))
        there = drawn[place] == token if n else np.zeros(len(token), bool)
        if there.sum() < FIRINGS:
            return []
        place, value = place[there], value[there].astype(np.float64)
        mean, spread = self._moments
        together = np.zeros(self._x.shape[1])
        for start in range(0, len(place), ROWS):
            part = slice(start, start + ROWS)
            together += value[part].astype(np.float32) @ self._x[place[part]]
        covariance = together / n - value.sum() / n * mean
        own = np.sqrt(max((value**2).sum() / n - (value.sum() / n) ** 2, 1e-30))
        r = covariance / np.maximum(own * spread, 1e-30)
        r[spread < 1e-12] = 0  # a neuron that never changes
        best = np.argsort(-np.abs(r), kind="stable")[:most]
        return [(int(i), float(np.clip(r[i], -1, 1))) for i in best]

    @cached_property
    def _moments(self) -> tuple[ndarray, ndarray]:
        """Mean and standard deviation of every neuron, in fp64."""
        x = self._x[: self._n]
        mean = _total(x, lambda part: part) / len(x)
        return mean, np.sqrt(_total(x, lambda part: (part - mean) ** 2) / len(x))


def _ranges(start: Int[ndarray, " n"], stop: Int[ndarray, " n"]) -> Int[ndarray, " total"]:
    """The numbers from each start to before its stop, one range behind the other."""
    sizes = stop - start
    found = np.repeat(stop - np.cumsum(sizes), sizes)
    found += np.arange(len(found))
    return found


def _total(
    x: Float[ndarray, "n d"], of: Callable[[Float[ndarray, "m d"]], Float[ndarray, "m d"]]
) -> Float[ndarray, " d"]:
    """Σ `of`(row) in fp64, row after row; a few at a time, which stay in the cache: 15 times as
    fast as numpy's sums of all of them, with the same bits."""
    total = np.zeros((1, x.shape[1]))
    for start in range(0, len(x), CACHED):
        part = of(x[start : start + CACHED].astype(np.float64))
        total = np.concatenate([total, part]).sum(0, keepdims=True)
    return total[0]


def _spread(token: Int[ndarray, " n"]) -> ndarray:
    """A number below 2³² for each token, evenly spread (Fibonacci hashing)."""
    return (token.astype(np.uint64) * np.uint64(2654435769)) % np.uint64(2**32)
