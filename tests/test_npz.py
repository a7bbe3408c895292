"""Arrays survive .npz, as numpy reads and writes it; what claims more than it has is refused."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_torch_file import Canary

from sae.errors import FormatError
from sae.formats import npz


def test_numpy_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {"W_enc": torch.randn(3, 4), "b_enc": torch.randn(4).half(), "k": torch.tensor(2.0)}
    npz.write(tmp_path / "a.npz", tensors)
    with np.load(tmp_path / "a.npz") as arrays:
        assert all(np.array_equal(arrays[name], t.numpy()) for name, t in tensors.items())
    found = npz.read(tmp_path / "a.npz")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_compressed_files_are_read(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((50, 60)).astype(np.float32)
    np.savez_compressed(tmp_path / "a.npz", W_enc=weights)
    assert np.array_equal(npz.read(tmp_path / "a.npz")["W_enc"].numpy(), weights)


def packed(file: Path, content: bytes, how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file, "w", how) as archive:
        archive.writestr("W_enc.npy", content)
    return file


def as_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY\x01\x00",
        as_npy(np.ones(3, np.float32))[:-4],
        as_npy(np.ones(3, np.float32)).replace(b"(3,)", b"(9,)"),
        as_npy(np.ones(3, np.float32)).replace(b"(3,)", b"(-3"),
        as_npy(np.ones(3, np.int64)),
        as_npy(np.ones(3, ">f4")),
        as_npy(np.asfortranarray(np.ones((3, 2), np.float32))),
    ],
)
def test_what_is_no_array_of_weights(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(FormatError, match=r"a\.npz is damaged or no \.npz file") as caught:
        npz.read(packed(tmp_path / "a.npz", content))
    assert len(str(caught.value).splitlines()) == 1


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    content = as_npy(np.zeros(10**6, np.float32))
    with pytest.raises(FormatError, match="compressed as no weights are"):
        npz.read(packed(tmp_path / "a.npz", content, zipfile.ZIP_DEFLATED))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    objects = np.array([Canary(mark)], dtype=object)
    buffer = io.BytesIO()
    np.save(buffer, objects, allow_pickle=True)
    for content in (buffer.getvalue(), pickle.dumps(Canary(mark))):
        with pytest.raises(FormatError):
            npz.read(packed(tmp_path / "a.npz", content))
    assert not mark.exists()
