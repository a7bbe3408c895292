"""Proves that no damage to a run goes unseen: a damaged file is named by `sae verify`, and by
whatever would read it; nothing damaged is ever loaded in silence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny import overrides, save

from sae import cli, formats, labels, store, verification
from sae.autoencoder import SparseAutoencoder
from sae.errors import RunError, SAEError
from sae.records import FeatureDictionary
from sae.store import Run

SITE = "layers.1.mlp_act"
DAMAGES = 200
WEIGHTS = ("sae.safetensors", "cfg.yaml", "fingerprint.safetensors", "manifest.json")
FEATURES = tuple(
    f"features/{name}"
    for name in ("features.parquet", "examples.parquet", "tokens.safetensors", "manifest.json")
)
UNREAD = ("features/README.md", "eval.json")
"""What no loader reads: for `sae verify` alone."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of other seeds, trained, evaluated and scanned."""
    folder = save(tmp_path_factory.mktemp("verify"))
    made = []
    for seed in "01":
        run = folder / f"run{seed}"
        given = overrides(folder) | {"seed": seed, "output": str(run)}
        flags = [part for name, value in given.items() for part in (f"--{name}", value)]
        assert cli.main(["train", *flags]) == 0
        for verb in ("evaluate", "features"):
            assert cli.main([verb, str(run), "--tokens", "1000", "--device", "cpu"]) == 0
        made.append(run)
    return made[0], made[1]


@pytest.fixture
def run(runs: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs[0], tmp_path / "run"))


def load(run: Path, to: Path) -> None:
    """All that is read of a run's SAE: its origin, weights and dictionary, and two exports."""
    folder = Run(run).sae()
    store.read_manifest(folder)
    SparseAutoencoder.from_pretrained(folder)
    FeatureDictionary(Run(run).features())
    formats.write("parquet", folder, to / "parquet")
    formats.write("safetensors", folder, to / "safetensors")


def loaders(name: str, folder: Path, to: Path) -> list[Callable[[], object]]:
    """Everything that reads the file `name` of an SAE's folder."""
    if name in UNREAD:
        return []
    if name in FEATURES:
        return [
            lambda: FeatureDictionary(store.features_folder(folder)),
            lambda: formats.write("parquet", folder, to),
            lambda: formats.write("jsonl", folder, to, [1]),
        ]
    if name == "manifest.json":  # without which an SAE would be one copied by hand
        return [lambda: (store.read_manifest(folder), SparseAutoencoder.from_pretrained(folder))]
    return [
        lambda: SparseAutoencoder.from_pretrained(folder),
        lambda: formats.write("safetensors", folder, to),
    ]


def damage(file: Path, other: Path, random: Random) -> str:
    """Harm a file; says how."""
    old, kind = file.read_bytes(), random.choice(["cut", "flip", "swap", "delete", "grow"])
    if kind == "cut":
        file.write_bytes(old[: random.randrange(len(old))])
    elif kind == "flip":
        at, bit = random.randrange(len(old)), 1 << random.randrange(8)
        file.write_bytes(old[:at] + bytes([old[at] ^ bit]) + old[at + 1 :])
    elif kind == "swap" and other.read_bytes() != old:
        file.write_bytes(other.read_bytes())
    elif kind == "grow":
        file.write_bytes(old + random.randbytes(random.choice([1, 8, 1000])))
    else:
        kind = "delete"
        file.unlink()
    return kind


def problems(run: Path) -> list[str]:
    return [line for finding in verification.verify(Run(run)) for line in finding.problems]


def test_random_damages_are_never_loaded_in_silence(
    runs: tuple[Path, Path], run: Path, tmp_path: Path
) -> None:
    load(run, tmp_path / "sound")
    random, silent, kinds = Random(20), [], set()
    for number in range(DAMAGES):
        name = random.choice([*WEIGHTS, *FEATURES, *UNREAD])
        folder = run / "saes" / SITE
        file, sound = folder / name, (folder / name).read_bytes()
        kind = damage(file, runs[1] / "saes" / SITE / name, random)
        kinds.add((kind, name))
        # a manifest that is sound but of another folder is told by what it says of the files here
        named = file.parent.name if (kind, file.name) == ("swap", "manifest.json") else file.name
        told = [*store.verify(folder), *store.verify(folder / "features")]
        if not any(named in line for line in told):
            silent.append((number, kind, name, "verify"))
        for reader in loaders(name, folder, tmp_path / "out"):
            try:
                reader()
                silent.append((number, kind, name, "loaded"))
            except SAEError as error:
                assert named in str(error), (number, kind, name, error)
                assert len(str(error).splitlines()) <= 3
            assert not (tmp_path / "out").exists()
        file.write_bytes(sound)
    assert silent == [] and len(kinds) > 30
    load(run, tmp_path / "sound again")


