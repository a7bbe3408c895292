"""The streaming scan gives what the whole matrix of activations would.

Every statistic and example of a tiny planted model is compared with brute force over [tokens
d_sae]; weight effects with the formula written out from the model's own parameters; and the result
does not depend on batches, chunks or blocks.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers as hf
from planted import (
    CONTEXT,
    D_SAE,
    DEAD,
    DENSE,
    NEURONS,
    ROWS,
    SITE,
    SOURCE,
    Planted,
    make_sae,
)

from sae import features as module
from sae.autoencoder import SparseAutoencoder
from sae.data import TokenBatch
from sae.errors import DataError, ModelError
from sae.features import AFTER, BEFORE, ScanSettings, prompt_features, scan
from sae.hooks import Hookpoint, capture
from sae.records import FeatureDictionary
from sae.routes import Route
from sae.sparsity import ReluL1, TopK
from sae.store import read_manifest, sha256

ALIVE = 30


@pytest.fixture(scope="module")
def acts(made: Planted) -> np.ndarray:
    """[tokens d_sae], 0 at tokens that are not kept, by the plainest route."""
    point = Hookpoint.parse(SITE)
    with torch.no_grad(), capture(made.model, [point]) as found:
        made.model(made.rows.tokens)
    acts = made.sae.encode(found[point].flatten(0, 1))
    return (acts * made.rows.kept.flatten()[:, None]).detach().numpy()


def tables(folder: Path) -> list[Any]:
    return [pq.read_table(folder / f"features/{n}.parquet") for n in ("features", "examples")]


def test_statistics_are_those_of_the_matrix(
    made: Planted, dictionary: FeatureDictionary, acts: np.ndarray
) -> None:
    kept = int(made.rows.kept.sum())
    for record in dictionary.records(range(D_SAE)):
        column = acts[:, record.feature]
        fired = column[column > 0]
        assert record.n_fired == len(fired)
        assert record.density == len(fired) / kept
        assert record.max == pytest.approx(column.max(), rel=1e-5)
        if not len(fired):
            assert record.mean is None and record.histogram is None and not record.top_tokens
            continue
        assert record.mean == pytest.approx(fired.mean(dtype=np.float64), rel=1e-4)
        assert record.histogram is not None
        assert sum(record.histogram.counts) == len(fired)
        assert record.histogram.edges[0] == 0 and record.histogram.edges[-1] == record.max
    assert dictionary.records([DENSE])[0].density == 1
    assert dictionary.records([DEAD])[0].density == 0


def test_histograms_count_what_lies_between_their_edges(
    dictionary: FeatureDictionary, acts: np.ndarray
) -> None:
    for record in dictionary.records(range(D_SAE)):
        if record.histogram is None:
            continue
        edges = np.array(record.histogram.edges)
        fired = acts[:, record.feature][acts[:, record.feature] > 0]
        # Activations of another batch size differ in the last bit: leave out what sits on an edge.
        near = np.abs(fired[:, None] - edges).min(1) < 1e-5 * record.max
        counts = np.histogram(fired[~near], edges)[0]
        assert (np.abs(counts - record.histogram.counts).sum()) <= near.sum()


def test_top_tokens_share_out_the_activation(
    made: Planted, dictionary: FeatureDictionary, acts: np.ndarray
) -> None:
    ids = made.rows.tokens.flatten().numpy()
    column = acts[:, ALIVE]
    mass = np.bincount(ids, column, minlength=len(made.tokenizer)) / column.sum()
    found = dictionary.records([ALIVE])[0].top_tokens
    assert [t.value for t in found] == pytest.approx(np.sort(mass)[::-1][: len(found)], rel=1e-4)
    assert all(mass[t.token] == pytest.approx(t.value, rel=1e-4) for t in found)
    whole = [t for t in found if not t.piece.startswith("\\x")]
    assert whole and all(made.tokenizer.decode([t.token]) == t.piece for t in whole)


def test_company_is_that_of_the_matrix(
    made: Planted, dictionary: FeatureDictionary, acts: np.ndarray
) -> None:
    """φ of firing together, Pearson's r with the neurons, and a place for every feature."""
    kept = made.rows.kept.flatten().numpy()
    point = Hookpoint.parse(SITE)
    with torch.no_grad(), capture(made.model, [point]) as found:
        made.model(made.rows.tokens)
    neurons, own = found[point].flatten(0, 1).numpy()[kept], acts[kept]
    for record in dictionary.records(range(D_SAE)):
        column = own[:, record.feature]
        assert record.cofiring is not None and record.correlated_neurons is not None
        for other in record.cofiring:
            phi = np.corrcoef(column > 0, own[:, other.feature] > 0)[0, 1]
            assert other.value == pytest.approx(phi, abs=1e-4) and other.feature != record.feature
        for neuron in record.correlated_neurons:
            r = np.corrcoef(column, neurons[:, neuron.neuron])[0, 1]
            assert neuron.value == pytest.approx(r, abs=1e-3)
        assert record.map_xy is not None and len(record.map_xy) == 2
    alive = dictionary.records([ALIVE])[0]
    assert alive.cofiring and alive.correlated_neurons
    assert dictionary.records([DEAD])[0].cofiring == []


