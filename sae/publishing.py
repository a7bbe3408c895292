"""A run on the Hub: its SAEs as a model with a card made from its numbers, each feature dictionary
as a data set.
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sae import formats, hub
from sae.autoencoder import read_config, read_metadata
from sae.errors import FormatError
from sae.store import MANIFEST, Run, features_folder, read_manifest
from sae.untrusted import read_json

_CARD = """
# Sparse autoencoders for {model}

{table}

```python
from sae.autoencoder import SparseAutoencoder

sae = SparseAutoencoder.from_pretrained("{repo}", "{first}")   # raw activations in and out
acts = sae.encode(x)                        # x: [tokens {d_in}], read at {hookpoint}
```
{saelens}{features}
## Where it came from

{provenance}

Made with sae-toolkit; `sae.safetensors` and `cfg.yaml` are all that is needed, no code.
"""
_SAELENS = """
In [SAELens](https://github.com/decoderesearch/SAELens):

```python
from huggingface_hub import snapshot_download
from sae_lens import SAE

folder = snapshot_download("{repo}", allow_patterns="saelens/{first}/*")
sae = SAE.load_from_disk(f"{{folder}}/saelens/{first}")
```
"""
_FEATURES = """
Its features are a data set:

```python
from datasets import load_dataset

features = load_dataset("{data}", "features", split="train")   # or "examples"
```
"""
_SHOWN = ("model", "revision", "data", "data_fingerprint", "tokens", "seed", "imported")


def publish(
    run: str | Path, repo_id: str, *, sae: str | None = None, private: bool = False
) -> list[str]:
    """Put a run, or one of its SAEs, on the Hub; returns the addresses, the model's first.

    Layout: config.yaml and saes/<name>/ as in a run, so that `from_pretrained` reads it; and
    saelens/<name>/ where SAELens can hold the SAE. Feature dictionaries go to data sets of the
    same name (of several SAEs: with the SAE's name behind it). Raises RunError.
    """
    opened = Run(run)
    folders = {sae: opened.sae(sae)} if sae else opened.saes() or {"": opened.sae()}
    folders = {folder.name: folder for folder in folders.values()}
    data = {
        name: repo_id if len(folders) == 1 else f"{repo_id}-{name}"
        for name, folder in folders.items()
        if (folder / "features").is_dir()
    }
    with tempfile.TemporaryDirectory() as temporary:
        staging = Path(temporary)
        shutil.copy(opened.config_path, staging)
        readable = [name for name, folder in folders.items() if _copy(folder, staging)]
        text = card(folders, repo_id, readable, data)
        (staging / "README.md").write_text(text, encoding="utf-8")
        found = [hub.upload(staging, repo_id, private=private, message="Add the SAEs")]
    for name, data_id in data.items():
        folder, message = features_folder(folders[name]), f"Add the features of {name}"
        found.append(
            hub.upload(folder, data_id, repo_type="dataset", private=private, message=message)
        )
    return found


def _copy(folder: Path, staging: Path) -> bool:
    """An SAE's own files, and the same for SAELens; whether that can hold it."""
    target = staging / "saes" / folder.name
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("features", ".*"))
    try:
        formats.write("saelens", folder, staging / "saelens" / folder.name)
    except FormatError:
        return False
    return True


def card(
    folders: Mapping[str, Path], repo_id: str, readable: list[str], data: Mapping[str, str]
) -> str:
    """The README.md of the repository: numbers, how to load, provenance, tags."""
    first, folder = next(iter(folders.items()))
    facts, config = _facts(folder), read_config(folder)
    names = {"repo": repo_id, "first": first, "data": data.get(first)}
    head = {
        "library_name": "sae-toolkit",
        "tags": ["sparse-autoencoder", "interpretability", config["sparsity"]["kind"]],
    }
    if isinstance(model := facts.get("model"), str) and hub.is_name(model):
        head["base_model"] = model
    shown = {name: facts[name] for name in _SHOWN if facts.get(name) is not None}
    text = _CARD.format(
        **names,
        model=facts.get("model", "a language model"),
        hookpoint=facts.get("hookpoint", "its hookpoint"),
        d_in=config["d_in"],
        table=_table(folders),
        saelens=_SAELENS.format(**names) if first in readable else "",
        features=_FEATURES.format(**names) if first in data else "",
        provenance="\n".join(f"- {name}: {value}" for name, value in shown.items()),
    )
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n{text}"


def _facts(folder: Path) -> dict[str, Any]:
    """What cfg.yaml and the manifest of an SAE say of its origin."""
    metadata = read_metadata(folder)
    return {**metadata, **(read_manifest(folder) if (folder / MANIFEST).is_file() else {})}


def _table(folders: Mapping[str, Path]) -> str:
    """A row for each SAE; a dash where it was not evaluated."""
    lines = [
        "| SAE | kind | d_in | features | FVU | L0 | dead | cross-entropy recovered |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, folder in folders.items():
        config = read_config(folder)
        found = read_json(folder / "eval.json") if (folder / "eval.json").is_file() else {}
        numbers = [_number(found.get(key), form) for key, form in _NUMBERS.items()]
        recovered = (found.get("cross_entropy") or {}).get("recovered_mean")
        row = [name, config["sparsity"]["kind"], config["d_in"], f"{config['d_sae']:,}"]
        lines.append(
            "| " + " | ".join(map(str, [*row, *numbers, _number(recovered, ".1%")])) + " |"
        )
    return "\n".join(lines)


_NUMBERS = {"fvu": ".3f", "l0": ".1f", "dead": ".1%"}


def _number(found: Any, form: str) -> str:
    """An estimate of eval.json, {value, error}, or a plain number."""
    value = found.get("value") if isinstance(found, dict) else found
    return format(value, form) if isinstance(value, int | float) else "–"
