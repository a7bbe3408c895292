"""One forward pass of the language model serves all SAEs, they learn, the log is complete, and what
was learnt survives Ctrl-C."""

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny import BATCH, CONTEXT, MAPS, RELU, TOKENS, along, llama, planned, save

from sae import config, training
from sae.autoencoder import SparseAutoencoder
from sae.planning import Plan
from sae.routes import Route
from sae.store import Run, read_manifest, sha256

BOTH = {"hookpoints": "layers.*.mlp_act"}
METRICS = {"loss", "mse", "fvu", "l0", "dead", "revived", "lr", "sequences", "masked", "skipped"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("training"), llama())


def counted(plan: Plan) -> tuple[Counter[str], Path]:
    """Train, and count forward passes, token batches and reports."""
    counts: Counter[str] = Counter()

    def batches(*args, **kwargs):
        for rows in type(plan.source).train(plan.source, *args, **kwargs):
            counts["batches"] += 1
            yield rows

    plan.source.train = batches
    hook = plan.lm.model.register_forward_pre_hook(lambda *_: counts.update(["forward"]))
    with_report = training.train(plan, lambda *_: counts.update(["report"]))
    hook.remove()
    return counts, with_report


def test_two_saes_learn_from_one_forward_pass_a_batch(folder: Path, tmp_path: Path) -> None:
    one, _ = counted(planned(folder, {"output": str(tmp_path / "one")}))
    two, run = counted(planned(folder, BOTH | {"output": str(tmp_path / "two")}))
    assert one == two
    assert two["forward"] == two["batches"] <= TOKENS // (4 * CONTEXT) + 6  # the pool is read ahead
    assert list(Run(run).saes()) == ["layers.0.mlp_act", "layers.1.mlp_act"]


@pytest.mark.parametrize("changes", [{}, RELU], ids=["topk", "relu_l1"])
def test_loss_falls_and_the_log_is_complete(folder: Path, tmp_path: Path, changes: dict) -> None:
    reported = []
    plan = planned(folder, BOTH | changes | {"output": str(tmp_path / "run"), "optim.lr": "0.01"})
    run = training.train(plan, lambda tokens, rows: reported.append((tokens, rows)))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = [str(point) for point in plan.hookpoints]
    assert [(row["tokens"], row["hookpoint"]) for row in rows] == [
        (tokens, name) for tokens, _ in reported for name in names
    ]
    assert [tokens for tokens, _ in reported] == [BATCH, 21 * BATCH, TOKENS]
    for row in rows:
        assert row.keys() == METRICS | {"tokens", "seconds", "hookpoint"}
        assert row["seconds"] >= 0 and 1 <= row["sequences"] <= BATCH and row["l0"] <= 48
    for name in names:
        first, *_, last = [row for row in rows if row["hookpoint"] == name]
        assert last["fvu"] < 0.7 * first["fvu"]
        assert last["mse"] < first["mse"]
    assert config.load(run / "config.yaml") == plan.config


@pytest.mark.parametrize("k_start", [1, 4, 12])
def test_k_goes_from_its_start_to_its_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k_start: int
) -> None:
    """In the second quarter of the tokens; at d_sae 48 more features are positive than that."""
    monkeypatch.setattr(training, "LOG_EVERY_STEPS", 1)
    changes = {
        "sae.sparsity.k_start": str(k_start),
        "sae.sparsity.k_ramp": ["0.25", "0.5"],
        "optim.lr": "1e-9",
        "output": str(tmp_path / "run"),
    }
    found = []
    plan = planned(folder, changes)
    training.train(plan, lambda _, rows: found.append(rows["layers.1.mlp_act"]["l0"]))
    steps = TOKENS // BATCH
    expected = [
        round(k_start + (4 - k_start) * min(1, max(0, 4 * step / steps - 1)))
        for step in range(steps)
    ]
    assert found == expected


def test_each_sae_of_a_grid_is_that_of_a_run_of_its_own(folder: Path, tmp_path: Path) -> None:
    """To the bit, from one forward pass for all; its manifest and the log say which it is."""
    grid = {"grid": {"sae.sparsity.k": [2, 4], "sae.init": ["random", "data"]}}
    single, _ = counted(planned(folder, BOTH | {"output": str(tmp_path / "single")}))
    counts, run = counted(planned(folder, BOTH | grid | {"output": str(tmp_path / "grid")}))
    assert counts == single and len(Run(run).saes()) == 8
    alone = {"sae.sparsity.k": "2", "sae.init": "data", "output": str(tmp_path / "alone")}
    other = Run(training.train(planned(folder, alone))).sae()
    name = "layers.1.mlp_act-k=2-init=data"
    assert sha256(Run(run).sae(name) / "sae.safetensors") == sha256(other / "sae.safetensors")
    settings = {"sae.sparsity.k": 2, "sae.init": "data"}
    assert read_manifest(Run(run).sae(name))["grid"] == settings
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    (first, *_) = [row for row in rows if row["sae"] == name]
    assert first["hookpoint"] == "layers.1.mlp_act" and settings.items() <= first.items()


