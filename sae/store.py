"""A folder on disk: atomic writes, hashes, the manifest, and where things lie in a run.

A folder becomes visible only once it is complete: it is filled beside its place, its manifest is
written last, everything reaches the disk (fsync), and one rename puts it where it belongs.
"""

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from sae import __version__, untrusted
from sae.errors import FormatError, RunError, suggest

FORMAT = 2
"""1 had no seal."""
MANIFEST = "manifest.json"
WEIGHTS = "sae.safetensors"
SETTINGS = "config.yaml"
LOCK = ".lock"
OWN_KEYS = frozenset({"format", "versions", "files", "seal"})
"""What every manifest says; the rest tells where the folder came from."""
_VERSIONS_OF = ("torch", "transformers", "tokenizers", "datasets", "safetensors", "pyarrow")


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Hold until the file or folder at `path` is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new, never half."""
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_bytes(content)
        fsync(temporary)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name_full_disk(error, path)
        raise
    fsync(path.parent)


def _name_full_disk(error: BaseException, path: Path) -> None:
    """Raise OSError naming `path` where a full disk is the reason.

    The error itself names no file, one that is gone now, or the one that was to be copied; that of
    safetensors is no OSError.
    """
    full = os.strerror(errno.ENOSPC)
    if full in str(error):
        raise OSError(errno.ENOSPC, full, str(path)) from error


def write_json(path: str | Path, value: object) -> None:
    """Write JSON atomically; raises ValueError on NaN and infinities, which JSON does not have."""
    write_atomic(path, _to_json(value))


def _to_json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only writer of a run while the block runs; the lock of a dead process does not count.

    Raises RunError at once where another process writes it.
    """
    try:
        held = filelock.FileLock(folder / LOCK).acquire(timeout=0)
    except filelock.Timeout:
        raise RunError(
            f"{folder} is being written by another process; wait for it, or stop it first"
        ) from None
    except OSError as error:
        raise RunError(f"{folder} cannot be written to ({error.strerror})") from None
    with held:
        yield


@contextlib.contextmanager
def staged(
    path: str | Path, *, extra: Mapping[str, Any] | None = None, overwrite: bool = False
) -> Iterator[Path]:
    """Fill a new folder that appears at `path`, with its manifest, when the block ends well.

    `extra` joins the manifest and may still be filled inside the block. If the block raises,
    nothing changes at `path`. Raises RunError where something is there and `overwrite` is False,
    and OSError naming `path` where its disk is full.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    _restore(path)
    _refuse_existing(path, overwrite)
    folder = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    folder.mkdir()
    try:
        yield folder
        write_manifest(folder, extra)
        _publish(folder, path, overwrite)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        _name_full_disk(error, path)
        raise


def write_manifest(folder: Path, extra: Mapping[str, Any] | None = None) -> None:
    """Write manifest.json over every file of `folder`, all of them on the disk before it is."""
    extra = dict(extra or {})
    if taken := OWN_KEYS & extra.keys():
        raise ValueError(f"manifest keys {sorted(taken)} are the manifest's own")
    files = {}
    for file in covered_files(folder):
        fsync(file)
        name = file.relative_to(folder).as_posix()
        files[name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    for inner in sorted(p for p in folder.rglob("*") if p.is_dir()):
        fsync(inner)
    _seal(folder, {"format": FORMAT, "versions": versions(), **extra, "files": files})


def _seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json with a hash of itself, so that no slip in it goes unseen either."""
    manifest.pop("seal", None)
    seal = hashlib.sha256(_to_json(manifest).encode()).hexdigest()
    write_json(folder / MANIFEST, manifest | {"seal": seal})


def write_result(folder: Path, name: str, value: object) -> None:
    """Write JSON into a finished folder, and into its manifest where it has one."""
    write_json(folder / name, value)
    if not (folder / MANIFEST).exists():
        return
    manifest = read_manifest(folder)
    file = folder / name
    manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    _seal(folder, manifest | {"format": FORMAT})


