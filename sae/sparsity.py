"""What keeps the features sparse: a nonlinearity, its penalty, and how dead features come back."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.config import Moment
from sae.errors import ConfigError, suggest

Device = str | torch.device | None


class Sparsity(nn.Module, ABC):
    """From pre-activations to activations; one subclass for each kind of autoencoder.

    A subclass says here all that training needs to know of it; `steps.step` does the rest.
    """

    kind: ClassVar[str]
    """Its name in configs."""
    settings: ClassVar[tuple[str, ...]]
    """Its settings, each an argument and an attribute, and named alike in its config."""
    revival: ClassVar[Literal["resample", "auxk"]]
    """How dead features come back: drawn anew, or by the auxiliary loss."""
    l0_knob: ClassVar[str]
    """The setting that moves L0."""
    competes: ClassVar[bool] = False
    """Whether a feature's activation depends on the other features of its token."""

    @abstractmethod
    def forward(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """The activations, all of them ≥ 0; each token's depend on no other token."""

    def cut(
        self, pre: Iterable[Float[Tensor, "chunk d_sae"]], tokens: int, now: Moment
    ) -> Float[Tensor, ""] | None:
        """What `in_training` is given, where that depends on the whole batch of `tokens`."""
        return None

    def observe(self, cut: Float[Tensor, ""] | None) -> None:
        """Learn from a step that is taken what `forward` needs to know."""

    def in_training(
        self, pre: Float[Tensor, "batch d_sae"], now: Moment, cut: Float[Tensor, ""] | None
    ) -> Float[Tensor, "batch d_sae"]:
        """The activations a step trains."""
        return self(pre)

    def penalty(
        self, acts: Float[Tensor, "batch d_sae"], decoder_norms: Float[Tensor, " d_sae"]
    ) -> Float[Tensor, ""]:
        """What is added to the loss, before its coefficient; mean over the batch."""
        return acts.new_zeros(())

    def config(self) -> dict[str, Any]:
        """Its settings, which `make_sparsity(self.kind, **config)` turns into the same object."""
        return {name: getattr(self, name) for name in self.settings}

    def check(self, d_sae: int) -> None:
        """Raise ConfigError where the settings do not fit a dictionary of `d_sae` features."""
        return

    def allocate(self, d_sae: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        """Create its tensors for `d_sae` features, as they are before training."""
        return

    def extra_repr(self) -> str:
        """The settings as shown by `print(sae)`."""
        return ", ".join(f"{name}={value}" for name, value in self.config().items())


class ReluL1(Sparsity):
    """ReLU, with the penalty Σ_i acts_i · ‖W_dec[i]‖ times `l1`.

    The norm in the penalty stops the cheap way out of small activations and long decoder rows,
    so the rows need no constraint. Bricken et al. 2023 (transformer-circuits.pub/2023/
    monosemantic-features); decoder norms as in Conerly et al., April 2024 update.
    """

    kind = "relu_l1"
    settings = ("l1",)
    revival = "resample"
    l0_knob = "l1"

    def __init__(self, l1: float) -> None:
        super().__init__()
        if not l1 >= 0:
            raise ConfigError(f"l1 {l1}: the penalty's coefficient must be 0 or more")
        self.l1 = l1

    def forward(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """max(pre, 0)."""
        return pre.relu()

    def penalty(
        self, acts: Float[Tensor, "batch d_sae"], decoder_norms: Float[Tensor, " d_sae"]
    ) -> Float[Tensor, ""]:
        """Mean over the batch of Σ_i acts_i · ‖W_dec[i]‖; multiply by `l1`."""
        return (acts @ decoder_norms).mean()


class TopK(Sparsity):
    """The `k` largest pre-activations of each token, then ReLU: at most `k` features are active.

    No penalty; dead features come back by the auxiliary loss. Gao et al. 2024, arXiv:2406.04093.
    """

    kind = "topk"
    settings = ("k",)
    revival = "auxk"
    l0_knob = "k"
    competes = True

    def __init__(self, k: int) -> None:
        super().__init__()
        _check_k(k)
        self.k = k

    def forward(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """max(pre, 0) where pre is among the k largest of its token, 0 elsewhere."""
        values, features = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, features, values.relu())

    def check(self, d_sae: int) -> None:
        """Raise ConfigError where k is more than there are features."""
        _check_k(self.k, d_sae)


class BatchTopK(Sparsity):
    """The n·k largest pre-activations of a batch of n tokens, then ReLU: k a token on average.

    A token takes as many features as it needs. Outside training there is no batch, so what exceeds
    the stored `threshold` is active: a mean over the last batches of the smallest activation that
    was among the n·k (Bussmann et al. 2024, arXiv:2412.06410, take the mean over many batches).
    """

    kind = "batchtopk"
    settings = ("k",)
    revival = "auxk"
    l0_knob = "k"

    KEEP = 0.95
    """What remains of the threshold when it learns from a batch: it remembers some 20 of them. With
    100 it lagged behind the training, where the cut still falls, and gave an L0 4 % too low."""

    threshold: Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        _check_k(k)
        self.k = k
        self.allocate(0)

    def allocate(self, d_sae: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        """A threshold of 0, which only a step sets to something else."""
        self.register_buffer("threshold", torch.zeros((), device=device, dtype=dtype))

    def forward(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """max(pre, 0) where pre reaches the threshold, 0 elsewhere."""
        return _from(pre, self.threshold)

    @torch.no_grad()
    def cut(
        self, pre: Iterable[Float[Tensor, "chunk d_sae"]], tokens: int, now: Moment
    ) -> Float[Tensor, ""]:
        """The n·k-th largest pre-activation of the batch; 0 where fewer are positive."""
        wanted, largest, bound = tokens * now.k, None, 0.0
        for chunk in pre:
            found = chunk[chunk > bound]
            largest = found if largest is None else torch.cat([largest, found])
            if len(largest) > wanted:
                largest = largest.topk(wanted, sorted=False).values
            if len(largest) == wanted:
                bound = largest.min()
        assert largest is not None
        return largest.min() if len(largest) == wanted else largest.new_zeros(())

    def in_training(
        self, pre: Float[Tensor, "batch d_sae"], now: Moment, cut: Float[Tensor, ""] | None
    ) -> Float[Tensor, "batch d_sae"]:
        """max(pre, 0) where pre reaches the batch's cut, 0 elsewhere."""
        assert cut is not None
        return _from(pre, cut)

    @torch.no_grad()
    def observe(self, cut: Float[Tensor, ""] | None) -> None:
        """Move the threshold towards the cut of a batch; the first one sets it."""
        assert cut is not None
        self.threshold.copy_(torch.where(self.threshold > 0, self.threshold, cut))
        self.threshold.lerp_(cut.to(self.threshold.dtype), 1 - self.KEEP)

    def check(self, d_sae: int) -> None:
        """Raise ConfigError where k is more than there are features."""
        _check_k(self.k, d_sae)


def _check_k(k: int, d_sae: int | None = None) -> None:
    if k < 1:
        raise ConfigError(f"k {k}: at least 1 feature must be active")
    if d_sae is not None and k > d_sae:
        raise ConfigError(f"k {k}: there are only {d_sae} features (d_sae)")


def _from(pre: Tensor, threshold: Tensor) -> Tensor:
    """max(pre, 0) where pre reaches a threshold ≥ 0, 0 elsewhere."""
    return torch.where(pre >= threshold, pre, 0).relu()


_KINDS: dict[str, type[Sparsity]] = {cls.kind: cls for cls in (ReluL1, TopK, BatchTopK)}


def make_sparsity(kind: str, **settings: Any) -> Sparsity:
    """The sparsity named `kind`; raises ConfigError on an unknown kind or setting."""
    try:
        return _named(kind)(**settings)
    except TypeError as error:
        raise ConfigError(f"sparsity {kind}: wrong settings {settings} ({error})") from None


def settings_of(kind: str) -> tuple[str, ...]:
    """What `make_sparsity` takes for `kind`; raises ConfigError on an unknown kind."""
    return _named(kind).settings


def _named(kind: str) -> type[Sparsity]:
    if kind not in _KINDS:
        raise ConfigError(
            f"sparsity kind {kind!r} is unknown{suggest(kind, _KINDS)}; "
            f"there are {', '.join(_KINDS)}"
        )
    return _KINDS[kind]
