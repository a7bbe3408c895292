"""Runs the code of docs/in-other-tools.md, each piece where its package is installed.

An SAE of random weights at the doc's hookpoint stands for a trained one. All pieces have to print
the same features and the same next tokens. Takes two minutes, or ten with installing.

    make exchange            # or: python scripts/other_tools.py [--peers FOLDER]
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from exchange import PACKAGES, SITE, Case, environment, make, real_activations, run_folder

from sae import formats
from sae.autoencoder import SparseAutoencoder
from sae.builtin import model_path

ROOT = Path(__file__).parents[1]
DOC = ROOT / "docs" / "in-other-tools.md"
HEADINGS = {"SAELens": "saelens", "sparsify": "sparsify", "transformers": None}
"""Section, and the format that its package reads."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="virtual environments")
    args = parser.parse_args()
    code, printed = pieces(DOC.read_text(encoding="utf-8")), {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for heading, name in HEADINGS.items():
            python, where = Path(sys.executable), "transformers with replace()"
            if name is not None:
                python, version = environment(args.peers.absolute(), PACKAGES[name])
                where = f"{PACKAGES[name]} {version}"
            (Path(folder) / "piece.py").write_text(code[heading], encoding="utf-8")
            printed[where] = run(python.absolute(), Path(folder))
            print(f"{where}: {printed[where]}", flush=True)
    sys.exit(int(len(set(printed.values())) > 1))


def pieces(doc: str) -> dict[str, str]:
    """The Python of each section, all its blocks in one."""
    sections = re.split(r"^## ", doc, flags=re.MULTILINE)[1:]
    blocks = {s.splitlines()[0]: re.findall(r"```python\n(.*?)```", s, re.DOTALL) for s in sections}
    return {heading: "\n".join(found) for heading, found in blocks.items()}


def prepare(folder: Path) -> Path:
    """The run, its exports and the model, by the paths that the doc has; returns the run."""
    run, case = folder / "checkpoints" / "mine", Case("topk", subtract=True)
    x = real_activations(SITE)
    sae: SparseAutoencoder = make(case, x, x)
    run_folder(run, sae, case)
    (folder / "checkpoints" / "builtin").symlink_to(model_path("builtin:"))
    for name in filter(None, HEADINGS.values()):
        formats.write(name, run / "saes" / SITE, folder / "exports" / name)
    return run


def run(python: Path, folder: Path) -> str:
    """What a piece prints in that folder, without the network."""
    given = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    if python == Path(sys.executable).absolute():
        given["PYTHONPATH"] = str(ROOT)
    command = [python, folder / "piece.py"]
    done = subprocess.run(command, cwd=folder, env=given, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{python}: the code of {DOC.name} fails")
    return done.stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    main()
