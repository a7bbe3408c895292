"""dictionary_learning (0.1): ae.pt and config.json, for `utils.load_dictionary(DIR, device)`.

Its class decides whether b_dec is subtracted, and whether there are prefixes. Loading an
AutoEncoder there scales decoder columns to norm 1 and the encoder to match, which changes
activations but no reconstruction.
"""

import itertools
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.errors import FormatError
from sae.formats import conventions, foreign, hookpoints, torch_file
from sae.formats.foreign import Foreign, Notes, Settings
from sae.formats.hookpoints import Match
from sae.sparsity import Sparsity
from sae.store import write_json

WEIGHTS, CONFIG = "ae.pt", "config.json"
_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_WEIGHTS = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_GATED = {
    "encoder.weight": "W_enc",
    "gate_bias": "b_enc",
    "decoder.weight": "W_dec",
    "decoder_bias": "b_dec",
    "r_mag": "r_mag",
    "mag_bias": "b_mag",
}
_TRANSPOSED = ("encoder.weight", "decoder.weight")


_GROUPS = "group_sizes"


class _Class(NamedTuple):
    """One of its classes: our kind, whether b_dec is subtracted, our names of its tensors.

    `said`: the tensors that say what our settings do.
    """

    kind: str
    subtracts: bool
    names: dict[str, str]
    said: tuple[str, ...] = ()


CLASSES = {
    "AutoEncoder": _Class("relu_l1", True, {**_LINEAR, "bias": "b_dec"}),
    "AutoEncoderNew": _Class("relu_l1", False, {**_LINEAR, "decoder.bias": "b_dec"}),
    "AutoEncoderTopK": _Class("topk", True, {**_LINEAR, "b_dec": "b_dec"}, ("k", "threshold")),
    "BatchTopKSAE": _Class("batchtopk", True, {**_LINEAR, "b_dec": "b_dec"}, ("k", "threshold")),
    "MatryoshkaBatchTopKSAE": _Class("batchtopk", True, _WEIGHTS, ("k", "threshold", _GROUPS)),
    "JumpReluAutoEncoder": _Class("jumprelu", False, {**_WEIGHTS, "threshold": "threshold"}),
    "GatedAutoEncoder": _Class("gated", True, _GATED),
}


def recognises(source: Path) -> bool:
    """Whether a folder looks like one."""
    return (source / WEIGHTS).is_file() and (source / CONFIG).is_file()


# ------------------------------------------------------------------------------------------ out


def write(sae_folder: Path, out: Path, features: list[int] | None = None) -> Notes:
    """Write ae.pt and config.json to the new folder `out`."""
    return foreign.export("dictionary_learning", sae_folder, out, features, _fill)


def _fill(folder: Path, own: Foreign) -> Notes:
    kinds = dict.fromkeys(cls.kind for cls in CLASSES.values())
    foreign.check_kind("dictionary_learning", own, kinds)
    foreign.check_square("dictionary_learning", own)
    name, cls = _class_for(own)
    ours, notes = foreign.with_subtraction("dictionary_learning", own, cls.subtracts)
    ours, changed = conventions.outward(own.kind, ours)
    state = {theirs: ours[name] for theirs, name in cls.names.items()}
    for transposed in _TRANSPOSED:
        if transposed in state:
            state[transposed] = state[transposed].T.contiguous()
    torch_file.write(folder / WEIGHTS, state | _said(cls, own))
    config, unnamed = _config(name, own)
    write_json(folder / CONFIG, config)
    return notes + changed + unnamed


def _class_for(own: Foreign) -> tuple[str, _Class]:
    """The class of its kind and its prefixes, that which subtracts b_dec as it does if it can."""
    grouped = own.kind == "batchtopk" and foreign.widths(own) is not None
    found = [
        (name, cls)
        for name, cls in CLASSES.items()
        if cls.kind == own.kind and (_GROUPS in cls.said) == grouped
    ]
    fitting = [(n, cls) for n, cls in found if cls.subtracts == own.sae.subtract_b_dec]
    return (fitting or found)[0]


def _said(cls: _Class, own: Foreign) -> dict[str, Tensor]:
    """k, the threshold (−1 where our kind has none), and the number of features of each part."""
    said = {}
    if "k" in cls.said:
        said["k"] = torch.tensor(own.sae.sparsity.config()["k"], dtype=torch.int32)
        theta = own.tensors.get("threshold")
        said["threshold"] = torch.tensor(-1.0)
        if theta is not None:
            said["threshold"] = conventions.just_below(theta.float())
    if _GROUPS in cls.said:
        steps = itertools.pairwise((0, *(foreign.widths(own) or ())))
        said[_GROUPS] = torch.tensor([b - a for a, b in steps])
    return said


