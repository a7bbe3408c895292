"""A plan refuses, before any time is spent and without writing, whatever could fail later on."""

import re
from pathlib import Path

import pytest
import torch
from tiny import BATCH, CONTEXT, MAPS, RELU, TOKENS, planned, save

from sae import planning
from sae.activations import read
from sae.autoencoder import SparseAutoencoder
from sae.config import resolve
from sae.errors import ConfigError, DataError, HookpointError, RunError, SAEError
from sae.sparsity import ReluL1, TopK
from sae.store import write_manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("planning"))


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_a_plan_says_what_it_reads_makes_and_needs(folder: Path) -> None:
    before = files(folder)
    made = planned(folder)
    lines = dict(made.lines())
    assert [str(p) for p in made.hookpoints] == ["layers.1.mlp_act"]
    assert lines["SAE"] == "layers.1.mlp_act: 24 → 48 features, topk k 4"
    assert lines["tokens"].startswith(f"{TOKENS:,} needed")
    assert made.source.fingerprint in lines["text"] and str(folder / "run") in lines["disk"]
    assert made.sae_bytes() == 4 * (2 * 24 * 48 + 48 + 24)
    assert files(folder) == before


def test_a_plan_says_what_its_penalty_comes_to(folder: Path) -> None:
    wanted = {"kind": "relu_l1", "target_l0": 8, "p_end": 0.3}
    line = dict(planned(folder, {"sae.sparsity": wanted}).lines())["SAE"]
    assert line.endswith("relu_l1 L0 8 by steering l1, p 1 → 0.3")


@pytest.mark.parametrize(
    ("name", "line", "numbers"),
    [
        ("transcoder", "layers.1.mlp_in-to-layers.1.mlp_out: 16 → 48 features → 16", 48 * 33 + 16),
        ("skip transcoder", "topk k 4 and W_skip", 48 * 33 + 16 + 256),
        ("crosscoder", "layers.0-1.mlp_out: 32 → 48 features, topk", 48 * 65 + 32),
        ("all to all", "layers.0-1.mlp_in-to-layers.0-1.mlp_out: 32 → 48", 48 * 65 + 32 + 32 * 32),
    ],
)
def test_a_plan_of_a_map_counts_both_its_sides(
    folder: Path, name: str, line: str, numbers: int
) -> None:
    made = planned(folder, MAPS[name])
    assert line in dict(made.lines())["SAE"] and made.sae_bytes() == 4 * numbers
    assert made.pool_bytes() == 512 * (4 * 16 * len(made.hookpoints) + 16)
    assert planning.estimate(made)


def test_a_plan_says_how_often_the_text_is_read_and_that_none_is_held_out(
    folder: Path, tmp_path: Path
) -> None:
    once = " ".join(text for _, text in planned(folder).lines())
    assert "TIMES" not in once and "HELD OUT" not in once
    have = planned(folder).source.tokens_available
    assert have is not None
    changes = {"tokens": str(3 * have), "data.repeat": "true", "data.heldout": "0.2"}
    text = " ".join(text for _, text in planned(folder, changes).lines())
    assert "READ 3.0 TIMES" in text and "HELD OUT" not in text
    (tmp_path / "one.txt").write_text("the old cat sat " * 400, encoding="utf-8")
    for changes in ({"data.heldout": "0"}, {"data.source": str(tmp_path / "one.txt")}):
        assert "NOTHING IS HELD OUT" in str(list(planned(folder, changes).lines()))


def test_a_plan_of_a_grid_lists_its_saes_and_counts_them_all(folder: Path) -> None:
    grid = {"hookpoints": "layers.*.mlp_act", "grid": {"sae.d_sae": [8, 48], "sae.sparsity.k": [2]}}
    made = planned(folder, grid)
    lines = [text for what, text in made.lines() if what == "SAE"]
    assert len(lines) == len(made.members) == 4
    assert lines[0] == "layers.0.mlp_act-d_sae=8-k=2: 24 → 8 features, topk k 2"
    assert made.sae_bytes() == 2 * sum(4 * (2 * 24 * d_sae + d_sae + 24) for d_sae in (8, 48))
    assert made.pool_bytes() == 512 * (2 * 4 * 24 + 16)  # of two hookpoints, whatever the grid
    with pytest.raises(ConfigError, match=r"sae.sparsity.k: 40 came, wanted at most sae.d_sae"):
        planned(folder, grid | {"grid.sae.sparsity.k": ["2", "40"]})


def test_a_grid_whose_names_no_folder_can_have_is_refused(folder: Path) -> None:
    prefixes = [*((n + 1) / 100 for n in range(60)), 1.0]
    with pytest.raises(ConfigError, match=r"named layers.1.mlp_act-prefixes=0.01_.* at most 200"):
        planned(folder, {"grid": {"sae.prefixes": [prefixes]}})


