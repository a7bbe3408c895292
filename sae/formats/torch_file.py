"""Files of torch.save, as dictionary_learning and OpenAI have them: the one module that touches
pickle.

Reading needs `--allow-pickle-file` and is not left to torch: in a process of its own, an unpickler
that knows dictionaries, tensors and plain values, and nothing that could be called, says which
tensors there are. A file that names any other function is refused before it is called.
"""

import io
import json
import math
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sae.store import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

PICKLE_BYTES = 1 << 20
SECONDS = 60
DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "BoolStorage": "bool",
}


def write(file: Path, state: Mapping[str, Any]) -> None:
    """Write a dictionary of tensors and plain values."""
    import torch

    archive = io.BytesIO()  # torch's own writer does not say that a disk is full
    torch.save(dict(state), archive)
    write_atomic(file, archive.getvalue())


def read(file: Path, *, trusted: bool) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """The tensors of a file by name (those of inner dictionaries as outer.inner), and its values.

    Raises FormatError where `trusted` is not set, and for what is no dictionary of tensors.
    """
    from sae.errors import FormatError
    from sae.untrusted import parse_json

    if not file.is_file():
        raise FormatError(f"{file.parent}: {file.name} is missing")
    if not trusted:
        raise FormatError(
            f"{file} is a pickle file, which may hold more than tensors;\n"
            "give --allow-pickle-file where you know who made it (only tensors will be read)"
        )
    command = [sys.executable, "-I", __file__, str(file.absolute())]
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            raise ValueError((lines or ["its reader died"])[-1][:200])
        content = parse_json(done.stdout)
        with zipfile.ZipFile(file) as archive:
            tensors = {
                name: _tensor(archive, _Strided(_Storage(*storage), *shape))
                for name, (storage, *shape) in content["tensors"].items()
            }
        return tensors, content["values"]
    except subprocess.TimeoutExpired:
        raise FormatError(f"{file} could not be read in {SECONDS} s") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise FormatError(f"{file} cannot be read: {error}") from None


class _Storage(NamedTuple):
    """Bytes of the archive that hold numbers of one type."""

    key: str
    dtype: str
    numel: int


class _Strided(NamedTuple):
    """A tensor still to be made."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(archive: zipfile.ZipFile, raw: _Strided) -> "Tensor":
    """The numbers of a tensor, once its shape is known to lie within its bytes."""
    import torch

    (key, name, numel), offset, size, stride = raw
    whole = (numel, offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and 0 <= n < 2**63 for n in whole):
        raise ValueError("the shape of a tensor is not made of whole numbers")
    dtype: torch.dtype = getattr(torch, name)
    info = _entries(archive).get(f"data/{key}")
    if info is None or info.file_size != numel * dtype.itemsize:
        raise ValueError("the bytes of a tensor are missing, or not as many as it says")
    count = math.prod(size)
    if not count:
        return torch.zeros(size, dtype=dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= numel or count > numel:
        raise ValueError("a tensor claims a shape that its bytes do not have")
    numbers = torch.frombuffer(bytearray(archive.read(info)), dtype=dtype)
    return numbers.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The parts by name, without the folder that torch puts them in; ValueError if compressed."""
    entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
        raise ValueError("its parts are compressed, which torch does not do")
    return entries


# ---------------------------------------- in the process of its own, without torch and this package


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Strided:
    """In place of torch._utils._rebuild_tensor_v2."""
    return _Strided(storage, offset, size, stride)


def _parameter(tensor: Any, *_: Any) -> Any:
    """In place of torch._utils._rebuild_parameter."""
    return tensor


class _Unpickler(pickle.Unpickler):
    """Dictionaries, tensors and plain values; ValueError for anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """What may be called, in our own words."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return {"_rebuild_tensor_v2": _rebuild, "_rebuild_parameter": _parameter}[name]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise ValueError(f"it would call {module}.{name}"[:120] + ", which is not allowed")

    def persistent_load(self, pid: Any) -> _Storage:
        """A reference to the bytes of a tensor."""
        kind, dtype, key, _, numel = pid
        if kind != "storage" or dtype not in DTYPES.values() or not isinstance(key, str):
            raise ValueError("it refers to something other than the bytes of a tensor")
        return _Storage(key, dtype, numel)


def _described(file: Path) -> dict[str, Any]:
    """What a file holds, as JSON; ValueError where it is something else than torch writes."""
    if not zipfile.is_zipfile(file):
        raise ValueError(
            "it is no file of torch 1.6 or later; load it with torch and save it again"
        )
    with zipfile.ZipFile(file) as archive:
        entries = _entries(archive)
        if "data.pkl" not in entries or entries["data.pkl"].file_size > PICKLE_BYTES:
            raise ValueError(f"it has no data.pkl of at most {PICKLE_BYTES:,} bytes")
        if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
            raise ValueError("it was written on a big-endian machine")
        with archive.open(entries["data.pkl"]) as opened:
            content = _Unpickler(opened).load()
    tensors: dict[str, _Strided] = {}
    values = _split(content, "", tensors)
    return {"tensors": tensors, "values": values}


def _split(content: Any, prefix: str, tensors: dict[str, _Strided]) -> dict[str, Any]:
    """Fill `tensors`; return what is plain. Dictionaries in dictionaries may go two deep."""
    if not isinstance(content, dict) or prefix.count(".") > 1:
        raise ValueError(f"expected a dictionary of tensors, got {type(content).__name__}")
    values: dict[str, Any] = {}
    for name, value in content.items():
        if not isinstance(name, str):
            raise ValueError(f"a name in it is {type(name).__name__}, expected text")
        if isinstance(value, _Strided):
            tensors[prefix + name] = value
        elif isinstance(value, dict):
            values[name] = _split(value, f"{prefix}{name}.", tensors)
        elif value is None or isinstance(value, str | int | float | bool):
            values[name] = value
        else:
            raise ValueError(f"{name[:40]} is {type(value).__name__}, expected a tensor")
    return values


def _main(file: str) -> None:
    try:
        text = json.dumps(_described(Path(file)), allow_nan=False)
    except Exception as error:  # whatever it is: one line for the process that asked
        sys.exit(" ".join(str(error).split())[:200] or type(error).__name__)
    print(text)  # noqa: T201 - to the process that asked


if __name__ == "__main__":
    _main(*sys.argv[1:])
