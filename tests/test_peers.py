"""What the comparisons with other packages share: the rate chosen, the verdict, `--only`, and what
is kept of trainings."""

import argparse
import dataclasses
import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("peers")


@pytest.mark.parametrize("best", [2**-5, 0.5, 1, 16])
def test_a_wider_search_finds_the_best_however_far_it_is(peers: Any, best: float) -> None:
    tried: list[float] = []

    def loss(factor: float) -> float:
        tried.append(factor)
        return abs(math.log(factor / best))

    assert peers.best_factor(loss, [0.5, 1, 2], widen=True) == best
    assert {best / 2, best, best * 2} <= {*tried}
    assert len(tried) == len({*tried})


def test_without_it_only_the_factors_are_tried(peers: Any) -> None:
    assert peers.best_factor(lambda factor: -factor, [1, 4, 2]) == 4


def test_where_nothing_trains_the_search_ends(peers: Any) -> None:
    assert peers.best_factor(lambda _: math.inf, [1], widen=True) < peers.SLOWEST


def test_a_side_is_every_seed_at_the_rate_chosen_with_the_first(peers: Any) -> None:
    def train(lr: float, seed: int) -> dict[str, Any]:
        return {"fvu": abs(lr - seed), "ce": None} if lr != 1 else {"error": "diverged"}

    side = peers.Side(train, 2.0, [0.5, 1, 2], [2, 4], loss=lambda row: row["fvu"])
    assert (side.lr, side.values("fvu"), side.error) == (2, [0, 2], None)
    assert math.isnan(side.mean("ce"))
    assert peers.Side(train, 2.0, [0.5], [2, 4], loss=lambda row: 0).error == "diverged"


def test_not_worse_by_two_standard_errors_holds(peers: Any) -> None:
    error = peers.standard_error([0.0, 2.0])
    assert error == pytest.approx(1)
    said = [peers.verdict(worse * error, error) for worse in (-3, 2, 2.1)]
    assert said == ["HOLDS", "HOLDS", "FAILS"]
    assert peers.standard_error([3.0]) == 0


def test_only_names_packages_variants_or_both(peers: Any) -> None:
    def names(*only: str) -> list[str]:
        return [r.name for r in peers.chosen(peers.recipes(64), only, ["sae-lens", "eai-sparsify"])]

    assert names("topk") == ["sae-lens topk", "eai-sparsify topk"]
    assert names("topk", "dictionary-learning") == ["dictionary-learning top_k"]
    assert names("eai-sparsify") == ["eai-sparsify topk"]
    assert {name.split()[0] for name in names()} == {"sae-lens", "eai-sparsify"}
    with pytest.raises(SystemExit, match="topp"):
        names("topp")


def test_what_is_kept_is_not_computed_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a folder made for it; a file made under other settings is refused."""
    monkeypatch.syspath_prepend(SCRIPTS)
    kept, file = importlib.import_module("kept").Kept, tmp_path / "new" / "kept.json"
    assert kept(file, {"tokens": 1}).of("a", lambda: {"fvu": 0.5}) == {"fvu": 0.5}
    assert kept(file, {"tokens": 1}).of("a", lambda: pytest.fail("again")) == {"fvu": 0.5}
    with pytest.raises(SystemExit, match="other settings"):
        kept(file, {"tokens": 2})


def test_a_budget_is_whole_files(peers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Of less than one nothing would be trained on."""
    parser = argparse.ArgumentParser()
    peers.add_arguments(parser, "--samples", 0, "kept.json")
    given = ["--venvs", ".", "--samples"]
    assert parser.parse_args([*given, "70_000"]).tokens == 2 * peers.SHARD
    with pytest.raises(SystemExit):
        parser.parse_args([*given, "1000"])
    assert "--samples: 1000 came, wanted at least 32768" in capsys.readouterr().err


def test_what_is_compared_does_not_meet_the_runs_in_checkpoints(
    peers: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`sae train` of the same settings names its folder there the same."""
    monkeypatch.setattr(sys, "argv", ["compare_saelens.py", "--venvs", "."])
    compare = importlib.import_module("compare_saelens")
    bed = compare.TextBed(compare.arguments(), None, tmp_path / "0", 0)
    assert Path(bed.config().output).is_relative_to(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"about": {}}', None])
def test_a_file_of_no_results_is_refused_and_stays(
    peers: Any, tmp_path: Path, text: str | None
) -> None:
    out = tmp_path / "out.json"
    if text is None:
        out.mkdir()
    else:
        out.write_text(text)
    with pytest.raises(SystemExit, match=r"out\.json holds no results .*; name another file"):
        peers.Kept(out, {})
    assert text is None or out.read_text() == text


def test_a_study_of_other_settings_does_not_reuse_results(peers: Any) -> None:
    study = importlib.import_module("recover_planted").STUDIES["large"]
    changed = dataclasses.replace(study, changes=study.changes | {"optim.lr": 0.01})
    fewer = dataclasses.replace(study, samples=study.samples // 2)
    assert len({each.key("large", "topk", 0) for each in (study, changed, fewer)}) == 3


def test_a_package_without_an_environment_is_named(peers: Any, tmp_path: Path) -> None:
    workers = peers.Peers(argparse.Namespace(venvs=tmp_path / "none", prefix=[]))
    with pytest.raises(SystemExit, match=r"--venvs .*none: no .*sae-lens/bin/python"):
        workers.ask("sae-lens", {})
