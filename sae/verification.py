"""Whether a run is still what was written: hashes, settings, weights, fingerprints, results.

The language model is not needed, and torch only for the weights.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sae import config, labels, store
from sae.errors import SAEError
from sae.records import FeatureDictionary
from sae.store import Run
from sae.text import counted
from sae.untrusted import read_json


class Finding(NamedTuple):
    """One thing that was checked, what holds of it, and what does not."""

    what: str
    holds: str
    problems: list[str]


def verify(run: Run, sae: str | None = None) -> Iterator[Finding]:
    """Check a run, or of its SAEs just one; yields each finding as soon as it is made.

    Raises RunError where there is no SAE of that name.
    """
    saes = _saes(run, sae)
    features = [folder / "features" for folder in saes if (folder / "features").is_dir()]
    steps = _folders(run.path / "steps") if sae is None else []
    yield _settings(run)
    damaged = set()
    for folder in (run.path, *saes, *features, *steps):
        finding = _hashes(run, folder, [*saes, *features, *steps])
        damaged |= {folder} if finding.problems else set()
        yield finding
    for folder in saes:
        if folder not in damaged:
            yield _weights(run, folder)
            if (folder / "eval.json").exists():
                yield _evaluation(run, folder)
    for folder in features:
        if folder not in damaged and folder.parent not in damaged:
            yield _features(run, folder)


def _saes(run: Run, name: str | None) -> list[Path]:
    """The folders of the SAEs to check, those without weights too; RunError if there are none."""
    folders = _folders(run.path / "saes")
    if name is not None:
        folders = [folder for folder in folders if folder.name == store.folder_name(name)]
    return folders or [run.sae(name)]  # which raises, and says what there is


def _folders(parent: Path) -> list[Path]:
    """What lies in a folder of folders; hidden ones are half written."""
    found = sorted(parent.iterdir()) if parent.is_dir() else []
    return [path for path in found if path.is_dir() and not path.name.startswith(".")]


def _name(run: Run, path: Path) -> str:
    return "the run" if path == run.path else path.relative_to(run.path).as_posix()


def _about(file: Path, error: SAEError) -> str:
    """The error, beginning with the file it is about."""
    return str(error) if str(error).startswith(str(file)) else f"{file}: {error}"


def _settings(run: Run) -> Finding:
    try:
        config.load(run.config_path)
    except SAEError as error:
        return Finding(store.SETTINGS, "", [_about(run.config_path, error)])
    return Finding(store.SETTINGS, "every setting is known and in its range", [])


def _hashes(run: Run, folder: Path, others: list[Path]) -> Finding:
    """The files of one folder; those of `others` are told about where it is their turn."""
    inner = tuple(f"{other}{os.sep}" for other in others if folder in other.parents)
    given = f"{run.path / labels.FILE} is not in"  # people add labels to a run that is complete
    problems = [line for line in store.verify(folder) if not line.startswith((*inner, given))]
    if folder == run.path:
        problems += _labels(folder)
    files = counted(0 if problems else len(store.read_manifest(folder)["files"]), "file")
    return Finding(_name(run, folder), f"{files} of the expected size and SHA-256", problems)


def _labels(run: Path) -> list[str]:
    """What is wrong with the labels of a run's features, which no manifest covers."""
    try:
        labels.read(run, "")
    except SAEError as error:
        return [str(error)]
    return []


def _weights(run: Run, folder: Path) -> Finding:
    """Shapes, and what the stored inputs give."""
    from sae import fingerprint
    from sae.autoencoder import SparseAutoencoder

    what = f"{_name(run, folder)} weights"
    try:
        sae = SparseAutoencoder.from_pretrained(folder)
    except SAEError as error:
        return Finding(what, "", [str(error)])
    if not all(parameter.isfinite().all() for parameter in sae.parameters()):
        return Finding(what, "", [f"{folder / store.WEIGHTS}: some weights are not finite"])
    stored = fingerprint.read(folder, sae)
    said = "no fingerprint is stored"
    if stored is not None:
        said = f"{len(stored.x)} stored inputs give L0 {stored.l0:.3g} and FVU {stored.fvu:.3g}"
        said += " as they did when saved"
    return Finding(what, f"{sae.d_in} → {sae.d_sae:,} features; {said}", [])


def _evaluation(run: Run, folder: Path) -> Finding:
    file = folder / "eval.json"
    try:
        result = read_json(file)
    except SAEError as error:
        return Finding(_name(run, file), "", [_about(file, error)])
    if isinstance(result, dict) and result.get("sae_sha256") == store.sha256(
        folder / store.WEIGHTS
    ):
        return Finding(_name(run, file), "made from these weights", [])
    problem = f"{file} was made from other weights; make it again with: sae evaluate RUN"
    return Finding(_name(run, file), "", [problem])


def _features(run: Run, folder: Path) -> Finding:
    try:
        store.features_folder(folder.parent)
        there, wanted = len(FeatureDictionary(folder)), store.read_manifest(folder).get("d_sae")
    except SAEError as error:
        return Finding(_name(run, folder), "", [str(error)])
    said = f"{there:,} features, made from these weights"
    problems = [] if there == wanted else [f"{folder} has {there:,} features, not {wanted}"]
    return Finding(f"{_name(run, folder)} tables", said, problems)
