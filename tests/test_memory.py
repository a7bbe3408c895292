"""Proves that running out of memory costs time and nothing else.

Everything that takes more than a few tokens, rows or features is made to raise what torch raises;
training, evaluation and the scan then end with the results of a machine that has room, warn once,
and do not try the size that failed again. And a scan's memory does not grow with the dictionary.
"""

import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from planted import ROWS, SITE, SOURCE, Planted
from tiny import RELU, planned, save
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae import features, kernels, training
from sae.autoencoder import SparseAutoencoder
from sae.errors import SAEError
from sae.evaluation import evaluate
from sae.features import ScanSettings, prompt_features, scan
from sae.hooks import Hookpoint
from sae.kernels import relu_l1_step, topk_step
from sae.memory import MicroBatch, is_out_of_memory
from sae.sparsity import ReluL1, Sparsity, TopK
from sae.store import read_manifest

OURS = "memory ran out"


class Room:
    """Lets through what is small enough; counts what is not."""

    def __init__(self, most: int) -> None:
        self.most, self.refused, self.largest = most, 0, 0

    def check(self, size: int) -> None:
        if size > self.most:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        self.largest = max(self.largest, size)

    def guard(
        self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, size: Callable[..., int]
    ) -> None:
        """Let `owner.name` run only where `size` of its arguments fits."""
        real = getattr(owner, name)

        def checked(*args: Any, **kwargs: Any) -> Any:
            self.check(size(*args))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, checked)

    def guard_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No part of a training step takes more tokens."""
        pre = kernels._Encoder.pre

        def checked(encoder: Any, tokens: slice) -> torch.Tensor:
            self.check(len(encoder.x[tokens]))
            return pre(encoder, tokens)

        monkeypatch.setattr(kernels._Encoder, "pre", checked)
        self.guard(monkeypatch, kernels, "_decode", lambda *args: args[3])
        self.guard(monkeypatch, kernels.Auxk, "_acts", lambda _, pre: len(pre))
        self.guard(monkeypatch, SparseAutoencoder, "forward", lambda _, x: len(x))

    @contextmanager
    def guard_model(self, model: nn.Module) -> Iterator[None]:
        """No forward pass takes more rows."""
        hook = model.register_forward_pre_hook(lambda _, args: self.check(len(args[0])))
        yield
        hook.remove()


@contextmanager
def one_warning() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert len([w for w in caught if str(w.message).startswith(OURS)]) == 1
    assert len(caught) == 1


# --------------------------------------------------------------------------------- the abstraction


def test_it_halves_until_it_fits_and_remembers() -> None:
    room, batch = Room(3), MicroBatch("work", "tokens", "lower it")

    def work(rows: slice) -> list[int]:
        room.check(rows.stop - rows.start)
        return list(range(20))[rows]

    with one_warning():
        for _ in range(2):
            found = list(batch.split(20, work))
            assert [*itertools.chain(*(part for _, part in found))] == list(range(20))
            assert all(part == list(range(20))[rows] for rows, part in found)
    assert room.refused == 3 and room.largest == 2 == batch.size and batch.halved


def test_what_fits_is_not_split() -> None:
    batch = MicroBatch("work", "tokens", "lower it")
    assert [rows for rows, _ in batch.split(7, lambda rows: rows)] == [slice(0, 7)]
    assert [rows for rows, _ in batch.split(0, lambda rows: rows)] == [slice(0, 0)]
    batch = MicroBatch("work", "tokens", "lower it", 3)
    assert [rows.stop for rows, _ in batch.split(7, lambda rows: rows)] == [3, 6, 7]
    assert not batch.halved


def test_the_tensors_of_a_failed_try_are_freed_before_the_next() -> None:
    import weakref

    held: list[weakref.ref] = []

    def work(size: int) -> bool:
        alive = any(ref() is not None for ref in held)
        tensor = torch.zeros(size)
        held.append(weakref.ref(tensor))
        Room(1).check(size)
        return alive

    with one_warning():
        assert MicroBatch("work", "tokens", "lower it").fit(8, work) is False
    assert len(held) == 4


def test_one_that_does_not_fit_is_an_error_in_two_lines() -> None:
    with pytest.raises(SAEError, match="work: not even 1 of its tokens fits") as caught:
        MicroBatch("work", "tokens", "lower sae.d_sae").fit(8, Room(0).check)
    assert str(caught.value).splitlines()[1] == "  lower sae.d_sae"


def test_other_errors_pass() -> None:
    def work(size: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        MicroBatch("work", "tokens", "lower it").fit(8, work)


def test_real_errors_of_torch_and_numpy_are_known() -> None:
    import numpy as np

    for allocate in (lambda: torch.empty(2**56), lambda: np.empty(2**56)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value)


# ---------------------------------------------------------------------------------------- training


def random_sae(sparsity: Sparsity) -> SparseAutoencoder:
    sae = SparseAutoencoder(16, 64, sparsity)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return sae


STEPS: dict[str, tuple[Sparsity, Callable]] = {
    "topk": (
        TopK(4),
        lambda sae, x, n: topk_step(
            sae, x, x, 4, n, auxk=8, auxk_coef=3.0, dead=torch.arange(64) < 30
        ),
    ),
    "sparse": (ReluL1(1.0), lambda sae, x, n: relu_l1_step(sae, x, x, 0.7, n, sparse_below=2)),
    "dense": (ReluL1(1.0), lambda sae, x, n: relu_l1_step(sae, x, x, 0.7, n, sparse_below=0)),
    "by density": (ReluL1(1.0), lambda sae, x, n: relu_l1_step(sae, x, x, 0.7, n)),
}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("most", [1, 5, 64])
def test_a_step_is_the_same_however_it_is_split(
    kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparsity, step = STEPS[kind]
    sae, x = random_sae(sparsity), torch.randn(100, 16, generator=torch.Generator().manual_seed(1))
    whole = step(sae, x, None)
    wanted = [p.grad for p in sae.parameters()]
    room, chunk = Room(most), MicroBatch("the step", "tokens", "lower optim.batch")
    room.guard_steps(monkeypatch)
    with one_warning():
        split = chunk.fit(len(x), lambda n: step(sae, x, n))
    assert room.largest <= most
    assert torch.equal(split.fired, whole.fired)
    for name in ("loss", "mse", "penalty", "auxk", "l0"):
        torch.testing.assert_close(getattr(split, name), getattr(whole, name), rtol=1e-5, atol=0)
    for p, grad in zip(sae.parameters(), wanted, strict=True):
        assert p.grad is not None and grad is not None
        assert ((p.grad - grad).norm() / grad.norm()).item() < 1e-5
    refused = room.refused
    chunk.fit(len(x), lambda n: step(sae, x, n))
    assert room.refused == refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("memory"))


def trained(folder: Path, output: Path, changes: dict, room: Room | None = None) -> list[dict]:
    plan = planned(folder, changes | {"output": str(output), "optim.lr": "0.01"})
    if room is None:
        training.train(plan)
    else:
        with room.guard_model(plan.lm.model):
            training.train(plan)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("changes", [{}, RELU], ids=["topk", "relu_l1"])
@pytest.mark.parametrize("where", ["step", "model"])
def test_a_run_short_of_memory_ends_like_one_that_is_not(
    folder: Path, tmp_path: Path, changes: dict, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = trained(folder, tmp_path / "roomy", changes)
    room = Room(10 if where == "step" else 1)
    if where == "step":
        room.guard_steps(monkeypatch)
    with one_warning():
        found = trained(folder, tmp_path / "short", changes, room if where == "model" else None)
    assert 0 < room.refused <= 3 and room.largest <= room.most
    said = [read_manifest(tmp_path / name)["memory_ran_out"] for name in ("roomy", "short")]
    assert said == [False, True]
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        for name in ("fvu", "l0"):
            assert ours[name] == pytest.approx(theirs[name], rel=0.01)
        assert {k: ours[k] for k in ("tokens", "sequences", "revived")} == {
            k: theirs[k] for k in ("tokens", "sequences", "revived")
        }


# ------------------------------------------------------------------- evaluation, scan and prompts


@pytest.mark.parametrize("where", ["model", "sae"])
def test_the_evaluation_is_the_same(
    made: Planted, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    point, told = Hookpoint.parse(SITE), []

    def evaluated() -> Any:
        return evaluate(
            made.model, {point: made.sae}, [made.rows], n_tokens=10**9, ks=[3], baselines=True,
            progress=told.append,
        )[point]  # fmt: skip

    wanted, room = evaluated(), Room(3 if where == "model" else 40)
    told.clear()
    if where == "sae":
        room.guard(monkeypatch, SparseAutoencoder, "forward", lambda _, x: len(x))
    with one_warning():
        if where == "model":
            with room.guard_model(made.model):
                found = evaluated()
        else:
            found = evaluated()
    assert room.refused and sum(told) == found.n_tokens == wanted.n_tokens
    assert (found.density, found.dead, found.dense) == (wanted.density, wanted.dead, wanted.dense)
    for name in ("fvu", "l0", "neurons_l0"):
        assert getattr(found, name).value == pytest.approx(getattr(wanted, name).value, rel=1e-5)
    for name in ("model", "sae", "mean_ablated", "zero_ablated"):
        ours, theirs = (getattr(e.cross_entropy, name).value for e in (found, wanted))
        assert ours == pytest.approx(theirs, rel=1e-5)
    for ours, theirs in zip(found.baseline, wanted.baseline, strict=True):
        assert ours.fvu.value == pytest.approx(theirs.fvu.value, rel=1e-5)


def tables(folder: Path) -> list[list[dict]]:
    return [pq.read_table(folder / f"features/{n}.parquet").to_pylist() for n in TABLES]


TABLES = ("features", "examples")


def assert_close(ours: Any, theirs: Any) -> None:
    """Equal but for the last digits of numbers that are not whole."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    else:
        assert ours == theirs


