"""What the formats of other tools have in common: an autoencoder on its way out or in.

A writer is `fill(folder, Foreign) -> notes`, wrapped by `export`; a reader gives Foreigns. Notes
say what is not bit for bit. What a format cannot hold is refused by name.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from sae import config, hooks, language_model
from sae.autoencoder import DTYPES, SparseAutoencoder, read_metadata
from sae.config import TrainConfig
from sae.errors import ConfigError, FormatError, ModelError, SAEError
from sae.formats import hookpoints
from sae.formats.tables import provenance
from sae.hooks import Hookpoint
from sae.language_model import LanguageModel
from sae.records import check_features
from sae.routes import Route
from sae.sparsity import Sparsity, make_sparsity, settings_of
from sae.store import (
    MANIFEST,
    SETTINGS,
    WEIGHTS,
    read_manifest,
    sha256,
    staged,
    write_atomic,
    write_json,
)
from sae.untrusted import read_json

PROVENANCE = "provenance.json"
_OWN = (
    *(
        "hookpoint",
        "inputs",
        "targets",
        "model",
        "revision",
        "data",
        "data_fingerprint",
        "context",
        "tokens",
    ),
    "prefixes",
)

Notes = list[str]


@dataclass(frozen=True)
class Foreign:
    """An autoencoder, and what is known of where it belongs.

    `facts`: hookpoint, model, revision, data, context and the like, in our words; a reader leaves
    out what the files do not say. `notes`: what reading changed, and what is in doubt.
    """

    sae: SparseAutoencoder
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The kind of its sparsity."""
        return self.sae.sparsity.kind

    @property
    def route(self) -> Route | None:
        """What it reads and rebuilds, None where that is not known."""
        known = isinstance(self.facts.get("hookpoint"), str)
        return Route.parse("", self.facts) if known else None

    @property
    def is_map(self) -> bool:
        """Whether it rebuilds something else than it reads, or has a dense map."""
        sae, route = self.sae, self.route
        return bool(route and route.is_map) or sae.d_in != sae.d_out or sae.W_skip is not None

    @property
    def is_several(self) -> bool:
        """Whether several hookpoints lie side by side in what it reads or rebuilds."""
        sides = (self.route.inputs, self.route.targets) if self.route else ()
        return len(self.sae.sites) > 1 or any(len(side) > 1 for side in sides)

    @property
    def hookpoint(self) -> Hookpoint | None:
        """Where it reads, None where that is not known, or not one place."""
        return self.route.points[0] if self.route and not self.route.is_map else None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its weights by our names, on the CPU."""
        return {name: t.cpu().contiguous() for name, t in self.sae.tensors().items()}

    def says(self, name: str) -> str:
        """A fact as text, "" where it is not known."""
        return str(self.facts.get(name) or "")


# ------------------------------------------------------------------------------------------ out


def export(
    name: str,
    sae_folder: Path,
    out: Path,
    features: list[int] | None,
    fill: Callable[[Path, Foreign], Notes],
) -> Notes:
    """Write an SAE, or some of its features, to the new folder `out` by `fill`.

    provenance.json lies beside the format's own files and tells in our words where they came from,
    so that reading them again gives back what the format has no place for. Returns the notes.
    """
    foreign = opened(sae_folder, features)
    facts = {**foreign.facts, "export": name, "features": features}
    with staged(out, extra=facts) as folder:
        notes = [*foreign.notes, *fill(folder, foreign)]
        hashes = {file.name: sha256(file) for file in folder.rglob("*") if file.is_file()}
        sparsity = {"kind": foreign.kind, **foreign.sae.sparsity.config()}
        own = {**facts, "sparsity": sparsity, "notes": notes, "files": hashes}
        write_json(folder / PROVENANCE, own)
    return notes


def opened(sae_folder: Path, features: list[int] | None = None) -> Foreign:
    """An SAE folder, or some of its features, on its way out."""
    sae = SparseAutoencoder.from_pretrained(sae_folder)
    if features is not None:
        sae = selected(sae, features)
    metadata = read_metadata(sae_folder)
    manifest = read_manifest(sae_folder) if (sae_folder / MANIFEST).is_file() else {}
    facts = {**metadata, **provenance(manifest, features)}
    facts |= settings_of_run(sae_folder, features)
    return Foreign(sae, facts | {"sae_sha256": sha256(sae_folder / WEIGHTS)})


def settings_of_run(sae_folder: Path, features: list[int] | None = None) -> dict[str, Any]:
    """What only the settings of its run tell; some features alone are no prefixes of anything."""
    if (known := _run_config(sae_folder)) is None:
        return {}
    plain = known.sae.prefixes == (1.0,) or features is not None
    return {"context": known.data.context} | (
        {} if plain else {"prefixes": list(known.sae.prefixes)}
    )


def _run_config(sae_folder: Path) -> TrainConfig | None:
    """The settings of the run that an SAE lies in; None where it lies in none."""
    try:
        return config.load(sae_folder.parents[1] / SETTINGS)
    except (ConfigError, IndexError):
        return None


def ends_of(
    name: str, sae_folder: Path, manifest: Mapping[str, Any]
) -> tuple[Hookpoint, Hookpoint]:
    """The hookpoint that an SAE with a dictionary reads, and the one that it rebuilds.

    Raises FormatError for several side by side, which the format `name` has no place for.
    """
    origin = read_metadata(sae_folder)
    route = Route.parse(str(manifest["hookpoint"]), origin)
    if len(route.inputs) + len(route.targets) > 2:
        what = f"several hookpoints side by side ({route})"
        raise refuse(name, what, "use --format parquet")
    return route.inputs[0], route.targets[0]


def model_of(sae_folder: Path, name: str, point: Hookpoint, width: int) -> LanguageModel:
    """The language model, as the run's settings name it; ModelError where it is another."""
    known = _run_config(sae_folder)
    settings = known.model if known else config.ModelConfig(name=name)
    lm = language_model.load(settings, torch.device("cpu"))
    if (own := hooks.width(lm.model, point)) != width:
        raise ModelError(
            f"{lm.name} has width {own} at {point}, the SAE {width}; "
            f"give the model in the run's {SETTINGS}"
        )
    return lm


