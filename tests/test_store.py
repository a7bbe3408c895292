"""Folders appear whole or not at all, manifests cover what they say, and runs are found by name.

A failure is injected at every point where the disk is touched; afterwards the old folder or the new
one is there, never a mixture.
"""

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from sae import store
from sae.errors import RunError
from sae.store import Run, features_folder, read_manifest, sha256, staged, write_atomic


class CrashError(Exception):
    """What a test throws in the middle of things."""


def fill(path: Path, text: str, **settings: Any) -> None:
    with staged(path, **settings) as folder:
        (folder / "a.txt").write_text(text)
        (folder / "inner").mkdir()
        (folder / "inner" / "b.txt").write_text(text * 2)


def content(path: Path) -> dict[str, str]:
    """The files the manifest lists, after checking that it is true of them."""
    files = read_manifest(path)["files"]
    for name, facts in files.items():
        assert facts == {"bytes": (path / name).stat().st_size, "sha256": sha256(path / name)}
    return {name: (path / name).read_text() for name in files}


def test_staged_folder_appears_at_the_end_with_its_manifest(tmp_path: Path) -> None:
    extra: dict[str, Any] = {"model": "tiny"}
    with staged(tmp_path / "new", extra=extra) as folder:
        (folder / "a.txt").write_text("x")
        extra["tokens"] = 7
        assert not (tmp_path / "new").exists()
    manifest = read_manifest(tmp_path / "new")
    assert manifest["format"] == store.FORMAT
    assert (manifest["model"], manifest["tokens"]) == ("tiny", 7)
    assert manifest["versions"]["sae"]
    assert content(tmp_path / "new") == {"a.txt": "x"}
    assert os.listdir(tmp_path) == ["new"]  # noqa: PTH208


def test_a_block_that_raises_changes_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "run", "old")
    with pytest.raises(CrashError), staged(tmp_path / "run", overwrite=True) as folder:
        (folder / "a.txt").write_text("new")
        raise CrashError
    assert content(tmp_path / "run") == {"a.txt": "old", "inner/b.txt": "oldold"}
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_replacing_needs_overwrite_except_for_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    fill(tmp_path / "run", "first")
    with pytest.raises(RunError, match="already exists"):
        fill(tmp_path / "run", "second")
    fill(tmp_path / "run", "third", overwrite=True)
    assert content(tmp_path / "run")["a.txt"] == "third"
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="not a folder"):
        fill(tmp_path / "file", "x", overwrite=True)


