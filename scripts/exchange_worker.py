"""Another tool's side of scripts/exchange.py: runs in that tool's virtual environment, where this
package is not.

    python exchange_worker.py JOB.json      # {"format", "folder", "root"}

Opens the folder with the tool's own loader, writes activations and reconstructions of
root/inputs.safetensors to root/outputs.safetensors, and lets the tool save to root/saved.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Both = tuple[Tensor, Tensor]


def saelens(folder: str, saved: str) -> Callable[[Tensor], Both]:
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    sae.save_model(saved)

    def run(x: Tensor) -> Both:
        acts = sae.encode(x)
        if hasattr(sae, "W_skip"):
            return acts, sae(x)
        return acts, sae.decode(acts)

    return run


def sparsify(folder: str, saved: str) -> Callable[[Tensor], Both]:
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(folder)
    sae.save_to_disk(f"{saved}/{Path(folder).name}")

    def run(x: Tensor) -> Both:
        top = sae.encode(x)
        acts = torch.zeros(len(x), sae.num_latents).scatter_(1, top.top_indices, top.top_acts)
        return acts, sae(x).sae_out

    return run


def dictionary_learning(folder: str, saved: str) -> Callable[[Tensor], Both]:
    from dictionary_learning.utils import load_dictionary

    sae: Any = load_dictionary(folder, "cpu")[0]
    Path(saved).mkdir()
    torch.save(sae.state_dict(), f"{saved}/ae.pt")
    shutil.copy(f"{folder}/config.json", saved)

    def run(x: Tensor) -> Both:
        acts = sae.encode(x)
        return acts, sae.decode(acts)

    return run


def main(job: str) -> None:
    given = json.loads(Path(job).read_text())
    root = Path(given["root"])
    run = globals()[given["format"]](given["folder"], str(root / "saved"))
    outputs = {}
    for name, x in load_file(root / "inputs.safetensors").items():
        with torch.no_grad():
            acts, recon = run(x)
        outputs |= {f"{name}.acts": acts.contiguous(), f"{name}.recon": recon.contiguous()}
    save_file(outputs, root / "outputs.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
