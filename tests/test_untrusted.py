"""Proves that files made to do harm are refused: quickly, in little memory, by name, and by the
loaders that read such files; and that what others write honestly is read."""

import json
import os
import time
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from sae import untrusted
from sae.autoencoder import SparseAutoencoder, read_config
from sae.errors import FormatError, RunError
from sae.sparsity import TopK
from sae.store import read_manifest
from sae.untrusted import read_header, read_json

HONEST_FILES, MEGABYTES = 4, 200


def tensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, which may lie about its own length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(**changes: Any) -> dict[str, Any]:
    """A header of one sound tensor of 16 bytes, but for the changes."""
    return {"W_enc": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes}


def two(first: list[int], second: list[int], size: int = 16) -> bytes:
    """Two tensors at these offsets."""
    parts = {
        name: {"dtype": "U8", "shape": [offsets[1] - offsets[0]], "data_offsets": offsets}
        for name, offsets in (("a", first), ("b", second))
    }
    return tensors(parts, bytes(size))


DATA = bytes(16)
SAFETENSORS = {
    "empty": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "a header of 2⁶⁴ − 1 bytes": tensors({}, length=2**64 - 1),
    "a header of 100 MB that is there": tensors(b"{" + b" " * 100_000_000 + b"}"),
    "a header of 100 MB that is not": tensors({}, length=100_000_000),
    "a header longer than the file": tensors(one(), DATA, length=200),
    "a header cut short": tensors(one(), DATA, length=30),
    "no JSON": tensors(b"hello world", DATA),
    "not UTF-8": tensors(b'{"\xff": 1}', DATA),
    "a list": tensors([one()], DATA),
    "nested a million deep": tensors(b"[" * 1_000_000, DATA),
    "nested in objects": tensors(b'{"a":' * 500_000, DATA),
    "NaN in the shape": tensors(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}', DATA),
    "a tensor given twice": tensors(
        b'{"a":{"dtype":"U8","shape":[16],"data_offsets":[0,16]},'
        b'"a":{"dtype":"U8","shape":[16],"data_offsets":[0,16]}}',
        DATA,
    ),
    "an unknown type": tensors(one(dtype="F99"), DATA),
    "a type of two tensors": tensors(one(dtype=["F32"]), DATA),
    "no type": tensors({"W_enc": {"shape": [4], "data_offsets": [0, 16]}}, DATA),
    "a key too many": tensors(one(code="print()"), DATA),
    "no description": tensors({"W_enc": None}, DATA),
    "ten gigabytes claimed": tensors(one(shape=[50_000, 50_000]), DATA),
    "ten gigabytes claimed with offsets": tensors(
        one(shape=[50_000, 50_000], data_offsets=[0, 10**10]), DATA
    ),
    "a product that overflows": tensors(one(shape=[2**33, 2**33], data_offsets=[0, 16]), DATA),
    "a hundred thousand dimensions": tensors(one(shape=[2] * 100_000), DATA),
    "a negative size": tensors(one(shape=[-2, -2]), DATA),
    "half a row": tensors(one(shape=[2, 2.0]), DATA),
    "true as a size": tensors(one(shape=[True, 4]), DATA),
    "text as a size": tensors(one(shape="22"), DATA),
    "offsets behind the end": tensors(one(data_offsets=[16, 32]), DATA),
    "offsets before the start": tensors(one(data_offsets=[-16, 0]), DATA),
    "offsets backwards": tensors(one(data_offsets=[16, 0]), DATA),
    "three offsets": tensors(one(data_offsets=[0, 8, 16]), DATA),
    "offsets of 2⁶⁴": tensors(one(data_offsets=[2**64, 2**64 + 16]), DATA),
    "a number of 10,000 digits": tensors(
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,16]}}', DATA
    ),
    "overlapping": two([0, 10], [6, 16]),
    "the same bytes twice": two([0, 16], [0, 16]),
    "a hole": two([0, 6], [10, 16]),
    "bytes nobody claims": two([0, 4], [4, 8]),
    "metadata that is no text": tensors(one() | {"__metadata__": {"a": {"b": 1}}}, DATA),
    "metadata that is a list": tensors(one() | {"__metadata__": ["a"]}, DATA),
}
JSON = {
    "empty": b"",
    "half a file": b'{"format": 2, "files": {',
    "nested a million deep": b"[" * 1_000_000,
    "nested in objects": b'{"a":' * 1_000_000,
    "65 deep and sound": b"[" * 65 + b"]" * 65,
    "NaN": b'{"loss": NaN}',
    "infinity": b'{"loss": -Infinity}',
    "infinity by size": b'{"loss": 1e999}',
    "a key twice": b'{"format": 1, "format": 2}',
    "a number of a million digits": b"1" * 1_000_000,
    "not UTF-8": b'{"a": "\xc3\x28"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a NUL": b'{"a": "\x00"}',
    "17 MB": b'["' + b"a" * 17_000_000 + b'"]',
    "two values": b"{} {}",
    "a pickle": b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00\x8c\x01a\x94.",
}
BOMB = "metadata: {a0: &a0 [x]" + "".join(
    f", a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)
)
YAML = {
    "a bomb of aliases": BOMB + "}\n",
    "a bomb of merges": BOMB.replace("[", "{<<: [").replace("]", "]}").replace("x", "{x: 1}") + "}",
    "a value in itself": "metadata: &a [*a]\n",
    "nested deeply": "metadata: " + "[" * 500_000,
    "nested deeply in objects": "metadata: " + "{a: " * 200_000,
    "nested deeply by dashes": "metadata:\n" + "- " * 200_000,
    "nested deeply by keys": "metadata:\n" + "? " * 200_000,
    "nested by indents": "".join(" " * i + "a:\n" for i in range(1000)),
    "a call": "metadata: !!python/object/apply:os.system ['touch canary']\n",
    "a name": "metadata: !!python/name:os.system\n",
    "2 MB": "metadata: '" + "a" * 2_000_000 + "'\n",
    "a width of 10¹⁸": "d_in: 1000000000000000000\n",
    "not UTF-8": b"metadata: \xff\n",
    "metadata that is a list": "metadata: [1]\n",
}  # fmt: skip


