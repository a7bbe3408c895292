"""NumPy's .npz: a zip archive with an array in each part, read without trusting what it claims.

Objects, which numpy would have to rebuild, are refused, and no array is made before its bytes are
known to be there.
"""

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.errors import FormatError

SHRINK = 8
"""No weights are compressed further than this."""
TYPES = ("float16", "float32", "float64")


def write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, none of which may be bfloat16, which numpy does not have."""
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    np.savez(file, **arrays)


def read(file: Path) -> dict[str, Tensor]:
    """The arrays by name; FormatError naming the file where they are not plain numbers."""
    try:
        with zipfile.ZipFile(file) as archive:
            return {
                info.filename.removesuffix(".npy"): _array(archive, info)
                for info in archive.infolist()
            }
    except FileNotFoundError:
        raise FormatError(f"{file.parent}: {file.name} is missing") from None
    except Exception as error:  # zipfile's and numpy's readers raise a dozen kinds
        summary = " ".join(str(error).split())[:120] or type(error).__name__
        raise FormatError(f"{file} is damaged or no .npz file: {summary}") from None


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Tensor:
    if info.file_size > SHRINK * info.compress_size + 1024:
        raise ValueError(f"{info.filename[:40]} is compressed as no weights are")
    with archive.open(info) as part:
        version = np.lib.format.read_magic(part)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(part)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(part)
        left = info.file_size - part.tell()
        if dtype.name not in TYPES or fortran or dtype.byteorder == ">":
            raise ValueError(
                f"{info.filename[:40]} is {dtype}; expected rows of {', '.join(TYPES)}"
            )
        if math.prod(shape) * dtype.itemsize != left:
            raise ValueError(f"{info.filename[:40]} claims a shape that its bytes do not have")
        data = bytearray(part.read())
    if not data:
        return torch.zeros(shape)
    return torch.from_numpy(np.frombuffer(data, dtype).reshape(shape))