def covered_files(folder: Path) -> list[Path]:
    """The files a manifest of `folder` covers: all but those under a manifest of their own.

    Hidden ones are left out too: a lock, or what a crash left half written.
    """
    found = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not (entry / MANIFEST).exists():
            found += covered_files(entry)
        elif entry.is_file() and entry.name not in (MANIFEST, LOCK):
            found.append(entry)
    return found


def verify(folder: str | Path) -> list[str]:
    """What is wrong with a folder, a sentence for each file, [] where all is as its manifest says.

    Every file the manifest covers is read and hashed, and files it does not cover are named (but
    for format 1, which did not list results).
    """
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
    except RunError as error:
        return [str(error)]
    files = manifest["files"]
    wrong = (_problem(folder / name, facts) for name, facts in files.items())
    there = (file.relative_to(folder).as_posix() for file in covered_files(folder))
    strange = [f"{folder / name} is not in {MANIFEST}" for name in there if name not in files]
    return [*filter(None, wrong), *(strange if manifest["format"] > 1 else [])]


def check_files(folder: str | Path, *names: str) -> None:
    """Refuse files that are not those the folder's manifest covers; RunError names the first.

    A file that neither the folder nor its manifest has is no problem here, and of a folder without
    a manifest (one copied by hand) nothing is known.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        return
    files = read_manifest(folder)["files"]
    for name in names:
        file = folder / name
        if name in files:
            problem = _problem(file, files[name])
        else:
            problem = f"{file} is not in {MANIFEST}" if file.exists() else None
        if problem:
            raise RunError(f"{problem}; put back the file that belongs there, or make it again")


def _problem(file: Path, facts: Mapping[str, Any]) -> str | None:
    """How a file differs from what its manifest says of it."""
    try:
        size = file.stat().st_size
        if size != facts["bytes"]:
            return f"{file} is damaged: it has {size:,} bytes, not {facts['bytes']:,}"
        if sha256(file) != facts["sha256"]:
            return f"{file} is damaged: its content is not what {MANIFEST} says (SHA-256)"
    except FileNotFoundError:
        return f"{file} is missing"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"
    return None


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that shape a result."""
    found = {"sae": __version__, "python": platform.python_version()}
    return found | {name: own for name in _VERSIONS_OF if (own := _installed(name))}


@functools.cache
def _installed(name: str) -> str | None:
    """The version of a package, or None; looking it up takes 1 ms."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a folder; raises RunError where it is missing, broken or too new."""
    file = Path(path) / MANIFEST
    try:
        manifest = untrusted.read_json(file)
    except FileNotFoundError:
        raise RunError(
            f"{path} is not complete: it has no {MANIFEST}; copy all of it, or make it again"
        ) from None
    except FormatError as error:
        raise RunError(str(error)) from None
    number = manifest.get("format") if isinstance(manifest, dict) else None
    if type(number) is not int or number < 1:
        raise RunError(
            f"{file} is damaged: it does not say its format; put back the file that belongs there"
        )
    if number > FORMAT:
        raise RunError(
            f"{file}: format {number} is not known to sae {__version__}, which reads up to "
            f"{FORMAT}; install a newer sae-toolkit"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files, files.values())):
        raise RunError(f"{file} is damaged: its list of files holds what no manifest would say")
    if number > 1 and not _is_sealed(file, manifest):
        raise RunError(f"{file} is damaged or was edited: it is not what its own seal says")
    return manifest


def _is_sealed(file: Path, manifest: dict[str, Any]) -> bool:
    """Whether the file is, to the byte, what was written."""
    rest = {name: value for name, value in manifest.items() if name != "seal"}
    seal = hashlib.sha256(_to_json(rest).encode("utf-8", "replace")).hexdigest()
    return file.read_bytes() == _to_json(rest | {"seal": seal}).encode("utf-8", "replace")


def _is_entry(name: str, facts: object) -> bool:
    """Whether a manifest may say this: a name below its folder, a size and a hash."""
    if not set(name.split("/")).isdisjoint(("", ".", "..")) or name[1:2] == ":":
        return False
    if set(name) & set("\\\0") or any("\ud800" <= c <= "\udfff" for c in name):
        return False
    if not isinstance(facts, dict) or facts.keys() != {"bytes", "sha256"}:
        return False
    size, digest = facts["bytes"], facts["sha256"]
    known = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)
    return type(size) is int and size >= 0 and bool(known)


