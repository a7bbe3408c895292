"""What is read is what was written, selections are checked, and reading needs neither torch nor a
tokenizer."""

import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import CONTEXT, D_SAE, DEAD, Planted

from sae import records
from sae.errors import FormatError, RunError, SAEError
from sae.records import Example, FeatureDictionary, FeatureRecord, parse_features
from sae.text import TokenPieces


def test_records_have_exactly_the_columns_of_the_tables() -> None:
    assert [f.name for f in fields(FeatureRecord)] == records.FEATURES_SCHEMA.names
    assert [f.name for f in fields(Example)] == records.EXAMPLES_SCHEMA.names


def test_rows_come_back_as_records(dictionary: FeatureDictionary) -> None:
    assert len(dictionary) == D_SAE
    rows = dictionary.table().to_pylist()
    found = dictionary.records([30, 3])
    assert [record.feature for record in found] == [30, 3]
    assert found[0].writes is not None and rows[30]["writes"] is not None
    assert [vars(token) for token in found[0].writes] == rows[30]["writes"]
    dead = dictionary.records([DEAD])[0]
    assert (dead.n_fired, dead.max, dead.mean, dead.histogram) == (0, 0.0, None, None)
    assert dead.intervals == [] and dictionary.examples([DEAD]) == []


def test_intervals_are_sums_of_histogram_bins(dictionary: FeatureDictionary) -> None:
    record = dictionary.records([30])[0]
    assert sum(count for _, _, count in record.intervals) == record.n_fired
    assert record.intervals[0][1] == record.max and record.intervals[-1][0] == 0
    edges = [high for _, high, _ in record.intervals]
    assert edges == sorted(edges, reverse=True) and len(edges) == records.INTERVALS


def test_a_context_is_the_row_of_tokens(made: Planted, dictionary: FeatureDictionary) -> None:
    pieces = TokenPieces(made.tokenizer)
    for example in dictionary.examples([30, 20]):
        context = dictionary.context(example)
        assert context.pieces == pieces.pieces(made.rows.tokens[example.row].tolist())
        assert len(context.acts) == CONTEXT and context.acts[context.peak] == example.peak
        assert np.count_nonzero(context.acts) == len(example.indices)
        part = context.window(3, 2)
        assert part.pieces[part.peak] == example.token
        assert part.pieces == context.pieces[max(0, context.peak - 3) : context.peak + 3]


def test_ranking_puts_features_that_never_fire_last(dictionary: FeatureDictionary) -> None:
    table = dictionary.table().to_pydict()
    for sort in records.SORTS:
        order = dictionary.ranked(sort)
        assert sorted(order) == list(range(D_SAE))
        alive = [f for f in order if table["n_fired"][f]]
        assert order[: len(alive)] == alive
        values = [table[sort][f] for f in alive]
        assert values == sorted(values, reverse=sort != "feature")
    with pytest.raises(RunError, match="choose one of feature, density"):
        dictionary.ranked("colour")


