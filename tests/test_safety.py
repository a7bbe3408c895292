"""Proves that nothing a folder holds can run: the package has no call that would run it, and a
pickle that leaves a mark lies under every name a loader might reach for, in every kind of folder
that is read, and leaves none."""

import ast
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import overrides, save

from sae import cli, language_model, store
from sae.autoencoder import SparseAutoencoder
from sae.config import DataConfig, ModelConfig
from sae.documents import Documents
from sae.errors import ModelError, SAEError
from sae.planning import pick_device
from sae.records import FeatureDictionary
from sae.store import Run

PACKAGE = Path(store.__file__).parent

MODULES = "pickle cPickle _pickle cloudpickle dill joblib marshal shelve"
CALLS = (
    "torch.load torch.save torch.jit.load torch.hub.load yaml.load yaml.load_all yaml.unsafe_load "
    "yaml.full_load yaml.UnsafeLoader yaml.FullLoader yaml.Loader os.system os.popen "
    "pandas.read_pickle builtins.eval builtins.exec builtins.compile"
)
BANNED_MODULES, BANNED_CALLS = frozenset(MODULES.split()), frozenset(CALLS.split())
BANNED_BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})
BANNED_ARGUMENTS = frozenset({"trust_remote_code", "shell", "allow_pickle"})
"""Refused unless they are the constant False."""


