"""A probe that changes nothing is the model itself; one that ablates a feature does what taking its
decoder direction away by hand does."""

from typing import Any

import pytest
import torch
from planted import CONTEXT, DEAD, DENSE, SITE, Planted

from sae.errors import DataError, ModelError, RunError
from sae.features import prompt_features
from sae.hooks import Hookpoint, replace
from sae.language_model import LanguageModel
from sae.live import LiveProbe
from sae.records import Change
from sae.routes import Route
from sae.text import TokenPieces

TEXT = "the cat sat on a"
ROUTE = Route.at(Hookpoint.parse(SITE))
HOW: dict[str, Any] = {"tokens": 8, "temperature": 0.0, "seed": 0}


@pytest.fixture(scope="module")
def probe(made: Planted) -> LiveProbe:
    lm = LanguageModel(made.model, made.tokenizer, "tiny", None, CONTEXT)
    return LiveProbe(lm, made.sae, ROUTE)


def plain(made: Planted, n: int) -> tuple[list[int], torch.Tensor]:
    """Greedy decoding without a cache."""
    ids = made.tokenizer(TEXT)["input_ids"]
    start, first = len(ids), None
    for _ in range(n):
        logits = made.model(torch.tensor([ids])).logits[0, -1]
        first = logits if first is None else first
        ids = [*ids, int(logits.argmax())]
        if ids[-1] == made.tokenizer.eos_token_id:
            break
    assert first is not None
    return ids[start:], first.softmax(-1)


def test_without_changes_it_is_the_model(probe: LiveProbe, made: Planted) -> None:
    found = probe.steer(TEXT, {}, **HOW)
    ids, first = plain(made, 8)
    before = made.tokenizer(TEXT)["input_ids"]
    pieces = TokenPieces(made.tokenizer).pieces([*before, *ids])
    assert found.pieces == pieces[len(before) :]
    assert [t.token for t in found.likeliest] == first.topk(10).indices.tolist()
    assert [t.value for t in found.likeliest] == pytest.approx(first.topk(10).values.tolist())


def test_changes_that_change_nothing(probe: LiveProbe) -> None:
    found = probe.steer(TEXT, {DENSE: Change(), DEAD: Change(scale=0)}, **HOW)
    assert found == probe.steer(TEXT, {}, **HOW)


def test_ablating_is_taking_the_direction_away(probe: LiveProbe, made: Planted) -> None:
    sae = made.sae

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        return x - sae.encode(x)[..., DENSE, None] * sae.W_dec[DENSE]

    with torch.no_grad(), replace(made.model, Hookpoint.parse(SITE), by_hand):
        _, wanted = plain(made, 1)
    found = probe.steer(TEXT, {DENSE: Change(scale=0)}, **HOW)
    values = [wanted[t.token].item() for t in found.likeliest]
    assert [t.value for t in found.likeliest] == pytest.approx(values, rel=1e-4)
    assert found != probe.steer(TEXT, {}, **HOW)


def test_drawn_tokens_are_those_of_the_seed(probe: LiveProbe) -> None:
    how = HOW | {"temperature": 1.0, "tokens": 12}
    assert probe.steer(TEXT, {}, **how) == probe.steer(TEXT, {}, **how)
    others = [probe.steer(TEXT, {}, **(how | {"seed": s})).pieces for s in range(1, 4)]
    assert any(pieces != others[0] for pieces in others[1:])


def test_it_never_says_more_than_the_model_can_read(probe: LiveProbe, made: Planted) -> None:
    n = len(made.tokenizer(TEXT)["input_ids"])
    assert len(probe.steer(TEXT, {}, **(HOW | {"tokens": 999})).pieces) <= CONTEXT - n
    with pytest.raises(DataError, match="the model reads 1 to 32"):
        probe.steer(TEXT * 20, {}, **HOW)
    with pytest.raises(DataError):
        probe.steer("", {}, **HOW)
    with pytest.raises(RunError, match="feature 99"):
        probe.steer(TEXT, {99: Change()}, **HOW)


def test_reading_is_prompt_features(probe: LiveProbe, made: Planted) -> None:
    found = [(r.piece, r.features) for r in probe.read(TEXT, 3)]
    assert found == prompt_features(made.model, made.tokenizer, made.sae, SITE, TEXT, 3)


def test_a_model_without_a_head_is_not_steered(made: Planted) -> None:
    lm = LanguageModel(made.model.transformer, made.tokenizer, "headless", None, CONTEXT)
    with pytest.raises(ModelError, match="headless has no head"):
        LiveProbe(lm, made.sae, ROUTE).steer(TEXT, {}, **HOW)


def test_what_reads_one_place_and_writes_another_is_read_only(made: Planted) -> None:
    places = [Hookpoint.parse(f"layers.{layer}.mlp_act") for layer in (0, 1)]
    lm = LanguageModel(made.model, made.tokenizer, "tiny", None, CONTEXT)
    probe = LiveProbe(lm, made.sae, Route((places[0],), (places[1],)))
    assert len(probe.read(TEXT, 3)) == len(made.tokenizer(TEXT)["input_ids"])
    assert probe.steer(TEXT, {}, **HOW).pieces
    with pytest.raises(ModelError, match="only be read"):
        probe.steer(TEXT, {DENSE: Change(scale=0)}, **HOW)
