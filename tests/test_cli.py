"""The command line: every verb end to end on a tiny model, and every mistake in few words.

A mistake costs at most three lines and exit code 2, names what was wrong, what came and what to do,
and leaves every file as it was.
"""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tiny import TOKENS, overrides, save

import sae
from sae import cli, planning, training
from sae.autoencoder import SparseAutoencoder
from sae.browser import server
from sae.browser.pages import Pages
from sae.records import FeatureDictionary
from sae.store import Run, sha256

SITE = "layers.1.mlp_act"


def flags(folder: Path, **changes: str) -> list[str]:
    """The options of a quick training run, each as two arguments."""
    given = overrides(folder) | {k.replace("__", "."): v for k, v in changes.items()}
    return [part for name, value in given.items() for part in (f"--{name}", value)]


@dataclass(frozen=True)
class Place:
    """A folder with a model, texts, broken things and a trained, evaluated and scanned run."""

    folder: Path
    said: str

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def files(self) -> dict[Path, tuple[int, int, int]]:
        """Every file, and what tells that it was written: its inode, size and time."""
        paths = (Path(top, name) for top, _, names in os.walk(self.folder) for name in names)
        facts = ((path, path.stat()) for path in paths)
        return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in facts}

    def fill(self, text: str) -> str:
        return text.replace("@", str(self.folder) + "/")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = save(tmp_path_factory.mktemp("cli"))
    (folder / "empty").mkdir()
    (folder / "empty" / "a.txt").write_text("  \n")
    (folder / "rows.jsonl").write_text('{"body": "the cat sat"}\n' * 3)
    (folder / "file").write_text("mine")
    (folder / "typo.yaml").write_text("optim:\n  lrr: 1e-3\nsede: 1\n")
    (folder / "broken.yaml").write_text("optim: [1\n")
    write_broken_things(folder)
    with redirect_stdout(io.StringIO()) as said:
        assert cli.main(["train", *flags(folder, seed="7")]) == 0
    return Place(folder, said.getvalue())