def _config(name: str, own: Foreign) -> tuple[dict[str, Any], Notes]:
    """config.json: its trainer as far as it is known, and the hookpoint in nnsight's words."""
    trainer: dict[str, Any] = {
        "trainer_class": None,
        "dict_class": name,
        "activation_dim": own.sae.d_in,
        "dict_size": own.sae.d_sae,
        "lm_name": own.facts.get("model"),
        "layer": None,
        "submodule_name": None,
    }
    if "k" in own.sae.sparsity.config():
        trainer["k"] = own.sae.sparsity.config()["k"]
    buffer = {"d_submodule": own.sae.d_in, "ctx_len": own.facts.get("context"), "io": "out"}
    if own.hookpoint is None:
        return {"trainer": trainer, "buffer": buffer}, []
    there = hookpoints.to_nnsight(own.hookpoint, own.says("model"))
    path, _, side = there.name.rpartition(".")
    if there.match is Match.NONE:
        path, side = there.name, "output"
    trainer |= {"layer": own.hookpoint.layer, "submodule_name": path}
    buffer["io"] = {"input": "in", "output": "out"}[side]
    note = f"{own.hookpoint}: its module is not known here; submodule_name says it in our words"
    return {"trainer": trainer, "buffer": buffer}, [note] * (there.match is Match.NONE)


# ------------------------------------------------------------------------------------------- in


def read(source: Path, *, trusted: bool = False) -> list[Foreign]:
    """The dictionary of a folder; `trusted` allows to read ae.pt (see `torch_file`)."""
    config = Settings.read(source / CONFIG)
    trainer = config.inner("trainer")
    name = trainer.text("dict_class") or ""
    if name not in CLASSES:
        raise FormatError(
            f"{source / CONFIG}: dict_class {name!r:.60} is not known here; "
            f"expected {', '.join(CLASSES)}"
        )
    cls, weights = CLASSES[name], source / WEIGHTS
    tensors, _ = torch_file.read(weights, trusted=trusted)
    foreign.check_names(weights, tensors, [*cls.names, *cls.said])
    known = foreign.known_facts(source, weights)
    theirs = foreign.by_our_names(tensors, cls.names, _TRANSPOSED)
    sparsity, ours, notes = _inward(cls, theirs, tensors, known, weights)
    sae = foreign.assemble(weights, ours, sparsity, subtract_b_dec=cls.subtracts)
    facts, doubts = _facts(config)
    if _GROUPS in cls.said:
        sizes = tensors[_GROUPS].flatten().cumsum(0).tolist()
        facts |= foreign.prefixes(weights, sizes, sae.d_sae)
    doubts += _scaled(name, sae.decoder_norms)
    return [Foreign(sae, facts | foreign.own_facts(known), (*notes, *([] if known else doubts)))]


def _inward(
    cls: _Class,
    theirs: dict[str, Tensor],
    tensors: dict[str, Tensor],
    known: dict[str, Any],
    weights: Path,
) -> tuple[Sparsity, dict[str, Tensor], Notes]:
    """The sparsity, and the tensors in our conventions."""
    dtype = foreign.check_vectors(weights, theirs, set(theirs) - {"W_enc", "W_dec", "b_dec"})
    if cls.kind == "gated":
        return foreign.trained("gated", known), *conventions.gate(theirs)
    if cls.kind == "jumprelu":
        theta = theirs.pop("threshold").to(dtype)
        sparsity, own, notes = conventions.jump(theta, None, known, weights)
        return sparsity, theirs | own, notes
    if "k" not in cls.said:
        return foreign.trained(cls.kind, known), theirs, []
    if any(tensors[name].numel() != 1 for name in ("k", "threshold")) or int(tensors["k"]) < 1:
        raise FormatError(f"{weights}: k and threshold are no numbers, k of at least 1")
    sparsity = foreign.trained(cls.kind, known, k=int(tensors["k"]))
    if cls.kind == "batchtopk":
        theta = tensors["threshold"].float().reshape(())
        theirs |= {"threshold": conventions.just_above(theta).to(dtype)}
    return sparsity, theirs, []


def _scaled(name: str, norms: Tensor) -> Notes:
    """What loading there would change."""
    if name != "AutoEncoder" or torch.allclose(norms, torch.ones_like(norms)):
        return []
    return ["dictionary_learning scales decoder rows to norm 1 when it loads this; here they stay"]


def _facts(config: Settings) -> tuple[dict[str, Any], Notes]:
    """Model, context and hookpoint: submodule_name is nnsight's path, or <site>_layer_<i>."""
    trainer, buffer = config.inner("trainer"), config.inner("buffer")
    model, context = trainer.text("lm_name"), buffer.values.get("ctx_len")
    facts: dict[str, Any] = {"model": model} if model else {}
    if type(context) is int and context > 1:
        facts["context"] = context
    name = trainer.text("submodule_name")
    if name is None:
        return facts, ["config.json does not say which submodule it reads"]
    side = {"in": ".input", "out": ".output"}.get(str(buffer.values.get("io")), "")
    short = re.fullmatch(r"(resid_post|mlp_out|attn_out|attention_out)_layer_(\d{1,9})", name)
    if short:
        site = short[1].replace("attention", "attn")
        return facts | {"hookpoint": f"layers.{int(short[2])}.{site}"}, []
    here = hookpoints.from_module(name + side, model or "")
    if here.match is Match.NONE:
        return facts, [f"{name} has no name here"]
    return facts | {"hookpoint": here.name}, []
