"""SAELens (6 and later): cfg.json and sae_weights.safetensors, for `SAE.load_from_disk`.

Its tensors have our orientation. The cfg says by `apply_b_dec_to_input` whether b_dec is
subtracted, so that is never folded on the way out. As in SAELens itself, batchtopk is saved as
jumprelu with one threshold for all features, and the metadata tell what it was trained as. Its
W_skip is [d_out d_in].
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from sae import fingerprint
from sae.autoencoder import DTYPES
from sae.errors import FormatError
from sae.formats import conventions, foreign, hookpoints
from sae.formats.foreign import Foreign, Notes, Settings
from sae.formats.hookpoints import Match, Translation
from sae.hooks import Hookpoint
from sae.routes import Route
from sae.sparsity import Sparsity
from sae.store import write_json

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.0.0"
"""Of SAELens, whose layout of cfg.json this is; files without it are read as those before 6."""
ARCHITECTURES = {
    "relu_l1": "standard",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "jumprelu": "jumprelu",
    "gated": "gated",
}
_PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
_TENSORS = {
    "standard": _PLAIN,
    "topk": _PLAIN,
    "jumprelu": (*_PLAIN, "threshold"),
    "gated": ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"),
}
TRANSCODERS = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}
SKIP_TRANSCODERS = {"standard": "skip_transcoder", "jumprelu": "jumprelu_skip_transcoder"}
_MAPS = {
    theirs: plain for names in (TRANSCODERS, SKIP_TRANSCODERS) for plain, theirs in names.items()
}
_BATCHTOPK = ("batchtopk", "matryoshka_batchtopk")
"""What it calls the training of batchtopk, the second with prefixes."""


def recognises(source: Path) -> bool:
    """Whether a folder looks like one."""
    return (source / CFG).is_file() and (source / WEIGHTS).is_file()


def write(sae_folder: Path, out: Path, features: list[int] | None = None) -> Notes:
    """Write cfg.json and sae_weights.safetensors to the new folder `out`."""
    return foreign.export("saelens", sae_folder, out, features, _fill)


def _fill(folder: Path, own: Foreign) -> Notes:
    foreign.check_kind("saelens", own, ARCHITECTURES)
    architecture = _architecture_of(own)
    metadata, notes = _metadata(own)
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": own.sae.d_in,
        "d_sae": own.sae.d_sae,
        "dtype": str(own.sae.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": own.sae.subtract_b_dec,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if own.kind == "topk":
        cfg |= {"k": own.sae.sparsity.config()["k"], "rescale_acts_by_decoder_norm": False}
    if architecture in _MAPS:
        cfg["d_out"] = own.sae.d_out
    write_json(folder / CFG, cfg)
    ours, changed = conventions.outward(own.kind, own.tensors)
    names = _TENSORS[ARCHITECTURES[own.kind]]
    theirs = {name: ours["b_enc" if name == "b_gate" else name] for name in names}
    if "W_skip" in ours:
        theirs["W_skip"] = ours["W_skip"].T
    foreign.write_tensors(folder / WEIGHTS, theirs)
    return [*changed, *notes]


def _architecture_of(own: Foreign) -> str:
    """SAELens' name of it; FormatError for maps of which it has none."""
    plain = ARCHITECTURES[own.kind]
    if not foreign.check_map("saelens", own):
        return plain
    if not foreign.saelens_holds(own):
        what = f"a {own.kind} map" + (" that subtracts b_dec" if own.sae.subtract_b_dec else "")
        raise foreign.refuse("saelens", what, foreign.instead_of(own))
    return (TRANSCODERS if own.sae.W_skip is None else SKIP_TRANSCODERS)[plain]


