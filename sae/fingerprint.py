"""What an autoencoder must give: a few inputs stored with their reconstruction, L0 and FVU.

fingerprint.safetensors lies beside the weights and holds, in float32,
    x      [n d_in]   inputs as the autoencoder takes them (n is 8 where there were as many)
    y      [n d_out]  what it should rebuild, where that is not x itself
    recon  [n d_out]  what it gives for x
    l0     []         mean number of active features on x
    fvu    []         Σ‖y − recon‖² / Σ‖y − mean y‖² over these rows, 0 where all y are the same
    scale  []         of the inputs in training, where the metadata of the SAE tells it
A config that does not belong to the weights, weights that do not belong to the config, or a wrong
scale give another reconstruction or another L0.
"""

import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sae.errors import FormatError
from sae.store import write_atomic
from sae.untrusted import read_header

FINGERPRINT = "fingerprint.safetensors"
ROWS, MOST_ROWS = 8, 1024
ERROR = 1e-3
"""Largest ‖recon − expected‖ / ‖expected‖. Both sides are computed in fp32 on the CPU, whatever the
weights are stored in, so that only the order of sums differs: about 1e-6."""
STRAYS = 1
"""Rows that may be off: where two features tie for the last place of a top-k, rounding decides."""
L0_ERROR = 0.5
FVU_ERROR = 0.1
"""A tenth of the FVU, as the one row that may stray counts in it."""


class Fingerprint(NamedTuple):
    """The content of fingerprint.safetensors."""

    x: Float[Tensor, "n d_in"]
    y: Float[Tensor, "n d_out"] | None
    recon: Float[Tensor, "n d_out"]
    l0: float
    fvu: float
    scale: float | None


def write(folder: Path, sae: Any, x: Tensor, y: Tensor | None = None, scale: object = None) -> None:
    """Store what `sae` gives for the first rows of `x`; nothing where those are not finite."""
    rows = _rows(x, y)
    if not len(rows):
        return
    x = rows[:, : x.shape[1]]
    y = None if y is None else rows[:, x.shape[1] :]
    recon, l0, fvu = _measured(sae, x, y)
    if not recon.isfinite().all():
        return
    numbers = {"l0": l0, "fvu": fvu}
    if isinstance(scale, int | float):
        numbers["scale"] = float(scale)
    tensors = {"x": x, "recon": recon, **{k: torch.tensor(v) for k, v in numbers.items()}}
    if y is not None:
        tensors["y"] = y
    write_atomic(folder / FINGERPRINT, save({k: v.contiguous() for k, v in tensors.items()}))


def read(folder: Path, sae: Any) -> Fingerprint | None:
    """The fingerprint of an SAE folder, of the shapes that `sae` takes; None where there is none.

    Raises FormatError.
    """
    file = folder / FINGERPRINT
    if not file.exists():
        return None
    d_in, d_out = sae.d_in, sae.d_out
    there = {name: (entry.dtype, entry.shape) for name, entry in read_header(file).items()}
    n = next(iter(there.get("x", ("", ()))[1]), 0)
    wanted: dict[str, tuple[int, ...]] = {"x": (n, d_in), "recon": (n, d_out), "l0": (), "fvu": ()}
    wanted |= {k: v for k, v in {"y": (n, d_out), "scale": ()}.items() if k in there}
    if there != {k: ("F32", shape) for k, shape in wanted.items()} or not 0 < n <= MOST_ROWS:
        raise FormatError(
            f"{file} does not fit inputs of width {d_in} and outputs of width {d_out}; "
            "take all files from one save"
        )
    tensors = load(file)
    numbers = {k: tensors[k].item() if k in tensors else None for k in ("l0", "fvu", "scale")}
    return Fingerprint(tensors["x"], tensors.get("y"), tensors["recon"], **numbers)  # pyright: ignore


def load(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; FormatError where it is damaged, or vanishes meanwhile."""
    read_header(file)
    try:
        return load_file(file)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise FormatError(f"{file} is damaged or no safetensors file: {error}") from None


def check(folder: Path, sae: Any, scale: object = None) -> Fingerprint | None:
    """Refuse an autoencoder that does not give what its fingerprint expects.

    Returns the fingerprint, None where there is none. Raises FormatError.
    """
    stored = read(folder, sae)
    if stored is not None and (problem := _difference(stored, sae, scale)):
        raise FormatError(
            f"{folder}: weights, cfg.yaml and {FINGERPRINT} do not belong together: {problem};\n"
            "take all of them from one save"
        )
    return stored


def _difference(stored: Fingerprint, sae: Any, scale: object) -> str | None:
    """How an autoencoder differs from its fingerprint, None where it does not."""
    recon, l0, fvu = _measured(sae, stored.x, stored.y)
    off = torch.linalg.vector_norm(recon - stored.recon, dim=1)
    allowed = ERROR * torch.linalg.vector_norm(stored.recon, dim=1) + 1e-30
    strays = int((~(off <= allowed)).sum())  # a NaN is off too
    if strays > min(STRAYS, len(off) - 1):
        return (
            f"{strays} of {len(off)} stored inputs give another output (FVU {fvu:.3g}, expected "
            f"{stored.fvu:.3g})"
        )
    if not abs(l0 - stored.l0) <= L0_ERROR + ERROR * stored.l0:
        return f"L0 is {l0:g} on the stored inputs, expected {stored.l0:g}"
    if not math.isclose(fvu, stored.fvu, rel_tol=FVU_ERROR, abs_tol=ERROR):
        return f"FVU is {fvu:.3g} on the stored inputs, expected {stored.fvu:.3g}"
    if stored.scale is not None and not _same(scale, stored.scale):
        return f"metadata.scale is {scale}, expected {stored.scale:.6g}"
    return None


def _rows(x: Tensor, y: Tensor | None) -> Tensor:
    """[n d_in (+ d_out)] the first finite rows of x, with those of y beside them."""
    both = (x,) if y is None else (x, y)
    if any(part.ndim != 2 or len(part) != len(x) for part in both):
        raise ValueError(
            f"expected rows of inputs and targets, got {[list(p.shape) for p in both]}"
        )
    rows = torch.cat([part.detach().float().cpu() for part in both], dim=1)
    return rows[rows.isfinite().all(dim=1)][:ROWS]


@torch.no_grad()
def _measured(sae: Any, x: Tensor, y: Tensor | None) -> tuple[Tensor, float, float]:
    """Reconstruction, mean L0 and FVU on the CPU, in fp32."""
    if sae.device.type != "cpu" or sae.dtype != torch.float32:
        sae = copy.deepcopy(sae).to(device="cpu", dtype=torch.float32)
    out = sae(x)
    y = x if y is None else y
    variance = (y - y.mean(0)).square().sum().item() if y.shape == out.recon.shape else 0.0
    fvu = (y - out.recon).square().sum().item() / variance if variance else 0.0
    return out.recon, (out.acts > 0).sum(-1).float().mean().item(), fvu


def _same(number: object, expected: float) -> bool:
    return isinstance(number, int | float) and math.isclose(number, expected, rel_tol=1e-5)
