"""Thresholds and gates as other tools keep them.

Others keep θ itself, one for each feature, which is active where pre > θ. Our JumpReLU keeps log θ,
our BatchTopK one θ for all features, which are active from θ on. The magnitude of others' gates is
computed from x @ W_enc without the gate's bias, that of ours from pre, which has it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import FormatError
from sae.formats import foreign
from sae.formats.foreign import Notes
from sae.sparsity import Sparsity

NOTES = {
    "jumprelu": "not bit for bit: log θ is written as θ, which is the same when read back",
    "gated": "not bit for bit: the magnitude's bias is moved by exp(r_mag) · b_enc, for a "
    "magnitude without the gate's bias",
}
SILENT = -200.0
"""A log θ whose exp is 0 in every type of weights."""
_REACH = 32
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def outward(kind: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Notes]:
    """The tensors of an autoencoder as others have them.

    Those of jumprelu and batchtopk with `threshold` [d_sae], above which a feature is active, those
    of gated with b_mag for a magnitude that is computed without b_enc.
    """
    if kind == "gated":
        return {**tensors, "b_mag": _shifted(tensors, 1)}, [NOTES[kind]]
    if kind == "jumprelu":
        return {**tensors, "threshold": tensors["log_threshold"].exp()}, [NOTES[kind]]
    if kind == "batchtopk":
        d_sae = len(tensors["b_enc"])
        return {**tensors, "threshold": just_below(tensors["threshold"]).repeat(d_sae)}, []
    return dict(tensors), []


def just_below(threshold: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The number before each that is at least 0, so that pre > it means pre ≥ the threshold."""
    bits = threshold.view(_BITS[threshold.dtype])
    below_zero = torch.iinfo(bits.dtype).min + 1
    return torch.where(threshold > 0, bits - 1, below_zero).view(threshold.dtype)


def just_above(threshold: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The number behind each, 0 for those below 0: the inverse of `just_below`."""
    bits = threshold.view(_BITS[threshold.dtype])
    return torch.where(threshold < 0, 0, bits + 1).view(threshold.dtype)


def log_thresholds(
    theta: Float[Tensor, " d_sae"], where: object
) -> tuple[Float[Tensor, " d_sae"], Notes]:
    """The log θ whose exp is θ to the bit, or the nearest there is, which a note tells.

    θ below 0 means the same as 0 where activations are at least 0. Raises FormatError, naming
    `where`, for a θ that is not finite.
    """
    if not theta.isfinite().all():
        raise FormatError(f"{where}: a threshold is not a finite number")
    wanted = theta.clamp_min(0)
    exact = wanted.double().clamp_min(torch.finfo(torch.double).tiny).log()
    step = torch.finfo(theta.dtype).eps / 8 * exact.abs().clamp_min(0.5)
    best = exact.to(theta.dtype)
    for i in sorted(range(-_REACH, _REACH + 1), key=abs):
        other = (exact + i * step).to(theta.dtype)
        closer = (other.exp() - wanted).abs() < (best.exp() - wanted).abs()
        best = torch.where(closer, other, best)
    best = torch.where(wanted > 0, best, SILENT)
    off = ((best.exp() - wanted).abs() / wanted.clamp_min(torch.finfo(theta.dtype).tiny)).double()
    missed = int((off > 0).sum())
    if not missed:
        return best, []
    few = f"{missed:,} of {len(theta):,} thresholds"
    note = f"not bit for bit: {few} are no exp of a number, the nearest differ by {off.max():.0e}"
    return best, [note]


def jump(
    theta: Float[Tensor, " d_sae"], k: int | None, known: Mapping[str, Any], where: object
) -> tuple[Sparsity, dict[str, Tensor], Notes]:
    """A batchtopk where `k` is known and all features share one θ, else a jumprelu; its tensors.

    `known` are the settings of its training; see `log_thresholds` for what raises.
    """
    if k is not None and theta.isfinite().all() and bool((theta == theta[0]).all()):
        return foreign.trained("batchtopk", known, k=k), {"threshold": just_above(theta[0])}, []
    found, notes = log_thresholds(theta, where)
    return foreign.trained("jumprelu", known), {"log_threshold": found}, notes


def magnitude_without_bias(tensors: Mapping[str, Tensor]) -> Float[Tensor, " d_sae"]:
    """b_mag of exp(r_mag) · (pre − b_enc) + b_mag, as others have it, from that of ours."""
    return _shifted(tensors, 1)


def gate(theirs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Notes]:
    """The tensors of a gated autoencoder with b_mag for a magnitude that is computed from pre."""
    return {**theirs, "b_mag": _shifted(theirs, -1)}, [NOTES["gated"]]


def _shifted(tensors: Mapping[str, Tensor], sign: int) -> Tensor:
    b_enc, r_mag, b_mag = (tensors[name].double() for name in ("b_enc", "r_mag", "b_mag"))
    return (b_mag + sign * r_mag.exp() * b_enc).to(tensors["b_mag"].dtype)
