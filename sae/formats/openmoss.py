"""OpenMOSS' Llamascopium (lm_saes before): config.json and sae_weights.safetensors, for
`SparseAutoEncoder.from_pretrained(DIR)`.

Its tensors have our orientation; b_dec is never subtracted from the input; jumprelu keeps log θ as
ours does, and batchtopk without a threshold, so ours is written as a jumprelu. It can scale inputs
and outputs by constants, and compare activations times decoder norms: reading folds both.
"""

from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import fingerprint
from sae.errors import FormatError
from sae.formats import conventions, foreign, hookpoints
from sae.formats.foreign import Foreign, Notes, Settings
from sae.formats.hookpoints import Match
from sae.sparsity import Sparsity
from sae.store import write_json

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
_NAMES = {"W_E": "W_enc", "b_E": "b_enc", "W_D": "W_dec", "b_D": "b_dec"}
_OLD_NAMES = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec",
    "decoder.bias": "b_dec",
}
_NORM = "dataset_average_activation_norm."
FUNCTIONS = {
    "relu_l1": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "batchtopk": "jumprelu",
}
_READ = ("relu", "topk", "jumprelu")
_LOG = "log_jumprelu_threshold"
_LOG_NAMES = {True: _LOG, False: f"activation_function.{_LOG}"}
"""Of the thresholds, before and since the weights have short names."""


def recognises(source: Path) -> bool:
    """Whether a folder looks like one."""
    return (source / CONFIG).is_file() and (source / WEIGHTS).is_file()


# ------------------------------------------------------------------------------------------ out


def write(sae_folder: Path, out: Path, features: list[int] | None = None) -> Notes:
    """Write config.json and sae_weights.safetensors to the new folder `out`."""
    return foreign.export("openmoss", sae_folder, out, features, _fill)


def _fill(folder: Path, own: Foreign) -> Notes:
    foreign.check_kind("openmoss", own, FUNCTIONS)
    foreign.check_square("openmoss", own)
    ours, notes = foreign.with_subtraction("openmoss", own, False)
    theirs = {t: ours[name] for t, name in _NAMES.items()}
    if FUNCTIONS[own.kind] == "jumprelu":
        theirs[_LOG_NAMES[False]], changed = _log_thresholds(own, folder)
        notes += changed
    foreign.write_tensors(folder / WEIGHTS, theirs)
    place, unnamed = _place(own)
    config = {
        "sae_type": "sae",
        "d_model": own.sae.d_in,
        "expansion_factor": own.sae.d_sae / own.sae.d_in,
        "act_fn": FUNCTIONS[own.kind],
        "top_k": own.sae.sparsity.config().get("k", 50),
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": False,
        "use_decoder_bias": True,
        "use_glu_encoder": False,
        "dtype": str(own.sae.dtype),
        "device": "cpu",
        **place,
    }
    write_json(folder / CONFIG, config)
    return notes + unnamed


def _log_thresholds(own: Foreign, folder: Path) -> tuple[Tensor, Notes]:
    """log θ of every feature."""
    if own.kind == "jumprelu":
        return own.tensors["log_threshold"], []
    theirs, _ = conventions.outward(own.kind, own.tensors)
    return conventions.log_thresholds(theirs["threshold"], folder / WEIGHTS)


def _place(own: Foreign) -> tuple[dict[str, Any], Notes]:
    if own.hookpoint is None:
        return {"hook_point_in": "", "hook_point_out": ""}, []
    there = hookpoints.to_transformer_lens(own.hookpoint)
    note = f"{own.hookpoint} has no name in TransformerLens: hook_point_in says it in ours"
    names = {"hook_point_in": there.name, "hook_point_out": there.name}
    return names, [note] if there.match is Match.NONE else []


# ------------------------------------------------------------------------------------------- in


def read(source: Path) -> list[Foreign]:
    """The autoencoder of a folder; FormatError for what we cannot hold, by name."""
    config = Settings.read(source / CONFIG)
    weights = foreign.beside(source / CONFIG, WEIGHTS)
    known = foreign.known_facts(source, weights)
    _refuse_others(config)
    function = config.text("act_fn") or ""
    tensors = fingerprint.load(weights)
    norms = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_NORM)}
    ours = _named(config, weights, tensors, function)
    foreign.check_vectors(weights, ours, set(ours) - {"W_enc", "W_dec", "b_dec"})
    ours, notes = _without_decoder_norms(config, function, ours)
    ours, more = _unscaled(config, norms, ours)
    sparsity, ours = _sparsity(config, function, ours, known)
    sae = foreign.assemble(weights, ours, sparsity, subtract_b_dec=False)
    if sae.d_in != config.whole("d_model"):
        raise FormatError(
            f"{source}: {CONFIG} says d_model {config.whole('d_model')}, the weights have "
            f"{sae.d_in}; take both files from one save"
        )
    facts, doubts = _facts(config)
    doubts = [] if known else doubts
    return [Foreign(sae, facts | foreign.own_facts(known), (*notes, *more, *doubts))]


