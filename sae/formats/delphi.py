"""delphi's latent cache (EleutherAI): every activation on the scanned tokens, for `LatentDataset`.

latents/MODULE/FIRST_LAST.safetensors holds, for a range of features, locations (sequence, place,
feature − FIRST), activations in float16 and the tokens; config.json beside it names the model. The
dictionary keeps examples alone, so the language model reads its tokens once more.
"""

import itertools
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.numpy import save
from torch import Tensor

from sae import activations, fingerprint
from sae.autoencoder import SparseAutoencoder
from sae.data import TokenBatch
from sae.formats import foreign, hookpoints
from sae.formats.foreign import Notes
from sae.formats.hookpoints import Match
from sae.formats.tables import provenance
from sae.hooks import Hookpoint
from sae.language_model import LanguageModel
from sae.records import TOKENS, check_dictionary, check_features
from sae.store import features_folder, folder_name, read_manifest, staged, write_atomic, write_json

SPLITS, ROWS = 5, 16
LEAST = 1e-5
"""Smaller activations are left out, as delphi does."""
NARROW = 1 << 16
"""Locations below it take two bytes each."""


def write(sae_folder: Path, out: Path, features: list[int] | None = None) -> Notes:
    """Write latents/ to the new folder `out`; some features alone keep their numbers.

    Raises RunError without a feature dictionary, ModelError without the model.
    """
    folder = features_folder(sae_folder)
    check_dictionary(folder)
    manifest = read_manifest(folder)
    sae = SparseAutoencoder.from_pretrained(sae_folder)
    chosen = list(range(sae.d_sae)) if features is None else check_features(features, sae.d_sae)
    point, _ = foreign.ends_of("delphi", sae_folder, manifest)
    there = hookpoints.to_module(point, str(manifest["model"]))
    facts = provenance(manifest, features)
    with staged(out, extra=facts) as staging:
        lm = foreign.model_of(sae_folder, str(manifest["model"]), point, sae.d_in)
        module = staging / "latents" / folder_name(there.name)
        module.mkdir(parents=True)
        tokens = _tokens(folder / TOKENS)
        where, values = _firings(lm, point, sae, tokens, torch.tensor(sorted(chosen)))
        for file, part in _splits(where, values, sae.d_sae).items():
            write_atomic(module / file, save({**part, "tokens": tokens.tokens.numpy()}))
        write_json(module / "config.json", _config(manifest, tokens))
        write_json(staging / foreign.PROVENANCE, facts)
    notes = ["not bit for bit: delphi keeps activations in float16"]
    unnamed = f"{point} is no module's output, or of a model not known here: its folder says it"
    return notes + [f"{unnamed} in our words"] * (there.match is Match.NONE)


def _tokens(file: Path) -> TokenBatch:
    """The scanned tokens."""
    columns = fingerprint.load(file)
    names = ("tokens", "document", "position", "kept")
    tokens, document, position, kept = (columns[name] for name in names)
    return TokenBatch(tokens.long(), document.long(), position.long(), kept.bool())


@torch.no_grad()
def _firings(
    lm: LanguageModel,
    point: Hookpoint,
    sae: SparseAutoencoder,
    tokens: TokenBatch,
    chosen: Int[Tensor, " n"],
) -> tuple[Int[Tensor, "m 3"], Float[Tensor, " m"]]:
    """Sequence, place and feature of every activation, in the order of the tokens; and its size."""
    where, values = [], []
    for start in range(0, len(tokens), ROWS):
        rows = tokens[start : start + ROWS]
        x = activations.read(lm.model, [point], rows, torch.float32)[0][point]
        acts = sae.encode(x).float()[:, chosen]
        place = rows.kept.nonzero()
        token, feature = (acts > LEAST).nonzero(as_tuple=True)
        row, column = (place[token] + torch.tensor([start, 0])).unbind(1)
        where.append(torch.stack([row, column, chosen[feature]], dim=1))
        values.append(acts[token, feature])
    return torch.cat(where), torch.cat(values)


def _splits(
    where: Int[Tensor, "m 3"], values: Float[Tensor, " m"], d_sae: int
) -> dict[str, dict[str, Any]]:
    """locations and activations by the name of their file, which tells the range of features."""
    bounds = torch.linspace(0, d_sae, min(SPLITS, d_sae) + 1).long().tolist()
    found = {}
    for first, end in itertools.pairwise(bounds):
        own = (where[:, 2] >= first) & (where[:, 2] < end)
        locations = where[own] - torch.tensor([0, 0, first])
        largest = int(locations.max()) if len(locations) else 0
        kind = "uint16" if largest < NARROW else "uint32"
        found[f"{first}_{end - 1}.safetensors"] = {
            "locations": locations.numpy().astype(kind),
            "activations": values[own].half().numpy(),
        }
    return found


def _config(manifest: dict[str, Any], tokens: TokenBatch) -> dict[str, Any]:
    """The settings of delphi's CacheConfig, as far as they say what was read."""
    return {
        "dataset_repo": manifest.get("data"),
        "dataset_split": "train",
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": ROWS,
        "cache_ctx_len": tokens.tokens.shape[1],
        "ctx_len": tokens.tokens.shape[1],
        "n_tokens": tokens.tokens.numel(),
        "n_splits": SPLITS,
        "model_name": manifest.get("model"),
    }
