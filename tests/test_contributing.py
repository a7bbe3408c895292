"""Proves that a sparsity added to a copy of the package in the three places that CONTRIBUTING.md
shows, and nowhere else, has its properties, trains, resumes, and is listed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import overrides, save

ROOT = Path(__file__).parent.parent
PLACES = ("sae/sparsity.py", "sae/config.py", "tests/variants.py")


def put(file: Path, *changes: tuple[str, str]) -> None:
    """Write `new` in front of the one place where `old` stands, for each change."""
    text = file.read_text()
    for old, new in changes:
        assert text.count(old) == 1, (file, old)
        text = text.replace(old, new + old)
    file.write_text(text)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and its tests, with the variant of CONTRIBUTING.md."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("sae", "tests", "checkpoints/builtin"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "pyproject.toml", folder)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    sparsity, config, row = blocks
    files = [folder / place for place in PLACES]
    put(
        files[0],
        ("def _check_not_negative", sparsity + "\n\n"),
        (")\n}\n\n\ndef make", ", FixedThreshold"),
    )
    put(
        files[1],
        ("class SAEConfig(", config + "\n\n"),
        (" = Field(\n        default=ReluL1Config()", " | FixedThresholdConfig"),
    )
    put(
        files[2],
        ("}\n\n\ndef randn", row),
        ("BatchTopK, Gated, JumpRelu, ReluL1", "FixedThreshold, "),
    )
    return folder


def python(copy: Path, *args: str) -> str:
    """What python prints in the copy."""
    env = os.environ | {"PYTHONPATH": f"{copy}{os.pathsep}{copy / 'tests'}"}
    done = subprocess.run(
        [sys.executable, *args], cwd=copy, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


PROPERTIES = {
    "test_activations_have_the_shape_of_pre_and_are_not_negative",
    "test_a_token_is_encoded_as_in_any_company",
    "test_what_is_not_active_is_exactly_zero",
    "test_gradients_are_those_of_the_loss_by_finite_differences",
    "test_a_step_is_the_same_however_it_is_split",
    "test_saved_and_loaded_is_the_same_to_the_bit",
    "test_folding_leaves_the_activations_as_they_are",
    "test_a_config_makes_the_same_sparsity_again",
}
"""Tests of tests/test_sparsity.py that every row of VARIANTS has."""
OTHERS = {"test_an_interrupted_run_ends_in_the_same_bits", "test_commands"}
COMMANDS = """
import sys
from sae import cli
def test_commands(capfd):
    for args in {commands}:
        assert cli.main(args) == 0
    out = capfd.readouterr().out
    assert "fixed threshold 0.5" in out and "strongest example" in out
"""


def test_the_variant_of_contributing_has_all_properties_resumes_and_is_listed(
    copy: Path, tmp_path: Path
) -> None:
    given = overrides(save(tmp_path)) | {"output": str(tmp_path / "run")}
    del given["sae.sparsity.k"]
    given |= {"sae.sparsity.kind": "fixed", "sae.sparsity.threshold": "0.5"}
    options = [part for name, value in given.items() for part in (f"--{name}", value)]
    run = given["output"]
    commands = [["train", *options], ["features", run, "--tokens", "1000"], ["top", run]]
    (copy / "tests" / "test_fixed.py").write_text(COMMANDS.format(commands=commands))
    files = [f"tests/test_{name}.py" for name in ("sparsity", "resume", "fixed")]
    wanted = "fixed and (test_sparsity or same_bits or test_commands)"
    out = python(copy, "-m", "pytest", "-v", "-p", "no:cacheprovider", *files, "-k", wanted)
    passed = set(re.findall(r"::(test_\w+)\S* PASSED", out))
    assert passed >= PROPERTIES | OTHERS
