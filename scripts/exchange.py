"""Round trips through other tools' own packages: the same activations and reconstructions?

Ours → theirs: an SAE of random weights is exported, opened by the real package in a virtual
environment of its own, and both encode and decode 1,000 random and 1,000 real activations (of the
bundled model). Theirs → ours: the package saves what it has loaded, and `sae import` reads that.
Prints the table of docs/exchange.md. Takes ten minutes, most of it installing.

    make exchange            # or: python scripts/exchange.py [--peers FOLDER] [--only saelens]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae import formats
from sae.autoencoder import SparseAutoencoder
from sae.builtin import documents
from sae.config import ModelConfig
from sae.hooks import Hookpoint, capture
from sae.language_model import load
from sae.sparsity import BatchTopK, Gated, JumpRelu, ReluL1, TopK, make_sparsity
from sae.store import Run, write_atomic, write_manifest

PACKAGES = {
    "saelens": "sae-lens",
    "sparsify": "eai-sparsify",
    "dictionary_learning": "dictionary-learning",
}
WORKER = Path(__file__).with_name("exchange_worker.py")
SITE, N, D_SAE, SEED = "layers.2.mlp_out", 1000, 512, 0
GOAL, CLOSE, MOST_CLOSE = 1e-5, 1e-5, 1e-3
KINDS = {
    "relu_l1": ReluL1(1.0),
    "topk": TopK(16),
    "batchtopk": BatchTopK(16),
    "matryoshka": BatchTopK(16),
    "jumprelu": JumpRelu(),
    "gated": Gated(1.0),
}
HOLDS = {"saelens": tuple(KINDS), "sparsify": ("topk",), "dictionary_learning": tuple(KINDS)}
PREFIXES = "sae: {prefixes: [0.25, 0.5, 1.0]}\n"


class Row(NamedTuple):
    """One direction of one kind through one package."""

    package: str
    kind: str
    subtract: bool
    direction: str
    encode: float
    decode: float
    excluded: float
    """Share of the activations left out, as they lie within 1e-5 of where they begin."""
    l0: float = float("inf")
    """Features active per token, of the inputs with fewer: an SAE that is silent proves nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="virtual environments")
    parser.add_argument("--only", choices=PACKAGES, help="one of the packages")
    args = parser.parse_args()
    real = real_activations()
    random = torch.randn(real.shape, generator=torch.Generator().manual_seed(SEED))
    inputs = {"random": random, "real": real}
    rows = []
    for name in [args.only] if args.only else PACKAGES:
        python, version = environment(args.peers, PACKAGES[name])
        print(f"{PACKAGES[name]} {version}", flush=True)
        for kind in HOLDS[name]:
            for subtract in (True, False):
                rows += trips(python, f"{PACKAGES[name]} {version}", name, kind, subtract, inputs)
    print(table(rows))
    worst = max(max(row.encode, row.decode) for row in rows)
    silent = min(row.l0 for row in rows) < 1
    sys.exit(int(silent or worst > GOAL or max(row.excluded for row in rows) > MOST_CLOSE))


def environment(peers: Path, package: str, *others: str) -> tuple[Path, str]:
    """The Python of a package's own virtual environment, made where there is none; its version.

    `others` are installed with it. Its torchvision, which may not fit its torch, is taken out.
    """
    folder = peers / package
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", package, *others], check=True)
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return python, done.stdout.strip()


def real_activations() -> Tensor:
    """[N d] what the bundled model's MLP writes on built-in text."""
    lm = load(ModelConfig(), torch.device("cpu"))
    point, found = Hookpoint.parse(SITE), []
    for document in documents("builtin:"):
        ids = lm.tokenizer(document.text, return_tensors="pt", verbose=False)["input_ids"]
        for start in range(0, ids.shape[1], lm.context or N):
            with torch.no_grad(), capture(lm.model, [point]) as acts:
                lm.model(input_ids=ids[:, start : start + (lm.context or N)])
            found.append(acts[point][0])
        if sum(map(len, found)) >= N:
            break
    return torch.cat(found)[:N].contiguous()