def names_in(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: np → numpy, load → torch.load."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                found[alias.asname or whole] = whole
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """`np.load` as numpy.load; "" for what does not begin with an imported name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in names:
        return ""
    return ".".join([names[node.id], *reversed(parts)])


def banned(source: str) -> Iterator[str]:
    """Everything in a source that could run what a file holds."""
    tree = ast.parse(source)
    names = names_in(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in BANNED_MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in BANNED_MODULES:
                yield node.module or ""
            whole = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name for name in whole if name in BANNED_CALLS)
        elif isinstance(node, ast.Attribute):
            if (name := dotted(node, names)) in BANNED_CALLS:
                yield name
        elif isinstance(node, ast.Name):
            if node.id in BANNED_BUILTINS and node.id not in names:
                yield node.id
        elif isinstance(node, ast.keyword) and node.arg in BANNED_ARGUMENTS and not is_false(node):
            yield f"{node.arg}="


def is_false(node: ast.keyword) -> bool:
    return isinstance(node.value, ast.Constant) and node.value.value is False


SOURCES = sorted(PACKAGE.rglob("*.py"))
EXEMPT = {"formats/torch_file.py": {"pickle", "torch.save"}}
"""Reads tensors alone, in a process of its own, and only when asked to (see test_torch_file)."""


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_nothing_in_the_package_runs_what_a_file_holds(file: Path) -> None:
    allowed = EXEMPT.get(file.relative_to(PACKAGE).as_posix(), set())
    assert set(banned(file.read_text(encoding="utf-8"))) == allowed


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "def f():\n    import dill.source",
        "import torch\ntorch.load(x)",
        "import torch as t\nt.load(x)",
        "from torch import load as l\nl(x)",
        "import torch\nread = torch.load",
        "import torch\ntorch.save(x, y)",
        "import yaml\nyaml.load(x, yaml.SafeLoader)",
        "from yaml import unsafe_load",
        "import joblib",
        "import marshal, shelve",
        "eval('1')",
        "exec(code)",
        "compile(a, b, 'exec')",
        "run = eval",
        "import builtins\nbuiltins.eval('1')",
        "__import__('os')",
        "import os\nos.system('x')",
        "f(x, trust_remote_code=True)",
        "f(x, trust_remote_code=flag)",
        "run(x, shell=True)",
        "import numpy as np\nnp.load(x, allow_pickle=True)",
    ],
)
def test_the_ban_finds(source: str) -> None:
    assert list(banned(source))


def test_the_ban_passes_what_only_looks_alike() -> None:
    source = """
import ast, re, torch, yaml
model.eval()
re.compile("a")
ast.literal_eval("1")
torch.compile(f)
yaml.safe_load(x)
run(x, shell=False)
"pickle, torch.load( and eval("
"""
    assert list(banned(source)) == []


class Canary:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


NAMES = (
    "sae.pt sae.pth sae.bin sae.pkl sae.npy sae.npz sae.safetensors.pt model.bin model.pt "
    "pytorch_model.bin pytorch_model-00001-of-00001.bin adapter_model.bin tf_model.h5 "
    "training_args.bin optimizer.pt optimizer.bin scheduler.pt scaler.pt rng_state.pth state.pt "
    "state.pkl checkpoint.pt ckpt.pt trainer_state.pt tokenizer.pkl tokenizer.bin vocab.pkl "
    "data.pkl data.pickle data.npy data.joblib data.dill data.pt cache.pkl features.pkl "
    "features.npy examples.pkl tokens.npy tokens.pt labels.pkl config.pkl cfg.pkl ae.pt "
    "cfg.json.pkl metrics.pkl manifest.pkl ae_ckpt.pt __init__.pyc sitecustomize.pth"
)
STANDARD = {
    "sae": ("sae.safetensors", "cfg.yaml", "manifest.json", "fingerprint.safetensors"),
    "features": ("features.parquet", "examples.parquet", "tokens.safetensors", "manifest.json"),
    "model": ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"),
}
"""Names that are read: there the pickle takes the place of what should be there."""


def options(folder: Path, **changes: str) -> list[str]:
    """Of a quick training run."""
    given = overrides(folder) | changes
    return [part for name, value in given.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, texts, and a run on them."""
    folder = save(tmp_path_factory.mktemp("safety"))
    assert cli.main(["train", *options(folder)]) == 0
    assert cli.main(["features", str(folder / "run"), "--tokens", "500", "--device", "cpu"]) == 0
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of it all, whose config points into the copy."""
    folder = Path(shutil.copytree(made, tmp_path / "place"))
    config = folder / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(made), str(folder)))
    return folder


def pickled(mark: Path) -> bytes:
    return pickle.dumps(Canary(mark))


def read_everything(place: Path) -> list[SAEError]:
    """Each loader of the package on its folder; what they refuse."""
    sae = Run(place / "run").sae() if (place / "run" / "config.yaml").is_file() else place
    run = str(place / "run")
    model = ModelConfig(name=str(place / "model"))
    refused = []
    for reader in (
        lambda: SparseAutoencoder.from_pretrained(sae),
        lambda: FeatureDictionary(sae / "features").records([0]),
        lambda: FeatureDictionary(store.features_folder(sae)),
        lambda: store.verify(sae),
        lambda: language_model.load(model, pick_device("cpu")),
        lambda: list(Documents(DataConfig(source=str(place / "texts")))),
    ):
        try:
            reader()
        except SAEError as error:
            refused.append(error)
    for args in (
        ["verify", run],
        ["top", run],
        ["top", run, "--text", "the cat"],
        ["evaluate", run, "--tokens", "200", "--device", "cpu"],
        ["export", run, "--format", "safetensors", "--out", str(place / "out")],
        ["train", *options(place, init_from=run, output=str(place / "new")), "--dry-run"],
    ):
        assert cli.main(args) in (0, 2)
    return refused


def test_the_canary_would_sing(tmp_path: Path) -> None:
    pickle.loads(pickled(tmp_path / "mark"))
    assert (tmp_path / "mark").exists()


def test_pickles_beside_what_is_read_never_run(place: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    sae = Run(place / "run").sae()
    folders = [place / "model", place / "texts", place / "run", sae, sae / "features"]
    (place / "run" / "steps" / "64").mkdir(parents=True)
    for folder in [*folders, place / "run" / "steps" / "64", place]:
        for name in NAMES.split():
            (folder / name).write_bytes(pickled(mark))
    store.write_manifest(place / "run", {"tokens": 1})
    assert read_everything(place) == []
    assert not mark.exists()


@pytest.mark.parametrize(
    ("where", "name"), [(where, name) for where, names in STANDARD.items() for name in names]
)
def test_a_pickle_in_the_place_of_what_is_read_never_runs(
    place: Path, tmp_path: Path, where: str, name: str
) -> None:
    mark = tmp_path / "mark"
    sae = Run(place / "run").sae()
    store.write_manifest(place / "run", {"tokens": 1})
    folder = {"sae": sae, "features": sae / "features", "model": place / "model"}[where]
    (folder / name).write_bytes(pickled(mark))
    assert read_everything(place)
    assert not mark.exists()


def test_a_model_that_is_only_a_pickle_is_refused(place: Path, tmp_path: Path) -> None:
    """Whatever its config says, code of its own included."""
    folder, mark = place / "model", tmp_path / "mark"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickled(mark))
    config = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    for extra in ({}, {"auto_map": {"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.B"}},
                  {"model_type": "evil", "auto_map": {"AutoConfig": "evil.A"}}):  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config | extra))
        with pytest.raises(ModelError):
            language_model.load(ModelConfig(name=str(folder)), pick_device("cpu"))
        assert not mark.exists()


def test_a_data_set_of_pickles_or_scripts_is_refused(tmp_path: Path) -> None:
    """Data set cards that name pickles, a builder of pickles, a loading script, a saved state."""
    mark = tmp_path / "mark"
    cards = {
        "pickles": "configs:\n- config_name: default\n  data_files: '*.pkl'\n",
        "builder": "builder_name: pandas\nconfigs:\n- config_name: a\n  data_files: data.pkl\n",
        "arrays": "configs:\n- config_name: default\n  data_files: data.npy\n",
    }
    for name, card in cards.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "README.md").write_text(f"---\n{card}---\n")
        (folder / f"{name}.py").write_text(
            f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
        )
        for file in ("data.pkl", "data.npy", "data.pt"):
            (folder / file).write_bytes(pickled(mark))
        with pytest.raises(SAEError):
            list(Documents(DataConfig(source=str(folder))))
    saved = tmp_path / "saved"
    saved.mkdir()
    for file in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow", "state.pkl"):
        (saved / file).write_bytes(pickled(mark))
    with pytest.raises(SAEError):
        list(Documents(DataConfig(source=str(saved))))
    assert not mark.exists()
