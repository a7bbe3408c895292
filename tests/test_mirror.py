"""Whatever wandb does, training goes on: one warning, then silence; and in offline mode the real
one writes its file."""

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sae.config import TrainConfig, WandbConfig
from sae.mirror import open_mirror

CONFIG = TrainConfig(wandb=WandbConfig(project="tides", mode="offline"))


class Run:
    """A wandb run that fails at its `fails`-th call."""

    def __init__(self, fails: int | None = None):
        self.calls: list[Any] = []
        self.fails = fails

    def _called(self, what: Any) -> None:
        self.calls.append(what)
        if len(self.calls) == self.fails:
            raise ConnectionError("no route to host\nmore about it")

    def log(self, metrics: dict[str, float]) -> None:
        self._called(metrics)

    def finish(self) -> None:
        self._called("finished")


def fake(monkeypatch: pytest.MonkeyPatch, init: Any) -> None:
    """A module wandb whose `init` is this."""
    module = SimpleNamespace(init=init, Settings=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_it_is_off_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    mirror = open_mirror(TrainConfig(), tmp_path)
    mirror.log({"loss": 1.0}, 10)
    mirror.close()


def test_metrics_arrive_under_their_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, given = Run(), {}

    def init(**settings: Any) -> Run:
        given.update(settings)
        return run

    fake(monkeypatch, init)
    mirror = open_mirror(CONFIG, tmp_path / "my-run")
    mirror.log({"loss": 1.5, "fvu": None}, 10)
    mirror.close()
    assert run.calls == [{"tokens": 10, "loss": 1.5, "fvu": None}, "finished"]
    assert (given["project"], given["mode"], given["name"]) == ("tides", "offline", "my-run")
    assert given["dir"] == str(tmp_path / "my-run")
    assert given["config"] == CONFIG.model_dump(mode="json")


def test_wandb_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(UserWarning, match="pip install wandb.*training goes on") as caught:
        mirror = open_mirror(CONFIG, tmp_path)
        mirror.log({"loss": 1.0}, 10)
        mirror.close()
    assert len(caught) == 1


@pytest.mark.parametrize("error", [RuntimeError(), ValueError("no API key\nrun wandb login")])
def test_it_cannot_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def init(**_: Any) -> Run:
        raise error

    fake(monkeypatch, init)
    reason = (str(error) or "RuntimeError").splitlines()[0]
    with pytest.warns(UserWarning, match=f"wandb stopped: {reason}; training goes on") as caught:
        mirror = open_mirror(CONFIG, tmp_path)
        mirror.log({"loss": 1.0}, 10)
        mirror.close()
    assert len(caught) == 1


@pytest.mark.parametrize("fails", [1, 2, 4])
def test_it_fails_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
    run = Run(fails)
    fake(monkeypatch, lambda **_: run)
    with pytest.warns(UserWarning, match="no route to host; training goes on") as caught:
        mirror = open_mirror(CONFIG, tmp_path)
        for step in range(3):
            mirror.log({"loss": 1.0}, step)
        mirror.close()
    assert len(caught) == 1
    assert len(run.calls) == fails  # nothing is tried after the first failure


def test_the_real_one_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of wandb's own imports
        wandb = pytest.importorskip("wandb")
        folder = tmp_path / "run"
        folder.mkdir()
        mirror = open_mirror(CONFIG, folder)
    for step in range(5):
        mirror.log({"layers.2.mlp_act/unusual_name": 0.5, "nothing": None}, step)
    mirror.close()
    wandb.teardown()  # its writer is a process of its own: wait for it
    (written,) = folder.glob("wandb/offline-run-*/*.wandb")
    content = written.read_bytes()
    assert b"unusual_name" in content and b"tides" in content
