"""The one module that touches pickle: it gives back what torch saved, and a file that would call
anything never gets to, whether reading was allowed or not."""

import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sae import cli
from sae.errors import FormatError
from sae.formats import torch_file


class Canary:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_what_torch_saved_comes_back(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    state = {
        "plain": whole,
        "transposed": whole.T,
        "part": whole[1:3, ::2],
        "half": whole.half(),
        "bfloat": whole.bfloat16(),
        "long": torch.tensor([2**40, -1]),
        "int": torch.tensor(7, dtype=torch.int32),
        "bool": torch.tensor([True, False]),
        "none": torch.zeros(0, 3),
        "parameter": nn.Parameter(torch.ones(2)),
        "name": "ReLU",
        "inner": {"k": 3, "also": torch.ones(2)},
    }
    torch_file.write(tmp_path / "a.pt", state)
    tensors, values = torch_file.read(tmp_path / "a.pt", trusted=True)
    assert values == {"name": "ReLU", "inner": {"k": 3}}
    for name in state.keys() - {"name", "inner"}:
        assert torch.equal(tensors[name], state[name]) and tensors[name].dtype == state[name].dtype
    assert torch.equal(tensors["inner.also"], torch.ones(2))


def test_a_module_state_comes_back(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    torch.save(module.state_dict(), tmp_path / "a.pt")  # an OrderedDict with _metadata
    tensors, _ = torch_file.read(tmp_path / "a.pt", trusted=True)
    assert all(torch.equal(tensors[name], t) for name, t in module.state_dict().items())


def archive(file: Path, content: bytes, numbers: bytes = b"", compress: int = 0) -> Path:
    """A file as torch lays it out, with any pickle in it."""
    with zipfile.ZipFile(file, "w", compress) as out:
        out.writestr("archive/data.pkl", content)
        out.writestr("archive/data/0", numbers)
    return file


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("wrap", ["alone", "value", "key", "state", "plain file"])
def test_the_canary_never_sings(tmp_path: Path, wrap: str, trusted: bool) -> None:
    mark = tmp_path / "mark"
    bird = Canary(mark)
    if wrap == "state":
        content: Any = OrderedDict(a=1)
        content.bird = bird
    else:
        content = {"value": {"a": bird}, "key": {bird: 1}}.get(wrap, bird)
    file = tmp_path / "a.pt"
    if wrap == "plain file":
        file.write_bytes(pickle.dumps(content))
    else:
        archive(file, pickle.dumps(content))
    with pytest.raises(FormatError) as caught:
        torch_file.read(file, trusted=trusted)
    assert len(str(caught.value).splitlines()) <= 3
    args = ["import", str(file), "--output", str(tmp_path / "run")]
    assert cli.main([*args, "--allow-pickle-file"] if trusted else args) == 2
    assert not mark.exists()
    pickle.loads(pickle.dumps(content))
    assert mark.exists()  # it would have


def test_reading_has_to_be_allowed(tmp_path: Path) -> None:
    torch_file.write(tmp_path / "a.pt", {"a": torch.ones(1)})
    with pytest.raises(FormatError, match="--allow-pickle-file"):
        torch_file.read(tmp_path / "a.pt", trusted=False)


def tensor_pickle(size: tuple[Any, ...], stride: tuple[Any, ...], offset: Any = 0) -> bytes:
    """A pickle of {"a": a tensor of 4 floats} with any shape, as torch writes it."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self) -> tuple[Any, ...]:
            rebuild = torch._utils._rebuild_tensor_v2
            return rebuild, (Storage(), offset, size, stride, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            found = ("storage", torch.FloatStorage, "0", "cpu", 4)
            return found if isinstance(obj, Storage) else None

    import io

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"a": Tensor()})
    return buffer.getvalue()


NUMBERS = struct.pack("<4f", 1, 2, 3, 4)


def test_shapes_that_fit(tmp_path: Path) -> None:
    file = archive(tmp_path / "a.pt", tensor_pickle((2, 2), (1, 2)), NUMBERS)
    tensors, _ = torch_file.read(file, trusted=True)
    assert tensors["a"].tolist() == [[1, 3], [2, 4]]


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((5,), (1,), 0),
        ((2, 2), (2, 3), 0),
        ((4,), (1,), 1),
        ((4,), (-1,), 3),
        ((-1,), (1,), 0),
        ((4,), (1, 1), 0),
        ((1 << 40, 1 << 40), (0, 0), 0),
        ((2,), (1 << 62,), 0),
        ((1.5,), (1,), 0),
        ((4,), (1,), "x"),
        (((),), (1,), 0),
    ],
)
def test_shapes_that_lie(tmp_path: Path, size: Any, stride: Any, offset: Any) -> None:
    file = archive(tmp_path / "a.pt", tensor_pickle(size, stride, offset), NUMBERS)
    with pytest.raises(FormatError):
        torch_file.read(file, trusted=True)


def test_archives_that_lie(tmp_path: Path) -> None:
    good = tensor_pickle((4,), (1,))
    for file, wanted in (
        (archive(tmp_path / "a.pt", good, NUMBERS[:8]), "not as many"),
        (archive(tmp_path / "b.pt", good, NUMBERS, zipfile.ZIP_DEFLATED), "compressed"),
        (archive(tmp_path / "c.pt", b"x" * (1 << 21)), "data.pkl of at most"),
        (archive(tmp_path / "d.pt", pickle.dumps([1])), "got list"),
        (archive(tmp_path / "e.pt", pickle.dumps({"a": {"b": {"c": {}}}})), "got dict"),
        (archive(tmp_path / "f.pt", pickle.dumps({"a": {1, 2}})), "set"),
    ):
        with pytest.raises(FormatError, match=wanted):
            torch_file.read(file, trusted=True)
    with pytest.raises(FormatError, match="missing"):
        torch_file.read(tmp_path / "none.pt", trusted=True)
