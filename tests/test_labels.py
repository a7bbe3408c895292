"""Labels are kept in the run, belong to weights, and come out with every export."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import pytest
from planted import Planted

from sae import labels
from sae.errors import FormatError, RunError
from sae.formats import write
from sae.labels import Label
from sae.records import FeatureDictionary
from sae.store import read_manifest

HOSTILE = "</script><img src=x onerror=alert(1)> \u202e ‮ 日本"


@pytest.fixture
def run(made: Planted, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.folder.parents[1], tmp_path / "run"))


def test_a_label_comes_back_as_it_was_given(run: Path) -> None:
    labels.write(run, "a", 3, Label(f"  {HOSTILE} "))
    labels.write(run, "a", 4, Label("digits", "a machine"))
    labels.write(run, "b", 3, Label("of other weights"))
    assert labels.read(run, "a") == {3: Label(HOSTILE), 4: Label("digits", "a machine")}
    labels.write(run, "a", 3, None)
    assert labels.read(run, "a") == {4: Label("digits", "a machine")}
    assert labels.read(run, "c") == {}


def test_the_dictionary_and_its_exports_have_the_labels(run: Path, tmp_path: Path) -> None:
    folder = run / "saes" / "layers.1.mlp_act"
    sha = read_manifest(folder / "features")["sae_sha256"]
    labels.write(run, sha, 3, Label("cats"))
    dictionary = FeatureDictionary(folder / "features")
    assert dictionary.records([2, 3])[1].label == "cats"
    assert dictionary.ranked(search="CATS") == [3]
    write("parquet", folder, tmp_path / "out", [3, 4])
    assert FeatureDictionary(tmp_path / "out").table()["label"].to_pylist() == ["cats", None]
    write("jsonl", folder, tmp_path / "lines")
    lines = (tmp_path / "lines" / "features.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["feature"]: row["label"] for row in rows if row["label"]} == {3: "cats"}


def test_what_a_person_says_stays(run: Path) -> None:
    labels.write(run, "a", 3, Label("cats"))
    labels.write(run, "a", 4, Label("dogs", "a machine"))
    given = {n: Label(f"number {n}", "another machine") for n in (3, 4, 5)}
    assert labels.add(run, "a", given) == [3]
    assert labels.read(run, "a") == {3: Label("cats"), 4: given[4], 5: given[5]}


def test_what_a_person_says_while_a_machine_waits_stays(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = filelock.FileLock

    @contextmanager
    def held_by_a_person(*args: object, **options: object) -> Iterator[None]:
        monkeypatch.setattr(filelock, "FileLock", lock)
        labels.write(run, "a", 3, Label("mine"))
        yield

    monkeypatch.setattr(filelock, "FileLock", held_by_a_person)
    assert labels.add(run, "a", {3: Label("cats", "a machine")}) == [3]
    assert labels.read(run, "a") == {3: Label("mine")}


def test_half_a_character_is_replaced(run: Path) -> None:
    labels.write(run, "a", 3, Label("\ud800 half"))
    assert labels.read(run, "a") == {3: Label("? half")}


@pytest.mark.parametrize("text", ["", "  ", "x" * 401])
def test_labels_have_a_length(run: Path, text: str) -> None:
    with pytest.raises(RunError, match="1 to 400 characters"):
        labels.write(run, "a", 3, Label(text))


def facts_of(feature: str) -> str:
    return json.dumps({"a": {feature: {"text": "cats", "by": "person"}}})


@pytest.mark.parametrize(
    "text",
    [
        *("[]", '{"a": 1}', '{"a": {"-1": {}}}', '{"a": {"1": {"text": 1, "by": 2}}}', "{"),
        *map(facts_of, ("9" * 5000, "03", "²", "1 ")),
    ],
    ids=lambda text: text[:20],
)
def test_a_file_that_holds_no_labels_is_named(run: Path, text: str) -> None:
    (run / labels.FILE).write_text(text)
    with pytest.raises(FormatError, match=r"labels\.json") as caught:
        labels.read(run, "a")
    assert len(str(caught.value).splitlines()) <= 3
