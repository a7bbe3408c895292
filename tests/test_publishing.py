"""A run goes to a Hub and comes back: weights by from_pretrained, features by load_dataset; and
once more with the server stopped.

The Hub is a process (hub_server.py) that the real huggingface_hub and datasets reach by
HF_ENDPOINT; files above its limit go by LFS. The clients are processes of their own too, as the
libraries read that variable once.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from test_exchange import make, saved, topk
from tiny import overrides, save

from sae import cli, publishing
from sae.autoencoder import SparseAutoencoder
from sae.errors import RunError
from sae.hub import is_name
from sae.store import Run

ROOT = Path(__file__).parents[1]
PUSH = """
import sys
from sae import cli
for args in (["push", {run!r}, "me/tides"], ["push", {run!r}, "me/tides"]):
    assert cli.main(args) == 0
from sae.autoencoder import SparseAutoencoder
sae = SparseAutoencoder.from_pretrained({run!r})
assert sae.push_to_hub("me/alone").endswith("/me/alone")
"""
READ = """
import json, warnings
warnings.simplefilter("ignore")
from datasets import load_dataset
from sae import cli
from sae.autoencoder import SparseAutoencoder
whole = SparseAutoencoder.from_pretrained("me/tides")
part = SparseAutoencoder.from_pretrained("me/tides", subfolder="saes/layers.1.mlp_act")
alone = SparseAutoencoder.from_pretrained("me/alone")
old = SparseAutoencoder.from_pretrained("me/tides", revision="0" * 39 + "1")
sums = [float(s.W_dec.detach().double().sum()) for s in (whole, part, alone, old)]
tables = ("features", "examples")
rows = [load_dataset("me/tides", table, split="train").num_rows for table in tables]
out = {out!r}
code = cli.main(["import", "me/tides/saelens/layers.1.mlp_act", "--output", out])
print(json.dumps([sums, rows, code]))
"""
MISSING = """
import sys
from sae.autoencoder import SparseAutoencoder
from sae.errors import RunError
wrong = [("me/nothing", {}), ("me/tides", {"revision": "no"}), ("me/tides", {"subfolder": "x"})]
for name, more in wrong:
    try:
        SparseAutoencoder.from_pretrained(name, **more)
        sys.exit(1)
    except RunError as error:
        assert len(str(error).splitlines()) <= 3, error
"""


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of the stand-in, and its process."""
    command = [sys.executable, str(Path(__file__).with_name("hub_server.py"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().strip(), process
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an evaluation and features."""
    folder = save(tmp_path_factory.mktemp("published"))
    options = [part for k, v in overrides(folder).items() for part in (f"--{k}", v)]
    assert cli.main(["train", *options]) == 0
    assert cli.main(["evaluate", str(folder / "run"), "--tokens", "500"]) == 0
    assert cli.main(["features", str(folder / "run"), "--tokens", "500"]) == 0
    return folder / "run"


def client(code: str, endpoint: str, home: Path, *, stopped: bool = False) -> str:
    """Run a client of the stand-in; what it prints.

    Where that is `stopped`, datasets may know: by itself it tries for 24 s a table, then reads its
    cache all the same.
    """
    env = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_stand_in",
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": str(int(stopped)),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def read(
    server: tuple[str, subprocess.Popen[str]],
    trained: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[str, Path]]:
    """What the client of the running and of the stopped server printed, and the run it imported."""
    endpoint, process = server
    folder = tmp_path_factory.mktemp("read")
    runs = {name: folder / name for name in ("running", "stopped")}
    before = PUSH.format(run=str(trained)) + READ.format(out=str(runs["running"])) + MISSING
    running = client(before, endpoint, folder / "home")
    process.kill()
    process.wait()
    again = READ.format(out=str(runs["stopped"]))
    stopped = client(again, endpoint, folder / "home", stopped=True)
    return {"running": (running, runs["running"]), "stopped": (stopped, runs["stopped"])}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("server_is", ["running", "stopped"])
def test_there_and_back(server_is: str, read: dict[str, tuple[str, Path]], trained: Path) -> None:
    said, run = read[server_is]
    sae = SparseAutoencoder.from_pretrained(trained)
    sums, rows, code = json.loads(said.splitlines()[-1])
    assert sums == [float(sae.W_dec.detach().double().sum())] * 4
    assert rows[0] == sae.d_sae and rows[1] > 0 and code == 0
    assert torch.equal(SparseAutoencoder.from_pretrained(run).W_dec, sae.W_dec)


@pytest.mark.timeout(900)
def test_a_push_says_where(
    server: tuple[str, subprocess.Popen[str]], read: dict[str, tuple[str, Path]]
) -> None:
    said, _ = read["running"]
    assert f"published {server[0]}/me/tides" in said and "/datasets/me/tides" in said


def test_the_card_tells_numbers_and_how_to_load(trained: Path) -> None:
    folders = Run(trained).saes()
    (name,) = folders
    text = publishing.card(folders, "me/tides", [name], {name: "me/tides"})
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["tags"] == ["sparse-autoencoder", "interpretability", "topk"]
    evaluated = json.loads((folders[name] / "eval.json").read_text())
    assert f"| {evaluated['fvu']['value']:.3f} | {evaluated['l0']['value']:.1f} |" in body
    for wanted in (
        'from_pretrained("me/tides", ',
        "SAE.load_from_disk",
        "load_dataset(",
        "- data: ",
    ):
        assert wanted in body


def test_what_saelens_cannot_hold_has_no_such_snippet(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", make(topk()))
    text = publishing.card({folder.name: folder}, "me/tides", [], {})
    assert "SAELens" not in text and "load_dataset" not in text and "| – |" in text


def test_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "here").mkdir(parents=True)
    assert is_name("me/tides") and is_name("EleutherAI/sae-pythia-70m.v2")
    for name in ("me/here", "tides", "./me/tides", "/me/tides", "me/tides/more", "../tides"):
        assert not is_name(name)
    with pytest.raises(RunError, match="no revisions"):
        SparseAutoencoder.from_pretrained("me/here", revision="main")