@pytest.mark.parametrize("site", ["mlp_act", "mlp_in", "resid_pre"])
def test_the_memory_counts_the_text_and_the_activations_as_they_arrive(
    folder: Path, site: str
) -> None:
    point = f"layers.1.{site}"
    made = planned(folder, {"hookpoints": point, "model.dtype": "bfloat16"})
    rows = next(made.source.train(4, repeat=False))
    (acts,) = read(made.lm.model, made.hookpoints, rows, made.dtype)[0].values()
    pool = 512 * (acts.shape[1] * acts.element_size() + 2 * 8)
    assert made.pool_bytes() == pool
    kept = [row for side in (True, False) for row in made.source._kept[side].tokens]
    text = sum(row.nbytes * 3 + len(row) for row in kept)
    weights = sum(p.nbytes for p in made.lm.model.parameters())
    assert made.memory_bytes() == weights + text + pool + 4 * made.sae_bytes()


@pytest.mark.parametrize("changes", [{}, RELU], ids=["topk", "relu_l1"])
def test_an_estimate_is_a_time_and_a_speed(folder: Path, changes: dict) -> None:
    before = files(folder)
    ((name, value),) = planning.estimate(planned(folder, changes))
    assert name == "time"
    assert re.fullmatch(r"about [\d.]+ (s|min|h) \([\d,]+ tokens/s\)", value), value
    assert files(folder) == before


def test_a_wanted_l0_above_the_number_of_features_is_refused(folder: Path) -> None:
    wanted = {"sae.d_sae": "null", "sae.sparsity": {"kind": "relu_l1", "target_l0": 500}}
    with pytest.raises(ConfigError, match="target_l0: 500 came, wanted at most the 192 features"):
        planned(folder, wanted)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "0 s"), (99, "99 s"), (150, "2 min"), (9000, "2.5 h")]
)
def test_durations_are_in_the_unit_people_use(seconds: float, words: str) -> None:
    assert planning._duration(seconds) == words


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"hookpoints": "layers.7.mlp_act"}, HookpointError, "layers 0-1"),
        ({"data.context": str(2 * CONTEXT)}, DataError, f"at most {CONTEXT}"),
        ({"tokens": "1000000"}, DataError, "--data.repeat true"),
        ({"optim.pool": str(BATCH)}, ConfigError, f"at least {BATCH + 4 * CONTEXT}"),
        ({"sae.d_sae": "null", "sae.sparsity.k": "500"}, ConfigError, "192 features"),
        ({"sae.d_sae": "null", "sae.sparsity.k_start": "500"}, ConfigError, "k_start: 500"),
        ({"sae.d_sae": "999999999999"}, ConfigError, "GB of memory"),
        ({"optim.pool": "99999999999999"}, ConfigError, "optim.pool: 99,999,999,999,999 tokens"),
        ({"device": "cuda:99"}, ConfigError, "give cpu or auto"),
        ({"tokens": "10304", "finetune.tokens": "64"}, DataError, "and 512 for the pool"),
        ({"sae.skip": "true"}, ConfigError, "layers.1.mlp_act is rebuilt from itself"),
        (MAPS["transcoder"] | {"targets": ["layers.7.mlp_out"]}, HookpointError, "layers 0-1"),
        ({"init_from": "nowhere"}, RunError, "init_from: nowhere: no such folder"),
    ],
)
def test_what_would_fail_later_is_refused(
    folder: Path, changes: dict[str, str], error: type[Exception], words: str
) -> None:
    before = files(folder)
    with pytest.raises(error, match=re.escape(words)):
        planned(folder, changes)
    assert files(folder) == before


def test_a_pool_of_just_the_needed_size_is_planned(folder: Path) -> None:
    assert planned(folder, {"optim.pool": str(BATCH + 4 * CONTEXT)}).config.optim.pool


def test_a_short_text_may_be_repeated(folder: Path) -> None:
    assert planned(folder, {"tokens": "1000000", "data.repeat": "true"}).config.tokens == 1_000_000


def test_outputs_that_cannot_be_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name, words in (
        ("file", "exists already"),
        ("full", "exists already"),
        ("link", "exists already"),
        ("file/below/it", "is a file"),
        ("n" * 300, "cannot be used"),
    ):
        with pytest.raises(RunError, match=words):
            planned(folder, {"output": str(tmp_path / name)})
    assert (tmp_path / "full" / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert planned(folder, {"output": str(tmp_path / "empty")}).output == tmp_path / "empty"


def test_a_full_disk_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 100})
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunError, match="make room"):
        planned(folder)


