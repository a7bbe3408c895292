"""An autoencoder that another tool trained, as a run of ours: evaluate, features, top and export
work on it. Its manifest says where it came from, and what reading changed. And labels for the
features of a run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae import config as settings
from sae import fingerprint, formats, hub, labels
from sae.autoencoder import SparseAutoencoder, read_config
from sae.config import TrainConfig
from sae.errors import FormatError, HookpointError, RunError
from sae.formats import explanations
from sae.formats.foreign import Foreign
from sae.hooks import Hookpoint
from sae.records import check_features
from sae.routes import Route
from sae.store import (
    SETTINGS,
    WEIGHTS,
    Run,
    covered_files,
    folder_name,
    sha256,
    staged,
    write_atomic,
)
from sae.text import counted

_PLACES = ("hookpoints", "inputs", "targets")
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
    (of a map inputs and targets) where the files do not say them; `trusted` allows to read .pt
    files. Raises FormatError, HookpointError and RunError.
    """
    overrides, said = dict(overrides or {}), str(source)
    if not overrides.get("output"):
        raise RunError("--output is missing; sae import SOURCE --output checkpoints/NAME")
    source = _found(said, revision)
    name, found = formats.read(source, format, trusted=trusted)
    if not found:
        raise FormatError(f"{source} holds no autoencoder of format {name}")
    places = {name: overrides.pop(name) for name in _PLACES if overrides.get(name) is not None}
    routes = _routes(source, found, places)
    _check_widths(source, routes, found)
    config = _config(found, routes, overrides)
    notes = [note for foreign in found for note in foreign.notes]
    data = found[0].says("data")
    if data not in ("", config.data.source):
        notes.append(f"trained on {data}; read here on {config.data.source} (--data.source)")
    origin = {"format": name, "source": _address(said, revision), "files": _hashes(source)}
    run = Path(str(config.output))
    with staged(run, extra={"imported": origin, "notes": notes}) as folder:
        write_atomic(folder / SETTINGS, settings.dump(config))
        for route, foreign in zip(routes, found, strict=True):
            _write(folder / "saes" / folder_name(str(route)), route, foreign, config, origin)
    return Imported(run, name, notes)


def import_labels(run: str | Path, source: str | Path, sae: str | None = None) -> list[str]:
    """Give features of a run's SAE the labels of Neuronpedia's explanation files, a person's kept.

    Returns what to say of it. Raises RunError for a feature that the SAE does not have, before
    any label is given, and where there is no such file; FormatError for files of another kind.
    """
    if not Path(source).exists():
        raise RunError(f"{source}: no such file or folder; give Neuronpedia's explanations")
    folder = Run(run).sae(sae)
    found = explanations.read(Path(source))
    check_features([*found.labels], read_config(folder)["d_sae"])
    kept = labels.add(Path(run), sha256(folder / WEIGHTS), found.labels)
    makers = sorted({label.by for label in found.labels.values()})
    more = f" and {len(makers) - 3:,} more" if len(makers) > 3 else ""
    by = ", ".join(makers[:3]) + more
    said = f"{counted(len(found.labels) - len(kept), 'label')} of {found.source} by {by}"
    stays = f"the label that a person gave stays at {counted(len(kept), 'feature')}"
    return [said, *[stays] * bool(kept), *found.notes]


def _found(source: str, revision: str | None) -> Path:
    """The file or folder, of the Hub in its cache; RunError where there is none."""
    if Path(source).exists():
        if revision:
            raise RunError(
                f"--revision {revision}: {source} lies on this disk and has no revisions; "
                "leave it out"
            )
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


def _routes(source: Path, found: list[Foreign], given: Mapping[str, object]) -> list[Route]:
    """The route of each autoencoder: at the hookpoints given, else those the files say."""
    sides = {name: _points(value) for name, value in given.items()}
    if "hookpoints" in sides and len(sides) == 1:
        points = sides["hookpoints"]
        if len(points) != len(found):
            raise FormatError(
                f"--hookpoints: {len(points)} came, but {source} holds {len(found)} autoencoders"
            )
        return [Route.at(point) for point in points]
    if sides:
        if sides.keys() != {"inputs", "targets"} or len(found) > 1:
            raise FormatError(
                "give --hookpoints, or for one map both --inputs and --targets; "
                f"{' and '.join(f'--{name}' for name in sides)} came, for {len(found)} of them"
            )
        return [Route(sides["inputs"], sides["targets"])]
    routes = [foreign.route for foreign in found]
    for route, foreign in zip(routes, found, strict=True):
        if route is None:
            doubt = f" ({'; '.join(foreign.notes)})" if foreign.notes else ""
            raise HookpointError(
                f"{source} does not say at which of our hookpoints it reads{doubt};\n"
                "give it: --hookpoints layers.2.mlp_act, or module:<path>; "
                "of a map, --inputs and --targets"
            )
    known = [route for route in routes if route is not None]
    maps = [route for route in known if len(route.points) > 1]
    if len(set(known)) < len(known) or (maps and len(known) > 1):
        raise FormatError(
            f"{source} holds several autoencoders of one hookpoint, or maps; import each alone"
        )
    return known


def _check_widths(source: Path, routes: list[Route], found: list[Foreign]) -> None:
    """Raise FormatError for a route that no model has with the widths of its autoencoder."""
    for route, foreign in zip(routes, found, strict=True):
        sae = foreign.sae
        if why := route.contradiction(sae.d_in, sae.sites):
            raise FormatError(
                f"{source} reads width {sae.d_in} and rebuilds {' + '.join(map(str, sae.sites))}, "
                f"which {route} cannot have: {why};\ngive --hookpoints, or of a map --inputs and "
                "--targets, as it was trained"
            )


def _points(given: object) -> tuple[Hookpoint, ...]:
    names = [given] if isinstance(given, str) else list(given)  # pyright: ignore
    return tuple(Hookpoint.parse(str(name)) for name in names)


def _config(
    found: list[Foreign], routes: list[Route], overrides: Mapping[str, object]
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
        **_places(routes),
        "sae.d_sae": str(first.sae.d_sae),
        "sae.subtract_b_dec": str(first.sae.subtract_b_dec).lower(),
        "sae.skip": str(first.sae.W_skip is not None).lower(),
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


def _places(routes: list[Route]) -> dict[str, object]:
    """The settings that name them: hookpoints, or both sides of the one map."""
    route, *others = routes
    if others or len(route.points) == 1:
        return {"hookpoints": [str(route) for route in routes]}
    sides = {"inputs": route.inputs, "targets": route.targets}
    return {name: [str(point) for point in side] for name, side in sides.items()}


def _write(
    folder: Path, route: Route, foreign: Foreign, config: TrainConfig, origin: dict[str, Any]
) -> None:
    """One SAE, with its origin and what it gives for a few inputs."""
    said = {k: v for k, v in foreign.facts.items() if v is not None}
    facts = {
        **said,
        **route.origin(),
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