@pytest.mark.parametrize("operation", ["fsync", "rename"])
def test_a_crash_at_any_step_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Whatever step fails, reading afterwards gives one of the two whole folders."""
    owner: Any = store if operation == "fsync" else Path
    genuine = getattr(owner, operation)
    for step in range(20):
        path = tmp_path / f"{step}" / "run"
        fill(path, "old")
        steps = iter(range(100))

        def failing(*args: Any, step: int = step, steps: Any = steps) -> Any:
            if next(steps) == step:
                raise CrashError
            return genuine(*args)

        monkeypatch.setattr(owner, operation, failing)
        try:
            fill(path, "new", overwrite=True)
            done = True
        except CrashError:
            done = False
        monkeypatch.setattr(owner, operation, genuine)
        if not path.exists():  # died between the two renames: the next use puts it back
            with pytest.raises(RunError):
                fill(path, "newer")
        assert content(path)["a.txt"] in (["new"] if done else ["old", "new"])
        if done:
            return
    pytest.fail("the write never ended")


def test_everything_is_synced_before_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(store, "fsync", lambda path: synced.append(Path(path).name))
    fill(tmp_path / "run", "x")
    manifest = next(i for i, name in enumerate(synced) if name.startswith(".manifest.json"))
    assert set(synced[:manifest]) == {"a.txt", "b.txt", "inner"}
    assert synced[-1] == tmp_path.name


def test_a_manifest_leaves_out_folders_that_have_their_own(tmp_path: Path) -> None:
    with staged(tmp_path / "run") as folder:
        (folder / "config.yaml").write_text("a: 1")
        fill(folder / "saes" / "one", "x")
    assert list(read_manifest(tmp_path / "run")["files"]) == ["config.yaml"]
    assert content(tmp_path / "run" / "saes" / "one")


def test_folders_get_the_permissions_of_the_umask(tmp_path: Path) -> None:
    fill(tmp_path / "run", "x")
    (tmp_path / "plain").mkdir()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("run", "plain")}
    assert len(modes) == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(28, "No space left on device", "/a/file/that/was/read"),
        SafetensorError('IoError(Os { code: 28, message: "No space left on device" })'),
    ],
    ids=["of a write", "of a copy", "of safetensors"],
)
def test_a_full_disk_is_named_by_what_was_to_be_there(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(OSError, match="No space") as caught, staged(tmp_path / "out"):
        raise error
    assert caught.value.filename == str(tmp_path / "out") and not list(tmp_path.iterdir())


def test_write_atomic_keeps_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "labels.json"
    write_atomic(file, "old")

    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "fsync", broken)
    with pytest.raises(OSError, match=r"No space.*labels\.json"):
        write_atomic(file, b"new")
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["labels.json"]
    monkeypatch.undo()
    write_atomic(file, b"new")
    assert file.read_text() == "new"


def test_json_is_without_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda file: file.unlink(), "not complete"),
        (lambda file: file.write_text(""), "cannot be read"),
        (lambda file: file.write_text(json.dumps({"format": 99})), "newer sae-toolkit"),
        (lambda file: file.write_text("[]"), "is damaged: it does not say its format"),
        (lambda file: file.write_text('{"format": true}'), "does not say its format"),
    ],
)
def test_a_broken_manifest_says_what_is_wrong(
    tmp_path: Path, break_it: Callable[[Path], Any], message: str
) -> None:
    fill(tmp_path / "run", "x")
    break_it(tmp_path / "run" / "manifest.json")
    with pytest.raises(RunError, match=message):
        read_manifest(tmp_path / "run")


DAMAGES: dict[str, Callable[[Path, bytes], Any]] = {
    "0 bytes": lambda file, _: file.write_bytes(b""),
    "-1 byte": lambda file, old: file.write_bytes(old[:-1]),
    "half": lambda file, old: file.write_bytes(old[: len(old) // 2]),
    "+1 byte": lambda file, old: file.write_bytes(old + b"x"),
    "1 bit": lambda file, old: file.write_bytes(bytes([old[0] ^ 1]) + old[1:]),
    "deleted": lambda file, _: file.unlink(),
    "swapped": lambda file, old: file.write_bytes(old.replace(b"x", b"y")),
    "a folder": lambda file, _: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["a.txt", "inner/b.txt"])
def test_every_damage_is_found_and_named(
    tmp_path: Path, name: str, damage: Callable[[Path, bytes], Any]
) -> None:
    folder = tmp_path / "run"
    fill(folder, "x" * 40)
    assert store.verify(folder) == []
    damage(folder / name, (folder / name).read_bytes())
    (problem,) = store.verify(folder)
    assert problem.startswith(f"{folder / name} ")
    with pytest.raises(RunError, match=name):
        store.check_files(folder, name)
    other = {"a.txt", "inner/b.txt"} - {name}
    store.check_files(folder, *other, "neither here nor there.txt")


def test_a_file_no_manifest_knows_is_named(tmp_path: Path) -> None:
    """Except hidden ones, such as a lock, and those under a manifest of their own."""
    folder = tmp_path / "run"
    fill(folder, "x")
    fill(folder / "features", "y")
    (folder / ".lock").write_text("")
    assert store.verify(folder) == []
    (folder / "inner" / "new.txt").write_text("")
    assert store.verify(folder) == [f"{folder}/inner/new.txt is not in manifest.json"]
    with pytest.raises(RunError, match=r"new\.txt is not in manifest\.json"):
        store.check_files(folder, "inner/new.txt")
    (folder / "manifest.json").unlink()
    assert "not complete" in store.verify(folder)[0]
    store.check_files(folder, "a.txt")  # nothing is known of it


@pytest.mark.parametrize(
    "name", ["../a", "/etc/passwd", "a/../b", "a//b", "./a", "", ".", "a\\b", "c:a", "a\0b"]
)
def test_manifests_name_only_files_below_their_folder(tmp_path: Path, name: str) -> None:
    files = {name: {"bytes": 1, "sha256": "0" * 64}}
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    with pytest.raises(RunError, match="what no manifest would say"):
        read_manifest(tmp_path)


def make_run(path: Path, *names: str) -> Path:
    for name in names:
        folder = path / "saes" / store.folder_name(name)
        folder.mkdir(parents=True)
        (folder / store.WEIGHTS).write_bytes(name.encode())
        store.write_manifest(folder)
    path.mkdir(exist_ok=True)
    (path / "config.yaml").write_text("seed: 0\n")
    return path


def test_a_run_gives_its_saes_by_name_and_hookpoint(tmp_path: Path) -> None:
    run = Run(make_run(tmp_path / "run", "layers.0.mlp_act", "module:a/b"))
    assert list(run.saes()) == ["layers.0.mlp_act", "module_a_b"]
    assert run.sae("module:a/b") == run.sae("module_a_b") == run.saes()["module_a_b"]
    with pytest.raises(RunError, match=r"choose one with --sae: layers\.0\.mlp_act, module_a_b"):
        run.sae()
    with pytest.raises(RunError, match=r"did you mean 'layers\.0\.mlp_act'"):
        run.sae("layers.1.mlp_act")
    only = Run(make_run(tmp_path / "one", "layers.0.mlp_act"))
    assert only.sae() == only.sae("layers.0.mlp_act")
    (only.sae() / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"layers\.0\.mlp_act is not complete"):
        only.sae()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is not a run: it has no config\.yaml; runs live under"):
        Run(tmp_path)
    with pytest.raises(RunError, match="no such folder"):
        Run(tmp_path / "missing")
    with pytest.raises(RunError, match="holds no SAE"):
        Run(make_run(tmp_path / "empty")).sae()


def test_features_of_other_weights_are_refused(tmp_path: Path) -> None:
    folder = Run(make_run(tmp_path / "run", "layers.0.mlp_act")).sae()
    with pytest.raises(RunError, match="sae features RUN"):
        features_folder(folder)
    with staged(folder / "features", extra={"sae_sha256": sha256(folder / store.WEIGHTS)}):
        pass
    assert Run(tmp_path / "run").features() == folder / "features"
    (folder / store.WEIGHTS).write_bytes(b"trained on")
    with pytest.raises(RunError, match="other weights"):
        features_folder(folder)
    shutil.rmtree(folder / "features")