def _refuse_others(config: Settings) -> None:
    """What its encoders can do and ours cannot."""
    for key, allowed in (("sae_type", ("sae",)), ("act_fn", _READ)):
        if config.text(key) not in allowed:
            raise FormatError(
                f"{config.file}: {key} {config.text(key)!r:.40} cannot be read here; "
                f"expected {', '.join(allowed)}"
            )
    if config.flag("use_glu_encoder", False):
        raise FormatError(f"{config.file}: use_glu_encoder: we have no such encoder")
    if config.text("norm_activation") not in ("dataset-wise", "inference"):
        raise FormatError(
            f"{config.file}: norm_activation {config.text('norm_activation')!r:.40}: only "
            "dataset-wise and inference can be folded into weights"
        )
    if config.text("hook_point_in") != config.text("hook_point_out"):
        raise FormatError(f"{config.file}: reads one place and rebuilds another; ours cannot yet")


def _named(
    config: Settings, file: Path, tensors: dict[str, Tensor], function: str
) -> dict[str, Tensor]:
    """The weights by our names and in our orientation, of either generation of theirs."""
    old = "encoder.weight" in tensors
    names = _OLD_NAMES if old else _NAMES
    if function == "jumprelu":
        names = names | {_LOG_NAMES[old]: "log_threshold"}
    if not config.flag("use_decoder_bias", True):
        decoder = tensors.get("decoder.weight" if old else "W_D")
        if decoder is not None and decoder.ndim == 2:
            bias = decoder.new_zeros(decoder.shape[0 if old else 1])
            tensors = tensors | {"decoder.bias" if old else "b_D": bias}
    foreign.check_names(file, tensors, names)
    ours = {name: tensors[theirs] for theirs, name in names.items()}
    if old:
        for name in ("W_enc", "W_dec"):
            ours[name] = ours[name].T if ours[name].ndim == 2 else ours[name]
    return ours


def _unscaled(
    config: Settings, norms: dict[str, Tensor], ours: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Notes]:
    """Raw inputs in, raw outputs out: x · √d_model / norm is what was trained on."""
    if config.text("norm_activation") == "inference":
        return ours, []
    factors = []
    for key, old in (("hook_point_in", "in"), ("hook_point_out", "out")):
        names = (f"{_NORM}{config.text(key)}", f"{_NORM}{old}")
        found = next((norms[name] for name in names if name in norms), None)
        if found is None or found.numel() != 1 or not float(found) > 0:
            raise FormatError(f"{config.file.parent / WEIGHTS}: {names[0]} is no positive number")
        factors.append(sqrt(config.whole("d_model")) / float(found))
    scale_in, scale_out = factors
    scaled = {
        "W_enc": ours["W_enc"].double() * scale_in,
        "W_dec": ours["W_dec"].double() / scale_out,
        "b_dec": ours["b_dec"].double() / scale_out,
    }
    note = "not bit for bit: dataset_average_activation_norm is folded into the weights"
    return ours | {name: t.to(ours[name].dtype) for name, t in scaled.items()}, [note]


@torch.no_grad()
def _without_decoder_norms(
    config: Settings, function: str, ours: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Notes]:
    """Top-k or thresholds over activations times decoder norms, as such over activations."""
    if function == "relu" or not config.flag("sparsity_include_decoder_norm", True):
        return ours, []
    note = "not bit for bit: sparsity_include_decoder_norm is folded into the "
    if function == "jumprelu":  # a · ‖W_dec‖ > θ where a > θ / ‖W_dec‖
        norms = ours["W_dec"].double().norm(dim=-1).clamp_min(1e-30)
        moved = (ours["log_threshold"].double() - norms.log()).to(ours["log_threshold"].dtype)
        return ours | {"log_threshold": moved}, [f"{note}thresholds"]
    note += "weights; activations are OpenMOSS' times decoder norms"
    return foreign.times_decoder_norms(ours), [note]


def _sparsity(
    config: Settings, function: str, ours: dict[str, Tensor], known: dict[str, Any]
) -> tuple[Sparsity, dict[str, Tensor]]:
    if function == "topk":
        return foreign.trained("topk", known, k=config.whole("top_k")), ours
    if function == "relu":
        return foreign.trained("relu_l1", known), ours
    k = foreign.known_k(known)
    if k is None:
        return foreign.trained("jumprelu", known), ours
    theta = conventions.just_above(ours.pop("log_threshold").exp()[0])
    return foreign.trained("batchtopk", known, k=k), ours | {"threshold": theta}


def _facts(config: Settings) -> tuple[dict[str, Any], Notes]:
    """The hookpoint; which model it is for, the files do not say."""
    name = config.text("hook_point_in") or ""
    here = hookpoints.from_transformer_lens(name)
    if here.match is Match.NONE:
        return {}, [f"{name} has no name here"]
    return {"hookpoint": here.name}, []
