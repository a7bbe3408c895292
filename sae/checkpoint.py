"""Training state on disk: steps/<tokens>/, each folder immutable once it is complete.

A checkpoint has parts, one safetensors file of named tensors each (the stream, and every SAE with
its optimizer), and facts in its manifest. The newest one whose files are all as its manifest says
is the one to go on from.
"""

import contextlib
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae import store
from sae.errors import RunError
from sae.untrusted import read_header

FOLDER = "steps"

Parts = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; `facts` is what its manifest holds beside the hashes."""

    folder: Path
    facts: dict[str, Any]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, on the CPU."""
        file = self.folder / f"{name}.safetensors"
        read_header(file)  # refuses what only looks like safetensors
        return load_file(file)


def write(run: Path, tokens: int, parts: Parts, facts: Mapping[str, Any], keep: int) -> Path:
    """Write steps/<tokens>/ and delete all but the newest `keep` checkpoints.

    Raises:
        RunError: the disk has no room, or refuses; the checkpoints before are as they were.
    """
    steps = run / FOLDER
    steps.mkdir(exist_ok=True)
    _sweep(steps)
    if (steps / str(tokens)).is_dir() and not store.verify(steps / str(tokens)):
        return steps / str(tokens)  # the same state: it is not touched
    needed = sum(t.numel() * t.element_size() for part in parts.values() for t in part.values())
    if _free(steps) < needed:
        _prune(steps, keep=1)
    if _free(steps) < needed:
        raise _no_room(steps, needed, "was not written")
    try:
        with store.staged(steps / str(tokens), extra=facts, overwrite=True) as folder:
            for name, tensors in parts.items():
                contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
                save_file(contiguous, folder / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise _no_room(steps, needed, f"was not written ({why})") from None
    _prune(steps, keep)
    return steps / str(tokens)


def newest(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint; a damaged one is named in a warning and the one before taken."""
    for folder in reversed(_folders(run / FOLDER)):
        wrong = store.verify(folder)
        if not wrong:
            return Checkpoint(folder, store.read_manifest(folder))
        warnings.warn(f"{wrong[0]}; looking for a checkpoint before it", stacklevel=2)
    return None


def remove(run: Path) -> None:
    """Delete all checkpoints: a complete run has no use for them."""
    steps = run / FOLDER
    if steps.is_dir():
        _prune(steps, keep=0)
        _sweep(steps)
        with contextlib.suppress(OSError):  # somebody else's file is in it
            steps.rmdir()


def _folders(steps: Path) -> list[Path]:
    """Folders named by a number of tokens, the newest last."""
    if not steps.is_dir():
        return []
    return sorted((p for p in steps.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))


def _prune(steps: Path, keep: int) -> None:
    """Delete the oldest; each leaves its name first, so that no half-deleted one is ever found."""
    folders = _folders(steps)
    for folder in folders[: max(len(folders) - keep, 0)]:
        gone = folder.with_name(f".{folder.name}.tmp-deleted")
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _sweep(steps: Path) -> None:
    """Delete what a killed process left half-written or half-deleted."""
    for folder in steps.glob(".*.tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _no_room(steps: Path, needed: int, what: str) -> RunError:
    return RunError(
        f"checkpoint in {steps} {what}: it needs {needed:,} bytes, the disk has {_free(steps):,} "
        "left; the one before is as it was. Make room, then go on with --resume"
    )
