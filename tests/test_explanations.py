"""Neuronpedia's explanations become labels of a run: marked as a machine's, a person's kept, and
none for features that are not there."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted import D_SAE, Planted

from sae import cli, labels
from sae.errors import FormatError, RunError
from sae.formats import explanations
from sae.importing import import_labels
from sae.labels import LONGEST, Label
from sae.records import FeatureDictionary
from sae.store import read_manifest

MACHINE = "gpt-4o-mini"


def row(index: object, description: object = "cats", **more: Any) -> dict[str, Any]:
    """As its files have them."""
    known = {"modelId": "tiny", "layer": "1-res-jb", "index": index, "description": description}
    made = {"typeName": "oai_token-act-pair", "explanationModelName": MACHINE}
    return known | made | {"embedding": [0.1] * 100, "createdAt": "2026-01-01"} | more


def packed(file: Path, *rows: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    return file


@pytest.fixture
def run(made: Planted, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.folder.parents[1], tmp_path / "run"))


def of(run: Path) -> dict[int, Label]:
    (folder,) = (run / "saes").iterdir()
    return labels.read(run, read_manifest(folder / "features")["sae_sha256"])


def test_a_folder_of_batches(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported = tmp_path / "tiny" / "1-res-jb"
    packed(exported / "explanations" / "batch-0.jsonl.gz", row("3"), row("4", " birds\nthat sing "))
    packed(exported / "explanations" / "batch-1.jsonl.gz", row("5", explanationModelName=None))
    assert cli.main(["import", str(exported), "--labels", str(run)]) == 0
    said = capsys.readouterr().out
    assert "3 labels of tiny/1-res-jb by" in said and f"next: sae top {run}" in said
    wanted = {3: Label("cats", MACHINE), 4: Label("birds that sing", MACHINE)}
    assert of(run) == wanted | {5: Label("cats", "oai_token-act-pair")}
    (folder,) = (run / "saes").iterdir()
    assert FeatureDictionary(folder / "features").ranked(search="birds") == [4]


def test_the_list_of_the_api(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "export.json"
    file.write_text(json.dumps([row(7, typeName=None, explanationModelName=None)]))
    import_labels(run, file)
    assert of(run) == {7: Label("cats", explanations.MAKER)}


def test_the_first_of_a_feature_and_a_person_go_before(run: Path, tmp_path: Path) -> None:
    (folder,) = (run / "saes").iterdir()
    sha = read_manifest(folder / "features")["sae_sha256"]
    labels.write(run, sha, 3, Label("mine"))
    long = "so " * LONGEST
    file = packed(tmp_path / "batch-0.jsonl.gz", row("3"), row("4"), row("4", "dogs"), row(5, long))
    said = import_labels(run, file)
    found = of(run)
    assert found[3] == Label("mine") and found[4].text == "cats"
    assert len(found[5].text) == LONGEST and found[5].text.endswith("…")
    assert said == [
        f"2 labels of tiny/1-res-jb by {MACHINE}",
        "the label that a person gave stays at 1 feature",
        "1 explanation left out: of features that have one",
        f"1 explanation cut at {LONGEST} characters",
    ]


def test_no_file_may_call_itself_a_person(run: Path, tmp_path: Path) -> None:
    import_labels(run, packed(tmp_path / "a.jsonl.gz", row(3, explanationModelName=labels.PERSON)))
    assert of(run) == {3: Label("cats", explanations.MAKER)}
    import_labels(run, packed(tmp_path / "b.jsonl.gz", row(3, "dogs")))
    assert of(run) == {3: Label("dogs", MACHINE)}


def test_only_what_was_cut_and_is_kept_counts_as_cut(run: Path, tmp_path: Path) -> None:
    long = "so " * LONGEST
    file = packed(tmp_path / "a.jsonl.gz", row(3, "and so on …"), row(3, long), row(4, long))
    assert any("1 explanation cut" in line for line in import_labels(run, file))


def test_of_many_makers_a_few_are_told(run: Path, tmp_path: Path) -> None:
    rows = [row(i, explanationModelName=f"m{i}") for i in range(D_SAE)]
    said, *_ = import_labels(run, packed(tmp_path / "a.jsonl.gz", *rows))
    assert said.endswith(f"by m0, m1, m10 and {D_SAE - 3} more")


@pytest.mark.parametrize(
    ("model", "layer", "source"),
    [(None, None, "an unnamed source"), ("tiny", None, "tiny"), ([1], "1-res-jb", "1-res-jb")],
)
def test_rows_that_do_not_name_their_source(
    tmp_path: Path, model: object, layer: object, source: str
) -> None:
    bare = row("3", modelId=model, layer=layer)
    assert explanations.read(packed(tmp_path / "a.jsonl.gz", bare)).source == source
    with pytest.raises(FormatError, match=f"{source} and tiny/1-res-jb; give those of one source"):
        explanations.read(packed(tmp_path / "b.jsonl.gz", bare, row("4")))


def test_a_feature_that_is_not_there(run: Path, tmp_path: Path) -> None:
    file = packed(tmp_path / "batch-0.jsonl.gz", row("3"), row(str(D_SAE)))
    with pytest.raises(RunError, match=f"feature {D_SAE}: this SAE has features 0–{D_SAE - 1}"):
        import_labels(run, file)
    assert of(run) == {}
    with pytest.raises(RunError, match="no such file"):
        import_labels(run, tmp_path / "nothing")


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([row("3"), row("4", layer="2-res-jb")], "tiny/1-res-jb and tiny/2-res-jb"),
        ([row("-1")], "row 1: index '-1'"),
        ([row(None)], "index 'None'"),
        ([row("3"), row("4", None)], "row 2: description None"),
        ([row("4", "  ")], "description"),
        ([[1]], "expected an object, got list"),
        ([], "holds no explanations"),
        ([row("3", embedding="x" * explanations.LINE)], "a row has more than"),
    ],
)
def test_rows_that_are_none(tmp_path: Path, rows: list[object], wanted: str) -> None:
    with pytest.raises(FormatError, match=wanted) as caught:
        explanations.read(packed(tmp_path / "batch-0.jsonl.gz", *rows))
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda _: b"\x80\x04K", lambda b: gzip.compress(b"{")]
)
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl", "a.json"])
def test_damaged_files(tmp_path: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    file = packed(tmp_path / name, row("3"))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(FormatError) as caught:
        explanations.read(file)
    assert len(str(caught.value).splitlines()) <= 3


def test_options_that_do_not_go_together(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(packed(tmp_path / "a.jsonl.gz", row("3")))
    assert cli.main(["import", file, "--labels", str(run), "--output", "x"]) == 2
    assert cli.main(["import", file, "--sae", "x", "--output", "x"]) == 2
    assert "leave out --output" in capsys.readouterr().err
