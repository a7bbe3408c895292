"""How well a dictionary recovers planted features, beside what the true one reaches.

Every true feature gets at most one feature of the dictionary, by the best sum of decoder cosines.
That feature says "on" above a threshold of its own, chosen on one split and judged on another.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.sparsity import ReluL1, TopK
from sae.synthetic import PlantedFeatures

RECOVERED = 0.9
"""Cosine from which a true feature counts as recovered."""
CARRIED = 0.5
"""Share of a feature's mean magnitude another one must write to count as standing in for it."""
OFTEN = 0.05
"""Share of a feature's samples from which standing in for it is counted."""
_PAIRS = 4096


@dataclass(frozen=True)
class Scores:
    """What one dictionary reaches; the best is 1, and 0 for the two counts."""

    mmc: float
    """Mean over the true features of the largest decoder cosine."""
    recovered: float
    """Share of the true features whose largest cosine is at least RECOVERED."""
    f1: float
    """Mean F1 of the matched features; 0 for a true feature without one."""
    split: int
    """True features of which unmatched features of the dictionary carry a part of the samples."""
    absorbed: int
    """True features of which other true features' matches carry a part of the samples."""


@dataclass(frozen=True)
class Split:
    """Samples whose true activations are known."""

    x: Float[Tensor, "n d_in"]
    true: Float[Tensor, "n features"]


class Exam:
    """Two splits of planted samples, drawn once, on which any dictionary can be scored."""

    def __init__(self, features: PlantedFeatures, n: int = 20_000, seed: int = 1 << 31):
        generator = torch.Generator().manual_seed(seed)

        def drawn() -> Split:
            true = features.draw(n, generator)
            return Split(features.embed(true, generator)[0], true)

        self.features = features
        self.tuning, self.test = drawn(), drawn()

    @torch.no_grad()
    def score(self, sae: SparseAutoencoder) -> Scores:
        """The scores of an autoencoder of raw activations."""
        return self.judge(sae.W_dec, sae.encode(self.tuning.x), sae.encode(self.test.x))

    def judge(
        self,
        W_dec: Float[Tensor, "d_sae d_out"],
        tuning: Float[Tensor, "n d_sae"],
        test: Float[Tensor, "n d_sae"],
    ) -> Scores:
        """The scores of any dictionary, from its decoder and its activations on both splits."""
        W_dec, truth = W_dec.detach().float(), self.features.writes
        similar = cosines(truth, W_dec)
        largest = similar.amax(1)
        matched = match(similar)
        has = matched >= 0
        threshold = torch.zeros(len(W_dec))
        threshold[matched[has]] = thresholds(tuning[:, matched[has]], self.tuning.true[:, has] > 0)
        acts = torch.where(test > threshold, test, 0)
        on = torch.zeros_like(self.test.true, dtype=torch.bool)
        on[:, has] = acts[:, matched[has]] > 0
        split, absorbed = stand_ins(W_dec, acts, on, matched, truth, self.test.true)
        return Scores(
            mmc=largest.mean().item(),
            recovered=(largest >= RECOVERED).float().mean().item(),
            f1=f1(on, self.test.true > 0).nanmean().item(),
            split=int(split.sum()),
            absorbed=int(absorbed.sum()),
        )

    @torch.no_grad()
    def ideal(self, k: int | None = None) -> Scores:
        """What the true dictionary reaches with a linear encoder before ReLU, or before top-`k`.

        Thresholds are chosen for every feature, so ReLU stands for each variant that decides
        feature by feature: JumpReLU, Gated, and BatchTopK once trained. The encoder is the
        transpose of the true directions, or the linear regression of the true activations on x:
        whichever has the higher F1.
        """
        return max((self.score(sae) for sae in self._true(k)), key=lambda scores: scores.f1)

    def _true(self, k: int | None) -> list[SparseAutoencoder]:
        """Autoencoders of the true directions."""
        reads, writes = self.features.reads, self.features.writes
        transpose = (reads / reads.square().sum(1, keepdim=True)).T, torch.zeros(len(reads))
        found = []
        for W_enc, b_enc in (transpose, regression(self.tuning.x, self.tuning.true)):
            sparsity = ReluL1(0) if k is None else TopK(k)
            d_in, d_sae = W_enc.shape
            sae = SparseAutoencoder(d_in, d_sae, sparsity, writes.shape[1], subtract_b_dec=False)
            sae.W_enc.copy_(W_enc)
            sae.b_enc.copy_(b_enc)
            sae.W_dec.copy_(writes)
            found.append(sae)
        return found


