"""dictionary_learning (0.1): ae.pt and config.json, for `utils.load_dictionary(DIR, device)`.

Its class decides whether b_dec is subtracted. Loading an AutoEncoder there scales decoder columns
to norm 1 and the encoder to match, which changes activations but no reconstruction.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.errors import FormatError
from sae.formats import foreign, hookpoints, torch_file
from sae.formats.foreign import Foreign, Notes, Settings
from sae.formats.hookpoints import Match
from sae.sparsity import Sparsity, make_sparsity
from sae.store import write_json

WEIGHTS, CONFIG = "ae.pt", "config.json"
_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_TRANSPOSED = ("encoder.weight", "decoder.weight")


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
    foreign.check_kind("dictionary_learning", own, kinds, "use --format saelens")
    foreign.check_square("dictionary_learning", own, "use --format saelens")
    name, cls = _class_for(own)
    ours, notes = foreign.with_subtraction("dictionary_learning", own, cls.subtracts)
    state = {theirs: ours[name] for theirs, name in cls.names.items()}
    for transposed in _TRANSPOSED:
        if transposed in state:
            state[transposed] = state[transposed].T.contiguous()
    torch_file.write(folder / WEIGHTS, state | _said(cls, own))
    config, unnamed = _config(name, own)
    write_json(folder / CONFIG, config)
    return notes + unnamed


def _class_for(own: Foreign) -> tuple[str, _Class]:
    """The class of its kind, that which subtracts b_dec as it does if there are two."""
    found = [(name, cls) for name, cls in CLASSES.items() if cls.kind == own.kind]
    fitting = [(n, cls) for n, cls in found if cls.subtracts == own.sae.subtract_b_dec]
    return (fitting or found)[0]


def _said(cls: _Class, own: Foreign) -> dict[str, Tensor]:
    """k, and the threshold where our kind has none (−1: not set)."""
    said = {}
    if "k" in cls.said:
        said["k"] = torch.tensor(own.sae.sparsity.config()["k"], dtype=torch.int32)
    if "threshold" in cls.said:
        said["threshold"] = torch.tensor(-1.0)
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
    ours = {name: _ours(theirs, tensors[theirs]) for theirs, name in cls.names.items()}
    sae = foreign.assemble(
        weights, ours, _sparsity(cls, tensors, trainer, known), subtract_b_dec=cls.subtracts
    )
    facts, notes = _facts(config)
    notes += _scaled(name, sae.decoder_norms)
    return [Foreign(sae, facts | foreign.own_facts(known), tuple([] if known else notes))]


def _ours(name: str, tensor: Tensor) -> Tensor:
    return tensor.T if name in _TRANSPOSED and tensor.ndim == 2 else tensor


def _sparsity(
    cls: _Class, tensors: dict[str, Tensor], trainer: Settings, known: dict[str, Any]
) -> Sparsity:
    if "k" in cls.said:
        if tensors["k"].numel() != 1 or int(tensors["k"]) < 1:
            raise FormatError(f"{trainer.file.parent / WEIGHTS}: k is no number of at least 1")
        return make_sparsity(cls.kind, k=int(tensors["k"]))
    return make_sparsity("relu_l1", l1=foreign.trained_setting(known, "relu_l1", "l1", 0.0))


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
    short = re.fullmatch(r"(resid_post|mlp_out|attn_out|attention_out)_layer_(\d+)", name)
    if short:
        site = short[1].replace("attention", "attn")
        return facts | {"hookpoint": f"layers.{int(short[2])}.{site}"}, []
    here = hookpoints.from_module(name + side, model or "")
    if here.match is Match.NONE:
        return facts, [f"{name} has no name here"]
    return facts | {"hookpoint": here.name}, []