def cost(work: Callable[[], Any]) -> tuple[float, int]:
    """Seconds of this process's own time, and the most bytes held, while the memory is traced."""
    tracemalloc.start()
    start = time.process_time()
    try:
        work()
        return time.process_time() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@cache
def honest_seconds() -> float:
    """What an honest file of 400 KB costs: 0.25 s where the worst of those here costs 0.1 s."""
    rows = [[i, str(i), {"a": i / 7}] for i in range(10_000)]
    content = json.dumps(rows).encode()
    return cost(lambda: untrusted.parse_json(content))[0]


def refused(read: Callable[[], Any], error: type[Exception], name: str) -> None:
    """The error says which file, in three lines at most, and costs what a few honest files do."""
    told: list[str] = []

    def attempt() -> None:
        with pytest.raises(error) as caught:
            read()
        told.extend(str(caught.value).splitlines())

    seconds, peak = cost(attempt)
    assert name in told[0] and len(told) <= 3 and max(map(len, told)) < 500
    assert peak < MEGABYTES * 1e6 and seconds < HONEST_FILES * honest_seconds()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An SAE that is sound."""
    SparseAutoencoder(4, 8, TopK(2)).save_pretrained(tmp_path / "sae")
    return tmp_path / "sae"


@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=SAFETENSORS)
def test_hostile_safetensors_are_refused(folder: Path, content: bytes) -> None:
    file = folder / "sae.safetensors"
    file.write_bytes(content)
    refused(lambda: read_header(file), FormatError, str(file))
    refused(lambda: SparseAutoencoder.from_pretrained(folder), FormatError, str(file))


@pytest.mark.parametrize("content", JSON.values(), ids=JSON)
def test_hostile_json_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "manifest.json"
    file.write_bytes(content)
    refused(lambda: read_json(file), FormatError, str(file))
    refused(lambda: read_manifest(tmp_path), RunError, str(file))


@pytest.mark.parametrize("content", YAML.values(), ids=YAML)
def test_hostile_yaml_is_refused(folder: Path, content: str | bytes) -> None:
    file, added = folder / "cfg.yaml", content.encode() if isinstance(content, str) else content
    kept = [line for line in file.read_bytes().splitlines(True) if line[:5] not in added]
    file.write_bytes(b"".join(kept) + added)
    refused(lambda: read_config(folder), FormatError, str(file))
    assert not (Path.cwd() / "canary").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    for name, error in (("sae.safetensors", FormatError), ("cfg.yaml", FormatError)):
        (folder / name).rename(folder / "kept")
        os.mkfifo(folder / name)
        refused(lambda: SparseAutoencoder.from_pretrained(folder), error, name)
        (folder / "kept").replace(folder / name)
    os.mkfifo(folder / "manifest.json")
    refused(lambda: read_manifest(folder), RunError, "manifest.json")


def test_headers_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Every type that numpy has too, no values, no dimensions, and notes."""
    kinds = ("bool", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8")
    made: dict[str, Any] = {kind: np.zeros((2, 3), kind) for kind in kinds}
    made |= {"scalar": np.zeros((), "f4"), "none": np.zeros((0, 5), "f4")}
    (tmp_path / "a").write_bytes(save(made, metadata={"by": "a test"}))
    found = read_header(tmp_path / "a")
    assert {name: entry.shape for name, entry in found.items()} == {
        name: array.shape for name, array in made.items()
    }
    assert all(e.end - e.begin == made[name].nbytes for name, e in found.items())
    assert {entry.dtype for entry in found.values()} <= untrusted.DTYPE_BYTES.keys()


def test_what_passes_is_what_safetensors_itself_reads(tmp_path: Path) -> None:
    """A thousand slips in a sound file: refused in words, or read alike by both."""
    made = {"a": np.arange(6, dtype="f4").reshape(2, 3), "b": np.zeros(3, "i8")}
    sound, random, passed, file = save(made), Random(0), 0, tmp_path / "a"
    length = 8 + int.from_bytes(sound[:8], "little")
    for _ in range(1000):
        content = bytearray(sound)
        content[random.randrange(length)] = random.choice(
            [*b'[]{}",:0129NFI', random.randrange(256)]
        )
        file.write_bytes(content)
        try:
            found = {name: entry.shape for name, entry in read_header(file).items()}
        except FormatError as error:
            assert str(file) in str(error)
            continue
        passed += 1
        assert {name: array.shape for name, array in load_file(file).items()} == found
    assert 20 < passed < 500


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    value = {"a": [1, -2.5e-300, None, True, 'x"[{\\', {"ü": "↵"}], "b" * 100: "]" * 200}
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "a.json") == value
    deep = b"[" * untrusted.DEPTH + b"]" * untrusted.DEPTH
    assert untrusted.parse_json(deep) is not None
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "b.safetensors")
