"""An autoencoder that another tool trained, as a run of ours: evaluate, features, top and export
work on it. Its manifest says where it came from, and what reading changed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae import config as settings
from sae import fingerprint, formats, hub
from sae.autoencoder import SparseAutoencoder
from sae.config import TrainConfig
from sae.errors import FormatError, HookpointError, RunError
from sae.formats.foreign import Foreign
from sae.hooks import Hookpoint
from sae.store import covered_files, folder_name, sha256, staged, write_atomic

FETCHED = ("*.safetensors", "*.json", "*.yaml", "*.npz", "*.pt")


class Imported(NamedTuple):
    """The new run, the format it was read from, and what is not bit for bit or in doubt."""

    folder: Path
    format: str
    notes: list[str]


def import_run(
    source: str | Path,
    format: str | None = None,
    overrides: Mapping[str, object] | None = None,
    *,
    trusted: bool = False,
    revision: str | None = None,
) -> Imported:
    """Write the autoencoders of a file or folder, or of a Hub repository, as a new run.

    A repository is named USER/NAME, or USER/NAME/FOLDER for a part of it, at a `revision`.

    `overrides` are settings by their dotted names; output is needed, and model.name and hookpoints
    where the files do not say them; `trusted` allows to read .pt files. Raises FormatError and
    RunError.
    """
    overrides, said = dict(overrides or {}), str(source)
    if not overrides.get("output"):
        raise RunError("--output is missing; sae import SOURCE --output checkpoints/NAME")
    source = _found(said, revision)
    name, found = formats.read(source, format, trusted=trusted)
    if not found:
        raise FormatError(f"{source} holds no autoencoder of format {name}")
    points = _hookpoints(source, found, overrides.pop("hookpoints", None))
    config = _config(found, points, overrides)
    notes = [note for foreign in found for note in foreign.notes]
    data = found[0].says("data")
    if data not in ("", config.data.source):
        notes.append(f"trained on {data}; read here on {config.data.source} (--data.source)")
    origin = {"format": name, "source": _address(said, revision), "files": _hashes(source)}
    run = Path(str(config.output))
    with staged(run, extra={"imported": origin, "notes": notes}) as folder:
        write_atomic(folder / "config.yaml", settings.dump(config))
        for point, foreign in zip(points, found, strict=True):
            _write(folder / "saes" / folder_name(str(point)), point, foreign, config, origin)
    return Imported(run, name, notes)


def _found(source: str, revision: str | None) -> Path:
    """The file or folder, of the Hub in its cache; RunError where there is none."""
    if Path(source).exists():
        return Path(source)
    user, _, rest = source.partition("/")
    name, _, inside = rest.partition("/")
    if not hub.is_name(f"{user}/{name}"):
        raise RunError(f"{source}: no such file or folder; give what another tool has written")
    return hub.fetch(f"{user}/{name}", revision, inside or None, wanted=FETCHED)


def _address(source: str, revision: str | None) -> str:
    """Where it was read from, for the manifest."""
    if Path(source).exists():
        return str(Path(source).absolute())
    return f"hf://{source}" + (f"@{revision}" if revision else "")


def _hookpoints(source: Path, found: list[Foreign], given: object) -> list[Hookpoint]:
    """The hookpoint of each autoencoder: those given, else those the files say."""
    if given is not None:
        names = [given] if isinstance(given, str) else list(given)  # pyright: ignore
        if len(names) != len(found):
            raise FormatError(
                f"--hookpoints: {len(names)} came, but {source} holds {len(found)} autoencoders"
            )
        return [Hookpoint.parse(str(name)) for name in names]
    points = [foreign.hookpoint for foreign in found]
    for point, foreign in zip(points, found, strict=True):
        if point is None:
            doubt = f" ({'; '.join(foreign.notes)})" if foreign.notes else ""
            raise HookpointError(
                f"{source} does not say at which of our hookpoints it reads{doubt};\n"
                "give it: --hookpoints layers.2.mlp_act, or module:<path>"
            )
    known = [point for point in points if point is not None]
    if len(set(known)) < len(known):
        raise FormatError(
            f"{source} holds several autoencoders of one hookpoint; import each alone"
        )
    return known


def _config(
    found: list[Foreign], points: list[Hookpoint], overrides: Mapping[str, object]
) -> TrainConfig:
    """Settings under which the run opens: its model, text and widths, and its sparsity."""
    first = found[0]
    model = overrides.get("model.name") or first.says("model")
    if not model:
        raise FormatError(
            "the files do not say which language model it is for; "
            "give it: --model.name NAME_OR_FOLDER"
        )
    chosen: dict[str, object] = {
        "model.name": model,
        "hookpoints": [str(point) for point in points],
        "sae.d_sae": str(first.sae.d_sae),
        "sae.subtract_b_dec": str(first.sae.subtract_b_dec).lower(),
        "sae.sparsity.kind": first.kind,
    }
    if isinstance(first.facts.get("context"), int):
        chosen["data.context"] = str(first.facts["context"])
    if first.facts.get("prefixes"):
        chosen["sae.prefixes"] = first.facts["prefixes"]
    if first.facts.get("data_fingerprint"):  # only ours: others name what may not open here
        chosen["data.source"] = first.says("data")
    known = {flag.name for flag in settings.flags()}
    for name, value in first.sae.sparsity.config().items():
        if f"sae.sparsity.{name}" in known and value is not None:
            chosen[f"sae.sparsity.{name}"] = value
    return settings.resolve(None, chosen | dict(overrides))


def _write(
    folder: Path, point: Hookpoint, foreign: Foreign, config: TrainConfig, origin: dict[str, Any]
) -> None:
    """One SAE, with its origin and what it gives for a few inputs."""
    said = {k: v for k, v in foreign.facts.items() if v is not None}
    facts = {
        **said,
        "hookpoint": str(point),
        "model": config.model.name,
        "imported": origin,
        "notes": list(foreign.notes),
    }
    with staged(folder, extra=facts) as staging:
        foreign.sae.save_pretrained(staging, facts, inputs=_examples(foreign.sae))


@torch.no_grad()
def _examples(sae: SparseAutoencoder) -> torch.Tensor:
    """[8 d_in] inputs for the fingerprint, as none of the training are at hand: features it has."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(fingerprint.ROWS, sae.d_in, generator=generator)
    if sae.d_in != sae.d_out:
        return noise
    W_dec, b_dec = sae.W_dec.float(), sae.b_dec.float()
    rows = torch.randint(sae.d_sae, (fingerprint.ROWS,), generator=generator)
    return b_dec + W_dec[rows] + noise * W_dec.norm() / (sae.d_sae * sae.d_in) ** 0.5


def _hashes(source: Path) -> dict[str, str]:
    """SHA-256 of the files read."""
    if source.is_file():
        return {source.name: sha256(source)}
    files = covered_files(source)
    return {file.relative_to(source).as_posix(): sha256(file) for file in files}
