"""What others read: one module for each format, with `write(sae_folder, out, features)`."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from sae.errors import FormatError, suggest

FORMATS = {
    "parquet": "the dictionary's tables as they are, for pandas, DuckDB and datasets",
    "jsonl": "the same tables, a JSON object a line",
    "csv": "the same tables, lists and texts as JSON in their cells",
    "safetensors": "the autoencoder: sae.safetensors and cfg.yaml",
}


def check(name: str) -> None:
    """Raise FormatError where there is no such format."""
    if name not in FORMATS:
        raise FormatError(
            f"--format {name}: choose one of {', '.join(FORMATS)}{suggest(name, FORMATS)}"
        )


def write(
    name: str, sae_folder: str | Path, out: str | Path, features: Sequence[int] | None = None
) -> None:
    """Write an SAE, or some of its features, to the new folder `out` in the format `name`.

    Raises FormatError for an unknown format, RunError where `out` is taken, a feature does not
    exist, or the dictionary the tables need is missing.
    """
    check(name)
    # Only the format asked for is imported: not all of them can do without torch.
    module = importlib.import_module(f"sae.formats.{name}")
    module.write(Path(sae_folder), Path(out), None if features is None else list(features))
