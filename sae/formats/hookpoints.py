"""Names of the same place in a model: ours, TransformerLens', Hugging Face's modules, nnsight's.

A translation says how good it is. EXACT: the same numbers. UNPROCESSED: the same unless
TransformerLens has processed the weights (`from_pretrained_no_processing` does not, and SAELens
loads models that way): folding LayerNorm and centring what is written changes the residual stream.
NONE: the other side has no such place.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sae import builtin
from sae.errors import FormatError
from sae.hooks import Hookpoint
from sae.untrusted import read_json


class Match(StrEnum):
    """How far a name on the other side means the same numbers."""

    EXACT = "exact"
    UNPROCESSED = "exact without weight processing"
    NONE = "none"


@dataclass(frozen=True)
class Translation:
    """A name on the other side (ours, where the other side has none), and how good it is."""

    name: str
    match: Match


# mlp_in has none: ln2.hook_normalized is taken before the norm's gain, hook_mlp_in before the norm.
_TRANSFORMER_LENS = {
    "mlp_act": ("mlp.hook_post", Match.EXACT),
    "mlp_out": ("hook_mlp_out", Match.UNPROCESSED),
    "attn_out": ("hook_attn_out", Match.UNPROCESSED),
    "resid_pre": ("hook_resid_pre", Match.UNPROCESSED),
    "resid_post": ("hook_resid_post", Match.UNPROCESSED),
}
_SITES_OF_TRANSFORMER_LENS = {name: (site, m) for site, (name, m) in _TRANSFORMER_LENS.items()}


def to_transformer_lens(point: Hookpoint) -> Translation:
    """`layers.2.mlp_act` → `blocks.2.mlp.hook_post`; module paths and mlp_in have no such name."""
    if point.site not in _TRANSFORMER_LENS:
        return Translation(str(point), Match.NONE)
    name, match = _TRANSFORMER_LENS[point.site]
    return Translation(f"blocks.{point.layer}.{name}", match)


def from_transformer_lens(name: str) -> Translation:
    """`blocks.2.mlp.hook_post` → `layers.2.mlp_act`; NONE keeps the name as it came."""
    found = re.fullmatch(r"blocks\.(\d{1,9})\.(\S+)", name, re.ASCII)
    if not found or found[2] not in _SITES_OF_TRANSFORMER_LENS:
        return Translation(name, Match.NONE)
    site, match = _SITES_OF_TRANSFORMER_LENS[found[2]]
    return Translation(f"layers.{int(found[1])}.{site}", match)


def from_our_words(name: str) -> Translation:
    """`layers.2.mlp_in`, as exports say it where the other side has no name."""
    ours = re.fullmatch(r"layers\.\d+\.(mlp_in|mlp_act|\w+_out|resid_\w+)", name, re.ASCII)
    return Translation(name, Match.EXACT if ours else Match.NONE)


@dataclass(frozen=True)
class _Layout:
    """Module paths of a family inside its blocks; what is read is a module's input or output."""

    base: str  # the submodule that holds the blocks
    blocks: str
    down: str  # the down projection, whose input the neurons are
    attn: str
    act: str | None = None  # the module whose output the neurons are, where there is one
    mlp_in: str = "mlp.input"
    mlp_out: str = "mlp.output"
    post_attn: str | None = None  # a norm behind attention, whose output is added instead

    def sites(self) -> dict[str, str]:
        """Site → path inside the block with the side that is read."""
        return {
            "mlp_act": f"{self.act}.output" if self.act else f"{self.down}.input",
            "mlp_out": self.mlp_out,
            "attn_out": f"{self.post_attn or self.attn}.output",
            "mlp_in": self.mlp_in,
            "resid_pre": "input",
            "resid_post": "output",
        }


