"""Every kept token is drawn exactly once, with the activation that a plain forward pass of its row
gives; all hookpoints give the same tokens; what cannot work is said at once."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from planted import tiny_model
from torch import Tensor

from sae.activations import ActivationStream, Batch, Sites, Statistics, read
from sae.builtin.document import Document
from sae.data import Packer, TokenBatch
from sae.errors import ConfigError, DataError, FormatError, ModelError
from sae.hooks import Hookpoint
from sae.routes import Route

CONTEXT, LLM_BATCH, BATCH, POOL = 16, 2, 8, 64
ACT, IN, OUT = (Hookpoint(f"layers.{name}") for name in ("0.mlp_act", "1.mlp_in", "1.mlp_out"))
MODULES = {ACT: "transformer.h.0.mlp.act", OUT: "transformer.h.1.mlp"}


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return tiny_model(len(tokenizer)).eval()


@pytest.fixture(scope="module")
def rows(tokenizer: Any, paragraphs: list[str]) -> TokenBatch:
    """Short documents, with separators between them and BOS in front of every row."""
    packer = Packer(tokenizer, CONTEXT, latents=False)
    texts = [text for paragraph in paragraphs for text in paragraph.split("\n")]
    rows = TokenBatch.join(list(packer.rows(enumerate(Document(text, text) for text in texts))))
    assert not rows.kept.all() and rows.kept.sum() > 4 * POOL
    return rows


def batches(rows: TokenBatch) -> Iterator[TokenBatch]:
    return (rows[i : i + LLM_BATCH] for i in range(0, len(rows), LLM_BATCH))


def stream(model: Any, tokens: Iterator[TokenBatch], **changes: Any) -> ActivationStream:
    settings: dict[str, Any] = {"batch": BATCH, "pool": POOL, "dtype": torch.float32}
    settings |= {"hookpoints": [ACT, OUT], "generator": torch.Generator().manual_seed(0)} | changes
    return ActivationStream(model, tokens=tokens, **settings)


def collect(found: ActivationStream) -> dict[Hookpoint, Batch]:
    """All batches of a stream in one, for each hookpoint."""
    parts = list(found)
    return {
        point: Batch(
            *(torch.cat([getattr(p[point], n) for p in parts]) for n in ("x", "y", "source"))
        )
        for point in parts[0]
    }


@torch.no_grad()
def plain(model: Any, rows: TokenBatch) -> dict[Hookpoint, Tensor]:
    """What modules give out in a plain forward pass, row by row [n context d]."""
    found: dict[Hookpoint, list[Tensor]] = {point: [] for point in MODULES}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _module, _args, out, point=point: found[point].append(out)
        )
        for point, name in MODULES.items()
    ]
    for row in rows.tokens:
        model(row[None])
    for hook in hooks:
        hook.remove()
    return {point: torch.cat(outs) for point, outs in found.items()}


def where(source: Tensor) -> list[tuple[int, ...]]:
    return [tuple(pair) for pair in source.tolist()]


def kept(rows: TokenBatch) -> list[tuple[int, ...]]:
    """Document and position of every kept token, in reading order."""
    return where(torch.stack([rows.document[rows.kept], rows.position[rows.kept]], dim=1))


def test_every_kept_token_comes_once_with_its_activation(model: Any, rows: TokenBatch) -> None:
    found, wanted = collect(stream(model, batches(rows))), plain(model, rows)
    row_of = {pair: i for i, pair in enumerate(kept(rows))}
    drawn = where(found[ACT].source)
    assert len(set(drawn)) == len(drawn) and set(drawn) <= row_of.keys()
    assert 0 <= len(row_of) - len(drawn) < BATCH
    order = torch.tensor([row_of[pair] for pair in drawn])
    for point in (ACT, OUT):
        torch.testing.assert_close(found[point].x, wanted[point][rows.kept][order])
        assert torch.equal(found[point].x, found[point].y)
        assert torch.equal(found[point].source, found[ACT].source)


def test_the_last_token_comes_too_when_batches_divide_the_text(
    model: Any, rows: TokenBatch
) -> None:
    drawn = where(collect(stream(model, batches(rows), batch=1))[ACT].source)
    assert sorted(drawn) == sorted(kept(rows))


def test_tokens_are_mixed_by_the_generator_alone(model: Any, rows: TokenBatch) -> None:
    def order(seed: int) -> list[tuple[int, ...]]:
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed + 7)
        return where(collect(stream(model, batches(rows), generator=generator))[ACT].source)

    first = order(0)
    assert first == order(0)
    assert first != order(1)
    in_text = kept(rows)
    moved = [abs(in_text.index(pair) - i) for i, pair in enumerate(first)]
    assert sum(m > BATCH for m in moved) > len(moved) / 2


def test_half_the_pool_is_kept_full_while_there_is_text(model: Any, rows: TokenBatch) -> None:
    found = stream(model, batches(rows))
    drawn, in_text = 0, int(rows.kept.sum())
    assert POOL - LLM_BATCH * CONTEXT < len(found) <= POOL
    for _ in found:
        drawn += BATCH
        if drawn < in_text - POOL:
            assert len(found) >= POOL // 2 - BATCH
    assert len(found) < BATCH


def test_little_data_in_a_large_pool(model: Any, rows: TokenBatch) -> None:
    few = rows[:3]
    found = stream(model, batches(few), pool=10_000)
    assert len(found) == few.kept.sum()
    wanted, statistics = plain(model, few), found.statistics()
    for point in (ACT, OUT):
        acts = wanted[point][few.kept]
        torch.testing.assert_close(statistics[point].mean, acts.mean(0))
        norm = acts.norm(dim=1).mean().item()
        assert statistics[point].mean_norm == pytest.approx(norm, rel=1e-5)
        scaled = (acts * statistics[point].scale).norm(dim=1).mean().item()
        assert scaled == pytest.approx(acts.shape[1] ** 0.5, rel=1e-5)
    drawn = where(collect(found)[ACT].source)
    assert len(drawn) == len(kept(few)) // BATCH * BATCH


def test_statistics_are_those_of_the_pool(model: Any, rows: TokenBatch) -> None:
    found = stream(model, batches(rows))
    n = len(found)
    acts = plain(model, rows)[OUT][rows.kept][:n]
    torch.testing.assert_close(found.statistics()[OUT].mean, acts.mean(0))


def test_reading_leaves_out_special_tokens(model: Any, rows: TokenBatch) -> None:
    acts, source = read(model, [IN, OUT], rows[:4], torch.float32)
    assert where(source) == kept(rows[:4])
    assert len(acts[IN]) == len(acts[OUT]) == len(source)
    torch.testing.assert_close(acts[OUT], plain(model, rows[:4])[OUT][rows[:4].kept])
    assert not acts[OUT].requires_grad


def test_rows_without_a_kept_token_do_no_harm(model: Any, rows: TokenBatch) -> None:
    empty = TokenBatch(rows.tokens, rows.document, rows.position, torch.zeros_like(rows.kept))[:2]
    drawn = where(collect(stream(model, iter([empty, *batches(rows), empty]), batch=1))[ACT].source)
    assert sorted(drawn) == sorted(kept(rows))


def test_bfloat16_is_near(model: Any, rows: TokenBatch) -> None:
    fine, _ = read(model, [OUT], rows[:2], torch.float32)
    coarse, _ = read(model, [OUT], rows[:2], torch.bfloat16)
    assert (coarse[OUT].float() - fine[OUT]).norm() < 0.03 * fine[OUT].norm()


# Refusals


@pytest.mark.parametrize("pool", [BATCH, LLM_BATCH * CONTEXT - 4])
def test_a_pool_smaller_than_a_forward_pass(model: Any, rows: TokenBatch, pool: int) -> None:
    with pytest.raises(ConfigError, match=rf"optim\.pool: {pool} has no room for"):
        list(stream(model, batches(rows), pool=pool))


def test_a_pool_without_room_beside_what_is_left(model: Any, rows: TokenBatch) -> None:
    """The first pass fits, the second finds less than a batch of tokens and no room beside them."""
    first, second = rows[:2], rows[2:5]
    left, room = 10, 5
    batch, pool = int(first.kept.sum()) - left, int(second.kept.sum()) + room
    found = stream(model, iter([first, second]), pool=pool, batch=batch)
    with pytest.raises(ConfigError, match=rf"tokens beside {left}; raise it"):
        list(found)


def test_too_little_text(model: Any, rows: TokenBatch) -> None:
    with pytest.raises(DataError, match=r"data\.source: no text"):
        stream(model, iter([]))
    with pytest.raises(DataError, match=r"less than optim\.batch 60"):
        stream(model, iter([rows[:1]]), batch=60)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_activations_that_cannot_be_scaled(rows: TokenBatch, tokenizer: Any, value: float) -> None:
    broken = tiny_model(len(tokenizer))
    with torch.no_grad():
        for parameter in broken.transformer.h[1].mlp.c_proj.parameters():
            parameter.fill_(value)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp_out are all zero or not finite"):
        stream(broken, batches(rows)).statistics()


def test_the_scale_brings_the_mean_norm_to_the_root_of_the_width() -> None:
    assert Statistics(torch.zeros(16), 8.0).scale == 0.5


def test_hookpoints_side_by_side_weigh_alike() -> None:
    """Each has a scale of its own, kept by checkpoints and, as plain data, by what is saved."""
    acts = [torch.randn(500, 4) * 5 + 1, torch.randn(500, 9)]
    one, other = (Statistics.of([part], "acts") for part in acts)
    both = Statistics.side_by_side([one, other])
    assert Statistics.side_by_side([one]) is one and torch.equal(both.mean[4:], other.mean)
    scaled = torch.cat(acts, 1) * both.sites.scale(torch.device("cpu"))
    assert scaled[:, :4].norm(dim=1).mean().item() == pytest.approx(2, rel=1e-5)
    assert scaled[:, 4:].norm(dim=1).mean().item() == pytest.approx(3, rel=1e-5)
    assert one.sites.scale(torch.device("cpu")) == one.sites.plain() == one.scale
    for sites in (one.sites, both.sites):
        assert Sites.restored(sites.state()) == sites
        assert Sites(sites.widths, (1.0,) * len(sites.widths)).rescaled(sites.plain()) == sites
        assert sites.rescaled(None) is sites
    for wrong in (2.0, [1.0], [1.0, "a"], "ab"):
        with pytest.raises(FormatError, match="expected 2 numbers"):
            both.sites.rescaled(wrong)


def test_a_batch_along_a_route_is_what_it_reads_and_rebuilds() -> None:
    source = torch.zeros(3, 2, dtype=torch.long)
    acts = {point: torch.randn(3, 2 + i) for i, point in enumerate((ACT, IN, OUT))}
    batches = {point: Batch(values, values, source) for point, values in acts.items()}
    plain = Batch.along(Route.at(ACT), batches)
    assert plain.x is plain.y is acts[ACT] and plain.source is source
    both = Batch.along(Route((IN, ACT), (OUT,)), batches)
    assert torch.equal(both.x, torch.cat([acts[IN], acts[ACT]], 1)) and both.y is acts[OUT]
