"""Exports load elsewhere and hold the same numbers: datasets, pandas, and `from_pretrained`.

Each table format is read back by `datasets.load_dataset(DIR, config)` and by pandas and compared
with the dictionary it came from, value by value.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from planted import D_SAE, DEAD, NEURONS, SITE, SOURCE, Planted, make_sae, planted

from sae.autoencoder import SparseAutoencoder
from sae.errors import FormatError, RunError
from sae.formats import FORMATS, write
from sae.formats.card import TABLES, is_plain
from sae.formats.tables import rows_of
from sae.records import FeatureDictionary
from sae.sparsity import TopK
from sae.store import read_manifest, sha256, write_manifest

CHOSEN = [3, 30, 31, DEAD]
TABULAR = ("parquet", "jsonl", "csv")
OF_OTHERS = ("sparsify", "gemma_scope", "gemma_scope_2", "neuronpedia", "delphi")
"""Which hold no relu_l1, or need the language model."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return planted(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def stored(made: Planted, table: str, features: list[int] | None = None) -> list[dict[str, Any]]:
    rows = pq.read_table(made.folder / f"features/{table}.parquet").to_pylist()
    return [row for row in rows if features is None or row["feature"] in features]


def load(folder: Path, table: str, cache: Path) -> datasets.Dataset:
    found = datasets.load_dataset(str(folder), table, split="train", cache_dir=str(cache))
    assert isinstance(found, datasets.Dataset)
    return found


def parsed(row: dict[str, Any], suffix: str, table: str) -> dict[str, Any]:
    """A row as the format gives it, JSON cells of CSV read, absent values None."""
    if suffix != "csv":
        return row
    absent = {k: None if v is None or v is pd.NA or v != v else v for k, v in row.items()}
    plain = {field.name for field in TABLES[table] if is_plain(field)}
    return {k: v if v is None or k in plain else json.loads(v) for k, v in absent.items()}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("suffix", TABULAR)
def test_datasets_reads_every_table(made: Planted, tmp_path: Path, suffix: str, table: str) -> None:
    write(suffix, made.folder, tmp_path / "out", CHOSEN)
    found = load(tmp_path / "out", table, tmp_path / "cache")
    rows = [parsed(dict(row), suffix, table) for row in found]
    assert rows == stored(made, table, CHOSEN)


def test_datasets_reads_the_dictionary_itself(made: Planted, tmp_path: Path) -> None:
    for table in TABLES:
        assert list(load(made.folder / "features", table, tmp_path)) == stored(made, table)


READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    "parquet": pd.read_parquet,
    "jsonl": lambda file: pd.read_json(file, lines=True, precise_float=True),
    "csv": pd.read_csv,
}


@pytest.mark.parametrize("suffix", TABULAR)
def test_pandas_reads_every_table(made: Planted, tmp_path: Path, suffix: str) -> None:
    write(suffix, made.folder, tmp_path / "out")
    for table in TABLES:
        frame = READERS[suffix](tmp_path / "out" / f"{table}.{suffix}")
        wanted = stored(made, table)
        assert frame.columns.tolist() == list(wanted[0])
        for name in frame.columns:
            column = [parsed({name: v}, suffix, table)[name] for v in frame[name].tolist()]
            for ours, theirs in zip(column, [row[name] for row in wanted], strict=True):
                assert _same(ours, theirs), (name, ours, theirs)