def _metadata(own: Foreign) -> tuple[dict[str, Any], Notes]:
    """Where it belongs, in SAELens' words, and how far they mean the same."""
    known = {
        "sae_lens_version": VERSION,
        "model_name": own.facts.get("model"),
        "dataset_path": own.facts.get("data"),
        "context_size": own.facts.get("context"),
        "hook_head_index": None,
        **_training(own),
    }
    if own.route is None:
        return known, []
    there = [hookpoints.to_transformer_lens(p) for p in (*own.route.inputs, *own.route.targets)]
    known |= {"hook_name": there[0].name, "hook_match": there[0].match.value}
    if own.route.is_map:
        known["hook_name_out"] = there[-1].name
    if any(name.match is Match.UNPROCESSED for name in there):
        known["model_from_pretrained_kwargs"] = {"center_writing_weights": False}
    unnamed = dict.fromkeys(name.name for name in there if name.match is Match.NONE)
    says = "has no name in TransformerLens: hook_name says it in ours"
    return known, [f"{name} {says}" for name in unnamed]


def _training(own: Foreign) -> dict[str, Any]:
    """What a batchtopk was trained as, in the words of SAELens' own files."""
    if own.kind != "batchtopk":
        return {}
    widths = foreign.widths(own)
    details = {"k": own.sae.sparsity.config()["k"]}
    return {
        "training_architecture": _BATCHTOPK[bool(widths)],
        "training_architecture_details": details
        | ({"matryoshka_widths": list(widths)} if widths else {}),
    }


def read(source: Path) -> list[Foreign]:
    """The autoencoder of a folder; FormatError for what we cannot hold, by name."""
    cfg = Settings.read(source / CFG)
    weights = foreign.beside(source / CFG, WEIGHTS)
    known = foreign.known_facts(source, weights)
    _refuse_reshaped(cfg)
    name, dtype = _architecture(cfg), _dtype(cfg)
    architecture, skip = _MAPS.get(name, name), name in SKIP_TRANSCODERS.values()
    tensors = fingerprint.load(weights)
    foreign.check_names(weights, tensors, (*_TENSORS[architecture], *["W_skip"] * skip))
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    dense = {"W_skip": foreign.turned(tensors.pop("W_skip"))} if skip else {}
    foreign.check_vectors(weights, tensors, set(tensors) - {"W_enc", "W_dec", "b_dec"})
    sparsity, ours, notes = _ours(cfg, architecture, tensors, known)
    subtract = name not in _MAPS and cfg.flag("apply_b_dec_to_input", True)
    sae = foreign.assemble(weights, ours | dense, sparsity, subtract_b_dec=subtract)
    if (sae.d_in, sae.d_sae) != (cfg.whole("d_in"), cfg.whole("d_sae")):
        raise FormatError(
            f"{source}: {CFG} says d_in {cfg.whole('d_in')} and d_sae {cfg.whole('d_sae')}, the "
            f"weights have {sae.d_in} and {sae.d_sae}; take both files from one save"
        )
    facts, doubts = _facts(cfg)
    return [Foreign(sae, facts | foreign.own_facts(known), (*notes, *doubts))]


def _architecture(cfg: Settings) -> str:
    """Its architecture; before version 6, topk could be an activation of standard."""
    name = cfg.text("architecture") or "standard"
    if name == "standard" and str(cfg.values.get("activation_fn")).startswith("topk"):
        name = "topk"
    if name not in _TENSORS and name not in _MAPS:
        raise FormatError(
            f"{cfg.file}: architecture {name!r:.60} is not known here; "
            f"expected {', '.join((*_TENSORS, *_MAPS))}"
        )
    return name


def _ours(
    cfg: Settings, architecture: str, theirs: dict[str, Tensor], known: dict[str, Any]
) -> tuple[Sparsity, dict[str, Tensor], Notes]:
    """The sparsity, and the tensors by our names and in our conventions."""
    if architecture == "topk":
        values = cfg.values if "k" in cfg.values else cfg.object("activation_fn_kwargs")
        k = Settings(cfg.file, values).whole("k")
        return foreign.trained("topk", known, k=k), *_folded(cfg, theirs)
    if architecture == "gated":
        gate = {name: theirs[name] for name in ("W_enc", "W_dec", "b_dec", "r_mag", "b_mag")}
        ours, notes = conventions.gate(gate | {"b_enc": theirs["b_gate"]})
        return foreign.trained("gated", known), ours, notes
    if architecture == "jumprelu":
        plain = {name: theirs[name] for name in _PLAIN}
        sparsity, own, notes = conventions.jump(theirs["threshold"], _k(cfg), known, cfg.file)
        return sparsity, plain | own, notes
    return foreign.trained("relu_l1", known), theirs, []