def trips(
    python: Path, package: str, name: str, kind: str, subtract: bool, inputs: dict[str, Tensor]
) -> Iterator[Row]:
    """Out to the package, and back from what it saves."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sae = make(kind, subtract, inputs["real"])
        save_file(inputs, root / "inputs.safetensors")
        settings = PREFIXES if kind == "matryoshka" else ""
        formats.write(name, run_folder(root / "run", sae, settings), root / "out")
        there = next((root / "out").rglob({"sparsify": "cfg.json"}.get(name, "*.json"))).parent
        job = {"format": name, "folder": str(there), "root": str(root)}
        write_atomic(root / "job.json", json.dumps(job))
        subprocess.run([python, WORKER, root / "job.json"], check=True, capture_output=True)
        theirs = load_file(root / "outputs.safetensors")
        yield compare(Row(package, kind, subtract, "ours → theirs", 0, 0, 0), sae, inputs, theirs)
        found = formats.read(root / "saved", name, trusted=True)[1][0].sae
        yield compare(Row(package, kind, subtract, "theirs → ours", 0, 0, 0), found, inputs, theirs)


@torch.no_grad()
def make(kind: str, subtract: bool, x: Tensor) -> SparseAutoencoder:
    """Random directions of norm 1, and biases and thresholds that leave features sparse."""
    sparsity = make_sparsity(KINDS[kind].kind, **KINDS[kind].config())
    sae = SparseAutoencoder(x.shape[1], D_SAE, sparsity, None, subtract)
    generator = torch.Generator().manual_seed(SEED)
    sae.initialise(x.mean(0), generator)
    sae.W_dec.mul_(10)
    sae.b_enc.copy_(-0.2 * torch.rand(D_SAE, generator=generator))
    for name, tensor in sparsity.state_dict().items():
        drawn = torch.rand(tensor.shape, generator=generator)
        starts = {"threshold": 0.05, "log_threshold": -3.5, "b_mag": -0.1}
        tensor.copy_(starts.get(name, 0) + drawn * (0.01 if name == "threshold" else 0.5))
    return sae


def run_folder(run: Path, sae: SparseAutoencoder, settings: str) -> Path:
    """A run that holds just this SAE."""
    facts = {"hookpoint": SITE, "model": "builtin:", "data": "builtin:"}
    folder = run / "saes" / SITE
    sae.save_pretrained(folder, facts)
    write_manifest(folder, facts)
    write_atomic(run / "config.yaml", f"hookpoints: [{SITE}]\n{settings}")
    return Run(run).sae()


@torch.no_grad()
def compare(
    row: Row, sae: SparseAutoencoder, inputs: dict[str, Tensor], theirs: dict[str, Tensor]
) -> Row:
    """‖a − b‖ / ‖b‖ over both kinds of inputs, the larger of the two."""
    for name, x in inputs.items():
        ours, (acts, recon) = sae(x), (theirs[f"{name}.acts"], theirs[f"{name}.recon"])
        differs = (ours.acts > 0) != (acts > 0)
        edge = differs & ((ours.acts - acts).abs() <= CLOSE)
        off = edge | (differs & near_the_cut(sae, ours.pre))
        kept = ~off.any(-1)
        row = row._replace(
            encode=max(row.encode, relative(ours.acts[~off], acts[~off])),
            decode=max(row.decode, relative(ours.recon[kept], recon[kept])),
            excluded=max(row.excluded, off.float().mean().item()),
            l0=min(row.l0, (acts > 0).sum(-1).float().mean().item()),
        )
    return row


def near_the_cut(sae: SparseAutoencoder, pre: Tensor) -> Tensor:
    """Which pre-activations lie within 1e-5 of what decides whether they are active."""
    if sae.sparsity.kind == "topk":
        cut = pre.topk(sae.sparsity.config()["k"], dim=-1).values[:, -1:]
    else:
        cut = getattr(sae.sparsity, "threshold", torch.zeros(()))
    return (pre - cut).abs() <= CLOSE


def relative(a: Tensor, b: Tensor) -> float:
    return (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item()


def table(rows: list[Row]) -> str:
    """The table of docs/exchange.md."""
    lines = [
        "| package | kind | b_dec subtracted | direction | encode | decode | excluded | L0 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        subtracted = "yes" if row.subtract else "no"
        numbers = f"{row.encode:.0e} | {row.decode:.0e} | {row.excluded:.2%} | {row.l0:.0f}"
        lines.append(f"| {row.package} | {row.kind} | {subtracted} | {row.direction} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
