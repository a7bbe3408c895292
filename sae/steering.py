"""Steer a penalty's coefficient during training until as many features are active as wanted.

A controller on logarithms, whose error is log(L0 / target). L0 answers a change of the coefficient
like a first-order lag of some steps: a part of the coefficient proportional to the error, `lag`
times the integral one, cancels it, so that L0 goes to the target without swinging. While the
features improve, the coefficient that gives the target falls steadily: `trend` learns how fast,
else L0 would stay above the target all along. Both parts: Åström & Hägglund 1995, "PID
Controllers". While the learning rate falls, the trend slows down like it, as the features do, and
the integral part like its root, as L0 answers more and more slowly.

Features that have just been resampled are active on most tokens for some steps. That passes by
itself, and a coefficient that answered it would kill them again: of a sudden rise little counts.

Learned thresholds follow the penalty slowly, and no penalty at all can leave L0 below the target:
the reconstruction holds them up. So all of them are moved together as well, which L0 answers at
once; the coefficient then only has to bring about that it is not needed (the same book's mid-range
control, by two actuators).

The coefficient starts far below the one that is given and rises, so that features come before the
penalty does: those that too much of it kills at first hardly come back.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

HEAD_START = 30.0
"""How many times below the given coefficient it starts."""
STRENGTH = 0.9
"""e-folds of the coefficient, for an error of one e-fold: at once, and again over each lag."""
FAR_ABOVE, FAR_BELOW = 1.0, 0.5
"""An L0 that is further off, in e-folds, counts as this far off."""
SUDDEN = 0.1
"""A rise above the target, or above the error before, counts up to this much, in e-folds."""
NEAR = 0.3
"""The trend is learnt from smaller errors than this: larger ones only say how it began."""
PUSH, FASTEST = 0.3, 0.03
"""e-folds that thresholds are raised by at each step: for an error of one e-fold, and at most. The
reconstruction moves them by up to 0.01 (Adam's step), which leaves an error of 3 % until the
learning rate falls."""
KEEP = 0.8
"""What remains of the smoothed error at each step: it remembers some 5."""


class L0Control:
    """The factor on a coefficient, moved after every step by what L0 was.

    `lag`: steps that L0 takes to answer the coefficient, at the full learning rate.
    """

    def __init__(self, target: float, lag: float) -> None:
        self.target, self.lag = target, lag
        self.log_factor = -math.log(HEAD_START)
        self.error = -math.inf
        """log(L0 / target), smoothed; −∞ until L0 has been above the target."""
        self.trend = 0.0
        """What log_factor moves by each step at the full rate where the error is 0."""

    @property
    def factor(self) -> float:
        """What the coefficient is multiplied by."""
        return math.exp(self.log_factor)

    def observe(self, l0: float, speed: float = 1.0, *, early: bool = False) -> float:
        """Learn from a step at `speed` of the full learning rate.

        Returns by how many e-folds to raise all thresholds, 0 `early` in the training. Nor does an
        L0 that is too low teach anything then before it has been too high: where thresholds start
        high, no feature is active yet.
        """
        error = math.log(max(l0, 1e-3 * self.target) / self.target)
        bounded = max(-FAR_BELOW, min(FAR_ABOVE, error))
        if self.error == -math.inf:
            if early and error < 0:
                return 0.0
            self.error = bounded
        bounded = min(bounded, max(self.error, 0.0) + SUDDEN)
        before, self.error = self.error, KEEP * self.error + (1 - KEEP) * bounded
        gain, pace = STRENGTH / self.lag, math.sqrt(speed)
        if abs(self.error) < NEAR:
            self.trend += pace * gain**2 / 4 * self.error  # critically damped
        self.log_factor += pace * gain * self.error + speed * self.trend
        self.log_factor += STRENGTH * (self.error - before)
        return 0.0 if early else max(-FASTEST, min(FASTEST, PUSH * self.error))

    def state(self) -> Float[Tensor, " 3"]:
        """What the rest of the training depends on."""
        return torch.tensor([self.log_factor, self.error, self.trend], dtype=torch.float64)

    def restore(self, state: Float[Tensor, " 3"]) -> None:
        """Go on from a `state()`."""
        self.log_factor, self.error, self.trend = state.tolist()
