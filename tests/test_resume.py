"""An interrupted run goes on to the same bits; what cannot give them is refused by name; numbers
that are not finite never reach the weights.

Every test compares SHA-256 of the final weights with a run that nobody disturbed.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BATCH, MAPS, RELU, TOKENS, overrides, planned, save
from variants import VARIANTS

from sae import checkpoint, cli, store, training
from sae.activations import ActivationStream
from sae.checkpoint import Checkpoint
from sae.config import TrainConfig
from sae.errors import ConfigError, RunError
from sae.resuming import check_config, saved_state
from sae.store import Run, read_manifest, sha256

BOTH = {"hookpoints": "layers.*.mlp_act"}
EVERY = {"checkpoint.every_tokens": str(4 * BATCH)}
KINDS = {name: variant.tiny for name, variant in VARIANTS.items()}
KINDS["moving topk"] = {"sae.sparsity.k_start": "2"}
KINDS["steered gated"] = VARIANTS["gated"].tiny | {"sae.sparsity.target_l0": "4"}
KINDS["finetuned batchtopk"] = VARIANTS["batchtopk"].tiny | {"finetune.tokens": str(8 * BATCH)}
KINDS["matryoshka topk"] = {"sae.prefixes": ["0.25", "1"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("resume"))


def weights(run: Path) -> list[str]:
    return [sha256(sae / "sae.safetensors") for sae in Run(run).saes().values()]


def interrupted(number: int, at: int) -> training.Report:
    """Sends a signal at the first logged step with `at` tokens or more."""

    def report(tokens: int, rows: dict) -> None:
        if tokens >= at:
            os.kill(os.getpid(), number)

    return report


def trained(folder: Path, output: Path, changes: dict | None = None, **options: Any) -> Path:
    resuming = options.get("resume") is not None
    plan = planned(folder, {"output": str(output)} | (changes or {}), resuming=resuming)
    return training.train(plan, **options)


@pytest.fixture(scope="module", autouse=True)
def every_step_is_logged() -> Iterator[None]:
    """So that a report comes at each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LOG_EVERY_STEPS", 2)
        yield


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run with some changes that nobody disturbed; each is trained once."""
    made: dict[str, Path] = {}

    def of(changes: dict | None = None) -> Path:
        key = json.dumps(changes)
        if key not in made:
            made[key] = trained(folder, tmp_path_factory.mktemp("whole") / "run", changes)
        return made[key]

    return of


# ------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [(3,), (1, 9, 10, 29)], ids=str)
def test_an_interrupted_run_ends_in_the_same_bits(
    folder: Path,
    tmp_path: Path,
    undisturbed: Callable[..., Path],
    kind: str,
    steps: tuple[int, ...],
) -> None:
    """Several interruptions in one epoch and across its edge: the text has about 1,400 tokens."""
    changes = BOTH | KINDS[kind] | {"data.repeat": "true"}
    whole, run = undisturbed(changes), tmp_path / "run"
    resume = None
    for step in steps:
        report = interrupted(signal.SIGTERM, step * BATCH)
        trained(folder, run, changes, report=report, resume=resume)
        assert read_manifest(run)["ended"] == "SIGTERM"
        resume = saved_state(run)
    trained(folder, run, changes, resume=resume)
    assert weights(run) == weights(whole) and len(weights(run)) == 2
    assert not (run / "steps").exists()
    assert metrics(run) == metrics(whole)
    assert [e["event"] for e in events(run)] == ["resumed"] * len(steps)


@pytest.mark.parametrize("sparsity", [{}, RELU | {"optim.dead_after": "200"}], ids=["topk", "relu"])
@pytest.mark.parametrize("name", MAPS)
def test_an_interrupted_map_ends_in_the_same_bits(
    folder: Path, tmp_path: Path, name: str, sparsity: dict
) -> None:
    """Each hookpoint has a scale of its own, which a checkpoint keeps."""
    changes, run = MAPS[name] | sparsity, tmp_path / "run"
    whole = trained(folder, tmp_path / "whole", changes)
    trained(folder, run, changes, report=interrupted(signal.SIGTERM, 17 * BATCH))
    trained(folder, run, changes, resume=saved_state(run))
    assert weights(run) == weights(whole) and len(weights(run)) == 1
    assert metrics(run) == metrics(whole)


def test_an_interrupted_grid_ends_in_the_same_bits(folder: Path, tmp_path: Path) -> None:
    grid = {"grid": {"sae.sparsity.kind": ["topk", "relu_l1"], "sae.d_sae": [24, 48], "seed": [3]}}
    changes, run = BOTH | grid | {"sae.sparsity.k": None}, tmp_path / "run"
    whole = trained(folder, tmp_path / "whole", changes)
    trained(folder, run, changes, report=interrupted(signal.SIGTERM, 17 * BATCH))
    without = planned(folder, BOTH | {"output": str(tmp_path / "other")}).config
    with pytest.raises(ConfigError, match=r"grid.seed: None came, the run to resume has \[3\]"):
        check_config(saved_state(run), without)
    turned = {"grid": dict(reversed(grid["grid"].items()))}
    with pytest.raises(ConfigError, match=r"grid: seed, sae.d_sae, .+ has the order sae"):
        check_config(saved_state(run), planned(folder, changes | turned | {"output": "o"}).config)
    trained(folder, run, changes, resume=saved_state(run))
    assert weights(run) == weights(whole) and len(set(weights(run))) == 8
    assert metrics(run) == metrics(whole)


def metrics(run: Path) -> list[dict]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def test_a_stream_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    """Documents that are read as training goes, over three passes."""
    lines = (folder / "texts").glob("*.txt")
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": f.read_text()}) for f in sorted(lines)))
    changes = {"data.source": str(data), "data.streaming": "true", "data.repeat": "true"}
    whole, run = trained(folder, tmp_path / "whole", changes), tmp_path / "run"
    trained(folder, run, changes, report=interrupted(signal.SIGINT, 9 * BATCH))
    trained(
        folder, run, changes, report=interrupted(signal.SIGINT, 25 * BATCH), resume=saved_state(run)
    )
    trained(folder, run, changes, resume=saved_state(run))
    assert weights(run) == weights(whole)


def test_a_stop_while_the_pool_fills_is_exact_too(
    folder: Path, tmp_path: Path, undisturbed: Callable[..., Path]
) -> None:
    whole, run = undisturbed(), tmp_path / "run"
    plan = planned(folder, {"output": str(run)})
    passes = iter(range(1000))

    def stop_in_the_fill(*_: Any) -> None:
        if next(passes) == 9:  # the first fill takes six
            os.kill(os.getpid(), signal.SIGTERM)

    hook = plan.lm.model.register_forward_pre_hook(stop_in_the_fill)
    training.train(plan)
    hook.remove()
    assert 0 < read_manifest(run)["tokens"] < TOKENS
    trained(folder, run, resume=saved_state(run))
    assert weights(run) == weights(whole)


def test_time_runs_out_and_the_run_goes_on_later(
    folder: Path, tmp_path: Path, undisturbed: Callable[..., Path]
) -> None:
    whole, run = undisturbed(), tmp_path / "run"
    trained(folder, run, max_seconds=1e-9)
    assert read_manifest(run) | {"tokens": 0, "ended": "max-time"} == read_manifest(run)
    trained(folder, run, resume=saved_state(run))
    assert weights(run) == weights(whole)


def test_a_streams_state_gives_the_rest_of_its_batches(folder: Path) -> None:
    plan = planned(folder)

    def stream(state: dict | None = None) -> ActivationStream:
        start = int(state["reading"][0]) if state else 0
        return ActivationStream(
            plan.lm.model, plan.hookpoints, plan.source.train(4, repeat=False, start=start),
            batch=BATCH, pool=512, dtype=plan.dtype, state=state,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip

    (point,) = plan.hookpoints
    expected = [batch[point] for batch in stream()]
    for cut in (0, 1, 2, len(expected) // 2, len(expected) - 1, len(expected)):
        first = stream()
        for _ in range(cut):
            first.draw()
        rest = [batch[point] for batch in stream(first.state())]
        assert len(rest) == len(expected) - cut
        for got, wanted in zip(rest, expected[cut:], strict=True):
            assert torch.equal(got.x, wanted.x) and torch.equal(got.source, wanted.source)


# ---------------------------------------------------------------------- checkpoints on the disk


@pytest.fixture(scope="module")
def stopped_once(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    report = interrupted(signal.SIGTERM, 13 * BATCH)
    return trained(folder, tmp_path_factory.mktemp("stopped") / "run", EVERY, report=report)


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A run stopped at its 14th step, with checkpoints of the 12th and the last."""
    return Path(shutil.copytree(stopped_once, tmp_path / "stopped"))


