"""Round trips through other tools' own packages: the same activations and reconstructions?

Ours → theirs: an SAE or a map of random weights is exported, opened by the real package in a
virtual environment of its own, and both encode and decode 1,000 random and 1,000 real activations
(of the bundled model). Theirs → ours: the package saves what it has loaded, and `sae import` reads
that. Gemma Scope's files are read by SAELens' own loaders of them. Prints the table of
docs/exchange.md. Takes twenty minutes, half of it installing.

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
from sae.routes import Route
from sae.sparsity import BatchTopK, Gated, JumpRelu, ReluL1, TopK, make_sparsity
from sae.store import Run, write_atomic, write_manifest

PACKAGES = {
    "saelens": "sae-lens",
    "sparsify": "eai-sparsify",
    "dictionary_learning": "dictionary-learning",
    "gemma_scope": "sae-lens",
    "gemma_scope_2": "sae-lens",
}
"""What reads each format."""
WORKER = Path(__file__).with_name("exchange_worker.py")
SITE, N, D_SAE, SEED = "layers.2.mlp_out", 1000, 512, 0
READS = "layers.2.mlp_in"
"""What a transcoder to SITE reads."""
GOAL, CLOSE, MOST_CLOSE = 1e-5, 1e-5, 1e-3
KINDS = {
    "relu_l1": ReluL1(1.0),
    "topk": TopK(16),
    "batchtopk": BatchTopK(16),
    "matryoshka": BatchTopK(16),
    "jumprelu": JumpRelu(),
    "gated": Gated(1.0),
}
SAES = {
    "saelens": tuple(KINDS),
    "sparsify": ("topk",),
    "dictionary_learning": tuple(KINDS),
    "gemma_scope": ("batchtopk", "matryoshka", "jumprelu"),
    "gemma_scope_2": ("batchtopk", "matryoshka", "jumprelu"),
}
MAPS = {
    "saelens": ("relu_l1", "batchtopk", "matryoshka", "jumprelu"),
    "sparsify": ("topk",),
    "gemma_scope": SAES["gemma_scope"],
    "gemma_scope_2": SAES["gemma_scope_2"],
}
NO_SKIP = ("gemma_scope",)
PREFIXES = "sae: {prefixes: [0.25, 0.5, 1.0]}\n"


class Case(NamedTuple):
    """What goes out and comes back."""

    kind: str
    shape: str = "SAE"
    """SAE, transcoder or skip transcoder."""
    subtract: bool = False

    @property
    def is_map(self) -> bool:
        """Whether it rebuilds something else than it reads."""
        return self.shape != "SAE"


class Row(NamedTuple):
    """One direction of one case through one package."""

    package: str
    format: str
    case: Case
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
    parser.add_argument("--only", choices=PACKAGES, help="one of the formats")
    args = parser.parse_args()
    real = {site: real_activations(site) for site in (READS, SITE)}
    generator = torch.Generator().manual_seed(SEED)
    random = torch.randn(real[SITE].shape, generator=generator)
    rows = []
    for name in [args.only] if args.only else PACKAGES:
        python, version = environment(args.peers, PACKAGES[name])
        package = f"{PACKAGES[name]} {version}"
        print(f"{package}, {name}", flush=True)
        rows += trips(python, package, name, random, real)
    print(table(rows))
    worst = max(max(row.encode, row.decode) for row in rows)
    excluded, silent = max(row.excluded for row in rows), min(row.l0 for row in rows) < 1
    print(
        f"{len(rows)} rows; the largest difference is {worst:.0e}, the largest share excluded "
        f"{excluded:.4%}"
    )
    sys.exit(int(silent or worst > GOAL or excluded > MOST_CLOSE))


def cases(name: str) -> Iterator[Case]:
    """All that a format holds: SAEs with and without subtraction of b_dec, and maps."""
    for kind in SAES[name]:
        yield Case(kind, subtract=True)
        yield Case(kind)
    for kind in MAPS.get(name, ()):
        yield Case(kind, "transcoder")
        if name not in NO_SKIP:
            yield Case(kind, "skip transcoder")


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


def real_activations(site: str) -> Tensor:
    """[N d] what the bundled model has at a hookpoint on built-in text."""
    lm = load(ModelConfig(), torch.device("cpu"))
    point, found = Hookpoint.parse(site), []
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
    python: Path, package: str, name: str, random: Tensor, real: dict[str, Tensor]
) -> Iterator[Row]:
    """All cases out to the package, in one process of it, and back from what it saves."""
    with tempfile.TemporaryDirectory() as folder:
        roots = {case: Path(folder) / str(i) for i, case in enumerate(cases(name))}
        inputs = {
            case: {"random": random, "real": real[READS if case.is_map else SITE]} for case in roots
        }
        ours = {case: make(case, inputs[case]["real"], real[SITE]) for case in roots}
        jobs = [export(name, case, roots[case], ours[case], inputs[case]) for case in roots]
        write_atomic(Path(folder) / "jobs.json", json.dumps(jobs))
        command = [python, WORKER, Path(folder) / "jobs.json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for case, root in roots.items():
            theirs = load_file(root / "outputs.safetensors")
            found = formats.read(root / "saved", name, trusted=True)[1][0].sae
            for direction, sae in (("ours → theirs", ours[case]), ("theirs → ours", found)):
                yield compare(
                    Row(package, name, case, direction, 0, 0, 0), sae, inputs[case], theirs
                )


def export(
    name: str, case: Case, root: Path, sae: SparseAutoencoder, inputs: dict[str, Tensor]
) -> dict[str, str]:
    """Write it as a run and in the format; what the other side has to know."""
    formats.write(name, run_folder(root / "run", sae, case), root / "out")
    save_file(inputs, root / "inputs.safetensors")
    there = next((root / "out").rglob("cfg.json" if name == "sparsify" else "*.json")).parent
    return {"format": name, "shape": case.shape, "folder": str(there), "root": str(root)}


@torch.no_grad()
def make(case: Case, x: Tensor, y: Tensor) -> SparseAutoencoder:
    """Random directions of norm 1, and biases and thresholds that leave features sparse.

    `x` and `y`: activations that it reads and rebuilds.
    """
    sparsity = make_sparsity(KINDS[case.kind].kind, **KINDS[case.kind].config())
    skip = case.shape == "skip transcoder"
    sae = SparseAutoencoder(x.shape[1], D_SAE, sparsity, y.shape[1], case.subtract, skip=skip)
    generator = torch.Generator().manual_seed(SEED)
    sae.initialise(y.mean(0), generator, tied=not case.is_map)
    sae.W_dec.mul_(10)
    sae.b_enc.copy_(-0.2 * torch.rand(D_SAE, generator=generator))
    if sae.W_skip is not None:
        sae.W_skip.copy_(0.1 * torch.randn(sae.W_skip.shape, generator=generator))
    for name, tensor in sparsity.state_dict().items():
        drawn = torch.rand(tensor.shape, generator=generator)
        starts = {"threshold": 0.05, "log_threshold": -3.5, "b_mag": -0.1}
        tensor.copy_(starts.get(name, 0) + drawn * (0.01 if name == "threshold" else 0.5))
    return sae


def run_folder(run: Path, sae: SparseAutoencoder, case: Case) -> Path:
    """A run that holds just this SAE."""
    reads = READS if case.is_map else SITE
    route = Route((Hookpoint.parse(reads),), (Hookpoint.parse(SITE),))
    facts = {**route.origin(), "model": "builtin:", "data": "builtin:"}
    folder = run / "saes" / str(route)
    sae.save_pretrained(folder, facts)
    write_manifest(folder, facts)
    places = f"inputs: [{READS}]\ntargets: [{SITE}]" if case.is_map else f"hookpoints: [{SITE}]"
    prefixes = PREFIXES if case.kind == "matryoshka" else ""
    write_atomic(run / "config.yaml", f"{places}\n{prefixes}")
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
    """The table of docs/exchange.md: encode / decode of both directions of a case in one row."""
    lines = [
        "| package, format | kind | shape | b_dec subtracted | ours → theirs | theirs → ours "
        "| excluded | L0 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for there, back in zip(rows[::2], rows[1::2], strict=True):
        case, excluded = there.case, max(there.excluded, back.excluded)
        names = f"{there.package}, {there.format} | {case.kind} | {case.shape}"
        numbers = " | ".join(f"{row.encode:.0e} / {row.decode:.0e}" for row in (there, back))
        subtracted = "yes" if case.subtract else "no"
        lines.append(f"| {names} | {subtracted} | {numbers} | {excluded:.2%} | {there.l0:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