def test_examples_hold_the_activations_of_their_row(
    made: Planted, dictionary: FeatureDictionary, acts: np.ndarray
) -> None:
    by_row = acts.reshape(ROWS, CONTEXT, D_SAE)
    for e in dictionary.examples(range(D_SAE)):
        dense = np.zeros(CONTEXT)
        dense[e.indices] = e.values
        np.testing.assert_allclose(dense, by_row[e.row, :, e.feature], rtol=1e-4, atol=1e-6)
        assert dense[e.column] == e.peak > 0
        assert e.document == made.rows.document[e.row, e.column]
        assert e.position == made.rows.position[e.row, e.column] >= 0


def test_top_examples_are_the_strongest_one_a_sequence_without_duplicates(
    made: Planted, dictionary: FeatureDictionary, acts: np.ndarray
) -> None:
    ids = np.pad(made.rows.tokens.numpy(), ((0, 0), (BEFORE, AFTER)), constant_values=-1)
    for feature in range(D_SAE):
        strength = acts[:, feature].reshape(ROWS, CONTEXT)
        found = dictionary.examples([feature], "top")
        assert [e.rank for e in found] == list(range(len(found)))
        rows, windows, expected = set(), set(), []
        for flat in np.argsort(-strength.ravel(), kind="stable"):
            row, column = divmod(int(flat), CONTEXT)
            window = tuple(ids[row, column : column + BEFORE + AFTER + 1])
            if strength[row, column] > 0 and row not in rows and window not in windows:
                rows.add(row)
                windows.add(window)
                expected.append(strength[row, column])
        assert [e.peak for e in found] == pytest.approx(expected[:20], rel=1e-4)
    duplicates = [e.duplicates for e in dictionary.examples(range(D_SAE), "top")]
    assert max(duplicates) > 0


def test_intervals_hold_exactly_their_members(
    dictionary: FeatureDictionary, acts: np.ndarray
) -> None:
    """low < peak <= high at the stored edges, and none is missing that could be there."""
    for record in dictionary.records(range(D_SAE)):
        found = dictionary.examples([record.feature], "interval")
        edges = {(low, high) for low, high, _ in record.intervals}
        assert {(e.low, e.high) for e in found} <= edges
        for low, high, count in record.intervals:
            members = [e for e in found if e.low == low]
            assert all(low < e.peak <= high for e in members)
            assert len({e.row for e in members}) == len(members) <= 5
            assert bool(members) == (count > 0)
            # One may be left out only for its row or for a window that is there already.
            column = acts[:, record.feature].reshape(ROWS, CONTEXT)
            rows = ((column > low * 1.00001) & (column < high * 0.99999)).any(1).sum()
            assert len(members) >= min(5, rows - sum(e.duplicates for e in found) - 4) or rows < 9


def test_random_examples_are_drawn_evenly(made: Planted) -> None:
    """Over many seeds each firing token comes up equally often (5 standard errors)."""
    text = module._Text(made.rows, module.TokenPieces(made.tokenizer))
    token = np.arange(3, 3 + 12)
    firings = module._Firings(token, np.linspace(0.1, 1, 12).astype(np.float32))
    counts = np.zeros(12)
    draws = 1200
    for seed in range(draws):
        picks = firings.examples(text, ScanSettings(top=1), np.random.default_rng(seed))
        chosen = [pick.index for pick in picks if pick.kind == "random"]
        assert len(set(chosen)) == 5
        counts[chosen] += 1
    share = 5 / 12
    assert np.abs(counts / draws - share).max() < 5 * np.sqrt(share * (1 - share) / draws)


def test_none_of_a_kind_is_none(made: Planted) -> None:
    text = module._Text(made.rows, module.TokenPieces(made.tokenizer))
    firings = module._Firings(np.arange(3, 15), np.linspace(0.1, 1, 12).astype(np.float32))
    settings = ScanSettings(top=1, per_interval=0, random=0)
    picks = list(firings.examples(text, settings, np.random.default_rng(0)))
    assert [pick.kind for pick in picks] == ["top"]


