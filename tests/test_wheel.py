"""The built wheel carries the bundled model and works from another folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

PROGRAM = """
import sae
from sae import builtin
from sae.builtin import facts
assert builtin.model_path().is_relative_to(sae.__path__[0]), builtin.model_path()
assert (builtin.model_path() / "model.safetensors").is_file()
assert len(facts.load().facts) >= 300
from sae.cli import main
raise SystemExit(main(["train", "--sae.sparsity.k", "-1"]))
"""


def test_wheel_holds_all_it_needs(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr  # the verb ran and refused k below 1
    assert "sae.sparsity.k" in done.stderr and "Traceback" not in done.stderr