def widths(own: Foreign) -> tuple[int, ...] | None:
    """The numbers of features that learn to rebuild the input by themselves, None where plain."""
    shares = own.facts.get("prefixes")
    return config.SAEConfig(prefixes=shares).prefix_sizes(own.sae.d_sae) if shares else None


def prefixes(file: Path, sizes: list[Any], d_sae: int) -> dict[str, Any]:
    """The fact that tells such numbers, {} where there is just one; FormatError if impossible."""
    rising = all(type(size) is int and size > 0 for size in sizes) and sizes == sorted(set(sizes))
    if not rising or sizes[-1:] != [d_sae]:
        raise FormatError(f"{file}: prefixes of {str(sizes)[:60]} features: do not rise to {d_sae}")
    return {"prefixes": [size / d_sae for size in sizes]} if len(sizes) > 1 else {}


@torch.no_grad()
def selected(sae: SparseAutoencoder, features: list[int]) -> SparseAutoencoder:
    """An autoencoder with some features of another, in which each fires as before.

    Raises FormatError where they would not, RunError for a feature that does not exist.
    """
    check_features(features, sae.d_sae)
    if sae.sparsity.competes:
        raise FormatError(
            f"--feature: in a {sae.sparsity.kind} autoencoder features compete, so some of them "
            "alone would fire differently; export all, or use --format parquet"
        )
    settings = sae.sparsity.config()
    if "k" in settings:
        settings["k"] = min(settings["k"], len(features))
    sparsity = make_sparsity(sae.sparsity.kind, **settings)
    part = SparseAutoencoder(
        sae.d_in,
        len(features),
        sparsity,
        sae.d_out,
        sae.subtract_b_dec,
        skip=sae.W_skip is not None,
        sites=sae.sites,
        dtype=sae.dtype,
    )
    part.W_enc.copy_(sae.W_enc[:, features])
    part.b_enc.copy_(sae.b_enc[features])
    part.W_dec.copy_(sae.W_dec[features])
    part.b_dec.copy_(sae.b_dec)
    if part.W_skip is not None and sae.W_skip is not None:
        part.W_skip.copy_(sae.W_skip)
    for name, tensor in sae.sparsity.state_dict().items():
        part.sparsity.state_dict()[name].copy_(tensor[features] if tensor.ndim else tensor)
    return part