@pytest.mark.parametrize("batch", [1, ROWS])
def test_the_result_does_not_depend_on_batches_chunks_or_blocks(
    made: Planted, tmp_path: Path, batch: int
) -> None:
    made.sae.save_pretrained(tmp_path)
    settings = ScanSettings(memory=1 << 25 if batch == 1 else 64 * 4 * D_SAE * 9, blocks=batch)
    batches = [made.rows[i : i + batch] for i in range(0, ROWS, batch)]
    scan(
        made.model,
        made.tokenizer,
        {SITE: tmp_path},
        batches,
        10**9,
        source=SOURCE,
        settings=settings,
    )
    for ours, theirs in zip(tables(tmp_path), tables(made.folder), strict=True):
        for name in ("feature", "n_fired", "kind", "rank", "row", "column"):
            if name in ours.column_names:
                assert ours[name].to_pylist() == theirs[name].to_pylist(), name


def test_two_saes_in_one_pass_are_as_each_alone(made: Planted, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    made.sae.save_pretrained(one)
    resid = SparseAutoencoder(16, 20, TopK(3))
    resid.save_pretrained(two)
    sites = {SITE: one, "layers.0.resid_post": two}
    batches = [made.rows[i : i + 7] for i in range(0, ROWS, 7)]
    settings = ScanSettings(memory=64 * 50 * 4 * D_SAE, blocks=4)
    written = scan(
        made.model, made.tokenizer, sites, batches, 10**9, source=SOURCE, settings=settings
    )
    assert written == {site: folder / "features" for site, folder in sites.items()}
    for ours, theirs in zip(tables(one), tables(made.folder), strict=True):
        assert ours.equals(theirs)
    assert sum(r.n_fired for r in FeatureDictionary(written["layers.0.resid_post"]).records(
        range(20))) <= 3 * int(made.rows.kept.sum())  # fmt: skip


def test_only_a_chunk_of_activations_is_ever_made(
    made: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    genuine = SparseAutoencoder.encode

    def watched(self: SparseAutoencoder, x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return genuine(self, x)

    monkeypatch.setattr(SparseAutoencoder, "encode", watched)
    made.sae.save_pretrained(tmp_path)
    settings = ScanSettings(memory=64 * 4 * D_SAE * 17)
    scan(
        made.model, made.tokenizer, {SITE: tmp_path}, [made.rows], 10**9, source=SOURCE,
        settings=settings,
    )  # fmt: skip
    assert max(sizes) == 17 and sum(sizes) == made.rows.kept.sum()
    assert {p.name for p in tmp_path.iterdir()} == {"features", "sae.safetensors", "cfg.yaml"}


def test_the_scan_stops_at_its_budget_and_says_what_it_read(made: Planted, tmp_path: Path) -> None:
    made.sae.save_pretrained(tmp_path)
    asked = []

    def batches() -> Any:
        for i in range(0, ROWS, 4):
            asked.append(i)
            yield made.rows[i : i + 4]

    heard: list[int] = []
    scan(
        made.model, made.tokenizer, {SITE: tmp_path}, batches(), 200, source=SOURCE,
        progress=heard.append,
    )  # fmt: skip
    manifest = read_manifest(tmp_path / "features")
    rows = manifest["sequences"]
    kept = made.rows.kept.sum(1)
    assert kept[: rows - 1].sum() < 200 <= kept[:rows].sum() == manifest["tokens"] == sum(heard)
    assert len(asked) == -(-rows // 4)
    assert manifest["sae_sha256"] == sha256(tmp_path / "sae.safetensors")
    assert {k: manifest[k] for k in ("model", "revision", "data")} == SOURCE
    assert (manifest["hookpoint"], manifest["seed"]) == (SITE, 0)


def test_mistakes(made: Planted, tmp_path: Path) -> None:
    made.sae.save_pretrained(tmp_path)
    args = made.model, made.tokenizer, {SITE: tmp_path}
    with pytest.raises(DataError, match="no text to scan"):
        scan(*args, [], 100, source=SOURCE)
    broken = make_sae()
    with torch.no_grad():
        broken.W_enc[:] = torch.inf
    broken.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp_act: the activations are not finite"):
        scan(*args, [made.rows], 100, source=SOURCE)
    assert {p.name for p in tmp_path.iterdir()} == {"sae.safetensors", "cfg.yaml"}


def test_dropout_is_off_during_the_scan(made: Planted, tmp_path: Path) -> None:
    made.sae.save_pretrained(tmp_path)
    made.model.train()
    try:
        scan(*(made.model, made.tokenizer, {SITE: tmp_path}), [made.rows], 10**9, source=SOURCE)
        assert made.model.training
    finally:
        made.model.eval()
    ours, theirs = tables(tmp_path)[0]["n_fired"], tables(made.folder)[0]["n_fired"]
    assert ours.to_pylist() == theirs.to_pylist()


# ---------------------------------------------------------------------------- what weights say


def effects(
    model: Any, tokenizer: Any, route: str | Route, sae: SparseAutoencoder
) -> list[dict[str, Any]]:
    route = Route.at(Hookpoint.parse(route)) if isinstance(route, str) else route
    pieces = module.TokenPieces(tokenizer)
    settings = ScanSettings(memory=64 * 4 * D_SAE * 11)
    found = module._Effects(model, route, sae, pieces, settings)
    return list(found.columns(0, sae.d_sae))


def test_writes_and_reads_follow_the_weights(made: Planted) -> None:
    """The formulas of the design, from GPT-2's own parameters (Conv1D holds [d_in d_out])."""
    gpt, sae = made.model.transformer, made.sae
    W_U = made.model.lm_head.weight.T
    logits = sae.W_dec @ gpt.h[1].mlp.c_proj.weight * gpt.ln_f.weight @ W_U
    logits = (logits - logits.mean(1, keepdim=True)).detach()
    reads = gpt.wte.weight * gpt.h[1].ln_2.weight @ gpt.h[1].mlp.c_fc.weight @ sae.W_enc
    rows = effects(made.model, made.tokenizer, SITE, sae)
    assert len(rows) == D_SAE
    for i, row in enumerate(rows):
        for name, wanted in (
            ("writes", logits[i].sort(descending=True)),
            ("suppresses", logits[i].sort()),
            ("reads", reads[:, i].sort(descending=True)),
        ):
            values = [token["value"] for token in row[name]]
            torch.testing.assert_close(torch.tensor(values), wanted.values[:10].detach())
            assert row[name][0]["token"] == int(wanted.indices[0])
        histogram = row["logit_histogram"]
        assert sum(histogram["counts"]) == len(made.tokenizer)
        assert histogram["edges"][-1] == row["writes"][0]["value"]
        assert histogram["edges"][0] == row["suppresses"][0]["value"]


def test_a_map_reads_at_its_inputs_and_writes_at_its_targets(made: Planted) -> None:
    """A transcoder's two sides; and of several hookpoints the sum of what each adds."""
    gpt, d = made.model.transformer, made.model.config.n_embd
    at = {name: Hookpoint(f"layers.{name}") for name in ("1.mlp_in", "0.mlp_out", "1.mlp_out")}
    point, outs = at["1.mlp_in"], (at["0.mlp_out"], at["1.mlp_out"])
    sae = SparseAutoencoder(d, 9, TopK(2), 2 * d, subtract_b_dec=False, sites=(d, d))
    rows = effects(made.model, made.tokenizer, Route((point,), outs), sae)
    written = (sae.W_dec[:, :d] + sae.W_dec[:, d:]) * gpt.ln_f.weight @ made.model.lm_head.weight.T
    written = (written - written.mean(1, keepdim=True)).detach()
    read = (gpt.wte.weight * gpt.h[1].ln_2.weight @ sae.W_enc).detach()
    for i, row in enumerate(rows):
        assert row["writes"][0]["value"] == pytest.approx(written[i].max().item(), rel=1e-4)
        assert row["reads"][0]["value"] == pytest.approx(read[:, i].max().item(), rel=1e-4)
    streams = Route.at(Hookpoint("layers.0.resid_post"), Hookpoint("layers.1.resid_post"))
    sae = SparseAutoencoder(2 * d, 9, TopK(2), sites=(d, d))
    (row, *_) = effects(made.model, made.tokenizer, streams, sae)
    assert "writes" not in row and row["reads"]


def test_sites_of_the_residual_stream(made: Planted) -> None:
    gpt = made.model.transformer
    sae = SparseAutoencoder(16, 12, ReluL1(1.0))
    logits = sae.W_dec * gpt.ln_f.weight @ made.model.lm_head.weight.T
    logits = logits - logits.mean(1, keepdim=True)
    for site, writes, reads in (
        ("resid_pre", True, gpt.wte.weight),
        ("resid_post", True, gpt.wte.weight),
        ("mlp_in", False, gpt.wte.weight * gpt.h[1].ln_2.weight),
        ("mlp_out", True, None),
        ("attn_out", True, None),
    ):
        row = effects(made.model, made.tokenizer, f"layers.1.{site}", sae)[4]
        assert ("writes" in row) == writes and ("reads" in row) == (reads is not None)
        assert "neurons" not in row and "participation" not in row
        if writes:
            assert row["writes"][0]["value"] == pytest.approx(logits[4].max().item(), rel=1e-5)
        if reads is not None:
            best = (reads @ sae.W_enc[:, 4]).max().item()
            assert row["reads"][0]["value"] == pytest.approx(best, rel=1e-5)
    row = effects(made.model, made.tokenizer, "module:transformer.h.1.mlp", sae)[4]
    assert row.keys() == {"neighbours"}


def test_a_model_without_a_head_has_no_writes(made: Planted) -> None:
    config = hf.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=NEURONS,
        vocab_size=300, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    row = effects(hf.BertModel(config).eval(), made.tokenizer, SITE, made.sae)[0]
    assert "writes" not in row and "logit_histogram" not in row and row["reads"]


def test_neurons_participation_and_neighbours(made: Planted) -> None:
    sae = make_sae()
    with torch.no_grad():
        sae.W_dec[0] = 0
        sae.W_dec[0, 3] = -2
        sae.W_dec[1] = 1
        sae.W_dec[2] = 0
        sae.W_dec[3] = 3 * sae.W_dec[4]
    rows = effects(made.model, made.tokenizer, SITE, sae)
    assert rows[0]["neurons"][0] == {"neuron": 3, "value": -2}
    assert rows[0]["participation"] == pytest.approx(1)
    assert rows[1]["participation"] == pytest.approx(NEURONS)
    assert rows[2]["participation"] is None and rows[2]["logit_histogram"] is None
    assert rows[3]["neighbours"][0] == {"feature": 4, "value": pytest.approx(1)}
    directions = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    for i, row in enumerate(rows):
        cosines = directions @ directions[i]
        assert i not in [n["feature"] for n in row["neighbours"]] and len(row["neighbours"]) == 10
        for neighbour in row["neighbours"]:
            assert neighbour["value"] == pytest.approx(
                cosines[neighbour["feature"]].item(), abs=1e-5
            )


# ------------------------------------------------------------------------------ features of a text


def test_features_of_a_prompt_are_the_largest_activations(made: Planted) -> None:
    text = "the cat 日本<|end|> sat"
    ids = made.tokenizer.encode(text)
    found = prompt_features(made.model, made.tokenizer, made.sae, SITE, text, k=4)
    assert "".join(piece for piece, _ in found) == text and len(found) == len(ids)
    point = Hookpoint.parse(SITE)
    with torch.no_grad(), capture(made.model, [point]) as captured:
        made.model(torch.tensor([ids]))
    acts = made.sae.encode(captured[point])[0]
    for i, (_, pairs) in enumerate(found):
        if ids[i] == made.tokenizer.eos_token_id:
            assert pairs == []
            continue
        wanted = acts[i].topk(4)
        assert [f for f, _ in pairs] == wanted.indices[wanted.values > 0].tolist()
        torch.testing.assert_close(
            torch.tensor([a for _, a in pairs]), wanted.values[wanted.values > 0].detach()
        )


def test_a_prompt_must_fit_the_model(made: Planted) -> None:
    for text in ("", "cat " * 100):
        with pytest.raises(DataError, match=f"the model reads 1 to {CONTEXT}"):
            prompt_features(made.model, made.tokenizer, made.sae, SITE, text)


def test_rows_are_cut_to_the_budget(made: Planted) -> None:
    rows = replace(made.rows, kept=torch.ones_like(made.rows.kept))
    batches = [rows[i : i + 8] for i in range(0, ROWS, 8)]
    for wanted, expected in (
        (1, 1),
        (CONTEXT, 1),
        (CONTEXT + 1, 2),
        (CONTEXT * 9, 9),
        (10**9, ROWS),
    ):
        cut = TokenBatch.join(list(module._upto(batches, wanted)))
        assert len(cut) == expected


def test_the_strongest_firings_come_in_the_order_of_a_stable_sort():
    value = np.random.default_rng(0).integers(1, 400, 3000).astype(np.float32)  # many are equal
    firings = module._Firings(np.arange(3000), value)
    assert [*firings._strongest()] == np.argsort(-value, kind="stable").tolist()


@pytest.mark.parametrize("spread", [1, 100])
def test_sums_by_id_are_the_same_with_and_without_a_sort(spread: int):
    random = np.random.default_rng(0)
    ids, values = spread * random.integers(0, 50, 200), random.random(200).astype(np.float32)
    found, sums = module._summed(ids, values)
    assert found.tolist() == sorted(set(ids.tolist()))
    assert sums.tolist() == pytest.approx([values[ids == i].sum() for i in found])