def _k(cfg: Settings) -> int | None:
    """k, where a jumprelu was trained as a batchtopk of a whole number."""
    metadata = cfg.inner("metadata")
    if metadata.text("training_architecture") not in _BATCHTOPK:
        return None
    k = metadata.object("training_architecture_details").get("k")
    if isinstance(k, float) and k.is_integer():  # it takes any share of a feature
        k = int(k)
    return k if isinstance(k, int) and k > 0 else None


def _refuse_reshaped(cfg: Settings) -> None:
    """Inputs that are normalised or reshaped before the encoder are not what we read."""
    for key, plain in (("normalize_activations", ("none",)), ("reshape_activations", ("none",))):
        if (cfg.text(key) or "none") not in plain:
            raise FormatError(
                f"{cfg.file}: {key} {cfg.text(key)!r:.40}: only 'none' can be read; "
                "fold it into the weights in SAELens first and save again"
            )
    if cfg.values.get("finetuning_scaling_factor"):
        raise FormatError(
            f"{cfg.file}: finetuning_scaling_factor is no part of this autoencoder; "
            "fold it into the decoder in SAELens first and save again"
        )


def _dtype(cfg: Settings) -> Any:
    name = (cfg.text("dtype") or "").removeprefix("torch.")
    if name not in DTYPES:
        raise cfg.wrong("dtype", ", ".join(DTYPES))
    return DTYPES[name]


def _folded(cfg: Settings, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Notes]:
    """Decoder norms folded in where top-k is taken over activations times those norms."""
    if not cfg.flag("rescale_acts_by_decoder_norm", False):
        return tensors, []
    note = "not bit for bit: rescale_acts_by_decoder_norm is folded into the weights"
    return foreign.times_decoder_norms(tensors), [note]


def _facts(cfg: Settings) -> tuple[dict[str, Any], Notes]:
    """Model, text and hookpoint; what was at the top of cfg.json before version 6 too."""
    said = Settings(cfg.file, {**cfg.values, **cfg.object("metadata")})
    facts: dict[str, Any] = {"model": said.text("model_name"), "data": said.text("dataset_path")}
    context = said.values.get("context_size")
    facts["context"] = context if type(context) is int and context > 1 else None
    facts = {name: value for name, value in facts.items() if value is not None}
    facts |= _prefixes(cfg)
    name = said.text("hook_name") or said.text("hook_point")
    if name is None:
        return facts, []
    if said.values.get("hook_head_index") is not None:
        return facts, [f"{name}, head {said.values['hook_head_index']}: we read no single heads"]
    names = [name, *filter(None, [said.text("hook_name_out")])]
    places = [_here(name, facts.get("model") or "") for name in names]
    if unnamed := [place.name for place in places if place.match is Match.NONE]:
        return facts, [f"{name} has no name here" for name in unnamed]
    kwargs = said.object("model_from_pretrained_kwargs")
    processed = [key for key in ("fold_ln", "center_writing_weights") if kwargs.get(key)]
    doubts = [
        f"{theirs} was read from a model with {', '.join(processed)}: {place.match.value}"
        for theirs, place in zip(names, places, strict=True)
        if processed and place.match is Match.UNPROCESSED
    ]
    points = [Hookpoint.parse(place.name) for place in places]
    return facts | Route((points[0],), (points[-1],)).origin(), doubts


def _here(name: str, model: str) -> Translation:
    """A hookpoint of ours, by its name in TransformerLens, as a module, or in our words."""
    found = hookpoints.from_transformer_lens(name)
    if found.match is Match.NONE:
        found = hookpoints.from_module(name, model)
    return hookpoints.from_our_words(name) if found.match is Match.NONE else found


def _prefixes(cfg: Settings) -> dict[str, Any]:
    """The widths of a Matryoshka training."""
    details = cfg.inner("metadata").object("training_architecture_details")
    sizes = details.get("matryoshka_widths")
    return foreign.prefixes(cfg.file, sizes, cfg.whole("d_sae")) if isinstance(sizes, list) else {}