def test_search_looks_into_tokens(dictionary: FeatureDictionary) -> None:
    found = dictionary.ranked(search="FT")
    assert 0 < len(found) < D_SAE
    for record in dictionary.records(found):
        tokens = [*record.top_tokens, *(record.writes or [])]
        assert any("ft" in token.piece.lower() for token in tokens)
    assert dictionary.ranked(search="no such word") == []


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1))
def test_selections(pairs: list[tuple[int, int]]) -> None:
    text = ", ".join(f"{min(p)}-{max(p)}" if p[0] != p[1] else f"{p[0]}" for p in pairs)
    wanted = [f for p in pairs for f in range(min(p), max(p) + 1)]
    assert parse_features(text, 100) == list(dict.fromkeys(wanted))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9999", "feature 9999: this SAE has features 0–4095"),
        ("5-99999999999", "feature 99999999999: this SAE has"),
        ("20-10", "feature 20-10: a range runs from the smaller"),
        ("one", "feature 'one': expected numbers and ranges such as 1,5,10-20"),
        ("-3", "feature '-3': expected"),
        ("1-", "feature '1-': expected"),
        (" , ", "--feature is empty"),
        ("9" * 5000, "feature '9{40}': expected"),
    ],
)
def test_selections_that_are_wrong(text: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        parse_features(text, 4096)


def test_numbers_out_of_range_and_missing_folders(
    dictionary: FeatureDictionary, tmp_path: Path
) -> None:
    for read in (dictionary.records, dictionary.examples):
        with pytest.raises(RunError, match=f"this SAE has features 0–{D_SAE - 1}"):
            read([D_SAE])
    with pytest.raises(RunError, match="sae features RUN"):
        FeatureDictionary(tmp_path)


def test_a_sample_is_of_live_features_and_of_its_seed(dictionary: FeatureDictionary) -> None:
    live = [row["feature"] for row in dictionary.table().to_pylist() if row["n_fired"]]
    drawn = dictionary.sample(8, 0)
    assert drawn == sorted(set(drawn)) == dictionary.sample(8, 0) != dictionary.sample(8, 1)
    assert len(drawn) == 8 and set(drawn) <= set(live) and DEAD not in live
    assert dictionary.sample(10_000, 3) == live


def test_no_value_is_nan(made: Planted, dictionary: FeatureDictionary) -> None:
    def floats(column: pa.Array) -> list[pa.Array]:
        if pa.types.is_struct(column.type):
            return [leaf for part in column.flatten() for leaf in floats(part)]
        if pa.types.is_list(column.type):
            return floats(column.flatten())
        return [column] if pa.types.is_floating(column.type) else []

    for name in ("features", "examples"):
        table = pq.read_table(made.folder / f"features/{name}.parquet")
        for column in table.combine_chunks().columns:
            for leaf in floats(column.combine_chunks()):
                assert np.isfinite(leaf.drop_null().to_numpy()).all(), name
    assert dictionary.table(["feature", "label"]).to_pylist()[0] == {"feature": 0, "label": None}


def test_reading_does_without_torch() -> None:
    modules = "sae.records, sae.store, sae.text, sae.terminal, sae.formats.csv, sae.formats.jsonl"
    check = (
        f"import sys, {modules}; print(sorted({{'torch', 'transformers'}} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def read_all(folder: Path) -> None:
    """All that a dictionary has."""
    dictionary = FeatureDictionary(folder)
    everything = range(len(dictionary))
    dictionary.ranked()
    dictionary.sample(3, 0)
    dictionary.records(everything)
    for example in dictionary.examples(everything):
        dictionary.context(example)


@pytest.fixture
def by_hand(made: Planted, tmp_path: Path) -> Path:
    """A dictionary copied without its manifest, so that only sense can tell what is wrong."""
    folder = Path(shutil.copytree(made.folder / "features", tmp_path / "features"))
    (folder / "manifest.json").unlink()
    read_all(folder)
    return folder


@pytest.mark.parametrize("name", ["features.parquet", "examples.parquet", "tokens.safetensors"])
def test_a_dictionary_without_a_manifest_is_refused_where_it_makes_no_sense(
    by_hand: Path, name: str
) -> None:
    """Random damage: read all the same, or refused in words; never an error of another kind."""
    random, refused, sound = Random(name), 0, (by_hand / name).read_bytes()
    for number in range(40):
        content = bytearray(sound)
        # the start and the end hold what says how to read the rest
        near = random.choice([range(200), range(len(sound)), range(len(sound) - 200, len(sound))])
        content[random.choice(near)] ^= 1 << random.randrange(8)
        (by_hand / name).write_bytes(content[: random.choice([len(content)] * 4 + [number * 9])])
        try:
            read_all(by_hand)
        except SAEError as error:
            refused += 1
            assert str(by_hand) in str(error) and len(str(error).splitlines()) <= 3
    assert refused > 10


def test_rows_that_do_not_fit_each_other_are_refused(by_hand: Path) -> None:
    for name, column, value, words in (
        ("features.parquet", "feature", 7, "no row for feature"),
        ("examples.parquet", "row", 10**6, "no row 1000000"),
        ("examples.parquet", "column", -1, "outside its text"),
        ("examples.parquet", "indices", [CONTEXT], "outside its text"),
        ("examples.parquet", "values", [], "outside its text"),
    ):
        table = pq.read_table(by_hand / name)
        schema = records.TABLES[name]
        rows = [row | {column: value} for row in table.to_pylist()]
        pq.write_table(pa.Table.from_pylist(rows, schema), by_hand / name)
        with pytest.raises(FormatError, match=words):
            read_all(by_hand)
        pq.write_table(table, by_hand / name)
    table = pq.read_table(by_hand / "features.parquet").drop_columns(["writes"])
    pq.write_table(table, by_hand / "features.parquet")
    with pytest.raises(FormatError, match="no column 'writes'"):
        FeatureDictionary(by_hand)
