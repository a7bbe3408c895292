"""The README.md of a dictionary folder: what `datasets.load_dataset(DIR, "features")` goes by."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from sae.records import EXAMPLES_SCHEMA, FEATURES_SCHEMA

TABLES = {"features": FEATURES_SCHEMA, "examples": EXAMPLES_SCHEMA}

_TEXT = """
# Features of {hookpoint} of {model}

A dictionary of {d_sae} features of a sparse autoencoder, over {tokens} tokens of text.

```python
datasets.load_dataset(DIR, "features")   # or "examples"
```
`features` has a row for every feature: how often and how strongly it fires, the tokens it fires on
(`top_tokens`), raises (`writes`), lowers (`suppresses`) and is excited by (`reads`), its neurons
and its neighbours. `examples` has rows of text where it fires: `kind` is top, interval (one of
five equal parts of (0, max], low < peak <= high) or random. `indices` and `values` are its
activations over the whole sequence, `row` and `column` the place in tokens.safetensors.
A value is null where a thing does not exist.{note}
"""


def write_card(folder: Path, suffix: str, manifest: Mapping[str, Any], note: str = "") -> None:
    """Write README.md for the tables features.<suffix> and examples.<suffix> of `folder`."""
    head = {
        "configs": [
            {"config_name": name, "data_files": f"{name}.{suffix}", "default": name == "features"}
            for name in TABLES
        ],
        # Without it the type of a column is guessed from its first rows, which may all be null.
        "dataset_info": [
            {"config_name": name, "features": _columns(schema, flat=suffix == "csv")}
            for name, schema in TABLES.items()
        ],
    }
    names = ("hookpoint", "model", "d_sae", "tokens")
    text = _TEXT.format(note=note, **{name: manifest.get(name, "?") for name in names})
    front = yaml.safe_dump(head, sort_keys=False)
    (folder / "README.md").write_text(f"---\n{front}---\n{text}", encoding="utf-8")


def is_plain(field: pa.Field) -> bool:
    """Whether a CSV cell can hold the column as it is: numbers, and the fixed words of `kind`.

    Any other text may be "NA" or "null", which readers take for nothing, so it becomes JSON too.
    """
    kind = field.type
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or field.name == "kind"


def _columns(schema: pa.Schema, flat: bool) -> list[dict[str, Any]]:
    """The columns in the words of a data set card; `flat`: with JSON where a cell needs it."""
    if flat:
        return [
            {"name": f.name, "dtype": _dtype(f.type) if is_plain(f) else "string"} for f in schema
        ]
    return [_column(field) for field in schema]


def _column(field: pa.Field) -> dict[str, Any]:
    if pa.types.is_struct(field.type):
        inner = [field.type.field(i) for i in range(field.type.num_fields)]
        return {"name": field.name, "struct": [_column(f) for f in inner]}
    if pa.types.is_list(field.type):
        item = _column(field.type.value_field)
        return {"name": field.name, "list": item.get("struct") or item["dtype"]}
    return {"name": field.name, "dtype": _dtype(field.type)}


def _dtype(kind: pa.DataType) -> str:
    return {"float": "float32", "double": "float64"}.get(str(kind), str(kind))
