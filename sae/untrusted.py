"""Files that may be damaged, or made to do harm: JSON, and the headers of safetensors files.

What is absurd is refused before anything of its size is allocated. Neither format can run code.
"""

import json
import math
import re
import stat
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sae.errors import FormatError

JSON_BYTES = 1 << 24
HEADER_BYTES = 1 << 22
"""A header takes about 100 bytes a tensor."""
DEPTH = 64
DIMENSIONS = 64
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}

_MARKS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[][{}]', re.DOTALL)


class Entry(NamedTuple):
    """One tensor of a safetensors file: its type as written there, its shape, its bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_json(data: bytes) -> Any:
    """JSON without NaN, infinities, a key given twice, or lists and objects over 64 deep.

    Raises ValueError.
    """
    text = data.decode()
    _check_depth(text)
    return json.loads(
        text, object_pairs_hook=_once_each, parse_constant=_refuse_constant, parse_float=_finite
    )


def read_json(path: str | Path, limit: int = JSON_BYTES) -> Any:
    """The content of a JSON file of at most `limit` bytes; see `parse_json`.

    Raises FileNotFoundError, and FormatError naming the file.
    """
    path = Path(path)
    try:
        return parse_json(read_limited(path, limit))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read: {_first_line(error)}") from None


def read_limited(path: Path, limit: int) -> bytes:
    """The bytes of a file; ValueError where there are more than `limit`, or it is no file."""
    with _open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return data


def read_header(path: str | Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, once its header has been found to be true of the file.

    Known types, shapes that fit their bytes, bytes that lie in the file one behind the other.
    Raises FileNotFoundError, and FormatError naming the file.
    """
    path = Path(path)
    try:
        with _open_regular(path) as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_BYTES):
                raise ValueError(f"its header of {length:,} bytes cannot be in {size:,}")
            header = parse_json(file.read(length))
        return _checked(header, size - 8 - length)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(
            f"{path} is damaged or no safetensors file: {_first_line(error)}"
        ) from None


def _open_regular(path: Path) -> BinaryIO:
    """Open a file; a pipe or device, which may never end, is a ValueError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a file")
    return path.open("rb")


def _checked(header: Any, size: int) -> dict[str, Entry]:
    """The entries of a header over `size` bytes of data; ValueError where it cannot be true."""
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise ValueError("its __metadata__ is not text")
    entries = {name: _entry(name, facts) for name, facts in header.items()}
    spans = sorted((entry.begin, entry.end) for entry in entries.values())
    ends = [(0, 0), *spans, (size, size)]
    if any(before[1] != after[0] for before, after in pairwise(ends)):
        raise ValueError(f"its tensors do not fill its {size:,} bytes one behind the other")
    return entries


def _entry(name: str, facts: Any) -> Entry:
    shown = ascii(name)[:40]
    if not isinstance(facts, dict) or facts.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {shown} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {shown} is of unknown type {ascii(dtype)[:40]}")
    if not (_whole_numbers(shape) and _whole_numbers(offsets) and len(offsets) == 2):
        raise ValueError(f"tensor {shown} has a shape or offsets that are not a few whole numbers")
    if math.prod(shape) * DTYPE_BYTES[dtype] != offsets[1] - offsets[0]:
        raise ValueError(f"tensor {shown} claims a shape that its bytes do not have")
    return Entry(dtype, tuple(shape), *offsets)


def _whole_numbers(values: Any) -> bool:
    if not isinstance(values, list) or len(values) > DIMENSIONS:
        return False
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_depth(text: str) -> None:
    depth = 0
    for mark in _MARKS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(mark[0], 0)
        if depth > DEPTH:
            raise ValueError(f"it is nested more than {DEPTH} deep")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice in one object")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large for a number")
    return number


def _first_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