VERBS = {
    "evaluate": ["evaluate", "@", "--tokens", "500"],
    "features": ["features", "@", "--tokens", "500"],
    "top": ["top", "@"],
    "top of a text": ["top", "@", "--text", "the cat"],
    "tables": ["export", "@", "--format", "csv", "--out", "@/../out"],
    "weights": ["export", "@", "--format", "safetensors", "--out", "@/../out"],
    "part of the weights": [
        "export", "@", "--format", "parquet", "--feature", "1", "--out", "@/../out",
    ],
    "init_from": ["train", "--init_from", "@", "--output", "@/../new"],
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_names_the_damaged_file(
    run: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    of_features = verb in ("top", "tables", "part of the weights")
    name = "features/examples.parquet" if of_features else "sae.safetensors"
    file = run / "saes" / SITE / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    args = [arg.replace("@", str(run)) for arg in VERBS[verb]]
    if verb == "init_from":
        given = yaml.safe_load((run / "config.yaml").read_text())
        (run.parent / "again.yaml").write_text(yaml.safe_dump(given | {"output": None}))
        args.insert(1, str(run.parent / "again.yaml"))
    before = {path: store.sha256(path) for path in run.rglob("*") if path.is_file()}
    assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert f"{file} is damaged: its content is not what manifest.json says" in err
    assert {path: store.sha256(path) for path in run.rglob("*") if path.is_file()} == before


def test_a_sound_run_is_all_well(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["--sae", SITE]):
        assert cli.main(["verify", str(run), *args]) == 0
        out, err = capsys.readouterr()
        assert err == "" and out.count("ok ") == 7 and f"all is well with {run}: 7 checks" in out
        assert "8 stored inputs give L0 4 and FVU" in out and "24 → 48 features" in out


def edit_config(run: Path) -> None:
    """Another k, under a manifest made anew."""
    folder = run / "saes" / SITE
    file = folder / "cfg.yaml"
    file.write_text(file.read_text().replace("k: 4", "k: 5"))
    store.write_manifest(folder, {"hookpoint": SITE})


def spoil_weights(run: Path) -> None:
    folder = run / "saes" / SITE
    tensors = load_file(folder / "sae.safetensors")
    tensors["b_enc"][0] = float("nan")
    save_file(tensors, folder / "sae.safetensors")
    (folder / "fingerprint.safetensors").unlink()
    store.write_manifest(folder, {"hookpoint": SITE})


def retrain(run: Path) -> None:
    folder = run / "saes" / SITE
    sae = SparseAutoencoder.from_pretrained(folder)
    sae.initialise()
    sae.save_pretrained(folder)
    store.write_manifest(folder, {"hookpoint": SITE})


def checkpoint(run: Path) -> None:
    with store.staged(run / "steps" / "64") as folder:
        (folder / "state.safetensors").write_bytes(b"x")
    (run / "steps" / "64" / "state.safetensors").write_bytes(b"y")


WRONG: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "settings": (lambda run: (run / "config.yaml").write_text("sede: 1"),
                 ["config.yaml: sede: unknown setting", "config.yaml is damaged"]),
    "no manifest": (lambda run: (run / "manifest.json").unlink(), ["is not complete"]),
    "a strange file": (lambda run: (run / "x.pt").write_text(""), ["x.pt is not in manifest.json"]),
    "a strange folder": (lambda run: (run / "saes" / "new").mkdir(), ["saes/new is not complete"]),
    "metrics": (lambda run: (run / "metrics.jsonl").unlink(), ["metrics.jsonl is missing"]),
    "weights gone": (lambda run: (run / "saes" / SITE / "sae.safetensors").unlink(),
                     ["sae.safetensors is missing"]),
    "no SAE": (lambda run: shutil.rmtree(run / "saes" / SITE), ["holds no SAE"]),
    "another config": (edit_config, ["do not belong together"]),
    "NaN": (spoil_weights, ["some weights are not finite", "features was made from other weights"]),
    "other weights": (retrain, ["eval.json was made from other weights",
                                "features was made from other weights"]),
    "evaluation": (lambda run: store.write_result(run / "saes" / SITE, "eval.json", []),
                   ["eval.json"]),
    "a checkpoint": (checkpoint, ["steps/64/state.safetensors is damaged"]),
}  # fmt: skip


@pytest.mark.parametrize(("harm", "words"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_told_in_few_words(
    run: Path, harm: Callable[[Path], object], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    harm(run)
    assert cli.main(["verify", str(run)]) == 2
    out, err = capsys.readouterr()
    assert all(word in err for word in words) and "all is well" not in out
    assert "Traceback" not in err and len(err.splitlines()) <= 3 * len(words)


def test_of_several_saes_one_may_be_chosen(run: Path) -> None:
    shutil.copytree(run / "saes" / SITE, run / "saes" / "second")
    (run / "saes" / "second" / "cfg.yaml").unlink()
    assert any("second/cfg.yaml is missing" in line for line in problems(run))
    one = [finding for finding in verification.verify(Run(run), SITE)]
    assert not any("second" in finding.what or finding.problems for finding in one)
    with pytest.raises(RunError, match="did you mean 'second'"):
        list(verification.verify(Run(run), "secnd"))


def test_a_run_with_labels_is_well_unless_they_are_damaged(run: Path) -> None:
    labels.write(run, store.sha256(run / "saes" / SITE / store.WEIGHTS), 3, labels.Label("cats"))
    assert not any(finding.problems for finding in verification.verify(Run(run)))
    (run / labels.FILE).write_text("[]")
    (problem,) = [line for finding in verification.verify(Run(run)) for line in finding.problems]
    assert "does not hold labels" in problem


def test_an_evaluation_joins_the_manifest(run: Path) -> None:
    folder = run / "saes" / SITE
    assert "eval.json" in store.read_manifest(folder)["files"]
    store.write_result(folder, "eval.json", {"a": 1})
    assert store.verify(folder) == [] and json.loads((folder / "eval.json").read_text()) == {"a": 1}