def cosines(
    truth: Float[Tensor, "features d"], W_dec: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "features d_sae"]:
    """Of every true feature with every feature of the dictionary."""
    normalize = torch.nn.functional.normalize
    return normalize(truth, dim=1) @ normalize(W_dec, dim=1).T


def regression(
    x: Float[Tensor, "n d_in"], true: Float[Tensor, "n features"]
) -> tuple[Float[Tensor, "d_in features"], Float[Tensor, " features"]]:
    """Weights and biases of the least-squares estimate of the true activations from x."""
    mean, true_mean = x.mean(0), true.mean(0)
    W_enc = torch.linalg.lstsq(x - mean, true - true_mean).solution
    return W_enc, true_mean - mean @ W_enc


def match(similar: Float[Tensor, "features d_sae"]) -> Int[Tensor, " features"]:
    """One feature of the dictionary for each true one, of the largest sum; -1 where none is left.

    Kuhn 1955, "The Hungarian method for the assignment problem".
    """
    rows, columns = linear_sum_assignment(similar.numpy(), maximize=True)
    matched = torch.full((len(similar),), -1)
    matched[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return matched


def thresholds(
    acts: Float[Tensor, "n features"], active: Bool[Tensor, "n features"]
) -> Float[Tensor, " features"]:
    """Of each feature the one above which "on" has the best F1, between two activations or 0."""
    values, order = acts.sort(dim=0, descending=True)
    found = active.gather(0, order).cumsum(0)
    said = torch.arange(1, len(acts) + 1)[:, None]
    score = 2 * found / (said + active.sum(0))
    below = torch.cat([values[1:], torch.zeros_like(values[:1])])
    score[values <= below] = -1  # no threshold lies between equal activations
    best = score.argmax(0, keepdim=True)
    return ((values.gather(0, best) + below.gather(0, best)) / 2)[0]


def f1(on: Bool[Tensor, "n features"], active: Bool[Tensor, "n features"]) -> Tensor:
    """[features] 2·TP / (2·TP + FP + FN), 0 without TP; NaN where a feature is never active."""
    hits = (on & active).sum(0)
    score = 2 * hits / (on.sum(0) + active.sum(0))
    return torch.where(active.any(0), score, torch.nan)


def stand_ins(
    W_dec: Float[Tensor, "d_sae d"],
    acts: Float[Tensor, "n d_sae"],
    on: Bool[Tensor, "n features"],
    matched: Int[Tensor, " features"],
    truth: Float[Tensor, "features d"],
    true: Float[Tensor, "n features"],
) -> tuple[Bool[Tensor, " features"], Bool[Tensor, " features"]]:
    """Which true features are split, and which absorbed, on more than OFTEN of their samples.

    Looked at are samples with the feature where its match is off: where `on` is false and the
    match's activation 0. Another one stands in if it
    writes at least CARRIED of the feature's mean magnitude along its direction. Where that is
    another true feature's match, the feature is absorbed there, otherwise it is split. After
    Chanin et al. 2024, arXiv:2409.14507, who must guess the direction by a probe.
    """
    active = true > 0
    counts = active.sum(0).clamp_min(1)
    needed = CARRIED * true.sum(0) / counts
    writes = (truth @ W_dec.T) / truth.square().sum(1, keepdim=True)
    is_match = torch.zeros(len(W_dec), dtype=torch.bool)
    is_match[matched[matched >= 0]] = True
    lost = torch.zeros(2, len(truth))
    for pairs in (active & ~on).nonzero().split(_PAIRS):
        sample, feature = pairs.T
        written, by = (acts[sample] * writes[feature]).max(1)
        hit = written >= needed[feature]
        lost.index_put_((is_match[by[hit]].long(), feature[hit]), torch.ones(()), accumulate=True)
    split, absorbed = lost / counts > OFTEN
    return split, absorbed
