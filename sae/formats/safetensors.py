"""Safetensors: the autoencoder itself, all of it or the weights of some features."""

import shutil
from pathlib import Path
from typing import Any

import torch

from sae import fingerprint
from sae.autoencoder import CONFIG, SparseAutoencoder, read_config
from sae.errors import FormatError
from sae.fingerprint import FINGERPRINT
from sae.formats.tables import provenance
from sae.records import check_features
from sae.sparsity import make_sparsity
from sae.store import MANIFEST, WEIGHTS, check_files, read_manifest, sha256, staged, write_json


def write(sae_folder: Path, out: Path, features: list[int] | None = None) -> None:
    """Write sae.safetensors and cfg.yaml to the new folder `out`, which `from_pretrained` reads.

    With `features` the result has just those, renumbered from 0; provenance.json tells which they
    were. Raises FormatError where their activations would no longer be the same.
    """
    files = (WEIGHTS, CONFIG, FINGERPRINT)
    check_files(sae_folder, *files)
    metadata = read_config(sae_folder).get("metadata") or {}
    facts = _facts(sae_folder, metadata, features)
    chosen = None if features is None else _select(sae_folder, features)
    with staged(out, extra=facts) as folder:
        if chosen is None:
            for name in files:
                if (sae_folder / name).exists():
                    shutil.copy(sae_folder / name, folder)
        else:
            known = fingerprint.read(sae_folder, chosen)
            examples = {"inputs": known.x, "targets": known.y} if known else {}
            chosen.save_pretrained(folder, {**metadata, "features": features}, **examples)
        write_json(folder / "provenance.json", facts)


def _facts(
    sae_folder: Path, metadata: dict[str, Any], features: list[int] | None
) -> dict[str, Any]:
    has_manifest = (sae_folder / MANIFEST).is_file()
    manifest = read_manifest(sae_folder) if has_manifest else {}
    return {
        **metadata,
        **provenance(manifest, features),
        "sae_sha256": sha256(sae_folder / WEIGHTS),
    }


@torch.no_grad()
def _select(sae_folder: Path, features: list[int]) -> SparseAutoencoder:
    """An autoencoder with some features of another, in which each fires as before."""
    sae = SparseAutoencoder.from_pretrained(sae_folder)
    check_features(features, sae.d_sae)
    if sae.sparsity.competes:
        raise FormatError(
            f"--feature: in a {sae.sparsity.kind} autoencoder features compete, so some of them "
            "alone would fire differently; export all, or use --format parquet"
        )
    sparsity = make_sparsity(sae.sparsity.kind, **sae.sparsity.config())
    part = SparseAutoencoder(
        sae.d_in, len(features), sparsity, sae.d_out, sae.subtract_b_dec, dtype=sae.dtype
    )
    part.W_enc.copy_(sae.W_enc[:, features])
    part.b_enc.copy_(sae.b_enc[features])
    part.W_dec.copy_(sae.W_dec[features])
    part.b_dec.copy_(sae.b_dec)
    for name, tensor in sae.sparsity.state_dict().items():
        part.sparsity.state_dict()[name].copy_(tensor[features] if tensor.ndim else tensor)
    return part