def steps(run: Path) -> list[int]:
    return sorted(int(p.name) // BATCH for p in (run / "steps").iterdir())


def test_the_newest_two_are_kept(stopped: Path) -> None:
    assert steps(stopped) == [12, 13]
    assert store.verify(stopped / "steps" / str(13 * BATCH)) == []


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda f: f.write_bytes(b""),
    "short": lambda f: f.write_bytes(f.read_bytes()[:-1]),
    "long": lambda f: f.write_bytes(f.read_bytes() + b"x"),
    "a bit": lambda f: f.write_bytes(f.read_bytes()[:-9] + b"\x01" + f.read_bytes()[-8:]),
    "gone": lambda f: f.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["stream.safetensors", "layers.1.mlp_act.safetensors", "manifest.json"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    folder: Path, undisturbed: Callable[..., Path], stopped: Path, name: str, damage: str
) -> None:
    file = stopped / "steps" / str(13 * BATCH) / name
    DAMAGES[damage](file)
    if store.verify(file.parent):  # a byte more in a manifest may leave it valid
        with pytest.warns(UserWarning, match=rf"steps/{13 * BATCH}.*{name}.*before it"):
            saved = saved_state(stopped)
        assert saved.folder.name == str(12 * BATCH)
    else:
        saved = saved_state(stopped)
    trained(folder, stopped, EVERY, resume=saved)
    assert weights(stopped) == weights(undisturbed())


def test_a_full_disk_names_the_bytes_and_spares_what_is_there(
    folder: Path,
    tmp_path: Path,
    undisturbed: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    trained(folder, run, EVERY, report=interrupted(signal.SIGTERM, 5 * BATCH))
    before = {f: sha256(f) for f in (run / "steps").rglob("*.*")}
    monkeypatch.setattr(checkpoint, "_free", lambda _: 1000)
    with pytest.raises(RunError, match=r"needs [\d,]+ bytes, the disk has 1,000 left"):
        trained(folder, run, EVERY, resume=saved_state(run))
    newest = saved_state(run).folder
    assert {f: sha256(f) for f in newest.rglob("*.*")}.items() <= before.items()
    monkeypatch.undo()
    trained(folder, run, EVERY, resume=saved_state(run))
    assert weights(run) == weights(undisturbed())


def test_two_processes_do_not_write_one_run(folder: Path, tmp_path: Path, stopped: Path) -> None:
    with store.locked(stopped), pytest.raises(RunError, match="written by another process"):
        trained(folder, stopped, EVERY, resume=saved_state(stopped))
    with store.locked(stopped):
        pass  # and a lock that was given back counts no more


# ---------------------------------------------------------------------------------- refusals


def said(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    code = cli.main(["train", *args])
    return code, capsys.readouterr().err


def test_what_cannot_be_resumed(
    folder: Path, tmp_path: Path, stopped: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = str(stopped)
    code, err = said(capsys, "--resume", run, "--optim.lr", "0.1", "--seed", "7")
    assert code == 2 and "optim.lr: 0.1 came, the run to resume has 0.002" in err
    assert "seed: 7 came, the run to resume has 0" in err and err.count("\n") == 2
    code, err = said(
        capsys, *(f"--{k}={v}" for k, v in overrides(folder).items()), f"--output={run}"
    )
    assert code == 2 and f"go on with that run by --resume {run}" in err
    code, err = said(capsys, "--resume", str(tmp_path / "nowhere"))
    assert code == 2 and "no such folder" in err
    complete = trained(folder, tmp_path / "complete")
    code, err = said(capsys, "--resume", str(complete))
    assert code == 2 and "the run is complete" in err
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    code, err = said(capsys, "--resume", run)
    assert code == 2 and "then, 77 now" in err and "--allow-changed-environment" in err
    assert steps(stopped) == [12, 13]
    assert cli.main(["train", "--resume", run, "--allow-changed-environment"]) == 0
    assert "changed threads" in capsys.readouterr().out


def test_auto_resumes_begins_or_finds_it_done(
    folder: Path, tmp_path: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = overrides(folder) | EVERY
    for output, word in (
        (tmp_path / "fresh", "this is a new run"),
        (stopped, f"resumes at {13 * BATCH} of"),
        (stopped, "is complete; nothing to do"),
    ):
        options = [
            part for k, v in (given | {"output": str(output)}).items() for part in (f"--{k}", v)
        ]
        assert cli.main(["train", *options, "--resume", "auto"]) == 0
        assert word in capsys.readouterr().out
    assert weights(stopped) == weights(tmp_path / "fresh")


def test_a_run_begun_with_a_ramp_that_moves_nothing_goes_on(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An earlier version began it; a new run is refused, by --resume auto too."""
    run, ramp = tmp_path / "run", {"sae.sparsity.k_ramp": ["0", "0.5"]}
    with monkeypatch.context() as earlier:
        earlier.setattr("sae.config.refuse_idle_ramps", lambda config: None)
        trained(folder, run, ramp, report=interrupted(signal.SIGTERM, 5 * BATCH))
    flags = [f"--{key}={value}" for key, value in overrides(folder).items()]
    auto = [*flags, "--sae.sparsity.k_ramp", "0", "0.5", "--resume", "auto", "--output"]
    code, err = said(capsys, *auto, str(tmp_path / "new"))
    assert code == 2 and "k_start (null) moves nothing" in err
    assert not (tmp_path / "new").exists()
    for again in (["--resume", str(run)], [*auto, str(run)]):
        assert said(capsys, *again, "--dry-run") == (0, "")


@pytest.mark.parametrize("auto", [False, True])
def test_other_settings_of_a_complete_run_are_named(
    folder: Path, tmp_path: Path, auto: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(folder, tmp_path / "complete")
    given = overrides(folder) | {"output": str(run)} if auto else {}
    options = [f"--{k}={v}" for k, v in given.items()]
    options += ["--resume", "auto" if auto else str(run), "--optim.lr", "0.1"]
    code, err = said(capsys, *options)
    first, last = err.splitlines()
    assert code == 2 and "optim.lr: 0.1 came, the run to resume has 0.002" in first
    assert f"{run} is complete; --init-from trains it further" in last


def test_a_checkpoint_of_settings_unknown_here_is_refused_in_words(tmp_path: Path) -> None:
    chosen = TrainConfig()
    before = chosen.model_dump(mode="json", exclude={"grid", "finetune"})  # as it once was
    check_config(Checkpoint(tmp_path, {"config": before}), chosen)
    with pytest.raises(ConfigError, match="colour: unknown setting"):
        check_config(Checkpoint(tmp_path, {"config": before | {"colour": "red"}}), chosen)


@pytest.mark.parametrize("text", ["0", "-3", "soon", "5 weeks", ""])
def test_a_time_that_is_none(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = said(capsys, f"--max-time={text}")
    assert code == 2 and f"--max-time: {text!r} came, wanted a time" in err


# ----------------------------------------------------------------------------------- numbers

SHORT = {"tokens": str(20 * BATCH), "data.repeat": "true"}
"""Ends 12 steps after batch 7; k, penalties and rates move as in a longer run."""
BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "1e38": 1e38}


def with_batches(monkeypatch: pytest.MonkeyPatch, change: Callable) -> None:
    """The stream of the trainer, its batches passed through `change(number, batches)`."""
    draw, numbers = ActivationStream.draw, iter(range(10**6))

    def changed(self: ActivationStream) -> Any:
        found = change(next(numbers), draw(self))
        return found if found != "leave out" else draw(self)

    monkeypatch.setattr(ActivationStream, "draw", changed)


@pytest.fixture(scope="module")
def clean(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """The weights of a run of a kind whose batch 7 never came; each is trained once."""

    @cache
    def of(kind: str) -> list[str]:
        with pytest.MonkeyPatch.context() as patch:
            with_batches(patch, lambda n, batches: "leave out" if n == 7 else batches)
            run = tmp_path_factory.mktemp("clean") / "run"
            return weights(trained(folder, run, KINDS[kind] | SHORT))

    return of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("rows", [slice(3, 4), slice(None)], ids=["a token", "a batch"])
def test_a_skipped_batch_is_as_if_it_had_never_come(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clean: Callable[[str], list[str]],
    kind: str,
    value: str,
    rows: slice,
) -> None:
    """Bit for bit: also the schedule, the generator, and the clocks of dead features."""

    def poison(number: int, batches: dict) -> dict:
        if number == 7:
            for batch in batches.values():
                batch.x[rows] = BAD[value]
        return batches

    wanted = clean(kind)
    with_batches(monkeypatch, poison)
    run = trained(folder, tmp_path / "run", KINDS[kind] | SHORT)
    assert weights(run) == wanted
    (skipped,) = events(run)
    assert skipped["event"] == "skipped" and skipped["tokens"] == 7 * BATCH
    assert skipped["documents"] and metrics(run)[-1]["skipped"] == 1


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("site", ["loss", "gradient"])
def test_a_broken_step_is_not_taken(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: str, value: str
) -> None:
    from sae import kernels

    step, numbers = kernels.topk_step, iter(range(10**6))

    def broken(sae: Any, *args: Any, **options: Any) -> Any:
        stats = step(sae, *args, **options)
        if next(numbers) == 7:
            if site == "loss" and value != "1e38":
                stats.loss.fill_(BAD[value])
            else:
                sae.W_enc.grad[3, 5] = BAD[value]
        return stats

    monkeypatch.setattr(kernels, "topk_step", broken)
    run = trained(folder, tmp_path / "run", {"data.repeat": "true"})
    assert [e["event"] for e in events(run)] == ["skipped"]
    assert read_manifest(run)["tokens"] == TOKENS and finite(run)


def finite(run: Path) -> bool:
    from sae.autoencoder import SparseAutoencoder

    return all(p.isfinite().all() for p in SparseAutoencoder.from_pretrained(run).parameters())


@pytest.mark.parametrize("after", [5, 31], ids=["in the middle", "at the last step"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_broken_weights_send_the_run_back(
    folder: Path,
    tmp_path: Path,
    undisturbed: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    value: str,
    after: int,
) -> None:
    """To the last checkpoint; and as the harm does not come again, to the same bits."""
    whole = undisturbed()
    broken_once(monkeypatch, after, BAD[value])
    run = trained(folder, tmp_path / "run", EVERY)
    assert weights(run) == weights(whole)
    assert "went back" in [e["event"] for e in events(run)]


def broken_once(monkeypatch: pytest.MonkeyPatch, after: int, value: float, times: int = 1) -> None:
    from sae.learner import Learner

    apply, left = Learner.apply, [after, times]

    def broken(self: Learner, *args: Any) -> None:
        apply(self, *args)
        left[0] -= 1
        if left[0] < 0 < left[1]:
            left[1] -= 1
            self.sae.W_dec.data[0, 0] = value

    monkeypatch.setattr(Learner, "apply", broken)


def test_weights_that_are_finite_and_absurd_end_at_the_last_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SKIPPED_IN_A_ROW", 4)
    broken_once(monkeypatch, 13, 1e38)
    with pytest.raises(
        RunError, match=rf"4 batches in a row.*the SAEs are those of {12 * BATCH} tokens"
    ):
        trained(folder, tmp_path / "run", EVERY | {"data.repeat": "true", "sae.sparsity.k": "48"})
    assert finite(tmp_path / "run") and saved_state(tmp_path / "run").facts["tokens"] == 12 * BATCH
    assert read_manifest(tmp_path / "run")["ended"] == "not finite"


def test_harm_that_comes_again_and_again_ends_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_once(monkeypatch, 13, float("nan"), times=1000)
    with pytest.raises(RunError, match="again and again"):
        trained(folder, tmp_path / "run", EVERY)
    assert finite(tmp_path / "run")


def test_massive_tokens_can_be_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae import activations

    read = activations.read

    def with_sinks(*args: Any) -> Any:
        acts, source = read(*args)
        for values in acts.values():
            values[::50] *= 1000
        return acts, source

    monkeypatch.setattr(activations, "read", with_sinks)
    run = trained(folder, tmp_path / "run", {"optim.max_norm": "10", "data.repeat": "true"})
    kept = trained(folder, tmp_path / "kept", {"data.repeat": "true"})
    share = metrics(run)[-1]["masked"] - metrics(kept)[-1]["masked"]
    assert share == pytest.approx(1 / 50, rel=0.2)
    assert metrics(kept)[-1]["masked"] > 0  # special tokens, by their id


def test_an_environment_is_what_the_bits_depend_on(folder: Path) -> None:
    from sae.planning import environment

    found: dict[str, Any] = environment(planned(folder))
    assert {"device", "cpu", "threads", "dtype", "model", "text", "torch", "python"} <= found.keys()
    json.dumps(found)