_LLAMA = _Layout("model", "layers", "mlp.down_proj", "self_attn")
_POST_NORMS = _Layout(
    "model",
    "layers",
    "mlp.down_proj",
    "self_attn",
    mlp_in="pre_feedforward_layernorm.output",
    mlp_out="post_feedforward_layernorm.output",
    post_attn="post_attention_layernorm",
)
LAYOUTS = {
    "gpt2": _Layout("transformer", "h", "mlp.c_proj", "attn", act="mlp.act"),
    "gpt_neo": _Layout("transformer", "h", "mlp.c_proj", "attn", act="mlp.act"),
    "gpt_neox": _Layout("gpt_neox", "layers", "mlp.dense_4h_to_h", "attention", act="mlp.act"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _POST_NORMS),
}
"""By `model_type` of the model's config.json."""


def to_nnsight(point: Hookpoint, model: str) -> Translation:
    """`layers.2.mlp_act` of GPT-2 → `transformer.h.2.mlp.act.output`, as nnsight reads it."""
    if point.module:
        return Translation(f"{point.module}.output", Match.EXACT)
    layout = LAYOUTS.get(model_type(model) or "")
    if layout is None or point.site is None:
        return Translation(str(point), Match.NONE)
    path = layout.sites()[point.site]
    return Translation(f"{layout.base}.{layout.blocks}.{point.layer}.{path}", Match.EXACT)


def to_module(point: Hookpoint, model: str) -> Translation:
    """`layers.2.resid_post` of Pythia → `layers.2`: a module, counted from the model without head.

    Only what is a module's output has such a name.
    """
    path = to_nnsight(point, model)
    layout = LAYOUTS.get(model_type(model) or "")
    if path.match is Match.NONE or not path.name.endswith(".output"):
        return Translation(str(point), Match.NONE)
    name = path.name.removesuffix(".output")
    return Translation(name.removeprefix(f"{layout.base}." if layout else ""), Match.EXACT)


def to_module_between(read: Hookpoint, rebuilt: Hookpoint, model: str) -> str | None:
    """The module, as `to_module` has it, whose input and output these are; None without one."""
    ends = [to_nnsight(point, model).name for point in (read, rebuilt)]
    name = ends[0].removesuffix(".input")
    if ends != [f"{name}.input", f"{name}.output"]:
        return None
    return to_module(rebuilt, model).name


def from_module(name: str, model: str = "") -> Translation:
    """A module path, counted from any parent, or with nnsight's `.input` and `.output`, to ours.

    `model` decides where families differ: its `model_type`, or what its name says. NONE keeps the
    name as it came.
    """
    found = re.fullmatch(r"(?:\w+\.)*?(h|layers)\.(\d{1,9})(?:\.(\S+))?", name, re.ASCII)
    if not found:
        return Translation(name, Match.NONE)
    blocks, layer, inside = found[1], int(found[2]), found[3] or "output"
    wanted = inside if inside.endswith(("input", "output")) else f"{inside}.output"
    for layout in _candidates(blocks, model):
        sides = {path: site for site, path in layout.sites().items()}
        sides[f"{layout.down}.input"] = "mlp_act"
        if wanted in sides:
            return Translation(f"layers.{layer}.{sides[wanted]}", Match.EXACT)
    return Translation(name, Match.NONE)


def _candidates(blocks: str, model: str) -> list[_Layout]:
    """The layouts a name may be of: the model's own, or those that name their blocks so."""
    own = LAYOUTS.get(model_type(model) or "")
    if own is None and re.search(r"gemma-?[23]", model, re.IGNORECASE):
        own = _POST_NORMS
    if own is not None:
        return [own]
    unsaid = [layout for layout in LAYOUTS.values() if layout is not _POST_NORMS]
    return [layout for layout in unsaid if layout.blocks == blocks]


def model_type(model: str) -> str | None:
    """`model_type` of a bundled or local model, or of a Hub model in the cache; None if unknown."""
    try:
        if model.startswith(builtin.PREFIX):
            file = builtin.model_path(model) / "config.json"
        elif Path(model).is_dir():
            file = Path(model) / "config.json"
        else:
            file = _cached(model)
        found = read_json(file).get("model_type") if file else None
    except (OSError, FormatError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def _cached(model: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
