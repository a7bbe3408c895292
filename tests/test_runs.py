"""A run reopens from its folder alone: which SAEs, evaluated, scanned and asked about a text."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import MAPS, TOKENS, planned, save

from sae import formats, runs, store, training
from sae.autoencoder import SparseAutoencoder
from sae.errors import DataError, FormatError, HookpointError, RunError
from sae.hooks import Hookpoint
from sae.importing import import_run
from sae.records import FeatureDictionary
from sae.store import Run, read_manifest

FIRST, SECOND = "layers.0.mlp_act", "layers.1.mlp_act"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(tmp_path_factory.mktemp("runs"))
    return training.train(planned(folder, {"hookpoints": "layers.*.mlp_act"}))


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_a_run_opens_all_its_saes_or_one(run: Path) -> None:
    opened = runs.open_run(run, device="cpu")
    assert list(opened.folders) == [FIRST, SECOND]
    assert opened.config.tokens == TOKENS
    one = runs.open_run(str(run), "layers.1.mlp_act", "cpu")
    assert {point: sae.d_sae for point, sae in one.autoencoders().items()} == {SECOND: 48}


def test_no_held_out_document_is_trained_on(run: Path) -> None:
    opened = runs.open_run(run, device="cpu")
    sides = []
    for heldout in (True, False):
        rows = list(opened.rows(heldout=heldout))
        sides.append({int(d) for batch in rows for d in batch.document.flatten()})
    assert sides[0] and sides[1] and not sides[0] & sides[1]


@pytest.mark.parametrize(
    ("name", "words"),
    [("layers.1.mlp_out", "did you mean 'layers.1.mlp_act'"), ("x", "it has layers.0.mlp_act")],
)
def test_an_sae_that_is_not_there_is_named(run: Path, name: str, words: str) -> None:
    with pytest.raises(RunError, match=words):
        runs.open_run(run, name)


def test_a_model_or_text_that_has_changed_is_told_and_noted(tmp_path: Path) -> None:
    folder = save(tmp_path)
    run = training.train(planned(folder, {"hookpoints": "layers.*.mlp_act"}))
    (folder / "texts" / "0.txt").write_text("another text " * 40, encoding="utf-8")
    with pytest.warns(UserWarning, match="THE TEXT HAS CHANGED") as told:
        opened = runs.open_run(run, device="cpu")
    assert len(told) == 1 and opened.inputs.source.fingerprint in str(told[0].message)
    runs.evaluate_run(opened)
    written = json.loads((Run(run).sae("layers.0.mlp_act") / "eval.json").read_text("utf-8"))
    assert written["changes"] == opened.changes
    model = opened.inputs.lm.model
    model.get_parameter("transformer.wte.weight").mul_(2)
    model.save_pretrained(folder / "model")
    with pytest.warns(UserWarning) as told:
        runs.open_run(run, device="cpu")
    assert ["MODEL" in str(w.message) for w in told] == [True, False]


def test_broken_runs_say_what_is_missing(copy: Path) -> None:
    sae = Run(copy).sae("layers.0.mlp_act")
    store.write_manifest(sae)
    with pytest.raises(RunError, match="does not say which hookpoint"):
        runs.open_run(copy)
    store.write_manifest(sae, {"hookpoint": "layer 0"})
    with pytest.raises(HookpointError, match="layer 0"):
        runs.open_run(copy)
    (sae / "manifest.json").unlink()
    with pytest.raises(RunError, match="is not complete"):
        runs.open_run(copy)
    shutil.rmtree(copy / "saes")
    with pytest.raises(RunError, match="holds no SAE"):
        runs.open_run(copy)
    (copy / "config.yaml").unlink()
    with pytest.raises(RunError, match="it has no config"):
        runs.open_run(copy)
    with pytest.raises(RunError, match="no such folder"):
        runs.open_run(copy / "gone")


def test_an_evaluation_is_returned_and_written(copy: Path) -> None:
    told: list[int] = []
    opened = runs.open_run(copy, device="cpu")
    found = runs.evaluate_run(opened, ks=(2,), progress=told.append)
    for point, evaluation in found.items():
        written = json.loads((opened.folders[point] / "eval.json").read_text())
        assert written["fvu"]["value"] == evaluation.fvu.value
        assert written["hookpoint"] == str(point)
        assert written["sae_sha256"] == store.sha256(opened.folders[point] / store.WEIGHTS)
        assert written["data_fingerprint"] == opened.inputs.source.fingerprint
        assert evaluation.n_tokens >= opened.config.data.eval_tokens == 500
        assert {row.k for row in evaluation.baseline} == {2, 4}
        assert sum(told) == evaluation.n_tokens


def test_a_scan_writes_a_dictionary_for_each_sae(copy: Path) -> None:
    told: list[int] = []
    opened = runs.open_run(copy, device="cpu")
    written = runs.scan_run(opened, n_tokens=700, progress=told.append)
    assert sum(told) >= 700 > sum(told[:-1])
    for point, folder in written.items():
        assert folder == Run(copy).features(str(point))
        assert len(FeatureDictionary(folder)) == 48
        manifest = read_manifest(folder)
        assert manifest["hookpoint"] == str(point) and manifest["tokens"] == sum(told)
        assert manifest["model"] == opened.inputs.lm.name


def test_a_text_of_ones_own(run: Path) -> None:
    opened = runs.open_run(run, device="cpu")
    found = runs.features_of(opened, "the old cat", k=3)
    assert list(found) == [FIRST, SECOND]
    lm, sae = opened.inputs.lm, opened.autoencoders()[SECOND]
    ids = torch.tensor([lm.tokenizer("the old cat")["input_ids"]])
    x = runs_activations(lm.model, Hookpoint(SECOND), ids)
    values, features = sae.encode(x).topk(3, dim=1)
    assert "".join(piece for piece, _ in found[SECOND]) == "the old cat"
    for (_, pairs), value, feature in zip(found[SECOND], values, features, strict=True):
        live = int((value > 0).sum())
        assert [f for f, _ in pairs] == feature[:live].tolist()
        assert [act for _, act in pairs] == pytest.approx(value[:live].tolist(), rel=1e-4)
    for text in ("", "cat " * 100):
        with pytest.raises(DataError, match="the model reads 1 to 32"):
            runs.features_of(opened, text)


def runs_activations(model, point: Hookpoint, ids: torch.Tensor) -> torch.Tensor:
    from sae.hooks import capture

    with torch.no_grad(), capture(model, [point]) as acts:
        model(ids)
    return acts[point][0]


def test_a_run_that_another_process_writes_is_left_alone(copy: Path) -> None:
    opened = runs.open_run(copy)
    with store.locked(copy):
        for verb in (runs.evaluate_run, runs.scan_run):
            with pytest.raises(RunError, match="written by another process"):
                verb(opened, n_tokens=100)
    assert not list(copy.glob("saes/*/eval.json")) and not list(copy.glob("saes/*/features"))


@pytest.mark.parametrize("name", MAPS)
def test_a_map_reopens_by_its_two_sides(tmp_path: Path, name: str) -> None:
    """Evaluated, scanned, asked about a text and exported like any SAE."""
    folder = save(tmp_path)
    run = training.train(planned(folder, MAPS[name] | {"tokens": "512"}))
    opened = runs.open_run(run, device="cpu")
    ((given, route),) = opened.routes.items()
    assert list(opened.folders) == [given] == list(Run(run).saes()) == [str(route)]
    (found,) = runs.evaluate_run(opened).values()
    assert found.fvu.value is not None and found.cross_entropy is not None
    assert len(found.sites) == (len(route.targets) if len(route.targets) > 1 else 0)
    (written,) = runs.scan_run(opened, n_tokens=300).values()
    assert read_manifest(written)["hookpoint"] == given
    lm, sae = opened.inputs.lm, opened.autoencoders()[given]
    ids = torch.tensor([lm.tokenizer("the old cat")["input_ids"]])
    acts = {point: runs_activations(lm.model, point, ids) for point in route.inputs}
    strongest = sae.encode(route.x(acts)).max(1).values.tolist()
    (said,) = runs.features_of(opened, "the old cat").values()
    assert [pairs[0][1] for _, pairs in said] == pytest.approx(strongest, rel=1e-4)
    weights = Run(run).sae()
    assert formats.write("safetensors", weights, tmp_path / "own") == []
    again = SparseAutoencoder.from_pretrained(tmp_path / "own")
    assert torch.equal(again(route.x(acts)).recon, sae(route.x(acts)).recon)
    back = import_run(
        tmp_path / "own", overrides={"output": str(tmp_path / "back"), "data.context": "32"}
    )
    assert runs.open_run(back.folder, device="cpu").routes == opened.routes
    formats.write("jsonl", weights, tmp_path / "rows")
    refusing = ["openmoss"] + (["saelens", "sparsify"] if len(route.targets) > 1 else [])
    for other in refusing:
        with pytest.raises(FormatError, match="; use --format ") as refusal:
            formats.write(other, weights, tmp_path / other)
        advised = str(refusal.value).rpartition(" ")[2]
        formats.write(advised, weights, tmp_path / f"instead-of-{other}")
