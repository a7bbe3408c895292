"""What keeps the features sparse: a nonlinearity, its penalty, and how dead features come back."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.config import Moment
from sae.errors import ConfigError, suggest


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
        if k < 1:
            raise ConfigError(f"k {k}: at least 1 feature must be active")
        self.k = k

    def forward(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """max(pre, 0) where pre is among the k largest of its token, 0 elsewhere."""
        values, features = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, features, values.relu())

    def check(self, d_sae: int) -> None:
        """Raise ConfigError where k is more than there are features."""
        if self.k > d_sae:
            raise ConfigError(f"k {self.k}: there are only {d_sae} features (d_sae)")


_KINDS: dict[str, type[Sparsity]] = {cls.kind: cls for cls in (ReluL1, TopK)}


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
