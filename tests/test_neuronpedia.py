"""Neuronpedia's files hold what SAEDashboard would compute, here from the activations themselves:
density, strongest tokens, intervals, logits. The comparison with SAEDashboard's own run is in
scripts/neuronpedia.py.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import CONTEXT, D_SAE, DEAD, NEURONS, ROWS, SITE, Planted, planted
from torch import Tensor

from sae import formats
from sae.activations import read
from sae.autoencoder import SparseAutoencoder
from sae.errors import FormatError, ModelError, RunError
from sae.features import scan
from sae.formats import neuronpedia
from sae.hooks import Hookpoint
from sae.routes import Route
from sae.sparsity import ReluL1
from sae.store import write_atomic, write_manifest
from sae.text import TokenPieces

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """A scanned dictionary in a run that names its model."""
    run = tmp_path_factory.mktemp("run")
    found = planted(run)
    found.model.save_pretrained(run / "model")
    found.tokenizer.save_pretrained(run / "model")
    write_atomic(run / "config.yaml", f"model: {{name: {run / 'model'}}}\n")
    return found


@pytest.fixture(scope="module")
def out(made: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "np"
    assert formats.write("neuronpedia", made.folder, folder) == []
    return folder


@pytest.fixture(scope="module")
def features(out: Path) -> list[dict[str, Any]]:
    batch = json.loads((out / "batch-0.json").read_text())
    assert batch["model_id"] == "tiny" and batch["layer"] == 1
    return batch["features"]


@pytest.fixture(scope="module")
def acts(made: Planted) -> Tensor:
    """[ROWS CONTEXT D_SAE] activations with decoder rows at norm 1."""
    point = Hookpoint.parse(SITE)
    x = read(made.model, [point], made.rows, torch.float32)[0][point]
    whole = torch.zeros(ROWS, CONTEXT, D_SAE)
    whole[made.rows.kept] = made.sae.encode(x) * made.sae.decoder_norms
    return whole.detach()


def test_every_feature_is_there(features: list[dict[str, Any]]) -> None:
    assert [feature["feature_index"] for feature in features] == list(range(D_SAE))
    dead = features[DEAD]
    assert dead["frac_nonzero"] == 0 and dead["activations"] == []
    assert dead["freq_hist_data_bar_heights"] == []


def test_density_and_histogram(features: list[dict[str, Any]], acts: Tensor) -> None:
    for feature in features:
        own = acts[..., feature["feature_index"]]
        assert feature["frac_nonzero"] == pytest.approx((own > 0).float().mean().item(), abs=1e-5)
        assert sum(feature["freq_hist_data_bar_heights"]) == (own > 0).sum()
        assert feature["n_prompts_total"] * feature["n_tokens_in_prompt"] == own.numel()


def test_the_strongest_tokens(features: list[dict[str, Any]], acts: Tensor) -> None:
    """Where no text repeats, they are those of a top-k over all tokens, as in SAEDashboard."""
    compared = 0
    for feature in features:
        own = acts[..., feature["feature_index"]]
        shown = [a for a in feature["activations"] if a["bin_min"] == -1]
        values = [a["values"][a["qualifying_token_index"]] for a in shown if a["values"]]
        best = own.flatten().topk(20).values
        rows = own.amax(1).topk(20).indices
        if len(own[rows].unique(dim=0)) < 20 or not (best > 0).all():
            continue
        firsts = [a["qualifying_token_index"] < 0 for a in shown]
        if not any(firsts):
            compared += torch.allclose(torch.tensor(values), best, rtol=1e-4, atol=2e-5)
    assert compared >= 3


def test_sequences_are_whole_but_for_their_first_token(
    made: Planted, features: list[dict[str, Any]], acts: Tensor
) -> None:
    pieces = TokenPieces(made.tokenizer)
    texts = {"".join(pieces.pieces(ids.tolist())[1:]): i for i, ids in enumerate(made.rows.tokens)}
    for feature in features[::5]:
        for shown in feature["activations"]:
            row = texts["".join(shown["tokens"])]
            assert len(shown["tokens"]) == len(shown["values"]) == CONTEXT - 1
            own = acts[row, 1:, feature["feature_index"]]
            torch.testing.assert_close(torch.tensor(shown["values"]), own, **CLOSE)


def test_intervals(features: list[dict[str, Any]], acts: Tensor) -> None:
    """Five equal parts of (0, max], of which the lowest counts the zeros too."""
    for feature in features:
        own = acts[..., feature["feature_index"]]
        edges = torch.linspace(0, own.max().item(), 6)
        for shown in feature["activations"]:
            if shown["bin_min"] == -1:
                assert shown["bin_max"] == pytest.approx(own.max().item(), abs=2e-5)
                continue
            low, high = shown["bin_min"], shown["bin_max"]
            assert min((edges - low).abs()) < 1e-4 and min((edges - high).abs()) < 1e-4
            inside = ((own >= low - 2e-5) & (own <= high + 2e-5)).float().mean().item()
            assert shown["bin_contains"] == pytest.approx(inside, abs=4 / own.numel())
            if shown["qualifying_token_index"] >= 0:
                value = shown["values"][shown["qualifying_token_index"]]
                assert low - 2e-5 <= value <= high + 2e-5


def test_logits_are_plain(made: Planted, features: list[dict[str, Any]]) -> None:
    """W_dec at norm 1 · W_down · W_U, with neither the norm's gain nor a mean taken out."""
    model = made.model
    W_down, W_U = model.transformer.h[1].mlp.c_proj.weight, model.lm_head.weight.T
    directions = made.sae.W_dec / made.sae.decoder_norms[:, None]
    logits = (directions @ W_down @ W_U).detach()
    for feature, own in zip(features, logits, strict=True):
        for name, sign in (("pos", 1), ("neg", -1)):
            wanted = sign * (sign * own).topk(10).values
            torch.testing.assert_close(torch.tensor(feature[f"{name}_values"]), wanted, **CLOSE)
        assert sum(feature["logits_hist_data_bar_heights"]) == len(own)
        assert len(feature["logits_hist_data_bar_values"]) == 50
        best = made.sae.W_dec[feature["feature_index"]].topk(3).indices.tolist()
        assert feature["neuron_alignment_indices"] == best
    text = features[0]["pos_str"][0]
    assert text == made.tokenizer.decode([int(logits[0].argmax())]) or "\ufffd" in text


