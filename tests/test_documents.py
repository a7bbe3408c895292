"""Every way to hand over text gives the same documents, and what is no text is refused in at most
three lines that name the setting and the way out."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae import documents as module
from sae.config import DataConfig
from sae.documents import PIECE_CHARACTERS, Documents
from sae.errors import DataError


def read(source: Path | str, **settings: Any) -> list[tuple[str, Any]]:
    """Keys and texts, which must be the same at a second reading."""
    found = Documents(DataConfig(source=str(source), **settings))
    first = [(document.key, document.text) for document in found]
    assert first == [(document.key, document.text) for document in found]
    assert len({key for key, _ in first}) == len(first)
    return first


def texts(source: Path | str, **settings: Any) -> list[Any]:
    return [text for _, text in read(source, **settings)]


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _cache_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# The same documents whatever the form


def test_files_and_datasets_of_every_kind_agree(tmp_path: Path, paragraphs: list[str]) -> None:
    rows = [{"id": i, "text": text} for i, text in enumerate(paragraphs)]
    jsonl = write_jsonl(tmp_path / "a.jsonl", rows)
    parquet, folder = tmp_path / "a.parquet", tmp_path / "texts"
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    folder.mkdir()
    for i, text in enumerate(paragraphs):
        (folder / f"{i:02}.txt").write_text(text, encoding="utf-8")
    saved, splits = tmp_path / "saved", tmp_path / "splits"
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(saved)
    datasets.DatasetDict(train=dataset.select([0]), validation=dataset).save_to_disk(splits)
    assert texts(jsonl) == texts(parquet) == texts(folder) == texts(saved) == paragraphs
    assert texts(splits, split="validation") == paragraphs
    assert texts(splits) == paragraphs[:1]


def test_a_folder_with_a_data_set_card_is_a_data_set(tmp_path: Path, paragraphs: list[str]) -> None:
    write_jsonl(tmp_path / "one.jsonl", [{"text": text} for text in paragraphs])
    write_jsonl(tmp_path / "two.jsonl", [{"text": "another"}])
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}.jsonl\n"
        for name in ("one", "two")
    )
    (tmp_path / "README.md").write_text(card + "---\n# Card\n")
    assert texts(tmp_path, name="one", split="test") == paragraphs
    assert texts(tmp_path, name="one", split="test", streaming=True) == paragraphs
    assert texts(tmp_path, name="two", split="test") == ["another"]


@pytest.mark.parametrize("readme", ["# My texts\n", "---\ntitle: a page\n---\n", "configs: none\n"])
def test_a_folder_with_any_other_readme_is_a_folder_of_text(tmp_path: Path, readme: str) -> None:
    (tmp_path / "README.md").write_text(readme)
    (tmp_path / "a.txt").write_text("a text")
    assert texts(tmp_path) == [readme, "a text"]


def test_folders_are_read_deeply_in_order_and_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.TXT", "a/z.md", "a/y.jsonl", ".git/x.txt", ".hidden.txt", "c.py", "d.csv"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    assert read(tmp_path) == [
        ("a/y.jsonl#0", "a/y.jsonl"),
        ("a/z.md#0", "a/z.md"),
        ("b.TXT#0", "b.TXT"),
    ]


def test_long_files_are_cut_at_line_ends(tmp_path: Path, text_file: Path) -> None:
    text = text_file.read_text(encoding="utf-8") * 10
    file = tmp_path / "book"
    file.write_text(text, encoding="utf-8")
    pieces = texts(file)
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces)
    assert all(PIECE_CHARACTERS <= len(piece) < PIECE_CHARACTERS + 101 for piece in pieces[:-1])
    file.write_text("x" * 5 * PIECE_CHARACTERS)
    assert max(map(len, texts(file))) <= 2 * PIECE_CHARACTERS


def test_token_ids_and_empty_rows(tmp_path: Path) -> None:
    rows = [{"ids": ids} for ids in ([5, 6, 7], [], None, [8])]
    jsonl = write_jsonl(tmp_path / "a.jsonl", rows)
    dataset = datasets.Dataset.from_list(rows).with_format("numpy")
    dataset.save_to_disk(tmp_path / "saved")
    assert texts(jsonl, column="ids") == [[5, 6, 7], [8]]
    assert texts(tmp_path / "saved", column="ids") == [[5, 6, 7], [8]]
    blank = write_jsonl(tmp_path / "b.jsonl", [{"text": t} for t in ("", " \n", None, "here")])
    assert read(blank) == [("b.jsonl#3", "here")]


def test_a_byte_order_mark_and_stray_bytes_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfna\xc3\xafve \xff end\r\n")
    (tmp_path / "b.txt").write_bytes("café".encode("latin-1"))
    with pytest.warns(UserWarning, match=r"a\.txt holds bytes that are not UTF-8") as told:
        assert texts(tmp_path) == ["naïve \ufffd end\n", "caf\ufffd"]
    assert {str(w.message) for w in told} == {str(told[0].message)}


def test_only_what_is_small_and_not_to_be_streamed_is_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("x" * 100)
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["x" * 100]}).save_to_disk(saved)
    for limit, small in ((1000, True), (50, False)):
        monkeypatch.setattr(module, "IN_MEMORY_BYTES", limit)
        for source in (file, saved):
            assert Documents(DataConfig(source=str(source))).in_memory == small
            assert not Documents(DataConfig(source=str(source), streaming=True)).in_memory


# Refusals


def refused(source: Path | str, *wanted: str, **settings: Any) -> None:
    with pytest.raises(DataError) as caught:
        read(source, **settings)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    for part in wanted:
        assert part in message


def test_no_such_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stories.txt").write_text("once")
    (tmp_path / "tales").mkdir()
    refused("storys.txt", "data.source", "did you mean 'stories.txt'?")
    refused(tmp_path / "storys.txt", "no file or folder", "stories.txt'?")
    refused("./tale", "no file or folder tale")
    refused("tale", "data.source: 'tale'", "did you mean 'tales'?")
    refused("~/no/such/folder", "no file or folder")
    refused("buitlin:facts", "did you mean 'builtin:facts'?")
    refused("builtin:fact", "no built-in text", "did you mean 'builtin:facts'?")
    (tmp_path / "0.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"no file or folder 0\.txt$"):  # and not: did you mean it
        read("0.txt")
    refused("nobody/nothing", "data.source: 'nobody/nothing'", "cannot be opened")


def test_no_text(tmp_path: Path) -> None:
    refused(tmp_path, "data.source: no text in", ".jsonl, .md, .parquet, .txt")


def test_tables_are_not_read_as_prose(tmp_path: Path) -> None:
    for name in ("a.json", "b.csv", "c.TSV"):
        (tmp_path / name).write_text('text,label\n"the cat",1\n')
        refused(tmp_path / name, name, "JSONL or Parquet")


def test_settings_that_nothing_reads_are_refused(tmp_path: Path) -> None:
    text, jsonl = tmp_path / "a.txt", write_jsonl(tmp_path / "a.jsonl", [{"body": "a"}])
    text.write_text("the cat")
    refused(text, "data.split: 'test' came", split="test")
    refused(text, "data.column: 'body' came", "data.name: 'en'", column="body", name="en")
    refused(jsonl, "data.name: 'en' came", "leave it out", name="en")
    refused("builtin:facts", "data.streaming: True came", streaming=True)
    assert texts(jsonl, column="body") == ["a"]
    assert texts(tmp_path / "a.txt", streaming=True) == ["the cat"]


def test_no_such_column(tmp_path: Path) -> None:
    rows = [{"texts": "a", "id": 1}]
    jsonl = write_jsonl(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for source in (jsonl, tmp_path / "a.parquet", tmp_path / "saved"):
        refused(source, "data.column", "no column 'text'; did you mean 'texts'?", "texts, id")


def test_no_such_split(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "saved")
    refused(tmp_path / "saved", "data.split", "did you mean 'train'?", "train, test", split="trian")


@pytest.mark.parametrize("value", [3, 1.5, True, {"a": 1}, ["a"], [1.5], [[1]], [True]])
def test_a_column_that_holds_neither_text_nor_ids(tmp_path: Path, value: Any) -> None:
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}, {"text": value}])
    refused(jsonl, "data.column: a.jsonl, row 1", type(value).__name__, "list of token ids")


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.txt", b"text\0\1\2", "is not UTF-8 text"),
        ("a.gz", b"\x1f\x8b\x08\x00\x00", "is not UTF-8 text"),
        ("a.txt", "naïve".encode("utf-16"), "is not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is no JSON object"),
        ("a.jsonl", b"[1, 2]\n", "line 1 is no JSON object"),
        ("a.jsonl", b"[" * 100_000, "line 1 is no JSON object"),
        ("a.parquet", b"PAR1 but not really", "cannot be read"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, wanted: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, "data.source", name, wanted)


def test_a_stream_that_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterable[dict[str, str]]:
        yield {"text": "a"}
        raise ConnectionError("the network is down\nmore")

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    refused("some/stream", "reading some/stream failed", "network is down", streaming=True)