def test_seeds_of_a_grid_differ_in_the_weights_alone(folder: Path, tmp_path: Path) -> None:
    """The run's own seed decides about the text: with it, an SAE is that of a plain run."""
    grid = {"grid.seed": ["0", "1"], "output": str(tmp_path / "grid"), "tokens": "512"}
    saes = Run(training.train(planned(folder, grid))).saes()
    plain = {"output": str(tmp_path / "plain"), "tokens": "512"}
    alone = Run(training.train(planned(folder, plain))).sae()
    zero, one = (sha256(sae / "sae.safetensors") for sae in saes.values())
    assert zero == sha256(alone / "sae.safetensors") != one
    assert [read_manifest(sae)["seed"] for sae in saes.values()] == [0, 1]


def test_the_saved_weights_take_raw_activations(folder: Path, tmp_path: Path) -> None:
    """The stored SAE does on raw activations what the last logged step did on scaled ones."""
    from sae.activations import read

    fvu = []
    plan = planned(folder, {"output": str(tmp_path / "run"), "optim.lr": "0.01"})
    run = training.train(plan, lambda _, rows: fvu.append(rows["layers.1.mlp_act"]["fvu"]))
    sae = SparseAutoencoder.from_pretrained(run)
    (point,) = plan.hookpoints
    x = read(plan.lm.model, [point], next(plan.source.heldout(8)), plan.dtype)[0][point]
    missed = (sae(x).recon - x).square().sum() / (x - x.mean(0)).square().sum()
    assert missed.item() == pytest.approx(fvu[-1], rel=0.3)
    manifest = read_manifest(Run(run).sae())
    assert manifest["tokens"] == TOKENS and manifest["ended"] == "complete"
    assert manifest["hookpoint"] == str(point) and manifest["model"] == str(folder / "model")
    assert manifest["data_fingerprint"] == plan.source.fingerprint


@pytest.mark.parametrize("name", MAPS)
def test_a_map_reads_its_inputs_and_rebuilds_its_targets(
    folder: Path, tmp_path: Path, name: str
) -> None:
    """In raw activations, side by side; what is saved says which."""
    from sae.activations import read

    fvu = []
    plan = planned(folder, MAPS[name] | {"output": str(tmp_path / "run"), "optim.lr": "0.01"})
    ((given, member),) = plan.members.items()
    route = member.route
    run = training.train(plan, lambda _, rows: fvu.append(rows[given]["fvu"]))
    sae = SparseAutoencoder.from_pretrained(run)
    acts, _ = read(plan.lm.model, plan.hookpoints, next(plan.source.heldout(8)), plan.dtype)
    x, y = route.x(acts), route.y(acts)
    widths = tuple(plan.widths[point] for point in route.targets)
    assert (sae.d_in, sae.d_out, sae.sites) == (x.shape[1], y.shape[1], widths)
    assert (sae.W_skip is not None) == plan.config.sae.skip and fvu[-1] < 0.9
    missed = (sae(x).recon - y).square().sum() / (y - y.mean(0)).square().sum()
    assert missed.item() < 1
    manifest = read_manifest(Run(run).sae())
    assert Route.parse("", manifest) == route and manifest["hookpoint"] == given
    scales = [manifest["scale"]] if len(route.inputs) == 1 else manifest["scale"]
    norms = [16**0.5 / scale for scale in scales]
    found = [acts[point].norm(dim=1).mean().item() for point in route.inputs]
    assert norms == pytest.approx(found, rel=0.1)


def test_a_map_of_a_hookpoint_to_itself_is_the_plain_sae_to_the_bit(
    folder: Path, tmp_path: Path
) -> None:
    point = "layers.1.mlp_out"
    plain = training.train(planned(folder, {"hookpoints": point, "output": str(tmp_path / "a")}))
    changes = along([point], [point]) | {"output": str(tmp_path / "b")}
    same = training.train(planned(folder, changes))
    first, second = (sha256(Run(run).sae(point) / "sae.safetensors") for run in (plain, same))
    assert first == second


