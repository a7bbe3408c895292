"""What keeps the features sparse: a nonlinearity, its penalty, and how dead features come back."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
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
    revival: ClassVar[Literal["resample", "auxk", "auxiliary"]]
    """How dead features come back: drawn anew, by the loss of AuxK, or by `auxiliary`."""
    l0_knob: ClassVar[str]
    """The setting that moves L0."""
    competes: ClassVar[bool] = False
    """Whether a feature's activation depends on the other features of its token."""
    pace: ClassVar[float] = 1.0
    """Learning rate of its own parameters, in multiples of that of the weights."""
    lag: ClassVar[float] = 15.0
    """Steps that L0 takes to answer the penalty's coefficient, at the full learning rate."""

    @abstractmethod
    def forward(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """The activations, all of them ≥ 0; each token's depend on no other token."""

    def raise_thresholds(self, by: float) -> None:
        """Raise learned thresholds by some e-folds, where there are any: L0 falls."""
        return

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
        self,
        pre: Float[Tensor, "batch d_sae"],
        acts: Float[Tensor, "batch d_sae"],
        decoder_norms: Float[Tensor, " d_sae"],
        now: Moment,
    ) -> Float[Tensor, ""]:
        """What is added to the loss, before its coefficient; mean over the batch."""
        return acts.new_zeros(())

    def auxiliary(
        self,
        pre: Float[Tensor, "batch d_sae"],
        y: Float[Tensor, "batch d_out"],
        decoder: tuple[Float[Tensor, "d_sae d_out"], Float[Tensor, " d_out"]],
        dead: Bool[Tensor, " d_sae"] | None,
    ) -> Float[Tensor, ""]:
        """A further loss, mean over the batch; `decoder` is W_dec and b_dec, which it leaves."""
        return pre.new_zeros(())

    def config(self) -> dict[str, Any]:
        """Its settings, which `make_sparsity(self.kind, **config)` turns into the same object."""
        return {name: getattr(self, name) for name in self.settings}

    def check(self, d_sae: int) -> None:
        """Raise ConfigError where the settings do not fit a dictionary of `d_sae` features."""
        return

    def allocate(self, d_sae: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        """Create its tensors for `d_sae` features, as they are before training."""
        return

    @torch.no_grad()
    def renew(self, features: Int[Tensor, " n"]) -> None:
        """Set what it holds of some features to what it was before training."""
        for name, parameter in self.named_parameters():
            fresh = make_sparsity(self.kind, **self.config())
            fresh.allocate(len(parameter), parameter.device, parameter.dtype)
            parameter[features] = fresh.get_parameter(name)[features]

    def extra_repr(self) -> str:
        """The settings as shown by `print(sae)`."""
        return ", ".join(f"{name}={value}" for name, value in self.config().items())


class ReluL1(Sparsity):
    """ReLU, with the penalty Σ_i (acts_i · ‖W_dec[i]‖)^p times `l1`; p is 1 or falls in training.

    The norm in the penalty stops the cheap way out of small activations and long decoder rows,
    so the rows need no constraint. Bricken et al. 2023 (transformer-circuits.pub/2023/
    monosemantic-features); decoder norms as in Conerly et al., April 2024 update. A p that falls
    below 1 comes ever closer to counting features: Karvonen et al. 2024, arXiv:2408.00113.
    """

    kind = "relu_l1"
    settings = ("l1",)
    revival = "resample"
    l0_knob = "l1"

    def __init__(self, l1: float) -> None:
        super().__init__()
        _check_not_negative(l1=l1)
        self.l1 = l1

    def forward(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """max(pre, 0)."""
        return pre.relu()

    def penalty(
        self,
        pre: Float[Tensor, "batch d_sae"],
        acts: Float[Tensor, "batch d_sae"],
        decoder_norms: Float[Tensor, " d_sae"],
        now: Moment,
    ) -> Float[Tensor, ""]:
        """Mean over the batch of Σ_i `power(acts_i · ‖W_dec[i]‖, now.p)`; multiply by `l1`."""
        if now.p == 1:
            return (acts @ decoder_norms).mean()
        return power(acts * decoder_norms, now.p).sum(-1).mean()


SMALL = 0.01
"""Far below activations that matter: those of a token have a norm of some √d_in together."""


def power(size: Tensor, p: float) -> Tensor:
    """size^p for sizes ≥ 0 well above SMALL, and 0 for 0: (size + SMALL)^p − SMALL^p.

    Without SMALL its slope would be without bound near 0.
    """
    return (size + SMALL).pow(p) - SMALL**p


def slope_of_power(size: Tensor, p: float) -> Tensor:
    """Derivative of `power` to `size`."""
    return (size + SMALL).pow_(p - 1).mul_(p)


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


class JumpRelu(Sparsity):
    """pre · 1[pre > θ], one learned θ = exp(`log_threshold`) > 0 per feature.

    The penalty counts active features, Σ 1[pre > θ]; or, with `tanh` = c above 0, it is
    Σ tanh(c · acts · ‖W_dec‖), which also pulls at small activations. Neither the jump nor the
    count has a gradient to θ, so it gets the kernel estimate of the gradient of their means, from
    the pre-activations within half a `bandwidth` of θ. Rajamanoharan et al. 2024, arXiv:2407.14435.

    A dead feature comes back by `preact_coef` times Σ ReLU(θ − pre) · ‖W_dec‖ over the dead, which
    raises its pre-activations and lowers its θ. This and tanh: Anthropic, January 2025 update
    (transformer-circuits.pub/2025/january-update), which takes the loss over all features.
    """

    kind = "jumprelu"
    settings = ("l0_coef", "bandwidth", "tanh", "preact_coef")
    revival = "auxiliary"
    l0_knob = "l0_coef"
    pace = 5.0
    """log θ is of the order of 1, an encoder weight of 1/√d_in, and Adam moves both alike. Of 1, 5
    and 20, 5 gave the lowest FVU for its L0 on the bundled model; at 20 half the features died."""
    lag = 20.0  # the penalty moves thresholds alone

    log_threshold: nn.Parameter

    def __init__(
        self,
        l0_coef: float = 0.0,
        bandwidth: float = 1.0,
        tanh: float = 0.0,
        preact_coef: float = 0.0,
    ) -> None:
        super().__init__()
        _check_not_negative(l0_coef=l0_coef, tanh=tanh, preact_coef=preact_coef)
        if not bandwidth > 0:
            raise ConfigError(f"bandwidth {bandwidth}: the kernel must be wider than 0")
        self.l0_coef, self.bandwidth = l0_coef, bandwidth
        self.tanh, self.preact_coef = tanh, preact_coef
        self.allocate(0)

    def allocate(self, d_sae: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        """Every θ at `bandwidth`."""
        start = torch.full((d_sae,), math.log(self.bandwidth), device=device, dtype=dtype)
        self.log_threshold = nn.Parameter(start)

    @property
    def threshold(self) -> Float[Tensor, " d_sae"]:
        """θ of every feature."""
        return self.log_threshold.exp()

    @torch.no_grad()
    def raise_thresholds(self, by: float) -> None:
        """Raise every log θ."""
        self.log_threshold.add_(by)

    def forward(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """pre where it is above θ, 0 elsewhere; d/dθ is −θ/bandwidth · kernel, as in the paper."""
        active = self._active(pre)
        fixed = active.detach()
        return pre * fixed + self.threshold.detach() * (active - fixed)  # the sum adds 0

    def penalty(
        self,
        pre: Float[Tensor, "batch d_sae"],
        acts: Float[Tensor, "batch d_sae"],
        decoder_norms: Float[Tensor, " d_sae"],
        now: Moment,
    ) -> Float[Tensor, ""]:
        """Mean over the batch of Σ 1[pre > θ], or of Σ tanh(c · acts · ‖W_dec‖)."""
        counted = (self.tanh * acts * decoder_norms).tanh() if self.tanh else self._active(pre)
        return counted.sum(-1).mean()

    def auxiliary(
        self,
        pre: Float[Tensor, "batch d_sae"],
        y: Float[Tensor, "batch d_out"],
        decoder: tuple[Float[Tensor, "d_sae d_out"], Float[Tensor, " d_out"]],
        dead: Bool[Tensor, " d_sae"] | None,
    ) -> Float[Tensor, ""]:
        """preact_coef · Σ ReLU(θ − pre) · ‖W_dec‖ over the dead features, mean over the batch."""
        if dead is None or not self.preact_coef or not dead.any():
            return pre.new_zeros(())
        norms = torch.linalg.vector_norm(decoder[0][dead], dim=-1)
        below = (self.threshold[dead] - pre[:, dead]).relu()
        return self.preact_coef * (below @ norms).mean()

    def _active(self, pre: Tensor) -> Tensor:
        """1[pre > θ], with the kernel's gradient to θ."""
        found: Tensor = _Above.apply(pre, self.threshold, self.bandwidth)  # pyright: ignore[reportAssignmentType]  # torch types it as Any | None
        return found


class _Above(torch.autograd.Function):
    """1[pre > θ]. To θ: −1/bandwidth where |pre − θ| < bandwidth/2, else 0; to pre: nothing."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (grad,) = grads
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        return None, (grad * near).flatten(0, -2).sum(0) / -ctx.bandwidth, None


class Gated(Sparsity):
    """1[pre > 0] · ReLU(exp(r_mag) · pre + b_mag): whether a feature is active, and how much.

    The penalty, Σ ReLU(pre) · ‖W_dec‖, pulls at the gate alone, so that it does not shrink the
    activations. The norms are constants to it: were they not, the rows would shrink, the magnitude
    make up for that, and the penalty vanish (the paper keeps rows at norm 1). The gate has no
    gradient from the reconstruction; it learns from an auxiliary one,
    ‖y − ReLU(pre) @ W_dec − b_dec‖², whose decoder is frozen. Rajamanoharan et al. 2024,
    arXiv:2404.16014; their magnitude starts from pre without its bias, which b_mag makes up for.
    """

    kind = "gated"
    settings = ("l1",)
    revival = "resample"
    l0_knob = "l1"

    r_mag: nn.Parameter
    b_mag: nn.Parameter

    def __init__(self, l1: float = 0.0) -> None:
        super().__init__()
        _check_not_negative(l1=l1)
        self.l1 = l1
        self.allocate(0)

    def allocate(self, d_sae: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        """Zeros, with which it is ReLU."""
        self.r_mag = nn.Parameter(torch.zeros(d_sae, device=device, dtype=dtype))
        self.b_mag = nn.Parameter(torch.zeros(d_sae, device=device, dtype=dtype))

    def forward(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """ReLU(exp(r_mag) · pre + b_mag) where pre is positive, 0 elsewhere."""
        return torch.where(pre > 0, self.r_mag.exp() * pre + self.b_mag, 0).relu()

    def penalty(
        self,
        pre: Float[Tensor, "batch d_sae"],
        acts: Float[Tensor, "batch d_sae"],
        decoder_norms: Float[Tensor, " d_sae"],
        now: Moment,
    ) -> Float[Tensor, ""]:
        """Mean over the batch of Σ ReLU(pre) · ‖W_dec‖, norms frozen; multiply by `l1`."""
        return (pre.relu() @ decoder_norms.detach()).mean()

    def auxiliary(
        self,
        pre: Float[Tensor, "batch d_sae"],
        y: Float[Tensor, "batch d_out"],
        decoder: tuple[Float[Tensor, "d_sae d_out"], Float[Tensor, " d_out"]],
        dead: Bool[Tensor, " d_sae"] | None,
    ) -> Float[Tensor, ""]:
        """Mean over the batch of ‖y − ReLU(pre) @ W_dec − b_dec‖²."""
        W_dec, b_dec = decoder
        return (y - pre.relu() @ W_dec - b_dec).square().sum(-1).mean()


def _check_not_negative(**coefs: float) -> None:
    for name, coef in coefs.items():
        if not coef >= 0:
            raise ConfigError(f"{name} {coef}: a coefficient must be 0 or more")


_KINDS: dict[str, type[Sparsity]] = {
    cls.kind: cls for cls in (ReluL1, TopK, BatchTopK, JumpRelu, Gated)
}


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
