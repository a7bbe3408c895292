"""Safetensors: the autoencoder itself, all of it or the weights of some features."""

import shutil
from pathlib import Path
from typing import Any

from sae import fingerprint
from sae.autoencoder import CONFIG, SparseAutoencoder, read_metadata
from sae.fingerprint import FINGERPRINT
from sae.formats import foreign
from sae.formats.foreign import Foreign, Notes
from sae.formats.tables import provenance
from sae.store import MANIFEST, WEIGHTS, check_files, read_manifest, sha256, staged, write_json


def write(sae_folder: Path, out: Path, features: list[int] | None = None) -> Notes:
    """Write sae.safetensors and cfg.yaml to the new folder `out`, which `from_pretrained` reads.

    With `features` the result has just those, renumbered from 0; provenance.json tells which they
    were. Raises FormatError where their activations would no longer be the same.
    """
    files = (WEIGHTS, CONFIG, FINGERPRINT)
    check_files(sae_folder, *files)
    metadata = read_metadata(sae_folder)
    facts = _facts(sae_folder, metadata, features)
    chosen = None
    if features is not None:
        chosen = foreign.selected(SparseAutoencoder.from_pretrained(sae_folder), features)
    with staged(out, extra=facts) as folder:
        if chosen is None:
            for name in files:
                if (sae_folder / name).exists():
                    shutil.copy(sae_folder / name, folder)
        else:
            known = fingerprint.read(sae_folder, chosen)
            examples = {"inputs": known.x, "targets": known.y} if known else {}
            chosen.save_pretrained(folder, {**metadata, "features": features}, **examples)
        own = {**facts, "files": {WEIGHTS: sha256(folder / WEIGHTS)}}
        write_json(folder / foreign.PROVENANCE, own)
    return []


def _facts(
    sae_folder: Path, metadata: dict[str, Any], features: list[int] | None
) -> dict[str, Any]:
    has_manifest = (sae_folder / MANIFEST).is_file()
    manifest = read_manifest(sae_folder) if has_manifest else {}
    return {
        **metadata,
        **provenance(manifest, features),
        **foreign.settings_of_run(sae_folder, features),
        "sae_sha256": sha256(sae_folder / WEIGHTS),
    }


def recognises(source: Path) -> bool:
    """Whether a folder looks like one."""
    return (source / CONFIG).is_file() and (source / WEIGHTS).is_file()


def read(source: Path) -> list[Foreign]:
    """The autoencoder of a folder as `write` leaves it."""
    metadata = read_metadata(source)
    sae = SparseAutoencoder.from_pretrained(source)
    known = foreign.known_facts(source, source / WEIGHTS)
    return [Foreign(sae, foreign.own_facts(metadata | known))]
