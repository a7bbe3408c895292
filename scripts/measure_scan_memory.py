"""Peak memory of a feature scan, above the loaded model and the SAE's own weights, by features.

    python scripts/measure_scan_memory.py [--d-sae 4096 16384 65536 --tokens 20000 --k 32]

Scans the text of the bundled model with random TopK autoencoders on its 512 neurons, each in a
process of its own. Linux with glibc only: the peak is VmHWM of /proc/self/status.
"""

import argparse
import ctypes
import gc
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SITE = "layers.2.mlp_act"


def make(folder: Path, d_sae: int, k: int) -> None:
    """Write the autoencoder; in a process of its own, as that takes memory too."""
    from sae.autoencoder import SparseAutoencoder
    from sae.sparsity import TopK

    SparseAutoencoder(512, d_sae, TopK(k)).save_pretrained(folder)


def memory(name: str) -> int:
    """VmRSS (now) or VmHWM (the peak so far) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def measure(folder: Path, d_sae: int, n_tokens: int) -> None:
    """Scan as `sae features` does, and print a row of the table."""
    from sae.memory import keep_freed_memory

    keep_freed_memory()
    import torch

    from sae.config import TrainConfig
    from sae.features import scan
    from sae.planning import open_inputs

    torch.set_num_threads(1)
    inputs = open_inputs(TrainConfig(), torch.device("cpu"))
    model, tokenizer = inputs.lm.model, inputs.lm.tokenizer
    rows, kept = [], 0
    for batch in inputs.source.train(8, repeat=False):  # tokenised here, not during the scan
        rows.append(batch)
        kept += int(batch.kept.sum())
        if kept >= n_tokens:
            break
    weights = 4 * (d_sae * (2 * 512 + 1) + 512)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading left free would hide what the scan takes
    Path("/proc/self/clear_refs").write_text("5")  # and so would its peak
    before, start = memory("VmRSS"), time.perf_counter()
    scan(model, tokenizer, {SITE: folder}, rows, n_tokens, source={})
    seconds = time.perf_counter() - start
    above = memory("VmHWM") - before - weights
    print(f"{d_sae:8,}{weights / 1e6:12,.0f}{above / 1e6:12,.0f}{seconds:10.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d-sae", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--step", help="for the processes that this one starts")
    parser.add_argument("--folder", type=Path, help="likewise")
    args = parser.parse_args()
    if args.step == "make":
        return make(args.folder, *args.d_sae, args.k)
    if args.step == "measure":
        return measure(args.folder, *args.d_sae, args.tokens)
    print(f"{'features':>8}{'weights MB':>12}{'peak MB':>12}{'seconds':>10}", flush=True)
    for d_sae in args.d_sae:
        with tempfile.TemporaryDirectory() as folder:
            for step in ("make", "measure"):
                own = ["--d-sae", str(d_sae), "--tokens", str(args.tokens), "--k", str(args.k)]
                own += ["--step", step, "--folder", folder]
                subprocess.run([sys.executable, __file__, *own], check=True)


if __name__ == "__main__":
    main()