def folder_name(hookpoint: str) -> str:
    """The folder of a hookpoint's SAE under saes/: its name with ':' and '/' replaced by '_'."""
    return hookpoint.replace(":", "_").replace("/", "_")


class Run:
    """A run's folder: which files it has and where; raises RunError where `path` holds no run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise RunError(f"{path} is not a run: no such folder; runs live under checkpoints/")
        if not self.config_path.is_file():
            raise RunError(
                f"{path} is not a run: it has no {SETTINGS}; runs live under checkpoints/"
            )

    @property
    def config_path(self) -> Path:
        """The resolved settings."""
        return self.path / SETTINGS

    def saes(self) -> dict[str, Path]:
        """The folder of every SAE of the run, by name."""
        return {file.parent.name: file.parent for file in sorted(self._saes_with_weights())}

    def chosen(self, name: str | None) -> list[Path]:
        """The folder of the SAE `name`, those of all where it is None; RunError for none."""
        return [self.sae(name)] if name is not None else list(self.saes().values()) or [self.sae()]

    def sae(self, name: str | None = None) -> Path:
        """The folder of one SAE, by name or hookpoint; without a name the run must hold just one.

        Raises RunError naming those there are, and where its manifest is gone.
        """
        found = self.saes()
        if not found:
            raise RunError(f"{self.path} holds no SAE: training has not finished a first save")
        if name is None:
            if len(found) > 1:
                raise RunError(
                    f"{self.path} holds {len(found)} SAEs, choose one with --sae: "
                    + ", ".join(found)
                )
            name = next(iter(found))
        folder = found.get(folder_name(name))
        if folder is None:
            hint = suggest(name, found)
            raise RunError(f"{self.path} has no SAE {name!r}; it has {', '.join(found)}{hint}")
        if not (folder / MANIFEST).is_file():
            raise RunError(f"{folder} is not complete: it has no {MANIFEST}")
        return folder

    def features(self, name: str | None = None) -> Path:
        """The folder of an SAE's feature dictionary; see `features_folder` for what raises."""
        return features_folder(self.sae(name))

    def _saes_with_weights(self) -> Iterator[Path]:
        files = (self.path / "saes").glob(f"*/{WEIGHTS}")
        return (file for file in files if not file.parent.name.startswith("."))  # half-written


def features_folder(sae_folder: str | Path) -> Path:
    """features/ of an SAE folder; RunError where there is none, or it is of other weights."""
    sae_folder = Path(sae_folder)
    folder = sae_folder / "features"
    if not folder.is_dir():
        raise RunError(
            f"{sae_folder} has no feature dictionary yet; make it with: sae features RUN"
        )
    made_from = read_manifest(folder).get("sae_sha256")
    if made_from != sha256(sae_folder / WEIGHTS):
        raise RunError(
            f"{folder} was made from other weights than {sae_folder / WEIGHTS} holds now; "
            "make it again with: sae features RUN"
        )
    return folder


def _refuse_existing(path: Path, overwrite: bool) -> None:
    """An empty folder may be filled, a folder be replaced on request; anything else stays."""
    if path.is_dir():
        if not overwrite and any(path.iterdir()):
            raise RunError(f"{path} already exists; choose another place or remove it first")
    elif path.exists() or path.is_symlink():
        raise RunError(f"{path} already exists and is not a folder; choose another place")


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _restore(path: Path) -> None:
    """Put back a folder that a crash left set aside between the two renames of `_publish`."""
    if _aside(path).exists() and not path.exists():
        _aside(path).rename(path)


def _publish(folder: Path, path: Path, overwrite: bool) -> None:
    """Rename `folder` to `path`; a folder in the way is set aside first and deleted after."""
    _refuse_existing(path, overwrite)
    aside = _aside(path)
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    folder.rename(path)
    fsync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)
