"""sparsify (EleutherAI, PyPI eai-sparsify): a folder for each hookpoint with cfg.json and
sae.safetensors, for `SparseCoder.load_from_disk`.

encoder.weight is [d_sae d_in]; W_dec and b_dec have our orientation. The input is centred by b_dec
unless `transcode` is set, so both of ours fit as they are. A transcoder rebuilds the output of the
module that its folder names from the input; its W_skip is [d_out d_in].
"""

import json
from pathlib import Path
from typing import Any

from sae import fingerprint
from sae.errors import FormatError
from sae.formats import foreign, hookpoints
from sae.formats.foreign import Foreign, Notes, Settings
from sae.formats.hookpoints import Match
from sae.hooks import Hookpoint
from sae.routes import Route
from sae.sparsity import make_sparsity
from sae.store import WEIGHTS, folder_name, write_atomic, write_json

CFG = "cfg.json"
_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


def recognises(source: Path) -> bool:
    """Whether a folder looks like one, or like a folder of them."""
    return bool(_folders(source))


def _folders(source: Path) -> list[Path]:
    """The folders that hold a coder: `source` itself, or those in it."""
    if not source.is_dir():
        return []
    within = [source, *sorted(path for path in source.iterdir() if path.is_dir())]
    return [path for path in within if (path / CFG).is_file() and (path / WEIGHTS).is_file()]


def write(sae_folder: Path, out: Path, features: list[int] | None = None) -> Notes:
    """Write `out`/<hookpoint>/cfg.json and sae.safetensors."""
    return foreign.export("sparsify", sae_folder, out, features, _fill)


def _fill(folder: Path, own: Foreign) -> Notes:
    foreign.check_kind("sparsify", own, ("topk",))
    name, notes = _name(own)
    inner = folder / folder_name(name)
    inner.mkdir()
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, own.sae.d_sae // own.sae.d_in),
        "normalize_decoder": False,
        "num_latents": own.sae.d_sae,
        "k": own.sae.sparsity.config()["k"],
        "multi_topk": False,
        "skip_connection": own.sae.W_skip is not None,
        "transcode": not own.sae.subtract_b_dec,
        "d_in": own.sae.d_in,
    }
    write_json(inner / CFG, cfg)
    ours = own.tensors | {"W_enc": own.tensors["W_enc"].T}
    theirs = {theirs: ours[name] for theirs, name in _NAMES.items()}
    if "W_skip" in ours:
        theirs["W_skip"] = ours["W_skip"].T
    foreign.write_tensors(inner / WEIGHTS, theirs)
    config = {"model": own.facts.get("model"), "dataset": own.facts.get("data")}
    write_atomic(folder / "config.json", json.dumps(config) + "\n")
    return notes


def _name(own: Foreign) -> tuple[str, Notes]:
    """The module that sparsify would hook, or our name with a note; FormatError for most maps."""
    instead = foreign.instead_of(own)
    if foreign.check_map("sparsify", own) and own.sae.d_in != own.sae.d_out:
        what = f"a map from width {own.sae.d_in} to {own.sae.d_out}"
        raise foreign.refuse("sparsify", what, instead)
    if own.route and own.route.is_map:
        if (module := foreign.module_of(own)) is None:
            what = f"{own.route}, which is no module's input and output"
            raise foreign.refuse("sparsify", what, instead)
        return module, []
    if own.hookpoint is None:
        return "sae", []
    there = hookpoints.to_module(own.hookpoint, own.says("model"))
    if there.match is Match.EXACT:
        return there.name, []
    note = (
        f"{own.hookpoint} is no module's output, or of a model not known here: its folder says it"
    )
    return str(own.hookpoint), [f"{note} in our words"]


def read(source: Path) -> list[Foreign]:
    """A coder, or all those of a folder; FormatError for what we cannot hold, by name."""
    folders = _folders(source)
    if not folders:
        raise FormatError(f"{source}: expected {CFG} and {WEIGHTS}, or folders that hold them")
    return [_read(folder, root=source) for folder in folders]


def _read(folder: Path, root: Path) -> Foreign:
    cfg, weights = Settings.read(folder / CFG), folder / WEIGHTS
    _refuse_others(cfg)
    tensors = fingerprint.load(weights)
    skip = cfg.flag("skip_connection", False)
    foreign.check_names(weights, tensors, (*_NAMES, *["W_skip"] * skip))
    names = _NAMES | {"W_skip": "W_skip"}
    ours = foreign.by_our_names(tensors, names, ("encoder.weight", "W_skip"))
    sae = foreign.assemble(
        weights,
        ours,
        make_sparsity("topk", k=cfg.whole("k")),
        subtract_b_dec=not cfg.flag("transcode", False),
    )
    if sae.d_in != cfg.whole("d_in"):
        raise FormatError(
            f"{folder}: {CFG} says d_in {cfg.whole('d_in')}, the weights have {sae.d_in}; "
            "take both files from one save"
        )
    known = next(
        (k for at in (folder, folder.parent) if (k := foreign.known_facts(at, weights))), {}
    )
    facts, notes = _facts(folder, root, maps=not known and cfg.flag("transcode", False))
    return Foreign(sae, facts | foreign.own_facts(known), () if known else tuple(notes))


def _refuse_others(cfg: Settings) -> None:
    activation = cfg.text("activation") or "topk"
    if activation != "topk":
        raise FormatError(f"{cfg.file}: activation {activation!r:.40}: only topk can be read here")


def _facts(folder: Path, root: Path, *, maps: bool) -> tuple[dict[str, Any], Notes]:
    """The hookpoint from the folder's name, both ends of a map; the model from config.json."""
    facts: dict[str, Any] = {}
    for place in (folder, folder.parent):
        if (place / "config.json").is_file():
            run = Settings.read(place / "config.json")
            said = {"model": run.text("model"), "data": run.text("dataset")}
            facts |= {name: value for name, value in said.items() if value}
    name, model = folder.resolve().name, facts.get("model") or ""
    ends = [hookpoints.from_module(f"{name}.{side}", model) for side in ("input", "output")]
    if maps and all(end.match is Match.EXACT for end in ends):
        inputs, targets = (Hookpoint.parse(end.name) for end in ends)
        return facts | Route((inputs,), (targets,)).origin(), []
    here = hookpoints.from_module(name, model)
    if here.match is Match.EXACT:
        return facts | {"hookpoint": here.name}, []
    return facts, [f"{folder.name} has no name here"]