def refuse(name: str, what: str, instead: str) -> FormatError:
    """The error for what a format has no place for."""
    return FormatError(f"--format {name} cannot hold {what}; {instead}")


def check_kind(name: str, foreign: Foreign, kinds: Iterable[str]) -> None:
    """Raise FormatError where the sparsity is not one of `kinds`."""
    if foreign.kind not in kinds:
        holds = " and ".join(kinds)
        what = f"a {foreign.kind} autoencoder (it holds {holds})"
        raise refuse(name, what, instead_of(foreign))


def instead_of(foreign: Foreign) -> str:
    """What to do where a format lacks it: take the tool that holds it, else our own format.

    Of maps sparsify has topk from a module's input to its output.
    """
    sae = foreign.sae
    if foreign.is_several:
        return "use --format safetensors"
    if saelens_holds(foreign):
        return "use --format saelens"
    is_topk = foreign.kind == "topk" and sae.d_in == sae.d_out
    return f"use --format {'sparsify' if is_topk and module_of(foreign) else 'safetensors'}"


def saelens_holds(foreign: Foreign) -> bool:
    """Every autoencoder; of maps ReLU and those with thresholds, b_dec not subtracted."""
    known = foreign.kind in ("relu_l1", "batchtopk", "jumprelu") and not foreign.sae.subtract_b_dec
    return known or not foreign.is_map


def module_of(foreign: Foreign) -> str | None:
    """The module whose input it reads and whose output it rebuilds; None without one."""
    route = foreign.route
    if route is None or not route.is_map:
        return None
    (read, *_), (rebuilt, *_) = route.inputs, route.targets
    return hookpoints.to_module_between(read, rebuilt, foreign.says("model"))


def check_square(name: str, foreign: Foreign) -> None:
    """Raise FormatError for a map from one width to another, a dense map, and several sites."""
    sae, instead = foreign.sae, instead_of(foreign)
    if sae.d_in != sae.d_out:
        what = f"a map from width {sae.d_in} to {sae.d_out}: its input and output are the same"
        raise refuse(name, what, instead)
    if foreign.route and foreign.route.is_map:
        raise refuse(name, f"a map, {foreign.route}", instead)
    if sae.W_skip is not None:
        raise refuse(name, "a dense map beside the features (W_skip)", instead)
    if len(sae.sites) > 1:
        raise refuse(name, f"{len(sae.sites)} hookpoints side by side", instead)


def check_map(name: str, foreign: Foreign) -> bool:
    """Whether it is a transcoder, from one hookpoint to another, or has a dense map.

    Raises FormatError for several hookpoints side by side, which no other tool's files hold.
    """
    if foreign.is_several:
        what = f"several hookpoints side by side ({foreign.route})"
        raise refuse(name, what, "use --format safetensors")
    return foreign.is_map


@torch.no_grad()
def with_subtraction(name: str, foreign: Foreign, wanted: bool) -> tuple[dict[str, Tensor], Notes]:
    """Its tensors where the format fixes whether b_dec is subtracted from the input, and notes.

    (x − b_dec) @ W_enc + b_enc = x @ W_enc + (b_enc − b_dec @ W_enc); rounding moves b_enc.
    """
    tensors = foreign.tensors
    if foreign.sae.subtract_b_dec == wanted:
        return tensors, []
    check_square(name, foreign)
    moved = tensors["b_dec"].double() @ tensors["W_enc"].double()
    b_enc = tensors["b_enc"].double() + (moved if wanted else -moved)
    verb = "always subtracts b_dec from the input" if wanted else "never subtracts b_dec"
    note = f"not bit for bit: {name} {verb}, so it is folded into b_enc"
    return tensors | {"b_enc": b_enc.to(foreign.sae.dtype)}, [note]