def test_a_map_goes_on_from_another(folder: Path, tmp_path: Path) -> None:
    first, second = [], []
    changes = MAPS["all to all"] | {"output": str(tmp_path / "first"), "optim.lr": "0.01"}
    run = training.train(planned(folder, changes), lambda *row: first.append(row))
    changes |= {"output": str(tmp_path / "second"), "init_from": str(run)}
    training.train(planned(folder, changes), lambda *row: second.append(row))
    before, after = (next(iter(rows[0][1].values()))["fvu"] for rows in (first, second))
    assert after < 0.8 * before


def test_one_seed_gives_one_result_and_another_seed_another(folder: Path, tmp_path: Path) -> None:
    hashes = []
    for number, seed in enumerate("001"):
        changes = {"output": str(tmp_path / str(number)), "seed": seed, "tokens": "512"}
        run = training.train(planned(folder, changes))
        hashes.append(sha256(Run(run).sae() / "sae.safetensors"))
    assert hashes[0] == hashes[1] != hashes[2]


def test_ctrl_c_keeps_what_was_learnt(folder: Path, tmp_path: Path) -> None:
    def stop(tokens: int, rows: dict) -> None:
        if tokens > BATCH:
            os.kill(os.getpid(), signal.SIGINT)

    plan = planned(folder, BOTH | {"output": str(tmp_path / "run")})
    run = training.train(plan, stop)
    assert read_manifest(run)["tokens"] == 21 * BATCH
    for sae in Run(run).saes().values():
        manifest = read_manifest(sae)
        assert manifest["ended"] == "SIGINT" and manifest["tokens"] == 21 * BATCH
        assert SparseAutoencoder.from_pretrained(sae).d_sae == 48
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_text_that_ends_early_is_a_shorter_run(folder: Path, tmp_path: Path) -> None:
    plan = planned(folder, {"output": str(tmp_path / "run")})
    rows = list(plan.source.train(4, repeat=False))[:8]
    plan.source.train = lambda *_, **__: iter(rows)
    run = training.train(plan)
    read = sum(int(batch.kept.sum()) for batch in rows)
    assert read_manifest(run)["tokens"] == read // BATCH * BATCH < TOKENS
    assert read_manifest(Run(run).sae())["ended"] == "text ended"


def test_init_from_goes_on_where_the_other_run_ended(folder: Path, tmp_path: Path) -> None:
    first, second = [], []
    changes = {"output": str(tmp_path / "first"), "optim.lr": "0.01"}
    run = training.train(planned(folder, changes), lambda *row: first.append(row))
    changes |= {"output": str(tmp_path / "second"), "init_from": str(run)}
    training.train(planned(folder, changes), lambda *row: second.append(row))
    before, after = (rows[0][1]["layers.1.mlp_act"]["fvu"] for rows in (first, second))
    assert after < 0.8 * before


def test_nothing_is_sent_anywhere_unless_asked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a project wandb is not even imported; with one that fails, training goes on."""
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    short = {"output": str(tmp_path / "off"), "tokens": "128"}
    assert training.train(planned(folder, short)).is_dir()
    short |= {"output": str(tmp_path / "on"), "wandb.project": "mine"}
    with pytest.warns(UserWarning, match="training goes on"):
        run = training.train(planned(folder, short))
    assert read_manifest(run)["tokens"] == 128


def test_a_dead_feature_that_is_not_resampled_stays_dead(folder: Path, tmp_path: Path) -> None:
    """96 never fire, a batch of 64 tokens revives 64 of them, those quiet longest."""
    from sae.learner import Learner

    changes = RELU | {"output": str(tmp_path / "run"), "optim.dead_after": str(BATCH)}
    plan = planned(folder, changes | {"sae.d_sae": "96"})
    stream = training.Training(plan).stream
    (point,) = plan.hookpoints
    learner = Learner.begin(plan.config, stream.statistics()[point], dtype=plan.dtype)
    batch = next(iter(stream))[point]
    with torch.no_grad():
        learner.sae.b_enc.fill_(-1e6)
    learner.quiet += torch.arange(96)
    learner.apply(batch, learner.gradients(batch, 0.1), 0.1)
    assert learner.revived == BATCH and int(learner.dead.sum()) == 96 - BATCH
    assert torch.equal(learner.quiet[-BATCH:], torch.zeros(BATCH, dtype=torch.long))
