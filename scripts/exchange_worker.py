"""Another tool's side of scripts/exchange.py: runs in that tool's virtual environment, where this
package is not.

    python exchange_worker.py JOBS.json      # [{"format", "shape", "folder", "root"}, …]

Opens each folder with the tool's own loader, writes activations and reconstructions of
root/inputs.safetensors to root/outputs.safetensors, and lets the tool save to root/saved.
"""

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Both = tuple[Tensor, Tensor]


def saelens(job: dict[str, str], saved: Path) -> Callable[[Tensor], Both]:
    from sae_lens import SAE

    sae = SAE.load_from_disk(job["folder"])
    sae.save_model(str(saved))
    return partial(run_saelens, sae)


def run_saelens(sae: Any, x: Tensor) -> Both:
    """Its decode leaves out W_skip."""
    acts = sae.encode(x)
    return acts, sae(x) if hasattr(sae, "W_skip") else sae.decode(acts)


def number(job: dict[str, str]) -> str:
    """Of the job, for a folder of its own."""
    return Path(job["root"]).name


def in_hub_cache(job: dict[str, str], repo: str, folder: str) -> Path:
    """The export where huggingface_hub looks for a repository that it has fetched."""
    cache = Path(job["root"]).parent / "hub"
    os.environ.update(HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1")
    own = cache / f"models--{repo.replace('/', '--')}"
    (own / "refs").mkdir(parents=True, exist_ok=True)
    (own / "refs" / "main").write_text("0" * 40)
    there = own / "snapshots" / ("0" * 40) / folder
    shutil.copytree(job["folder"], there)
    return there


def gemma_scope(job: dict[str, str], saved: Path) -> Callable[[Tensor], Both]:
    """By SAELens' loaders of Gemma Scope; widths come from the file, not the repository's name."""
    import numpy as np

    kind = "mlp" if job["shape"] == "SAE" else "transcoders"
    repo, folder = f"google/gemma-scope-2b-pt-{kind}", f"layer_2/width_16k/average_l0_{number(job)}"
    file = in_hub_cache(job, repo, folder) / "params.npz"
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    what = "sae" if kind == "mlp" else "transcoder"
    load = getattr(loaders, f"gemma_2_{what}_huggingface_loader")
    d_in, d_sae = np.load(file)["W_enc"].shape
    widths = {"d_in": d_in, "d_sae": d_sae}
    if kind == "transcoders":
        widths["d_out"] = np.load(file)["W_dec"].shape[1]

    def converter(cfg_overrides: dict[str, Any], **given: Any) -> Any:
        return load(**given, cfg_overrides=cfg_overrides | widths)

    sae: Any = SAE.from_pretrained(repo, folder, converter=converter)
    saved.mkdir()
    np.savez(saved / "params.npz", **{n: t.numpy() for n, t in sae.state_dict().items()})
    return partial(run_saelens, sae)


def gemma_scope_2(job: dict[str, str], saved: Path) -> Callable[[Tensor], Both]:
    """By SAELens' loader of Gemma Scope 2, shapes read from the disk and not by HTTP."""
    kind = {"SAE": "mlp_out"}.get(job["shape"], "transcoder")
    repo, folder = "google/gemma-scope-2-270m-pt", f"{kind}/layer_2_l0_{number(job)}"
    there = in_hub_cache(job, repo, folder)
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    shapes = {name: list(t.shape) for name, t in load_file(there / "params.safetensors").items()}
    loaders.get_safetensors_tensor_shapes = lambda *_: shapes
    sae: Any = SAE.from_pretrained(repo, folder, converter=loaders.gemma_3_sae_huggingface_loader)
    tensors = {name.lower(): tensor for name, tensor in sae.state_dict().items()}
    if "w_skip" in tensors:
        tensors["affine_skip_connection"] = tensors.pop("w_skip").T
    saved.mkdir()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, saved / "params.safetensors")
    shutil.copy(there / "config.json", saved)
    return partial(run_saelens, sae)


def sparsify(job: dict[str, str], saved: Path) -> Callable[[Tensor], Both]:
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(job["folder"])
    sae.save_to_disk(saved / Path(job["folder"]).name)

    def run(x: Tensor) -> Both:
        top = sae.encode(x)
        acts = torch.zeros(len(x), sae.num_latents).scatter_(1, top.top_indices, top.top_acts)
        return acts, sae(x).sae_out

    return run


def dictionary_learning(job: dict[str, str], saved: Path) -> Callable[[Tensor], Both]:
    from dictionary_learning.utils import load_dictionary

    sae: Any = load_dictionary(job["folder"], "cpu")[0]
    saved.mkdir()
    torch.save(sae.state_dict(), saved / "ae.pt")
    shutil.copy(f"{job['folder']}/config.json", saved)

    def run(x: Tensor) -> Both:
        acts = sae.encode(x)
        return acts, sae.decode(acts)

    return run


def main(jobs: str) -> None:
    warnings.filterwarnings("ignore", "You are loading an SAE using the HuggingFace repo_id")
    for job in json.loads(Path(jobs).read_text()):
        root = Path(job["root"])
        run = globals()[job["format"]](job, root / "saved")
        outputs = {}
        for name, x in load_file(root / "inputs.safetensors").items():
            with torch.no_grad():
                acts, recon = run(x)
            outputs |= {f"{name}.acts": acts.contiguous(), f"{name}.recon": recon.contiguous()}
        save_file(outputs, root / "outputs.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
