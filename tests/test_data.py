"""Rows are exactly `context` tokens, every token can be traced to its document and position, no
document is both trained on and held out, and the order is a function of seed and epoch."""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from sae import documents
from sae.builtin import facts
from sae.builtin.document import Document, hash_unit
from sae.config import DataConfig
from sae.data import Packer, TokenBatch, TokenSource, added_ids, open_source
from sae.errors import DataError

CONTEXT = 16


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def open_rows(tmp_path: Path, tokenizer: Any) -> Callable[..., TokenSource]:
    """Open rows of text or ids through a JSONL file."""

    def open_them(rows: list[Any], seed: int = 0, **settings: Any) -> TokenSource:
        file = write(tmp_path / "rows.jsonl", rows)
        config = DataConfig.model_validate(
            {"source": str(file), "context": CONTEXT, "heldout": 0.3} | settings
        )
        return open_source(config, tokenizer, seed)

    return open_them


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "IN_MEMORY_BYTES", 0)


def plain(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def one_pass(source: TokenSource, batch: int = 5) -> TokenBatch:
    return TokenBatch.join(list(source.train(batch, repeat=False)))


def all_heldout(source: TokenSource) -> TokenBatch:
    return TokenBatch.join(list(source.heldout(3)))


def lines(rows: TokenBatch) -> list[list[int]]:
    return rows.tokens.tolist()


def ids_by_document(rows: TokenBatch) -> dict[int, list[int]]:
    """The token ids of every document, put in order by their positions."""
    found: dict[int, dict[int, int]] = {}
    columns = (rows.tokens, rows.document, rows.position)
    for token, document, position in torch.stack(columns).flatten(1).T.tolist():
        if position >= 0:
            assert position not in found.setdefault(document, {})
            found[document][position] = token
    return {d: [by[p] for p in range(len(by))] for d, by in found.items()}


# Packing


@pytest.mark.parametrize("kind", ["tokenizer", "bert_tokenizer", "bare"])
def test_every_document_can_be_put_together_again(
    kind: str, request: pytest.FixtureRequest, paragraphs: list[str]
) -> None:
    tokenizer = request.getfixturevalue("tokenizer" if kind == "bare" else kind)
    if kind == "bare":
        tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
        tokenizer.backend_tokenizer.post_processor = None
    packer = Packer(tokenizer, CONTEXT, latents=False)
    texts = [Document(str(i), text) for i, text in enumerate(paragraphs)]
    rows = TokenBatch.join(list(packer.rows(enumerate(texts))))
    assert rows.tokens.shape[1] == CONTEXT
    wanted = {i: plain(tokenizer, text) for i, text in enumerate(paragraphs)}
    found = ids_by_document(rows)
    dropped = sum(map(len, wanted.values())) - sum(map(len, found.values()))
    assert 0 <= dropped < CONTEXT
    assert all(ids == wanted[document][: len(ids)] for document, ids in found.items())
    assert all(found[d] == wanted[d] for d in sorted(found)[:-1])  # what is dropped is the end


def test_rows_carry_the_special_tokens_of_the_tokenizer(
    tokenizer: Any, bert_tokenizer: Any, paragraphs: list[str]
) -> None:
    for used, before, behind, separator in (
        (tokenizer, [0], [], 0),
        (bert_tokenizer, [2], [3], 3),
    ):
        assert added_ids(used) == (before, behind)
        packer = Packer(used, CONTEXT, latents=False)
        rows = TokenBatch.join(list(packer.rows(enumerate(Document(t, t) for t in paragraphs))))
        width = CONTEXT - len(behind)
        assert (rows.tokens[:, : len(before)] == torch.tensor(before)).all()
        assert (rows.tokens[:, width:] == torch.tensor(behind)).all()
        body = slice(len(before), width)
        added = torch.ones(CONTEXT, dtype=torch.bool)
        added[body] = False
        assert (rows.position[:, added] == -1).all()
        between = rows.position[:, body] == -1  # one separator behind each document
        assert (rows.tokens[:, body][between] == separator).all()
        assert between.sum() in (len(paragraphs) - 1, len(paragraphs))
        assert (rows.kept == ~torch.isin(rows.tokens, torch.tensor(used.all_special_ids))).all()
        assert not rows.kept[rows.position == -1].any()


def test_special_tokens_inside_a_text_are_dropped_by_id(tokenizer: Any) -> None:
    packer = Packer(tokenizer, 8, latents=False)
    (rows,) = packer.rows([(0, Document("a", "tides <|bos|> and waves" * 3))])
    inside = (rows.tokens == 0) & (rows.position >= 0)
    assert inside.any() and not rows.kept[inside].any()


def test_token_ids_are_taken_as_they_are(open_rows: Any) -> None:
    rows = [[(7 * i + j) % 300 + 1 for j in range(20)] for i in range(12)]
    source = open_rows(rows)
    both = ids_by_document(one_pass(source)) | ids_by_document(all_heldout(source))
    assert all(ids == rows[document][: len(ids)] for document, ids in both.items())


# The two sides


def test_no_document_is_on_both_sides(open_rows: Any, paragraphs: list[str]) -> None:
    texts = [f"{i} {text}" for i in range(4) for text in paragraphs]
    for seed in (0, 1):
        source = open_rows(texts, seed)
        train, heldout = (
            set(rows.document.unique().tolist()) for rows in (one_pass(source), all_heldout(source))
        )
        assert train.isdisjoint(heldout)
        assert heldout <= {i for i in range(len(texts)) if hash_unit(f"rows.jsonl#{i}") < 0.3}
        assert len(train | heldout) > 0.9 * len(texts)  # but for the last, incomplete rows


def test_something_is_held_out_unless_nothing_shall_be(open_rows: Any) -> None:
    texts = [f"{i} " * 40 for i in range(3)]
    assert len(list(open_rows(texts, heldout=1e-6).heldout(1)))
    assert not list(open_rows(texts, heldout=0).heldout(1))
    assert not list(open_rows(texts[:1], heldout=0.1).heldout(1))


def test_a_source_may_decide_itself(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [Document(str(i), f"{i} " * 30, heldout=i % 2 == 0) for i in range(8)]
    monkeypatch.setattr("sae.builtin.documents", lambda _: iter(made))
    source = open_source(DataConfig(source="builtin:stdlib", context=CONTEXT), tokenizer, 0)
    assert {i % 2 for i in one_pass(source).document.unique().tolist()} == {1}
    assert {i % 2 for i in all_heldout(source).document.unique().tolist()} == {0}


# Order


def test_a_pass_gives_every_row_once(open_rows: Any, paragraphs: list[str]) -> None:
    source = open_rows(paragraphs * 3)
    batches = list(source.train(5, repeat=False))
    assert [len(batch) for batch in batches[:-1]] == [5] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= 5
    for batch in (1, 7, 10**6):
        assert lines(one_pass(source, batch)) == lines(TokenBatch.join(batches))
    assert source.tokens_available == int(one_pass(source).kept.sum())
    heldout = [lines(TokenBatch.join(list(source.heldout(batch)))) for batch in (1, 4, 100)]
    assert heldout[0] == heldout[1] == heldout[2]


def test_the_order_is_that_of_seed_and_epoch(open_rows: Any, paragraphs: list[str]) -> None:
    def epochs(seed: int) -> tuple[list, list]:
        source = open_rows(paragraphs * 3, seed, repeat=True)
        n = len(one_pass(source))
        rows = lines(TokenBatch.join(list(islice(source.train(1), 2 * n))))
        return rows[:n], rows[n:]

    first, second = epochs(0)
    assert (first, second) == epochs(0)
    other, _ = epochs(1)
    assert first != second and first != other
    assert sorted(first) == sorted(second) == sorted(other)


@pytest.mark.usefixtures("stream")
def test_a_stream_gives_the_same_rows_in_order(
    open_rows: Any, paragraphs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_rows(paragraphs * 60)  # several chunks
    assert source.tokens_available is None
    rows = one_pass(source)
    assert (rows.document[1:, 1] >= rows.document[:-1, 1]).all()
    for batch in (1, 1000):
        assert lines(one_pass(source, batch)) == lines(rows)
    twice = TokenBatch.join(list(islice(source.train(1, repeat=True), 2 * len(rows))))
    assert lines(twice) == lines(rows) * 2
    monkeypatch.setattr(documents, "IN_MEMORY_BYTES", 1 << 26)
    kept = open_rows(paragraphs * 60)
    assert sorted(lines(one_pass(kept))) == sorted(lines(rows))
    assert sorted(lines(all_heldout(kept))) == sorted(lines(all_heldout(source)))


def test_data_runs_out_unless_repeated(open_rows: Any, paragraphs: list[str]) -> None:
    n = len(one_pass(open_rows(paragraphs)))
    assert len(list(open_rows(paragraphs).train(1))) == n
    for source in (open_rows(paragraphs, repeat=True), open_rows(paragraphs)):
        assert len(list(islice(source.train(1, repeat=True), 3 * n))) == 3 * n


@pytest.mark.usefixtures("stream")
def test_repeating_a_stream_without_a_row_ends(open_rows: Any) -> None:
    assert not list(open_rows(["short"], repeat=True).train(1))


# What is shown and recorded


def test_the_preview_decodes_two_rows(
    open_rows: Any, paragraphs: list[str], tokenizer: Any
) -> None:
    source = open_rows(paragraphs)
    first = lines(next(source.train(2)))
    shown = source.preview()
    assert shown == [tokenizer.decode(row) for row in first]
    assert all(text.startswith("<|bos|>") for text in shown)
    assert source.preview(1, tokens=3) == [tokenizer.decode(first[0][:3])]


def test_the_fingerprint_names_the_text_and_nothing_else(
    tmp_path: Path, tokenizer: Any, paragraphs: list[str]
) -> None:
    def fingerprint(folder: str, rows: list[str], **settings: Any) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        source = write(tmp_path / folder / "a.jsonl", rows)
        return open_source(DataConfig(source=str(source), **settings), tokenizer, 0).fingerprint

    first = fingerprint("here", paragraphs, context=8)
    assert len(first) == 16 and int(first, 16) >= 0
    assert first == fingerprint("there", paragraphs, context=9, heldout=0.5)
    assert first != fingerprint("here", [*paragraphs[:-1], paragraphs[-1] + "."], context=8)


def test_latents_are_known_at_every_token_of_the_facts(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list(islice(facts.documents(), 40))
    prose = Document("prose", "no latents here, only tides and waves " * 20)
    monkeypatch.setattr("sae.builtin.documents", lambda _: iter([prose, *made]))
    source = open_source(DataConfig(source="builtin:", context=64), tokenizer, 0)
    rows, table = one_pass(source), facts.load()
    assert rows.latents is not None and rows.latents.shape == (*rows.tokens.shape, 5)
    known = rows.kept & (rows.document > 0)
    assert (rows.latents[known] >= 0).all()
    assert (rows.latents[~known] == -1).all()
    said = {(f.relation, f.subject, f.answer) for f in table.facts}
    for tokens, (relation, subject, answer, template, part) in runs(rows):
        fact = table.relations[relation], table.subjects[subject], table.answers[answer]
        assert fact in said and table.templates[template].relation == fact[0]
        if facts.PARTS[part] in ("subject", "answer"):
            wanted = fact[1] if facts.PARTS[part] == "subject" else fact[2]
            assert tokenizer.decode(tokens).strip() == wanted


def runs(rows: TokenBatch) -> Iterator[tuple[list[int], list[int]]]:
    """Stretches of tokens inside a row with the same latents, but for those at the row's ends."""
    assert rows.latents is not None
    for tokens, latents in zip(rows.tokens.tolist(), rows.latents.tolist(), strict=True):
        found: list[tuple[list[int], list[int]]] = [([], latents[0])]
        for token, values in zip(tokens, latents, strict=True):
            if values != found[-1][1]:
                found.append(([], values))
            found[-1][0].append(token)
        yield from (run for run in found[2:-1] if run[1][0] >= 0)


def test_other_texts_have_no_latents(open_rows: Any, paragraphs: list[str]) -> None:
    assert one_pass(open_rows(paragraphs)).latents is None


# Refusals


def test_too_little_text(open_rows: Any) -> None:
    with pytest.raises(DataError, match="holds no text"):
        open_rows(["", "  "])
    with pytest.raises(DataError, match="less than 1 training rows of 16 tokens; give more text"):
        open_rows(["a few words"])
    with pytest.raises(DataError, match="less than 2 training rows"):
        open_rows(["tides " * 12], heldout=0).preview()


def test_no_room_for_text(tmp_path: Path, bert_tokenizer: Any) -> None:
    config = DataConfig(source=str(write(tmp_path / "a.jsonl", ["text"])), context=3)
    with pytest.raises(DataError, match=r"data.context: 3 leaves no room .* 2 special .* least 4"):
        open_source(config, bert_tokenizer, 0)


@pytest.mark.parametrize("wrong", [[1, 2, 400], [1, -1]])
def test_ids_of_another_tokenizer(open_rows: Any, wrong: list[int]) -> None:
    with pytest.raises(
        DataError, match=r"data\.column: token ids from .* 0 to 399; give the model"
    ):
        open_rows([[1] * 50, wrong, [1] * 50])


def test_text_and_ids_in_one_column(open_rows: Any) -> None:
    with pytest.raises(DataError, match=r"data\.column: holds text and token ids"):
        open_rows(["text"] * 10 + [[1, 2]] * 10)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/y.txt"])
def test_what_the_disk_refuses(tokenizer: Any, name: str) -> None:
    with pytest.raises(DataError, match=r"data\.source: x+.*cannot be (read|opened)"):
        open_source(DataConfig(source=name), tokenizer, 0)