def guard_scan(room: Room, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "sae":
        room.guard(monkeypatch, SparseAutoencoder, "encode", lambda _, x: len(x))
    else:
        room.guard(monkeypatch, features._Effects, "_neighbours", lambda _, p: p.stop - p.start)


@pytest.mark.parametrize(("where", "most"), [("model", 2), ("sae", 9), ("weights", 3)])
def test_the_dictionary_is_the_same(
    made: Planted, tmp_path: Path, where: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.sae.save_pretrained(tmp_path)
    batches = [made.rows[i : i + 7] for i in range(0, ROWS, 7)]
    args = made.model, made.tokenizer, {SITE: tmp_path}, batches, 10**9
    room, settings = Room(most), ScanSettings(blocks=4)
    with one_warning():
        if where == "model":
            with room.guard_model(made.model):
                scan(*args, source=SOURCE, settings=settings)
        else:
            guard_scan(room, where, monkeypatch)
            scan(*args, source=SOURCE, settings=settings)
    assert room.refused and room.largest <= most
    assert_close(tables(tmp_path), tables(made.folder))


def test_a_small_budget_gives_the_same_dictionary(made: Planted, tmp_path: Path) -> None:
    """Blocks whose activations are more than the budget are read several times."""
    made.sae.save_pretrained(tmp_path)
    settings = ScanSettings(memory=16 * 16 * 50, blocks=2)
    scan(
        made.model, made.tokenizer, {SITE: tmp_path}, [made.rows], 10**9, source=SOURCE,
        settings=settings,
    )  # fmt: skip
    assert_close(tables(tmp_path), tables(made.folder))


def test_features_of_a_prompt_are_the_same(made: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    args = made.model, made.tokenizer, made.sae, SITE, "the cat sat on a mat while birds sang"
    wanted, room = prompt_features(*args), Room(2)
    room.guard(monkeypatch, SparseAutoencoder, "encode", lambda _, x: len(x))
    with one_warning():
        found = prompt_features(*args)
    assert_close([list(map(list, f)) for _, f in found], [list(map(list, f)) for _, f in wanted])


def test_weights_of_another_type_are_not_copied_whole(made: Planted) -> None:
    rows, matrix = torch.randn(3, 8), torch.randn(8, 9000).to(torch.bfloat16)
    torch.testing.assert_close(features._product(rows, matrix), rows @ matrix.float())


class Largest(TorchDispatchMode):
    """The largest tensor made, in bytes; views of what was there before do not count."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        before = {t.untyped_storage().data_ptr() for t in tensors(args)}
        for t in tensors(found):
            if t.untyped_storage().data_ptr() not in before and not t.is_meta:
                self.bytes = max(self.bytes, t.numel() * t.element_size())
        return found


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_a_scan_grows_with_the_dictionary(
    made: Planted, tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither [tokens d_sae], nor [d_sae d_sae], nor a copy of the weights.

    Resident memory takes a process and minutes: scripts/measure_scan_memory.py.
    """
    monkeypatch.setattr(features, "COLUMNS_AT_ONCE", 256)
    d_sae, settings = 2048, ScanSettings(memory=64 * 2**16, top=1, per_interval=1, random=0)
    SparseAutoencoder(24, d_sae, TopK(2), dtype=dtype).save_pretrained(tmp_path)
    with Largest() as largest:
        scan(
            made.model, made.tokenizer, {SITE: tmp_path}, [made.rows[:9]], 10**9, source=SOURCE,
            settings=settings,
        )  # fmt: skip
    assert settings.chunk_bytes < d_sae * 24 * dtype.itemsize
    assert settings.chunk_bytes / 2 < largest.bytes <= 1.5 * settings.chunk_bytes
