"""What others read and write: one module for each format.

`write(sae_folder, out, features)` returns notes of what is not bit for bit; those of weights also
have `recognises(source)` and `read(source)`, which gives `Foreign`s.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae.errors import FormatError, suggest

FORMATS = {
    "parquet": "the dictionary's tables as they are, for pandas, DuckDB and datasets",
    "jsonl": "the same tables, a JSON object a line",
    "csv": "the same tables, lists and texts as JSON in their cells",
    "neuronpedia": "the dictionary for Neuronpedia: SAEDashboard's batches and its bulk import",
    "delphi": "every activation on the scanned tokens, for delphi: its latent cache",
    "safetensors": "the autoencoder: sae.safetensors and cfg.yaml",
    "html": "pages to read, that open by double click or from any web server",
    "saelens": "the autoencoder for SAELens: SAE.load_from_disk(DIR)",
    "sparsify": "the autoencoder for sparsify: SparseCoder.load_many(DIR, local=True)",
    "dictionary_learning": "the same for dictionary_learning: utils.load_dictionary(DIR, device)",
    "openai": "the same for OpenAI's sparse_autoencoder: a .pt file",
    "openmoss": "the same for Llamascopium: SparseAutoEncoder.from_pretrained(DIR)",
    "gemma_scope": "the same as Gemma Scope has it: params.npz",
    "gemma_scope_2": "the same as Gemma Scope 2 has it: params.safetensors and config.json",
}
READABLE = (
    *("safetensors", "saelens", "sparsify", "dictionary_learning", "openai", "openmoss"),
    *("gemma_scope", "gemma_scope_2"),
)
TABLES = ("parquet", "jsonl", "csv")
"""Of the features, which hold no weights."""
UNSAFE = ("dictionary_learning", "openai")
"""Read only where the caller trusts the file."""
_OPENED_BY = {
    "safetensors": "SparseAutoencoder.from_pretrained({out!r})",
    "saelens": "SAE.load_from_disk({out!r})",
    "sparsify": "SparseCoder.load_many({out!r}, local=True)",
    "dictionary_learning": "dictionary_learning.utils.load_dictionary({out!r}, 'cpu')",
    "openmoss": "SparseAutoEncoder.from_pretrained({out!r})",
    "openai": "Autoencoder.from_state_dict, of what torch loads from {out}/autoencoder.pt",
    "gemma_scope": "numpy.load('{out}/params.npz')",
    "gemma_scope_2": "safetensors.torch.load_file('{out}/params.safetensors')",
}


def check(name: str, among: Sequence[str] = tuple(FORMATS)) -> None:
    """Raise FormatError where there is no such format."""
    if name not in among:
        raise FormatError(
            f"--format {name}: choose one of {', '.join(among)}{suggest(name, among)}"
        )


def write(
    name: str, sae_folder: str | Path, out: str | Path, features: Sequence[int] | None = None
) -> list[str]:
    """Write an SAE, or some of its features, to the new folder `out` in the format `name`.

    Returns what is not bit for bit. Raises FormatError for an unknown format or what it cannot
    hold, RunError where `out` is taken, a feature does not exist, or the dictionary the tables
    need is missing.
    """
    check(name)
    chosen = None if features is None else list(features)
    return _module(name).write(Path(sae_folder), Path(out), chosen)


def read(source: Path, name: str | None = None, *, trusted: bool = False) -> tuple[str, list[Any]]:
    """The autoencoders (`Foreign`) of a file or folder, and the name of its format.

    `trusted` allows to read the formats of UNSAFE. Raises FormatError for an unknown format, one
    that cannot be told, and damaged files.
    """
    if table := next((t for t in TABLES if _is_table(source, t, name)), None):
        raise FormatError(
            f"{source}: {table} holds tables of the features and no weights to import;\n"
            f"export the SAE in another format: one of {', '.join(READABLE)}"
        )
    if name is not None:
        check(name, READABLE)
    elif (name := recognised(source)) is None:
        raise FormatError(
            f"{source} is of no format known here; expected one of {', '.join(READABLE)}"
            + _whereabouts(source)
        )
    if name in UNSAFE:
        return name, _module(name).read(source, trusted=trusted)
    return name, _module(name).read(source)


def _is_table(source: Path, table: str, name: str | None) -> bool:
    return name == table or (name is None and (source / f"features.{table}").is_file())


def recognised(source: Path) -> str | None:
    """The first format that a file or folder looks like."""
    return next((name for name in READABLE if _module(name).recognises(source)), None)


def _whereabouts(source: Path) -> str:
    """Where what was meant lies, if it is a run's folder or a file of an export that came."""
    from sae.store import SETTINGS

    if (source / SETTINGS).is_file() and (source / "saes").is_dir():
        return (
            f";\n{source} is a run already: give it to sae evaluate, or one of its saes/ to import"
        )
    if source.is_file() and (name := recognised(source.parent)):
        return f";\ngive the folder {source.parent}, which looks like {name}"
    return ""


def how_to_open(name: str, out: str) -> str:
    """What to do with an export, as a clause."""
    if name == "html":
        return f"open {Path(out) / 'index.html'} in a web browser"
    if name not in _OPENED_BY:
        return f"{Path(out) / 'README.md'} tells how to open it"
    return f"in Python, {_OPENED_BY[name].format(out=out)}"


def _module(name: str) -> Any:
    # Only the format asked for is imported: not all of them can do without torch.
    return importlib.import_module(f"sae.formats.{name}")
