"""Gemma Scope 2, for Gemma 3: params.safetensors with the tensors of Gemma Scope in small letters,
and config.json with the model and the module that is read.
"""

from pathlib import Path
from typing import Any

from sae import fingerprint
from sae.errors import FormatError
from sae.formats import foreign, gemma_scope, hookpoints
from sae.formats.foreign import Foreign, Notes, Settings
from sae.formats.hookpoints import Match
from sae.store import write_json

CONFIG, WEIGHTS = "config.json", "params.safetensors"


def recognises(source: Path) -> bool:
    """Whether a folder looks like one."""
    return (source / CONFIG).is_file() and (source / WEIGHTS).is_file()


def write(sae_folder: Path, out: Path, features: list[int] | None = None) -> Notes:
    """Write config.json and params.safetensors to the new folder `out`."""
    return foreign.export("gemma_scope_2", sae_folder, out, features, _fill)


def _fill(folder: Path, own: Foreign) -> Notes:
    theirs, notes = gemma_scope.outward("gemma_scope_2", own)
    foreign.write_tensors(folder / WEIGHTS, {name.lower(): t for name, t in theirs.items()})
    config = {"architecture": "jump_relu", "model_name": own.facts.get("model")}
    if own.hookpoint is not None:
        there = hookpoints.to_nnsight(own.hookpoint, own.says("model"))
        config["hf_hook_point_in"] = there.name
        if there.match is Match.NONE:
            note = f"{own.hookpoint}: its module is not known here"
            notes.append(f"{note}; hf_hook_point_in says it in our words")
    write_json(folder / CONFIG, config)
    return notes


def read(source: Path) -> list[Foreign]:
    """The autoencoder of a folder; FormatError for what we cannot hold, by name."""
    config = Settings.read(source / CONFIG)
    weights = foreign.beside(source / CONFIG, WEIGHTS)
    if config.text("architecture") != "jump_relu":
        raise config.wrong("architecture", "jump_relu")
    if config.text("hf_hook_point_out") not in (None, config.text("hf_hook_point_in")):
        raise FormatError(f"{config.file}: reads one place and rebuilds another; ours cannot yet")
    known = foreign.known_facts(source, weights)
    facts, doubts = _facts(config)
    return [gemma_scope.inward(weights, fingerprint.load(weights), known, facts, doubts)]


def _facts(config: Settings) -> tuple[dict[str, Any], Notes]:
    """Model and hookpoint; its own files leave out who made the model, and write v3 for 3."""
    model = config.text("model_name") or ""
    if model.startswith("gemma-"):
        model = f"google/{model}".replace("-v3-", "-3-").replace("270m-pt", "270m")
    facts: dict[str, Any] = {"model": model} if model else {}
    name = config.text("hf_hook_point_in")
    if name is None:
        return facts, [f"{config.file.name} does not say which module it reads"]
    here = hookpoints.from_module(name, model)
    if here.match is Match.NONE:
        return facts, [f"{name} has no name here"]
    return facts | {"hookpoint": here.name}, []
