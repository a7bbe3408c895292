"""Proves that an autoencoder which is not what was saved is refused at load, on the strength of a
few stored inputs alone (no manifest), and that what is the same but for rounding is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sae import fingerprint
from sae.autoencoder import SparseAutoencoder
from sae.errors import FormatError
from sae.sparsity import ReluL1, TopK

D_IN, D_SAE, K = 12, 64, 5


def build(sparsity: Any = None, seed: int = 0, **settings: Any) -> SparseAutoencoder:
    """Random weights, biases included."""
    sae = SparseAutoencoder(D_IN, D_SAE, sparsity or TopK(K), **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return sae


def inputs(n: int = 20, seed: int = 9) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed))


def saved(folder: Path, sae: SparseAutoencoder | None = None, **examples: Any) -> Path:
    (sae or build()).save_pretrained(folder, {"scale": 0.5}, **{"inputs": inputs()} | examples)
    return folder


def edit(**changes: Any) -> Callable[[Path], None]:
    """A change of cfg.yaml."""

    def change(folder: Path) -> None:
        file = folder / "cfg.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))

    return change


def reweigh(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """A change of the weights."""

    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "sae.safetensors")
        change(tensors)
        save_file(tensors, folder / "sae.safetensors")

    return rewrite


def other(folder: Path) -> None:
    """The weights of an SAE of the same shape."""
    build(seed=1).save_pretrained(folder / "other")
    (folder / "other" / "sae.safetensors").replace(folder / "sae.safetensors")


WRONG = {
    "k one more": edit(sparsity={"kind": "topk", "k": K + 1}),
    "k one less": edit(sparsity={"kind": "topk", "k": K - 1}),
    "another kind": edit(sparsity={"kind": "relu_l1", "l1": 5.0}),
    "not centred": edit(subtract_b_dec=False),
    "another scale": edit(metadata={"scale": 0.25}),
    "no scale": edit(metadata={}),
    "weights of another": other,
    "folded twice": reweigh(lambda t: t.update(W_enc=t["W_enc"] * 2, W_dec=t["W_dec"] / 2)),
    "decoder scaled": reweigh(lambda t: t["W_dec"].mul_(1.01)),
    "bias lost": reweigh(lambda t: t["b_dec"].zero_()),
    "encoder bias lost": reweigh(lambda t: t["b_enc"].zero_()),
    "a NaN": reweigh(lambda t: t["W_enc"].__setitem__((0, 0), float("nan"))),
    "features shuffled": reweigh(lambda t: t.update(W_dec=t["W_dec"].flip(0))),
}


@pytest.mark.parametrize("damage", WRONG.values(), ids=WRONG)
def test_what_is_not_what_was_saved_is_refused(tmp_path: Path, damage: Callable) -> None:
    saved(tmp_path)
    SparseAutoencoder.from_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(FormatError, match="do not belong together") as caught:
        SparseAutoencoder.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [TopK(K), ReluL1(2.0)])
def test_the_same_autoencoder_loads_in_every_type(
    tmp_path: Path, sparsity: Any, dtype: torch.dtype
) -> None:
    for seed in range(20):
        saved(tmp_path, build(sparsity, seed, dtype=dtype), inputs=inputs(seed=seed))
        for wanted in (None, torch.float32, torch.bfloat16):
            SparseAutoencoder.from_pretrained(tmp_path, dtype=wanted)
        edit(subtract_b_dec=False)(tmp_path)
        with pytest.raises(FormatError, match="do not belong together"):
            SparseAutoencoder.from_pretrained(tmp_path)


def test_another_order_of_sums_changes_nothing(tmp_path: Path) -> None:
    """Features in another order add up in another order, the only freedom another machine has."""
    saved(tmp_path)
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(0))
    reweigh(
        lambda t: t.update(
            W_enc=t["W_enc"][:, order].contiguous(),
            b_enc=t["b_enc"][order],
            W_dec=t["W_dec"][order],
        )
    )(tmp_path)
    SparseAutoencoder.from_pretrained(tmp_path)


def test_it_holds_eight_rows_and_what_they_give(tmp_path: Path) -> None:
    sae, x = build(), inputs()
    x[2, 3] = float("inf")
    found = fingerprint.check(saved(tmp_path, sae, inputs=x), sae, 0.5)
    assert found is not None and found.y is None and found.scale == 0.5
    assert torch.equal(found.x, torch.cat([x[:2], x[3:9]]))
    out = sae(found.x)
    assert torch.equal(found.recon, out.recon) and found.l0 == K
    expected = (found.x - out.recon).square().sum() / (found.x - found.x.mean(0)).square().sum()
    assert found.fvu == pytest.approx(expected.item())


def test_a_map_has_targets_of_its_own(tmp_path: Path) -> None:
    sae = build(d_out=7, subtract_b_dec=False)
    saved(tmp_path, sae, targets=torch.ones(20, 7) * torch.arange(20)[:, None])
    assert SparseAutoencoder.from_pretrained(tmp_path).d_out == 7
    found = fingerprint.check(tmp_path, sae, 0.5)
    assert found is not None and found.y is not None and found.fvu > 0
    file = tmp_path / fingerprint.FINGERPRINT
    save_file(load_file(file) | {"y": found.y * 3}, file)
    with pytest.raises(FormatError, match="FVU is"):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_one_row_may_stray_but_not_two(tmp_path: Path) -> None:
    file = saved(tmp_path) / fingerprint.FINGERPRINT
    tensors = load_file(file)
    tensors["recon"][0] *= 1.01
    save_file(tensors, file)
    SparseAutoencoder.from_pretrained(tmp_path)
    tensors["recon"][1] *= 1.01
    save_file(tensors, file)
    with pytest.raises(FormatError, match="2 of 8 stored inputs"):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_without_one_an_autoencoder_loads_and_no_old_one_stays(tmp_path: Path) -> None:
    saved(tmp_path)
    build(seed=3).save_pretrained(tmp_path)
    assert not (tmp_path / fingerprint.FINGERPRINT).exists()
    SparseAutoencoder.from_pretrained(tmp_path)
    saved(tmp_path, inputs=torch.full((4, D_IN), float("nan")))
    assert not (tmp_path / fingerprint.FINGERPRINT).exists()


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(8, D_IN + 1)},
        {"recon": torch.zeros(8, D_IN).double()},
        {"l0": torch.zeros(1)},
        {"x": torch.zeros(0, D_IN), "recon": torch.zeros(0, D_IN)},
        {"x": torch.zeros(2000, D_IN), "recon": torch.zeros(2000, D_IN)},
        {"more": torch.zeros(1)},
    ],
    ids=lambda change: f"{ {k: list(v.shape) for k, v in change.items()} }",
)
def test_one_of_other_shapes_is_refused(tmp_path: Path, change: dict[str, torch.Tensor]) -> None:
    file = saved(tmp_path) / fingerprint.FINGERPRINT
    save_file(load_file(file) | change, file)
    with pytest.raises(FormatError, match="does not fit"):
        SparseAutoencoder.from_pretrained(tmp_path)
