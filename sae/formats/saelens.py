"""SAELens (6 and later): cfg.json and sae_weights.safetensors, for `SAE.load_from_disk`.

Its tensors have our orientation. The cfg says by `apply_b_dec_to_input` whether b_dec is
subtracted, so nothing has to be folded on the way out.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from sae import fingerprint
from sae.autoencoder import DTYPES
from sae.errors import FormatError
from sae.formats import foreign, hookpoints
from sae.formats.foreign import Foreign, Notes, Settings
from sae.formats.hookpoints import Match
from sae.sparsity import Sparsity, make_sparsity
from sae.store import write_json

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.0.0"
"""Of SAELens, whose layout of cfg.json this is; files without it are read as those before 6."""
ARCHITECTURES = {"relu_l1": "standard", "topk": "topk"}
_KINDS = {theirs: ours for ours, theirs in ARCHITECTURES.items()}
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")


def recognises(source: Path) -> bool:
    """Whether a folder looks like one."""
    return (source / CFG).is_file() and (source / WEIGHTS).is_file()


def write(sae_folder: Path, out: Path, features: list[int] | None = None) -> Notes:
    """Write cfg.json and sae_weights.safetensors to the new folder `out`."""
    return foreign.export("saelens", sae_folder, out, features, _fill)


def _fill(folder: Path, own: Foreign) -> Notes:
    foreign.check_kind("saelens", own, ARCHITECTURES, "use --format safetensors")
    foreign.check_square("saelens", own, "use --format safetensors")
    metadata, notes = _metadata(own)
    cfg: dict[str, Any] = {
        "architecture": ARCHITECTURES[own.kind],
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
    write_json(folder / CFG, cfg)
    foreign.write_tensors(folder / WEIGHTS, own.tensors)
    return notes


def _metadata(own: Foreign) -> tuple[dict[str, Any], Notes]:
    """Where it belongs, in SAELens' words, and how far they mean the same."""
    known = {
        "sae_lens_version": VERSION,
        "model_name": own.facts.get("model"),
        "dataset_path": own.facts.get("data"),
        "context_size": own.facts.get("context"),
        "hook_head_index": None,
    }
    if own.hookpoint is None:
        return known, []
    there = hookpoints.to_transformer_lens(own.hookpoint)
    known |= {"hook_name": there.name, "hook_match": there.match.value}
    if there.match is Match.UNPROCESSED:
        known["model_from_pretrained_kwargs"] = {"center_writing_weights": False}
        return known, []
    note = f"{own.hookpoint} has no name in TransformerLens: hook_name says it in ours"
    return known, [] if there.match is Match.EXACT else [note]


def read(source: Path) -> list[Foreign]:
    """The autoencoder of a folder; FormatError for what we cannot hold, by name."""
    cfg = Settings.read(source / CFG)
    weights = foreign.beside(source / CFG, WEIGHTS)
    known = foreign.known_facts(source, weights)
    _refuse_reshaped(cfg)
    kind = _kind(cfg)
    tensors = fingerprint.load(weights)
    foreign.check_names(weights, tensors, _TENSORS)
    tensors, notes = _folded(cfg, tensors)
    sae = foreign.assemble(
        weights,
        tensors,
        _sparsity(cfg, kind, known),
        subtract_b_dec=cfg.flag("apply_b_dec_to_input", True),
        dtype=_dtype(cfg),
    )
    if (sae.d_in, sae.d_sae) != (cfg.whole("d_in"), cfg.whole("d_sae")):
        raise FormatError(
            f"{source}: {CFG} says d_in {cfg.whole('d_in')} and d_sae {cfg.whole('d_sae')}, the "
            f"weights have {sae.d_in} and {sae.d_sae}; take both files from one save"
        )
    facts, doubts = _facts(cfg)
    return [Foreign(sae, facts | foreign.own_facts(known), (*notes, *doubts))]


def _kind(cfg: Settings) -> str:
    """Our kind of its architecture; before version 6, topk could be an activation of standard."""
    name = cfg.text("architecture") or "standard"
    if name == "standard" and str(cfg.values.get("activation_fn")).startswith("topk"):
        name = "topk"
    if name not in _KINDS:
        raise FormatError(
            f"{cfg.file}: architecture {name!r:.60} is not known here; expected {', '.join(_KINDS)}"
        )
    return _KINDS[name]


def _sparsity(cfg: Settings, kind: str, known: dict[str, Any]) -> Sparsity:
    if kind == "topk":
        values = cfg.values if "k" in cfg.values else cfg.object("activation_fn_kwargs")
        return make_sparsity("topk", k=Settings(cfg.file, values).whole("k"))
    return make_sparsity("relu_l1", l1=foreign.trained_setting(known, "relu_l1", "l1", 0.0))


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
    name = said.text("hook_name") or said.text("hook_point")
    if name is None:
        return facts, []
    if said.values.get("hook_head_index") is not None:
        return facts, [f"{name}, head {said.values['hook_head_index']}: we read no single heads"]
    here = hookpoints.from_transformer_lens(name)
    if here.match is Match.NONE:
        here = hookpoints.from_module(name, facts.get("model") or "")
    if here.match is Match.NONE:
        return facts, [f"{name} has no name here"]
    kwargs = said.object("model_from_pretrained_kwargs")
    processed = [key for key in ("fold_ln", "center_writing_weights") if kwargs.get(key)]
    doubt = f"{name} was read from a model with {', '.join(processed)}: {here.match.value}"
    doubts = [doubt] if processed and here.match is Match.UNPROCESSED else []
    return facts | {"hookpoint": here.name}, doubts
