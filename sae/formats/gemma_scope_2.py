"""Gemma Scope 2, for Gemma 3: params.safetensors with the tensors of Gemma Scope in small letters,
and config.json with the model and the module that is read.

A transcoder also names the module it rebuilds, and may have affine_skip_connection [d_in d_out].
"""

from pathlib import Path
from typing import Any

from sae import fingerprint
from sae.formats import foreign, gemma_scope, hookpoints
from sae.formats.foreign import Foreign, Notes, Settings
from sae.formats.hookpoints import Match
from sae.hooks import Hookpoint
from sae.routes import Route
from sae.store import write_json

CONFIG, WEIGHTS = "config.json", "params.safetensors"
IN, OUT, AFFINE = "hf_hook_point_in", "hf_hook_point_out", "affine_connection"
SKIP = "affine_skip_connection"


def recognises(source: Path) -> bool:
    """Whether a folder looks like one."""
    return (source / CONFIG).is_file() and (source / WEIGHTS).is_file()


def write(sae_folder: Path, out: Path, features: list[int] | None = None) -> Notes:
    """Write config.json and params.safetensors to the new folder `out`."""
    return foreign.export("gemma_scope_2", sae_folder, out, features, _fill)


def _fill(folder: Path, own: Foreign) -> Notes:
    theirs, notes = gemma_scope.outward("gemma_scope_2", own)
    tensors = {name.lower(): t for name, t in theirs.items()}
    if own.sae.W_skip is not None:
        tensors[SKIP] = own.tensors["W_skip"]
    foreign.write_tensors(folder / WEIGHTS, tensors)
    config = {"architecture": "jump_relu", "model_name": own.facts.get("model")}
    places, unnamed = _places(own)
    write_json(folder / CONFIG, config | places)
    return [*notes, *unnamed]


def _places(own: Foreign) -> tuple[dict[str, Any], Notes]:
    """The modules that are read and rebuilt, and whether a dense map lies beside the features."""
    if own.route is None:
        return {AFFINE: True} if own.sae.W_skip is not None else {}, []
    sides = [own.route.inputs[0], *(own.route.targets if own.route.is_map else ())]
    there = [hookpoints.to_nnsight(point, own.says("model")) for point in sides]
    said: dict[str, Any] = dict(zip((IN, OUT), (name.name for name in there), strict=False))
    if own.route.is_map or own.sae.W_skip is not None:
        said[AFFINE] = own.sae.W_skip is not None
    says = "its module is not known here; config.json says it in our words"
    return said, [f"{name.name}: {says}" for name in there if name.match is Match.NONE]


def read(source: Path) -> list[Foreign]:
    """The autoencoder of a folder; FormatError for what we cannot hold, by name."""
    config = Settings.read(source / CONFIG)
    weights = foreign.beside(source / CONFIG, WEIGHTS)
    if config.text("architecture") != "jump_relu":
        raise config.wrong("architecture", "jump_relu")
    known = foreign.known_facts(source, weights)
    facts, doubts = _facts(config)
    tensors, skip = fingerprint.load(weights), SKIP if config.flag(AFFINE, False) else None
    return [gemma_scope.inward(weights, tensors, known, facts, doubts, skip=skip)]


def _facts(config: Settings) -> tuple[dict[str, Any], Notes]:
    """Model and hookpoint; its own files leave out who made the model, and write v3 for 3."""
    model = config.text("model_name") or ""
    if model.startswith("gemma-"):
        model = f"google/{model}".replace("-v3-", "-3-").replace("270m-pt", "270m")
    facts: dict[str, Any] = {"model": model} if model else {}
    names = [name for key in (IN, OUT) if (name := config.text(key)) is not None]
    if config.text(IN) is None:
        return facts, [f"{config.file.name} does not say which module it reads"]
    here = [hookpoints.from_module(name, model) for name in names]
    here = [hookpoints.from_our_words(p.name) if p.match is Match.NONE else p for p in here]
    if unnamed := [place.name for place in here if place.match is Match.NONE]:
        return facts, [f"{name} has no name here" for name in unnamed]
    points = [Hookpoint.parse(place.name) for place in here]
    return facts | Route((points[0],), (points[-1],)).origin(), []