def test_weights_to_start_from_must_be_of_the_same_kind_and_size(
    folder: Path, tmp_path: Path
) -> None:
    SparseAutoencoder(24, 48, TopK(4)).save_pretrained(tmp_path / "same")
    SparseAutoencoder(24, 40, ReluL1(1), subtract_b_dec=False).save_pretrained(tmp_path / "other")
    assert planned(folder, {"init_from": str(tmp_path / "same")}).config.init_from
    with pytest.raises(ConfigError) as caught:
        planned(folder, {"init_from": str(tmp_path / "other")})
    for words in ("d_sae 40, not 48", "subtract_b_dec False, not True", "relu_l1, not topk"):
        assert words in str(caught.value)


def test_weights_to_start_from_are_refused_before_anything_slow(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is loaded where that tells nothing, before the text is read where it does.

    Of a run with several SAEs one that fits is enough until it is known which are wanted.
    """
    run = tmp_path / "run"
    for name, d_in, d_sae in (("layers.0.mlp_act", 24, 48), ("layers.1.mlp_act", 24, 40)):
        SparseAutoencoder(d_in, d_sae, TopK(4)).save_pretrained(run / "saes" / name)
        write_manifest(run / "saes" / name, {"hookpoint": name})
    (run / "config.yaml").write_text("")
    SparseAutoencoder(16, 48, TopK(4)).save_pretrained(tmp_path / "narrow")
    (tmp_path / "empty").mkdir()

    def refused(slow: str, start: Path, **changes: str) -> str:
        with monkeypatch.context() as patch, pytest.raises(SAEError) as caught:
            patch.setattr(planning, slow, lambda *_: pytest.fail(f"{slow} is too late"))
            planned(folder, changes | {"init_from": str(start)})
        return str(caught.value)

    for start, words in (("gone", "no such folder"), ("empty", "holds no SAE")):
        assert words in refused("open_model", tmp_path / start)
    assert "mlp_act has d_sae 48, not 24; make" in refused("open_model", run, **{"sae.d_sae": "24"})
    assert "layers.1.mlp_act has d_sae 40, not 48" in refused("open_source", run)
    assert "narrow has d_in 16, not 24, d_out 16" in refused("open_source", tmp_path / "narrow")


def test_weights_to_start_from_must_be_of_the_same_place(folder: Path, tmp_path: Path) -> None:
    lm = planned(folder).lm

    def start(**metadata: str | None) -> str:
        SparseAutoencoder(24, 48, TopK(4)).save_pretrained(tmp_path / "sae", metadata)
        return planned(folder, {"init_from": str(tmp_path / "sae")}).config.init_from or ""

    assert start(model=lm.name, revision=None, hookpoint="layers.1.mlp_act")
    assert start(model="before/it/moved", revision=lm.revision)
    with pytest.raises(ConfigError, match="is of the model gpt2, not of"):
        start(model="gpt2", revision=None)
    with pytest.raises(ConfigError, match=r"is of layers.0.mlp_act, not of layers.1.mlp_act"):
        start(model=lm.name, hookpoint="layers.0.mlp_act")


def test_a_torch_that_does_not_tell_of_bf16_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert planning.pick_dtype("auto", torch.device("cpu")) == torch.float32


def test_devices_and_types() -> None:
    cpu = torch.device("cpu")
    assert planning.pick_device("cpu") == cpu
    assert planning.pick_device("auto").type in ("cpu", "cuda")
    for name in ("gpu", "cuda:", "cuda:x", "meta", "mps:0"):
        with pytest.raises(ConfigError, match="wanted auto, cpu, cuda or cuda:N"):
            planning.pick_device(name)
    assert planning.pick_dtype("float32", cpu) == torch.float32
    assert planning.pick_dtype("bfloat16", cpu) == torch.bfloat16
    assert planning.pick_dtype("auto", cpu) in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("given", "d_in", "wanted"),
    [({}, 512, 0.4), ({"target_l0": 8}, 512, 0.8), ({"target_l0": 8, "bandwidth": 0.3}, 512, 0.3)],
)
def test_a_kernel_is_a_tenth_as_wide_as_activations_are_large(
    given: dict[str, float], d_in: int, wanted: float
) -> None:
    """Where L0 of them, all alike and at right angles, make up a token of norm √d_in."""
    chosen = {"kind": "jumprelu"} | given
    config = resolve(None, {f"sae.sparsity.{name}": value for name, value in chosen.items()})
    sparsity = planning.sparsity_of(config, d_in)
    assert sparsity.config()["bandwidth"] == pytest.approx(wanted)