def lines(file: Path) -> list[dict[str, Any]]:
    content = file.read_bytes()
    text = gzip.decompress(content) if file.suffix == ".gz" else content
    return [json.loads(line) for line in text.splitlines()]


def test_the_bulk_import(out: Path, features: list[dict[str, Any]]) -> None:
    (source,) = (out / "exports").glob("*/*")
    heads = {name: lines(source / f"{name}.jsonl") for name in _HEADS}
    assert all(len(rows) == 1 for rows in heads.values())
    (own,), (release,) = heads["source"], heads["release"]
    assert own["id"] == source.name == "1-mlp-act-relul1-37" and own["modelId"] == "tiny"
    assert heads["sourceset"][0]["releaseName"] == release["name"]
    rows = lines(source / "features" / "batch-0.jsonl.gz")
    assert [row["index"] for row in rows] == [str(i) for i in range(D_SAE)]
    assert all(len(row["vector"]) == NEURONS and row["layer"] == own["id"] for row in rows)
    shown = lines(source / "activations" / "batch-0.jsonl.gz")
    assert len(shown) == sum(len(feature["activations"]) for feature in features)
    assert len({row["id"] for row in shown}) == len(shown)
    assert all(row["id"][0] == "c" and len(row["id"]) == 25 for row in shown)
    assert all(row["values"][row["maxValueTokenIndex"]] == row["maxValue"] for row in shown)


_HEADS = ("release", "model", "sourceset", "source")


def test_some_features_in_batches(
    made: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(neuronpedia, "BATCH", 2)
    formats.write("neuronpedia", made.folder, tmp_path / "out", [7, 3, 20])
    batches = [json.loads((tmp_path / "out" / f"batch-{i}.json").read_text()) for i in (0, 1)]
    assert [f["feature_index"] for batch in batches for f in batch["features"]] == [7, 3, 20]
    assert batches[0]["features"][0] == features[7]
    skipped = json.loads((tmp_path / "out" / "skipped_indexes.json").read_text())
    assert set(skipped["skipped_indexes"]) == set(range(D_SAE)) - {7, 3, 20}


SIDES = [["layers.1.mlp_in"], ["layers.1.mlp_out"]]
LAYERS = ["layers.0.mlp_out", "layers.1.mlp_out"]


def scanned(made: Planted, inputs: list[str], targets: list[str]) -> Path:
    """The folder of a map of random weights with its dictionary."""
    route = Route(*(tuple(map(Hookpoint.parse, side)) for side in (inputs, targets)))
    folder = made.folder.parent / str(route)
    SparseAutoencoder(16 * len(inputs), 4, ReluL1(1.0), 16 * len(targets), False).save_pretrained(
        folder, route.origin()
    )
    write_manifest(folder)
    scan(made.model, made.tokenizer, {str(route): folder}, [made.rows], 99, source={"model": "t"})
    return folder


def test_a_transcoder_belongs_to_the_layer_it_reads(made: Planted, tmp_path: Path) -> None:
    """Its logits are those of what it writes; a crosscoder has no place there, nor at delphi."""
    folder = scanned(made, *SIDES)
    assert formats.write("neuronpedia", folder, tmp_path / "out") == []
    assert (tmp_path / "out" / "exports" / "t" / "1-mlp-in-to-mlp-out-relul1-4").is_dir()
    batch = json.loads((tmp_path / "out" / "batch-0.json").read_text())
    W_dec = SparseAutoencoder.from_pretrained(folder).W_dec.detach()
    logits = W_dec / W_dec.norm(dim=1, keepdim=True) @ made.model.lm_head.weight.T
    for feature, own in zip(batch["features"], logits, strict=True):
        best = own.topk(10).values
        torch.testing.assert_close(torch.tensor(feature["pos_values"]), best, **CLOSE)
    assert any("in our words" in note for note in formats.write("delphi", folder, tmp_path / "d"))
    several = scanned(made, LAYERS, LAYERS)
    for name in ("neuronpedia", "delphi"):
        with pytest.raises(FormatError, match=f"--format {name} cannot hold several hookpoints"):
            formats.write(name, several, tmp_path / "other")


def test_mistakes(made: Planted, tmp_path: Path) -> None:
    """A hookpoint without a layer, another model than the SAE's, no dictionary."""
    sae, point = SparseAutoencoder(16, 4, ReluL1(1.0)), "module:transformer.h.1.mlp"
    folder = tmp_path / "run" / "saes" / "other"
    sae.save_pretrained(folder)
    write_manifest(folder)
    with pytest.raises(RunError, match="no feature dictionary"):
        formats.write("neuronpedia", folder, tmp_path / "out")
    scan(made.model, made.tokenizer, {point: folder}, [made.rows], 99, source={"model": "tiny"})
    with pytest.raises(FormatError, match=r"cannot hold module:.* which has no layer"):
        formats.write("neuronpedia", folder, tmp_path / "out")
    write_atomic(made.folder.parents[1] / "config.yaml", "seed: 0\n")
    with pytest.raises(ModelError, match=r"builtin: .* 512 .* 24"):
        formats.write("neuronpedia", made.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