@torch.no_grad()
def times_decoder_norms(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same autoencoder with activations times ‖W_dec‖ and decoder rows of norm 1."""
    norms = tensors["W_dec"].double().norm(dim=-1)
    folded = {
        "W_enc": tensors["W_enc"].double() * norms,
        "b_enc": tensors["b_enc"].double() * norms,
        "W_dec": tensors["W_dec"].double() / norms.clamp_min(1e-30)[:, None],
    }
    return {**tensors, **{name: t.to(tensors[name].dtype) for name, t in folded.items()}}


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file."""
    write_atomic(file, save({name: t.contiguous() for name, t in tensors.items()}))


# ------------------------------------------------------------------------------------------- in


@dataclass(frozen=True)
class Settings:
    """The JSON object of a foreign file, read key by key; FormatError names file, key and value."""

    file: Path
    values: dict[str, Any]

    @classmethod
    def read(cls, file: Path) -> "Settings":
        """The object in `file`; FormatError where there is none."""
        try:
            values = read_json(file)
        except FileNotFoundError:
            raise FormatError(
                f"{file.parent}: {file.name} is missing; copy it along with the weights"
            ) from None
        if not isinstance(values, dict):
            raise FormatError(f"{file}: expected a JSON object, got {type(values).__name__}")
        return cls(file, values)

    def inner(self, key: str) -> "Settings":
        """The object under `key`, empty where it is null or not there."""
        return Settings(self.file, self.object(key))

    def object(self, key: str) -> dict[str, Any]:
        """The object under `key`, {} where it is null or not there."""
        found = self.values.get(key) or {}
        if not isinstance(found, dict):
            raise self.wrong(key, "an object")
        return found

    def whole(self, key: str) -> int:
        """A whole number of at least 1."""
        found = self.values.get(key)
        if type(found) is not int or found < 1:
            raise self.wrong(key, "a whole number of at least 1")
        return found

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        found = self.values.get(key, default)
        if not isinstance(found, bool):
            raise self.wrong(key, "true or false")
        return found

    def text(self, key: str) -> str | None:
        """Text, None where it is null or not there."""
        found = self.values.get(key)
        if found is not None and not isinstance(found, str):
            raise self.wrong(key, "text")
        return found

    def wrong(self, key: str, wanted: str) -> FormatError:
        """The error for a value that no such file would hold."""
        return FormatError(
            f"{self.file}: {key} {self.values.get(key)!r:.60}: expected {wanted}; "
            "take the file as its tool wrote it"
        )


def beside(settings: Path, name: str) -> Path:
    """The file of weights beside one of settings; FormatError where it is missing."""
    file = settings.with_name(name)
    if not file.is_file():
        raise FormatError(
            f"{settings.parent}: {name} is missing; copy it along with {settings.name}"
        )
    return file


def check_names(file: Path, found: Iterable[str], wanted: Iterable[str]) -> None:
    """Raise FormatError where tensors are missing or there are others."""
    missing, unknown = set(wanted) - set(found), set(found) - set(wanted)
    if missing or unknown:
        parts = [f"missing {', '.join(sorted(missing))}"] if missing else []
        parts += [f"unknown {', '.join(sorted(map(str, unknown)))[:100]}"] if unknown else []
        raise FormatError(f"{file} does not fit its settings: {'; '.join(parts)}")


def turned(tensor: Tensor) -> Tensor:
    """A matrix with rows for columns; what is none stays, for `assemble` to refuse."""
    return tensor.T if tensor.ndim == 2 else tensor


def by_our_names(
    theirs: Mapping[str, Tensor], names: Mapping[str, str], transposed: Iterable[str]
) -> dict[str, Tensor]:
    """Those in `names` by our names there, the matrices among `transposed` turned."""
    kept = {name: tensor for name, tensor in theirs.items() if name in names}
    kept |= {name: turned(kept[name]) for name in transposed if name in kept}
    return {names[name]: tensor for name, tensor in kept.items()}


def check_vectors(file: Path, tensors: Mapping[str, Tensor], names: Iterable[str]) -> torch.dtype:
    """Raise FormatError where these are not one number for each feature of encoder and decoder.

    Returns the type of the weights.
    """
    W_enc, W_dec = tensors["W_enc"], tensors["W_dec"]
    if W_enc.dtype not in DTYPES.values():
        raise FormatError(f"{file}: weights are {W_enc.dtype}; expected {', '.join(DTYPES)}")
    if W_enc.ndim != 2 or W_dec.ndim != 2 or not W_enc.numel() or not W_dec.numel():
        shapes = f"{list(W_enc.shape)} and {list(W_dec.shape)}"
        raise FormatError(f"{file}: encoder and decoder are {shapes}, expected two matrices")
    for name in (*names, "W_dec"):
        if tensors[name].shape[:1] != W_enc.shape[1:] or tensors[name].ndim > 1 + (name == "W_dec"):
            shapes = f"{list(tensors[name].shape)}, the encoder {list(W_enc.shape)}"
            raise FormatError(f"{file}: {name} is {shapes}; take the file as its tool wrote it")
    return W_enc.dtype


def assemble(
    file: Path,
    tensors: Mapping[str, Tensor],
    sparsity: Sparsity,
    *,
    subtract_b_dec: bool,
) -> SparseAutoencoder:
    """An autoencoder of tensors by our names and in our orientation, from `file`.

    Raises FormatError where shapes do not fit each other, or a type is none of ours.
    """
    dtype = check_vectors(file, tensors, ())
    W_enc, W_dec = tensors["W_enc"], tensors["W_dec"]
    try:
        sae = SparseAutoencoder(
            W_enc.shape[0],
            W_enc.shape[1],
            sparsity,
            W_dec.shape[1],
            subtract_b_dec,
            skip="W_skip" in tensors,
            device="meta",
            dtype=dtype,
        )
    except SAEError as error:
        raise FormatError(f"{file}: {error}") from None
    wanted = sae.tensors()
    check_names(file, tensors, wanted)
    typed = {}
    for name, expected in wanted.items():
        found = tensors[name]
        if found.shape != expected.shape:
            shapes = f"{list(found.shape)}, expected {list(expected.shape)}"
            raise FormatError(f"{file}: {name} is {shapes}")
        typed[name] = found.to(expected.dtype).contiguous()
    sae.take(typed)
    return sae


def known_facts(folder: Path, weights: Path) -> dict[str, Any]:
    """What provenance.json in the folder of our own export says of its file of weights.

    {} where it is not about these weights.
    """
    try:
        own = read_json(folder / PROVENANCE)
    except (FileNotFoundError, FormatError):
        return {}
    files = own.get("files") if isinstance(own, dict) else None
    if not isinstance(files, dict) or files.get(weights.name) != sha256(weights):
        return {}
    return own


def trained(kind: str, known: Mapping[str, Any], **held: Any) -> Sparsity:
    """A sparsity with the settings the format has held, the rest from `known_facts`.

    What only training needs is at its default where nothing is known: l1 at 0.
    """
    said = known.get("sparsity")
    said = said if isinstance(said, dict) and said.get("kind") == kind else {}
    settings = {"l1": 0.0} | {n: v for n, v in said.items() if type(v) in (int, float)} | held
    try:
        return make_sparsity(kind, **{n: v for n, v in settings.items() if n in settings_of(kind)})
    except ConfigError as error:
        raise FormatError(f"{PROVENANCE}: {error}") from None


def known_k(known: Mapping[str, Any]) -> int | None:
    """k, where `known_facts` say that it was a batchtopk, which others keep as thresholds."""
    said = known.get("sparsity")
    k = said.get("k") if isinstance(said, dict) and said.get("kind") == "batchtopk" else None
    return k if type(k) is int and k > 0 else None


def own_facts(known: Mapping[str, Any]) -> dict[str, Any]:
    """Of `known_facts`, those that say where an autoencoder belongs."""
    return {name: known[name] for name in _OWN if known.get(name) is not None}
