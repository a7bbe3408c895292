"""Gemma Scope (Lieberum et al. 2024, arXiv:2408.05147): params.npz, in folders such as
layer_20/width_16k/average_l0_71, of a repository such as google/gemma-scope-2b-pt-res.

A JumpReLU without subtraction of b_dec, W_enc [d_in d_sae], W_dec [d_sae d_out], θ in `threshold`.
The file says nothing else: layer, site and model are in the names of the folders around it. Its
transcoders read what the norm before the MLP gives without the norm's gain, which is no hookpoint
of ours, so only maps that we wrote know their place.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.errors import FormatError
from sae.formats import conventions, foreign, npz
from sae.formats.foreign import Foreign, Notes

WEIGHTS = "params.npz"
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
KINDS = ("jumprelu", "batchtopk")
_SITES = {"res": "resid_post", "mlp": "mlp_out"}
_UNREAD = {
    "att": "we read no single heads",
    "transcoders": "we do not read a norm's output without its gain",
}


def recognises(source: Path) -> bool:
    """Whether it is an .npz file, or a folder that holds one by their name."""
    return (source.is_file() and source.suffix == ".npz") or (source / WEIGHTS).is_file()


def write(sae_folder: Path, out: Path, features: list[int] | None = None) -> Notes:
    """Write params.npz to the new folder `out`."""
    return foreign.export("gemma_scope", sae_folder, out, features, _fill)


def _fill(folder: Path, own: Foreign) -> Notes:
    foreign.check_kind("gemma_scope", own, KINDS)
    if own.sae.dtype == torch.bfloat16:
        what = "bfloat16, which numpy does not have"
        raise foreign.refuse("gemma_scope", what, "use --format gemma_scope_2")
    if own.sae.W_skip is not None:
        what = "a dense map beside the features (W_skip)"
        raise foreign.refuse("gemma_scope", what, "use --format gemma_scope_2")
    theirs, notes = outward("gemma_scope", own)
    npz.write(folder / WEIGHTS, theirs)
    if own.route is not None:
        notes.append("the file has no place for hookpoint and model: provenance.json has them")
    return notes


def outward(name: str, own: Foreign) -> tuple[dict[str, Tensor], Notes]:
    """The tensors of TENSORS, and notes; FormatError for what the format `name` cannot hold."""
    foreign.check_kind(name, own, KINDS)
    foreign.check_map(name, own)
    ours, notes = foreign.with_subtraction(name, own, False)
    ours, changed = conventions.outward(own.kind, ours)
    return {tensor: ours[tensor] for tensor in TENSORS}, [*notes, *changed]


def read(source: Path) -> list[Foreign]:
    """The autoencoder of a params.npz, or of the folder it lies in."""
    file = source / WEIGHTS if source.is_dir() else source
    found = {name.lower(): tensor for name, tensor in npz.read(file).items()}
    scale = found.pop("scaling_factor", None)
    if scale is not None and not torch.all(scale == 1):
        raise FormatError(f"{file}: scaling_factor is no part of this autoencoder; fold it first")
    known = foreign.known_facts(file.parent, file)
    facts, doubts = _facts(file)
    return [inward(file, found, known, facts, doubts)]


def inward(
    file: Path,
    theirs: dict[str, Tensor],
    known: dict[str, Any],
    facts: dict[str, Any],
    doubts: Notes,
    *,
    skip: str | None = None,
) -> Foreign:
    """The autoencoder of tensors by the names of TENSORS in lower case; `skip` is its W_skip's."""
    names = {tensor.lower(): tensor for tensor in TENSORS} | ({skip: "W_skip"} if skip else {})
    foreign.check_names(file, theirs, names)
    ours = {names[name]: tensor for name, tensor in theirs.items()}
    dtype = foreign.check_vectors(file, ours, ("b_enc", "threshold"))
    theta, k = ours.pop("threshold").to(dtype), foreign.known_k(known)
    sparsity, own, notes = conventions.jump(theta, k, known, file)
    sae = foreign.assemble(file, ours | own, sparsity, subtract_b_dec=False)
    doubts = [] if known else doubts
    return Foreign(sae, facts | foreign.own_facts(known), (*notes, *doubts))


def _facts(file: Path) -> tuple[dict[str, Any], Notes]:
    """What the folders around the file say: repository (or its place in the cache) and layer."""
    path = file.absolute().as_posix()
    layer = re.findall(r"layer_(\d+)", path)
    of = re.findall(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)", path)
    if not of:
        return {}, [f"{file.name} says neither hookpoint nor model"]
    size, tuned, site = of[-1]
    facts = {"model": f"google/gemma-2-{size}" + ("-it" if tuned == "it" else "")}
    if site not in _SITES or not layer:
        why = _UNREAD.get(site, "no folder around it is layer_N")
        return facts, [f"gemma-scope-{size}-{tuned}-{site}: {why}"]
    return facts | {"hookpoint": f"layers.{int(layer[-1])}.{_SITES[site]}"}, []