def write_broken_things(folder: Path) -> None:
    """Settings, texts and models that nobody can read."""
    (folder / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    (folder / "list.yaml").write_text("- seed\n")
    (folder / "latin.yaml").write_bytes(b"seed: 1\n# caf\xe9\n")
    (folder / "deep.yaml").write_text("optim: " + "[" * 5000)
    names = "abcdefghij"
    lines = [f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in pairwise(names)]
    (folder / "bomb.yaml").write_text("\n".join(["a: &a [1]", *lines]))
    (folder / "call.yaml").write_text("seed: !!python/object/apply:os.getpid []\n")
    (folder / "numbers.jsonl").write_text('{"text": 3}\n')
    (folder / "cut.jsonl").write_text('{"text": "a b c"}\n{"text": "a\n')
    (folder / "cut.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"words": ["the cat"]}), folder / "words.parquet")
    (folder / "binary.txt").write_bytes(bytes(1000))
    for name, file in (("pickles", "data.pkl"), ("no model", "config.json")):
        (folder / name).mkdir()
        (folder / name / file).write_text("{}")


def break_runs(place: "Place") -> None:
    """Copies of the run: without features, with two SAEs, damaged in several ways."""
    for name in ("bare", "two", "cut", "lost", "edited", "wrong"):
        shutil.copytree(place.run, place.folder / name)
    saes = {p.parent.name: p / SITE for p in place.folder.glob("*/saes")}
    shutil.rmtree(saes["bare"] / "features")
    shutil.copytree(saes["two"], saes["two"].with_name("layers.0.mlp_act"))
    weights = saes["cut"] / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    (saes["lost"] / "features" / "examples.parquet").unlink()
    config = saes["edited"] / "cfg.yaml"
    config.write_text(config.read_text().replace("k: 4", "k: 6"))
    (saes["edited"] / "manifest.json").unlink()
    (place.folder / "wrong" / "config.yaml").write_text("seed: x\n")


def python(*args: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """A process of its own that finds this package; one thread, as sums depend on their number."""
    own = {"PYTHONPATH": str(Path(sae.__path__[0]).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd, env=os.environ | own | env, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def scanned(place: Place) -> Place:
    """The run once its features are written."""
    assert cli.main(["features", str(place.run), "--tokens", "1500", "--device", "cpu"]) == 0
    break_runs(place)
    return place


TRAIN = object()
"""Stands for the options of a run that would succeed."""

MISTAKES = {
    "unknown verb": (["tran"], ["no verb 'tran'", "did you mean 'train'"]),
    "unknown flag": ([TRAIN, "--optim.lrate", "3"], ["--optim.lrate", "no such option"]),
    "flag of a group": ([TRAIN, "--expansion-factor", "4"], ["mean --sae.expansion_factor"]),
    "unknown key": (["train", "@typo.yaml"], ["optim.lrr: ", "'optim.lr'", "sede", "'seed'"]),
    "broken YAML": (["train", "@broken.yaml"], ["broken.yaml line", "not valid YAML"]),
    "missing config": (["train", "@type.yaml"], ["type.yaml: no such file", "'typo.yaml'"]),
    "two configs": (["train", "@typo.yaml", "more.yaml"], ["more.yaml"]),
    "wrong type": ([TRAIN, "--tokens", "many"], ["tokens", '"many"', "whole number"]),
    "no value": ([TRAIN, "--seed"], ["--seed", "value is missing"]),
    "unknown layer": ([TRAIN, "--hookpoints", "layers.9.mlp_act"], ["layers.9", "layers 0-1"]),
    "unknown site": ([TRAIN, "--hookpoints", "layers.1.mlp_acts"], ["'layers.1.mlp_act'"]),
    "no model folder": ([TRAIN, "--model.name", "@texts"], ["model.name", "no config.json"]),
    "model not there": ([TRAIN, "--model.name", "@modl"], ["@modl", "/model'"]),
    "data not there": ([TRAIN, "--data.source", "@row.jsonl"], ["@row.jsonl", "rows.jsonl'"]),
    "no text column": ([TRAIN, "--data.source", "@rows.jsonl"], ["'text'", "columns are body"]),
    "empty data": ([TRAIN, "--data.source", "@empty"], ["data.source", "holds no text"]),
    "too little data": ([TRAIN, "--tokens", "1e6"], ["1,000,000 wanted", "--data.repeat true"]),
    "long context": ([TRAIN, "--data.context", "64"], ["data.context: 64", "at most 32"]),
    "d_sae 0": ([TRAIN, "--sae.d_sae", "0"], ["sae.d_sae: 0 came", "at least 1"]),
    "k above d_sae": ([TRAIN, "--sae.sparsity.k", "99"], ["sae.sparsity.k: 99", "at most", "48"]),
    "negative lr": ([TRAIN, "--optim.lr", "-1e-3"], ["optim.lr", "-0.001 came", "above 0"]),
    "NaN lr": ([TRAIN, "--optim.lr", "nan"], ["optim.lr", "nan", "a number above 0"]),
    "minus infinity": ([TRAIN, "--optim.lr", "-inf"], ["optim.lr", "-inf", "a number above 0"]),
    "negative l1": (
        ["train", "--sae.sparsity.l1", "-5"], ["sae.sparsity.l1: -5 came", "at least 0"],
    ),
    "batch above pool": (
        [TRAIN, "--optim.batch", "1024"], ["optim.batch: 1024", "optim.pool (512)"],
    ),
    "pool below a pass": ([TRAIN, "--optim.pool", "100"], ["optim.pool: 100", "at least 192"]),
    "too large": ([TRAIN, "--sae.d_sae", "9000000000"], ["sae.d_sae: 9,000,0", "GB of memory"]),
    "unwritable": ([TRAIN, "--output", "@file/run"], ["@file is a file", "--output"]),
    "output is taken": ([TRAIN, "--output", "@texts"], ["@texts exists already", "--output"]),
    "no such GPU": ([TRAIN, "--device", "cuda:77"], ["device: cuda:77", "give cpu or auto"]),
    "start of another size": (
        [TRAIN, "--init-from", "@run", "--sae.d-sae", "50"], ["init_from", "d_sae 48, not 50"],
    ),
    "no start": ([TRAIN, "--init_from", "@none"], ["init_from: @none: no such folder"]),
    "no run": (["top", "@texts"], ["@texts is not a run", "config.yaml"]),
    "no folder": (["evaluate", "@gone"], ["@gone is not a run", "no such folder"]),
    "run not named": (["features"], ["required: RUN", "sae features --help"]),
    "no such SAE": (["features", "@run", "--sae", "layers.1.mlp_out"], ["'layers.1.mlp_act'"]),
    "unknown device": (["evaluate", "@run", "--device", "gpu"], ["device: gpu", "cuda:N"]),
    "no count": (["features", "@run", "--tokens", "1,00"], ["--tokens", "'1,00'", "whole number"]),
    "several counts in one": (["evaluate", "@run", "--k", "8,16"], ["--k", "'8,16'"]),
    "out of range": (["top", "@run", "--feature", "48"], ["feature 48", "0–47"]),
    "no feature": (["top", "@run", "--feature", "one"], ["'one'", "1,5,10-20"]),
    "unknown sort": (["top", "@run", "--sort", "size"], ["--sort size", "density"]),
    "not found": (["top", "@run", "--search", "xyzzy"], ["--search xyzzy", "shorter"]),
    "limit 0": (["top", "@run", "--limit", "0"], ["--limit", "'0'", "at least 1"]),
    "flag with a slip": (["top", "@run", "--feture", "1"], ["--feture", "'--feature'"]),
    "two questions": (["top", "@run", "--text", "a", "--feature", "1"], ["--feature and --text"]),
    "long text": (["top", "@run", "--text", "cat " * 99], ["99 tokens", "1 to 32"]),
    "empty text": (["top", "@run", "--text", ""], ["0 tokens"]),
    "no format": (["export", "@run", "--out", "@x"], ["--format is missing"]),
    "unknown format": (
        ["export", "@run", "--format", "parket", "--out", "@x"], ["--format parket", "'parquet'"],
    ),
    "export is taken": (
        ["export", "@run", "--format", "csv", "--out", "@texts"], ["@texts already exists"],
    ),
    "export below a file": (
        ["export", "@run", "--format", "csv", "--out", "@file/x"], ["@file", "check the path"],
    ),
    "part of a top-k": (
        ["export", "@run", "--format", "safetensors", "--out", "@x", "--feature", "1"],
        ["--feature", "compete"],
    ),
    # settings
    "setting of another kind": (
        [TRAIN, "--sae.sparsity.l1", "5"], ["sae.sparsity.l1", "sae.sparsity.kind: relu_l1"],
    ),
    "kind with a slip": ([TRAIN, "--sae.sparsity.kind", "topkk"], ['"topkk" came', "'topk'"]),
    "dtype with a slip": ([TRAIN, "--model.dtype", "bf16"], ["model.dtype", "'bfloat16'"]),
    "no such dtype": ([TRAIN, "--model.dtype", "int8"], ["model.dtype", '"int8"', "float32"]),
    "seed below 0": ([TRAIN, "--seed", "-1"], ["seed: -1 came", "from 0 to 4294967295"]),
    "seed too large": ([TRAIN, "--seed", "5000000000"], ["seed: 5000000000 came", "4294967295"]),
    "empty seed": ([TRAIN, "--seed="], ["seed: null came", "whole number"]),
    "no tokens": ([TRAIN, "--tokens", "0"], ["tokens: 0 came", "at least 1"]),
    "less than a batch": ([TRAIN, "--tokens", "63"], ["tokens: 63", "optim.batch (64)"]),
    "part of a token": ([TRAIN, "--tokens", "1.5"], ["tokens: 1.5 came", "whole number"]),
    "no batch": ([TRAIN, "--optim.batch", "0"], ["optim.batch: 0 came", "at least 1"]),
    "no lr": ([TRAIN, "--optim.lr", "0"], ["optim.lr: 0 came", "above 0"]),
    "long warmup": ([TRAIN, "--optim.lr_warmup", "2"], ["optim.lr_warmup: 2", "from 0 to 1"]),
    "warmup and decay": (
        [TRAIN, "--optim.lr_warmup", "0.9"], ["optim.lr_warmup: 0.9", "optim.lr_decay (0.2)"],
    ),
    "beta of 1": ([TRAIN, "--optim.betas", "0.9", "1"], ["optim.betas: [0.9, 1]", "below 1"]),
    "one beta": ([TRAIN, "--optim.betas", "0.9"], ["optim.betas: [0.9] came", "two numbers"]),
    "no clipping by 0": ([TRAIN, "--optim.grad_clip", "0"], ["optim.grad_clip: 0", "or null"]),
    "no sequences": ([TRAIN, "--optim.llm_batch", "0"], ["optim.llm_batch: 0", "at least 1"]),
    "never dead": ([TRAIN, "--optim.dead_after", "never"], ["optim.dead_after", '"never" came']),
    "all held out": ([TRAIN, "--data.heldout", "1"], ["data.heldout: 1", "below 1"]),
    "next to all held out": (
        [TRAIN, "--data.heldout", "0.9999999"], ["data.source", "less than 1 training row"],
    ),
    "context of 1": ([TRAIN, "--data.context", "1"], ["data.context: 1", "at least 2"]),
    "nothing to evaluate": ([TRAIN, "--data.eval_tokens", "0"], ["data.eval_tokens: 0 came"]),
    "maybe": ([TRAIN, "--data.streaming", "maybe"], ['data.streaming: "maybe"', "true or false"]),
    "expansion of 0": (
        [TRAIN, "--sae.d_sae", "null", "--sae.expansion_factor", "0"], ["sae.expansion_factor: 0"],
    ),
    "k of 0": ([TRAIN, "--sae.sparsity.k", "0"], ["sae.sparsity.k: 0 came", "at least 1"]),
    "k_start above d_sae": (
        [TRAIN, "--sae.sparsity.k_start", "99"], ["sae.sparsity.k_start: 99", "(48)"],
    ),
    "k_ramp backwards": (
        [TRAIN, "--sae.sparsity.k_ramp", "0.5", "0"], ["sae.sparsity.k_ramp: [0.5, 0] came"],
    ),
    "auxk above d_sae": ([TRAIN, "--sae.sparsity.auxk", "99"], ["sae.sparsity.auxk: 99", "(48)"]),
    "hookpoint twice": (
        [TRAIN, "--hookpoints", "layers.1.mlp_act"], ["hookpoints: ", "each once"],
    ),
    "empty hookpoint": ([TRAIN, "--hookpoints", ""], ["hookpoints: ", "a list of hookpoints"]),
    "layer x": ([TRAIN, "--hookpoints", "layers.x.mlp_act"], ["layers.x", "'layers.0.mlp_act'"]),
    "no site": ([TRAIN, "--hookpoints", "layers.0"], ["hookpoint layers.0:", "attn_out"]),
    "no layer": ([TRAIN, "--hookpoints", "mlp_act"], ["hookpoint mlp_act", "'layers.0.mlp_act'"]),
    "no such module": (
        [TRAIN, "--hookpoints", "module:transformer.h.9"], ["no such module", "transformer.h.1"],
    ),
    "wild slip": ([TRAIN, "--hookpoints", "layers.*.mlpout"], ["nothing", "'layers.*.mlp_out'"]),
    "layer of many digits": (
        [TRAIN, "--hookpoints", f"layers.{'9' * 5000}.mlp_act"], ["layers.999", "layers 0-1"],
    ),
    "digits of another script": (
        [TRAIN, "--hookpoints", "layers.１.mlp_act"], ["layers.１.", "'layers.0.mlp_act'"],
    ),
    "mode": ([TRAIN, "--wandb.mode", "on"], ['wandb.mode: "on" came', "online, offline"]),
    "no such device": ([TRAIN, "--device", "gpu"], ['device: "gpu" came', "cuda:N"]),
    "no output": ([TRAIN, "--output", ""], ['output: "" came', "wanted text"]),
    "output is a file": ([TRAIN, "--output", "@file"], ["@file exists already", "--output"]),
    "a group is no setting": ([TRAIN, "--optim", "3"], ["--optim: no such option", "mean"]),
    "short option": ([TRAIN, "-x"], ["-x: no such option", "sae train --help"]),
    # files of settings
    "a folder for a config": (["train", "@texts"], ["@texts: cannot be read", "a YAML file"]),
    "not UTF-8": (["train", "@latin.yaml"], ["latin.yaml line 2", "save it as UTF-8"]),
    "key twice": (["train", "@twice.yaml"], ["'seed' is given twice", "keep one"]),
    "no keys": (["train", "@list.yaml"], ["list.yaml: ", "such as seed: 1"]),
    "deep nesting": (["train", "@deep.yaml"], ["deep.yaml line 1: nested too deeply"]),
    "bomb of aliases": (["train", "@bomb.yaml"], ["bomb.yaml", "aliases that repeat too much"]),
    "call in YAML": (["train", "@call.yaml"], ["call.yaml line 1: not valid YAML"]),
    "config in no folder": (["train", "@gone/x.yaml"], ["there is no folder @gone", "check"]),
    # models and texts
    "model not on the Hub": ([TRAIN, "--model.name", "gpt3"], ["'gpt3' cannot be loaded", "Hub"]),
    "empty model name": ([TRAIN, "--model.name", ""], ['model.name: "" came', "wanted text"]),
    "no such bundled model": (
        [TRAIN, "--model.name", "builtin:smal"], ["no built-in model 'builtin:smal'", "'builtin:'"],
    ),
    "no model in it": ([TRAIN, "--model.name", "@no model"], ["@no model' cannot be loaded as"]),
    "bundled text slip": (
        [TRAIN, "--data.source", "builtin:stdlb"], ["'builtin:stdlb'", "'builtin:stdlib'"],
    ),
    "binary text": ([TRAIN, "--data.source", "@binary.txt"], ["@binary.txt is not UTF-8 text"]),
    "half a line": ([TRAIN, "--data.source", "@cut.jsonl"], ["@cut.jsonl line 2", "JSON object"]),
    "numbers for text": (
        [TRAIN, "--data.source", "@numbers.jsonl"], ["row 0, column 'text' holds int", "token ids"],
    ),
    "half a table": ([TRAIN, "--data.source", "@cut.parquet"], ["@cut.parquet cannot be read as"]),
    "table without text": (
        [TRAIN, "--data.source", "@words.parquet"], ["no column 'text'", "columns are words"],
    ),
    "column with a slip": (
        [TRAIN, "--data.source", "@rows.jsonl", "--data.column", "bodi"], ["'bodi'", "'body'"],
    ),
    "pickles for text": ([TRAIN, "--data.source", "@pickles"], ["no text in @pickles", ".jsonl"]),
    "no data set": ([TRAIN, "--data.source", "nobody/no"], ["data.source: 'nobody/no'", "'train'"]),
    "device for text": ([TRAIN, "--data.source", "/dev/null"], ["/dev/null is a pipe or a device"]),
    "empty source": ([TRAIN, "--data.source", ""], ['data.source: "" came', "wanted text"]),
    # weights to start from
    "start from a file": ([TRAIN, "--init_from", "@file"], ["init_from: @file", "no such folder"]),
    "start from texts": ([TRAIN, "--init_from", "@texts"], ["init_from: @texts holds no SAE"]),
    "start at another place": (
        [TRAIN, "--init_from", "@run", "--hookpoints", "layers.0.mlp_out"],
        ["init_from: @run has no SAE 'layers.0.mlp_out'", "it has layers.1.mlp_act"],
    ),
    "start from half": ([TRAIN, "--init_from", "@cut"], ["sae.safetensors is damaged", "put back"]),
    "start from an edited one": (
        [TRAIN, "--init_from", "@edited/saes/layers.1.mlp_act"],
        ["@edited/saes", "do not belong together", "one save"],
    ),
    # runs
    "no tokens to evaluate": (["evaluate", "@run", "--tokens", "0"], ["--tokens", "'0'"]),
    "too many tokens": (["evaluate", "@run", "--tokens", "9" * 40], ["--tokens: '999", "whole"]),
    "k of 0 neurons": (["evaluate", "@run", "--k", "0"], ["--k", "'0'", "at least 1"]),
    "evaluate on no GPU": (["evaluate", "@run", "--device", "cuda:77"], ["cuda:77", "cpu or auto"]),
    "evaluate half": (["evaluate", "@cut"], ["sae.safetensors is damaged", "bytes, not"]),
    "evaluate wrong settings": (["evaluate", "@wrong"], ["@wrong/config.yaml is damaged"]),
    "two runs": (["evaluate", "@run", "@run"], ["unrecognized", "sae evaluate --help"]),
    "an SAE more": (
        ["evaluate", "@two", "--sae", "layers.2.mlp_act"], ["'layers.2.mlp_act'", "did you mean"],
    ),
    "below 0 tokens": (["features", "@run", "--tokens", "-5"], ["--tokens", "'-5'"]),
    "no manifest": (["features", "@edited"], ["is not complete", "manifest.json"]),
    "empty SAE": (["features", "@run", "--sae", ""], ["no SAE ''", "layers.1.mlp_act"]),
    "SAE above": (["top", "@run", "--sae", "../../x"], ["no SAE '../../x'", "layers.1.mlp_act"]),
    "nothing to verify": (["verify"], ["required: RUN", "sae verify --help"]),
    "verify no run": (["verify", "@texts"], ["@texts is not a run", "config.yaml"]),
    "verify another": (["verify", "@run", "--sae", "layers.1.mlp_akt"], ["'layers.1.mlp_act'"]),
    "verify half": (["verify", "@cut"], ["sae.safetensors is damaged", "put back"]),
    "verify wrong settings": (["verify", "@wrong"], ['seed: "x" came', "config.yaml is damaged"]),
    "verify on a device": (["verify", "@run", "--device", "cpu"], ["--device: no such option"]),
    "verify with a slip": (["verfy", "@run"], ["no verb 'verfy'", "did you mean 'verify'"]),
    "no features yet": (["top", "@bare"], ["no feature dictionary yet", "sae features RUN"]),
    "which SAE": (["top", "@two"], ["holds 2 SAEs", "--sae: layers.0.mlp_act, layers.1.mlp_act"]),
    "examples gone": (["top", "@lost"], ["features/examples.parquet is missing", "make it again"]),
    "backward range": (["top", "@run", "--feature", "5-2"], ["feature 5-2", "smaller number"]),
    "empty feature": (["top", "@run", "--feature", ""], ["--feature is empty", "1,5,10-20"]),
    "feature below 0": (["top", "@run", "--feature", "-1"], ["feature '-1'", "1,5,10-20"]),
    "sample of x": (["top", "@run", "--sample", "x"], ["--sample: 'x' came", "at least 0"]),
    "limit of nan": (["top", "@run", "--limit", "nan"], ["--limit: 'nan' came", "at least 1"]),
    "sort with a slip": (["top", "@run", "--sort", "densty"], ["--sort densty", "'density'"]),
    "search a sample": (
        ["top", "@run", "--search", "a", "--sample", "1"], ["--sample and --search", "one of them"],
    ),
    "inside a run": (["top", "@run/saes"], ["@run/saes is not a run", "config.yaml"]),
    "text of stray bytes": (["top", "@run", "--text", "caf\udce9"], ["--text", "not UTF-8"]),
    "escape code": (["top", "\x1b[31mrun"], ["\\x1b[31mrun is not a run", "no such folder"]),
    "NUL": (["top", "a\0b"], ["'a\\x00b' holds a character", "remove it"]),
    "half a character": ([TRAIN, "--output", "\ud800"], ["'\\ud800' holds a character"]),
    "long name": (["top", "x" * 5000], ["xxx … xxx", "xx: File name too long; check the path"]),
    "no place": (["export", "@run", "--format", "csv"], ["--out is missing", "--out DIR"]),
    "empty place": (["export", "@run", "--format", "csv", "--out", ""], ["--out is missing"]),
    "feature not there": (
        ["export", "@run", "--format", "csv", "--out", "@x", "--feature", "99"], ["feature 99"],
    ),
    "export over a file": (
        ["export", "@run", "--format", "csv", "--out", "@file"], ["@file already exists", "not a"],
    ),
    "export no features": (
        ["export", "@bare", "--format", "csv", "--out", "@x"], ["sae features RUN"],
    ),
    "export half": (
        ["export", "@cut", "--format", "safetensors", "--out", "@x"], ["tensors is damaged"],
    ),
    "export without examples": (
        ["export", "@lost", "--format", "jsonl", "--out", "@x"], ["examples.parquet is missing"],
    ),
    "resume elsewhere": (
        ["train", "--resume", "@run", "--output", "@new"], ["--output @new", "goes on in @run"],
    ),
    "revision of a folder": (
        ["import", "@run", "--output", "@x", "--revision", "v1"], ["--revision v1", "this disk"],
    ),
    "import a run": (["import", "@run", "--output", "@x"], ["@run is a run already"]),
    "import a file of a folder": (
        ["import", "@run/saes/layers.1.mlp_act/sae.safetensors", "--output", "@x"],
        ["give the folder @run/saes/layers.1.mlp_act, which looks like safetensors"],
    ),
    "options alone": (["--tokens", "5"], ["no verb '--tokens'", "sae --help"]),
}  # fmt: skip


TWO = {"unknown key", "verify wrong settings"}
"""Those that are two mistakes."""

ALONE = (
    "unknown verb", "bomb of aliases", "no folder", "NaN lr", "two configs", "which SAE",
    "verify half", "escape code", "long name",
)  # fmt: skip
NEEDS_A_MODEL = "unknown layer"
"""Those that are tried in processes of their own too."""


def given(place: Place, args: list) -> list[str]:
    """The arguments of a mistake."""
    first = ["train", *flags(place.folder, output="@new")] if args[0] is TRAIN else args[:1]
    return [place.fill(arg) for arg in [*first, *args[1:]]]


def check_told(place: Place, name: str, out: str, err: str) -> None:
    """In few words, all of those wanted among them."""
    lines = err.splitlines()
    for word in MISTAKES[name][1]:
        assert place.fill(word) in err
    assert 1 <= len(lines) <= 3 * (2 if name in TWO else 1) and "Traceback" not in err
    assert all(line.startswith("sae: ") and line.isprintable() for line in lines)
    assert max(map(len, lines)) < 1100
    assert "trained" not in out and "written" not in out and "all is well" not in out


def test_there_are_enough_mistakes() -> None:
    assert len(MISTAKES) >= 80 and len(ALONE) == 9
    assert {*ALONE, NEEDS_A_MODEL, *TWO} <= MISTAKES.keys()


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(scanned: Place, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = scanned.files()
    assert cli.main(given(scanned, MISTAKES[name][0])) == 2
    assert scanned.files() == before and not (scanned.folder / "new").exists()
    check_told(scanned, name, *capsys.readouterr())


@pytest.mark.parametrize("name", ALONE)
def test_mistakes_in_a_process_of_their_own(scanned: Place, name: str, tmp_path: Path) -> None:
    before = scanned.files()
    done = python("-m", "sae.cli", *given(scanned, MISTAKES[name][0]), cwd=tmp_path)
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    assert scanned.files() == before
    check_told(scanned, name, done.stdout, done.stderr)


def test_several_mistakes_are_a_line_each(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["--optim.lrr", "1", "--tokens", "many", "--seed", "-1", "--sae.sparsity.kind", "lasso"]
    assert cli.main(["train", "--seeed=3", *wrong]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines[:2]] == ["--seeed:", "--optim.lrr:"]
    rest = ["sae.sparsity.kind:", "seed:", "tokens:"]
    assert sorted(line.split()[1] for line in lines[2:]) == rest
    assert cli.main(["top", str(place.run), "--feture", "1", "--limt", "3"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("--lr", "did you mean --optim.lr or --finetune.lr?"),
        ("--grid.lr", "did you mean --grid.optim.lr?"),
        ("--seeds", "did you mean '--seed'?"),
    ],
)
def test_an_option_of_a_grid_is_suggested_only_for_one(
    given: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", given, "3"]) == 2
    assert capsys.readouterr().err == f"sae: {given}: no such option; {hint}\n"


@pytest.mark.parametrize(
    ("args", "kept"),
    [
        (["--search", "->"], ["--search=->"]),
        (["--search", "--x-y", "R"], ["--search=--x-y", "R"]),
        (["--search", "--debug"], ["--search=--debug"]),
        (["--debug", "R", "--all", "--debug"], ["R", "--all"]),
        (["--search", "--all", "R"], ["--search", "--all", "R"]),
        (["--search=a", "R"], ["--search=a", "R"]),
        (["--many", "1", "-2"], ["--many", "1", "-2"]),
    ],
)
def test_what_stands_behind_an_option_is_its_value(args: list[str], kept: list[str]) -> None:
    parser = cli.Parser("top", "")
    parser.add_argument("--search")
    parser.add_argument("--many", nargs="+")
    parser.add_argument("--all", action="store_true")
    assert parser.sift(args) == (kept, [])


def test_next_commands_of_several_saes_run_as_they_are(
    place: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = str(tmp_path / "my run")
    monkeypatch.setattr(server, "serve", lambda *_: None)
    assert cli.main(["train", *flags(place.folder, output=run, hookpoints="layers.*.mlp_act")]) == 0
    *_, told = capsys.readouterr().out.splitlines()
    assert f"sae top '{run}' --sae layers.0.mlp_act" in told
    for command in told.removeprefix("next: ").split("; ")[:2]:
        assert cli.main(shlex.split(command)[1:]) == 0
    *_, told = capsys.readouterr().out.splitlines()
    browse, top, export = told.removeprefix("next: ").split("; ")
    assert cli.main(shlex.split(browse)[1:]) == 0
    assert "at http://127.0.0.1:" in capsys.readouterr().out
    assert cli.main(shlex.split(top)[1:]) == 0
    assert "--feature" in capsys.readouterr().out
    assert cli.main(shlex.split(export.replace("DIR", str(tmp_path / "out")))[1:]) == 0
    assert cli.main(["verify", run]) == 0
    *_, told = capsys.readouterr().out.splitlines()
    assert cli.main(shlex.split(told)[2:]) == 0


def test_files_are_the_same_in_a_locale_without_utf8(scanned: Place, tmp_path: Path) -> None:
    """Every verb in the C locale, over texts, labels and settings in UTF-8; and, there and in this
    process, one config trains the same weights."""
    program = """
import sys, locale
from sae import cli
assert locale.getencoding() != "utf-8" and sys.flags.utf8_mode == 0
_, texts, run, out, config, ours, again, *options = sys.argv
for args in (
    ["train", ours, "--output", again],
    ["train", config, *options, "--data.source", texts, "--output", run],
    ["evaluate", run, "--tokens", "500"], ["features", run, "--tokens", "1000"],
    ["top", run], ["verify", run],
    *(["export", run, "--format", f, "--out", out + f] for f in ("jsonl", "csv", "parquet")),
):
    assert cli.main(args) == 0, args
"""
    texts, config = tmp_path / "texts", tmp_path / "config.yaml"
    shutil.copytree(scanned.folder / "texts", texts)
    (texts / "naïve.txt").write_text("café ‖ naïve → größer " * 20, encoding="utf-8")
    config.write_text("# größer ‖\nseed: 3\n", encoding="utf-8")
    ours, again = scanned.run / "config.yaml", tmp_path / "again"
    paths = [str(p) for p in (texts, tmp_path / "run", tmp_path / "out-", config, ours, again)]
    env = {"LC_ALL": "C", "PYTHONUTF8": "0"}
    options = ("-X", "warn_default_encoding", "-c", program)
    done = python(*options, *paths, *flags(scanned.folder), **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'encoding' argument" not in done.stderr  # what our own files do in silence
    weights = [sha256(Run(run).sae() / "sae.safetensors") for run in (scanned.run, again)]
    assert weights[0] == weights[1]
    (tmp_path / "out-parquet" / "README.md").read_text(encoding="utf-8")
    rows = (tmp_path / "out-jsonl" / "features.jsonl").read_text(encoding="utf-8")
    assert len(rows.splitlines()) == 48


def test_a_scan_of_a_short_text_says_how_much_there_was(
    scanned: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(scanned.run, tmp_path / "run")
    assert cli.main(["features", str(run), "--tokens", "9_000_000"]) == 0
    assert re.search(r"scanned [\d,]+ tokens, not 9,000,000: the text", capsys.readouterr().out)


def test_a_hub_that_cannot_be_reached_costs_three_lines_and_no_waiting(
    scanned: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself its client sleeps for 23 s; and the last mistake, of a model on this disk, is told
    in the same words by a process that loads it."""
    wrong = [["train", f"--{name}", "nobody/nothing"] for name in ("model.name", "data.source")]
    wrong += [given(scanned, MISTAKES[NEEDS_A_MODEL][0])]
    program = f"""
import sys, time
slept = []
time.sleep = slept.append
from sae import cli
for args in {wrong}:
    assert cli.main(args) == 2
    assert sum(slept) < 5, slept
    print("next", file=sys.stderr)
"""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    before, here = scanned.files(), tmp_path / "here"
    here.mkdir()
    done = python("-c", program, cwd=here)
    assert done.returncode == 0, done.stderr
    *asked, last, _ = done.stderr.split("next\n")
    for told in asked:
        assert "nobody/nothing" in told and 1 <= len(told.splitlines()) <= 3, told
    check_told(scanned, NEEDS_A_MODEL, done.stdout, last)
    assert scanned.files() == before and list(here.iterdir()) == []


def test_our_own_mistakes_are_one_line_too_and_debug_shows_where(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config, **_: object) -> None:
        raise error

    monkeypatch.setattr(planning, "plan", fail)
    for error, code, words in (
        (ZeroDivisionError("x"), 1, "unexpected ZeroDivisionError: x\nsae:   this is our mistake"),
        (OSError(28, "No space left on device", "/x"), 2, "/x: No space left on device"),
        (RuntimeError("can't allocate memory: 9 bytes"), 2, "lower optim.pool"),
    ):
        assert cli.main(["train", *flags(place.folder)]) == code
        assert words in capsys.readouterr().err
        with pytest.raises(type(error)):
            cli.main(["train", *flags(place.folder), "--debug"])
    error = KeyboardInterrupt()
    assert cli.main(["train", *flags(place.folder)]) == 130


def test_help_is_there_for_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == cli.main(["--help"]) == cli.main(["--version"]) == 0
    out = capsys.readouterr().out
    assert all(
        f"  sae {verb}" in out
        for verb in ("train", "evaluate", "features", "top", "export", "verify")
    )
    for verb in cli.VERBS:
        with pytest.raises(SystemExit) as stopped:
            cli.main([verb, "--help"])
        assert stopped.value.code == 0 and f"usage: sae {verb}" in capsys.readouterr().out


def test_help_and_import_do_without_torch() -> None:
    program = """
import sys, sae
heavy = {"torch", "transformers", "datasets", "numpy", "pyarrow"}
assert not heavy & sys.modules.keys(), "import sae"
from sae import cli
assert cli.main(["--help"]) == 0
assert not heavy & sys.modules.keys(), "sae --help"
for verb in cli.VERBS:
    try: cli.main([verb, "--help"])
    except SystemExit: pass
    assert not heavy & sys.modules.keys(), verb
assert cli.main(["train", "--seed", "x"]) == 2
assert not heavy & sys.modules.keys(), "a mistake in the settings"
print("light")
"""
    done = python("-c", program)
    assert done.stdout.endswith("light\n"), done.stderr


def test_a_reader_that_leaves_early_is_no_error(place: Place) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "sae.cli", "train", "--help"],
        stdout=write, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(write)
    assert done.returncode == 0 and done.stderr == ""


def test_training_says_what_it_does_and_what_is_next(place: Place) -> None:
    said = place.said
    assert "SAE     layers.1.mlp_act: 24 → 48 features, topk k 4" in said
    assert "row " in said and f"trained {place.run}\nnext: sae evaluate {place.run};" in said
    assert yaml.safe_load((place.run / "config.yaml").read_text())["tokens"] == TOKENS


@pytest.mark.parametrize("kind", ["relu_l1", "topk"])
def test_from_training_to_export(
    place: Place, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "my run")
    options = flags(place.folder, output=run)
    if kind == "relu_l1":
        del options[options.index("--sae.sparsity.k") :][:2]
        at = options.index("--sae.sparsity.k")
        options[at : at + 2] = ["--sae.sparsity.kind", "relu_l1", "--sae.sparsity.l1=0.5"]
    assert cli.main(["train", *options]) == 0
    assert f"sae top '{run}'" in capsys.readouterr().out
    assert cli.main(["evaluate", run, "--tokens", "500", "--k", "2", "6", "--device=cpu"]) == 0
    out, err = capsys.readouterr()
    assert "FVU" in out and "6 neurons" in out and "all neurons" in out
    assert re.match(r"evaluating 5\d\d/500 ", err)
    result = json.loads((Run(run).sae() / "eval.json").read_text())
    assert result["n_tokens"] >= 500 and result["cross_entropy"] is not None
    assert cli.main(["features", run, "--tokens", "1_000"]) == 0
    out, err = capsys.readouterr()
    assert f"written {Run(run).sae() / 'features'}" in out
    assert re.match(r"scanning 1,\d\d\d/1,000 ", err)
    look_around(run, capsys)
    write_everywhere(run, tmp_path, capsys)


def look_around(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`sae top` in all its ways."""
    dictionary = FeatureDictionary(Run(run).features())
    strongest, *_ = dictionary.ranked()
    word = dictionary.records([strongest])[0].top_tokens[0].piece.strip()
    for args, words in (
        ([], ["strongest example", f"--feature {strongest}"]),
        (["--sort", "density", "--limit", "3"], ["next: sae top"]),
        (["--feature", str(strongest)], [f"Feature {strongest}", "layers.1.mlp_act of", "next:"]),
        (["--feature", f"{strongest},{(strongest + 1) % 48}"], ["strongest example"]),
        (["--search", word.upper()], [word]),
        (["--sample", "0", "--limit", "4"], ["strongest example"]),
        (["--text", "--a-b cat"], ["layers.1.mlp_act", "features (activation)"]),
        (["--text=-5 mats"], ["features (activation)"]),
    ):
        assert cli.main(["top", run, *args]) == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words), (args, out)


def write_everywhere(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`sae export` to every format."""
    for name in ("parquet", "jsonl", "csv", "safetensors"):
        out = tmp_path / name
        assert cli.main(["export", run, "--format", name, "--out", str(out)]) == 0
        assert f"written {out}\nnext: " in capsys.readouterr().out
        assert (out / "manifest.json").is_file()
    assert pq.read_table(tmp_path / "parquet" / "features.parquet").num_rows == 48
    rows = (tmp_path / "jsonl" / "features.jsonl").read_text().splitlines()
    assert [json.loads(row)["feature"] for row in rows] == list(range(48))
    assert SparseAutoencoder.from_pretrained(tmp_path / "safetensors").d_sae == 48
    args = ["export", run, "--format", "jsonl", "--out", str(tmp_path / "two"), "--feature", "3,7"]
    assert cli.main(args) == 0
    assert len((tmp_path / "two" / "features.jsonl").read_text().splitlines()) == 2


def test_a_dry_run_writes_nothing(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = place.files()
    for option in ("--dry-run", "--dry_run"):
        assert cli.main(["train", *flags(place.folder, output="new"), option]) == 0
        out = capsys.readouterr().out
        assert re.search(r"time    about .+ \([\d,]+ tokens/s\)", out) and "nothing was" in out
    assert list(tmp_path.iterdir()) == [] and place.files() == before


def test_one_config_gives_one_result_from_a_file_or_from_flags(
    place: Place, tmp_path: Path
) -> None:
    """config.yaml of a run trains the same weights again, and so do flags spelled another way."""
    weights = sha256(place.run / "saes" / "layers.1.mlp_act" / "sae.safetensors")
    again = tmp_path / "again"
    assert cli.main(["train", str(place.run / "config.yaml"), "--output", str(again)]) == 0
    assert sha256(Run(again).sae() / "sae.safetensors") == weights


@pytest.mark.parametrize(
    "option", [["--sae.expansion-factor", "3"], ["--sae.expansion_factor=3"]], ids=str
)
def test_dashes_and_underscores_are_one(
    place: Place, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--sae.d_sae", "null", "--output", str(place.folder / "new"), "--dry-run"]
    assert cli.main(["train", *flags(place.folder), *given, *option]) == 0
    assert "24 → 72 features" in capsys.readouterr().out


def test_lists_may_be_given_in_parts(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--output", str(place.folder / "new"), "--dry-run"]
    assert (
        cli.main(["train", *flags(place.folder), *given, "--hookpoints", "layers.0.mlp_out"]) == 0
    )
    out = capsys.readouterr().out
    assert "layers.1.mlp_act: 24 → 48" in out and "layers.0.mlp_out: 16 → 48" in out
    assert cli.main(["train", *flags(place.folder), "--optim.betas", "-1", "0.5"]) == 2
    assert "optim.betas: [-1, 0.5] came" in capsys.readouterr().err


def test_a_grid_is_trained_evaluated_scanned_and_shown(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "grid"
    options = [*flags(place.folder, output=str(run)), "--grid.sae.sparsity.k", "2", "4"]
    assert cli.main(["train", *options, "--dry-run"]) == 0
    names = [f"{SITE}-k={k}" for k in (2, 4)]
    out = capsys.readouterr().out
    assert all(f"SAE     {name}: 24 → 48" in out for name in names)
    assert cli.main(["train", *options]) == 0 and list(Run(run).saes()) == names
    for verb in (["evaluate"], ["features", "--tokens", "2000"], ["top", "--text", "the cat sat"]):
        assert cli.main([verb[0], str(run), *verb[1:], "--device", "cpu"]) == 0
        out = capsys.readouterr().out
        assert all(name in out for name in names)
    for name in names:
        folder = Run(run).sae(name)
        assert json.loads((folder / "eval.json").read_text())["hookpoint"] == SITE
        assert cli.main(["top", str(run), "--sae", name]) == 0
        assert name in capsys.readouterr().out
        pages = Pages(Run(run).features(name))
        assert pages.name.endswith(name) and len(pages.history()["curves"]["tokens"]) == 3
    assert cli.main(["verify", str(run)]) == 0
    assert cli.main(["train", *flags(place.folder), "--grid.optim.batch", "64"]) == 2
    assert "--grid.optim.batch: no such option" in capsys.readouterr().err


def test_training_goes_on_from_another_run(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def first_fvu(run: Path) -> float:
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["fvu"]

    second = tmp_path / "second"
    options = flags(place.folder, output=str(second))
    assert cli.main(["train", *options, "--init-from", str(place.run)]) == 0
    assert first_fvu(second) < first_fvu(place.run)


def test_after_ctrl_c_the_run_is_there(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = str(tmp_path / "run")
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        stop = partial(os.kill, os.getpid(), number)
        monkeypatch.setattr(training.Log, "write", lambda *_, stop=stop: stop())
        resume = ["--resume", run] if Path(run).exists() else flags(place.folder, output=run)
        assert cli.main(["train", *resume]) == code
        out = capsys.readouterr().out
        assert f"{number.name}: stopped after " in out and f"sae train --resume {run}" in out
        assert f"sae top {run}" in out
    assert SparseAutoencoder.from_pretrained(run).d_sae == 48


def test_a_run_that_is_begun_needs_no_weights_to_start_from(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, run = tmp_path / "start", tmp_path / "run"
    shutil.copytree(place.run, start)
    with monkeypatch.context() as patched:
        patched.setattr(training.Log, "write", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        options = flags(place.folder, output=str(run))
        assert cli.main(["train", *options, "--init-from", str(start)]) == 143
    shutil.rmtree(start)
    assert cli.main(["train", "--resume", str(run)]) == 0