def _same(ours: Any, theirs: Any) -> bool:
    """Equal values; pandas has arrays for lists and NaN for what is absent."""
    if theirs is None:
        return ours is None or ours is pd.NA or (isinstance(ours, float) and math.isnan(ours))
    if isinstance(theirs, dict):
        return theirs.keys() == ours.keys() and all(_same(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return bool(ours == theirs) or (isinstance(theirs, float) and ours == pytest.approx(theirs))


@pytest.mark.parametrize("suffix", TABULAR)
def test_types_do_not_depend_on_the_first_rows(made: Planted, tmp_path: Path, suffix: str) -> None:
    """A file that holds only a feature that never fires still has columns of numbers and text."""
    write(suffix, made.folder, tmp_path / "out", [DEAD])
    found = load(tmp_path / "out", "features", tmp_path / "cache")
    assert found.features["mean"].dtype == "float32"
    assert found.features["label"].dtype == "string"


@pytest.mark.parametrize("name", [n for n in FORMATS if n not in OF_OTHERS])
def test_provenance_lies_beside_every_export(made: Planted, tmp_path: Path, name: str) -> None:
    write(name, made.folder, tmp_path / "out", CHOSEN)
    facts = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert {key: facts[key] for key in SOURCE} == SOURCE
    assert facts["hookpoint"] == SITE and facts["features"] == CHOSEN
    assert facts["sae_sha256"] == sha256(made.folder / "sae.safetensors")
    if name in TABULAR:
        assert facts["tokens"] == int(made.rows.kept.sum())
    files = read_manifest(tmp_path / "out")["files"]
    assert all(sha256(tmp_path / "out" / file) == facts["sha256"] for file, facts in files.items())


def test_an_export_is_a_dictionary_to_read_contexts_from(made: Planted, tmp_path: Path) -> None:
    write("parquet", made.folder, tmp_path / "out")
    ours, theirs = FeatureDictionary(tmp_path / "out"), FeatureDictionary(made.folder / "features")
    assert ours.examples([30]) == theirs.examples([30])
    example = ours.examples([30])[0]
    assert ours.context(example) == theirs.context(example)


def test_safetensors_is_the_same_file(made: Planted, tmp_path: Path) -> None:
    write("safetensors", made.folder, tmp_path / "out")
    for name in ("sae.safetensors", "cfg.yaml"):
        assert sha256(tmp_path / "out" / name) == sha256(made.folder / name)
    SparseAutoencoder.from_pretrained(tmp_path / "out")


def test_chosen_features_fire_as_in_the_whole(made: Planted, tmp_path: Path) -> None:
    write("safetensors", made.folder, tmp_path / "out", [30, 3])
    part = SparseAutoencoder.from_pretrained(tmp_path / "out")
    x = torch.randn(50, NEURONS)
    torch.testing.assert_close(part.encode(x), made.sae.encode(x)[:, [30, 3]])
    torch.testing.assert_close(part.W_dec, made.sae.W_dec[[30, 3]])


def test_competing_features_are_not_taken_apart(tmp_path: Path) -> None:
    make_sae(TopK(4)).save_pretrained(tmp_path / "sae")
    with pytest.raises(FormatError, match="features compete"):
        write("safetensors", tmp_path / "sae", tmp_path / "out", [1])
    assert not (tmp_path / "out").exists()
    write("safetensors", tmp_path / "sae", tmp_path / "out")


@pytest.mark.parametrize("name", FORMATS)
def test_mistakes(made: Planted, tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match=f"feature 9999: this SAE has features 0–{D_SAE - 1}"):
        write(name, made.folder, tmp_path / "out", [9999])
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(RunError, match="already exists"):
        write(name, made.folder, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_unknown_formats_and_missing_dictionaries(made: Planted, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="did you mean 'parquet'"):
        write("parqet", made.folder, tmp_path / "out")
    made.sae.save_pretrained(tmp_path / "sae")
    write_manifest(tmp_path / "sae")
    with pytest.raises(RunError, match="sae features RUN"):
        write("csv", tmp_path / "sae", tmp_path / "out")


def test_what_is_not_finite_becomes_null() -> None:
    batch = pa.RecordBatch.from_pylist([{"a": math.nan, "b": [{"v": math.inf}], "c": 1.5}])
    assert list(rows_of([batch])) == [{"a": None, "b": [{"v": None}], "c": 1.5}]
