"""Pieces join to the text they came from, never show a broken character, and are safe to print.

The reference for byte-level tokens is Python's own decoder: bytes that are no UTF-8 become \\xNN.
"""

import string
from typing import Any

import pytest
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from planted import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from sae.text import TokenPieces, counted, visible

TOKENIZER = byte_tokenizer()
PIECES = TokenPieces(TOKENIZER)
ids = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=30)


def raw_bytes(token_ids: list[int]) -> bytes:
    """The bytes of byte-level tokens by GPT-2's table, as transformers ships it."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    table = {character: byte for byte, character in bytes_to_unicode().items()}
    tokens = TOKENIZER.convert_ids_to_tokens(token_ids)
    return b"".join(bytes(table[c] for c in token) for token in tokens)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_pieces_of_text_join_to_the_text(text: str) -> None:
    token_ids = TOKENIZER.encode(text)
    pieces = PIECES.pieces(token_ids)
    assert len(pieces) == len(token_ids)
    assert "".join(pieces) == TOKENIZER.decode(token_ids) == text


@given(ids)
def test_any_tokens_at_all_show_broken_bytes_as_escapes(token_ids: list[int]) -> None:
    joined = "".join(PIECES.pieces(token_ids))
    assert joined == raw_bytes(token_ids).decode(errors="backslashreplace")
    assert "\ufffd" not in joined


def test_a_split_character_is_whole_where_it_ends() -> None:
    token_ids = [TOKENIZER.convert_tokens_to_ids(t) for t in ("ð", "Ł", "Ļ", "Ĥ")]  # f0 9f 99 82
    assert PIECES.pieces(token_ids) == ["", "", "", "🙂"]
    assert PIECES.pieces(token_ids[:3]) == ["\\xf0", "\\x9f", "\\x99"]
    assert PIECES.pieces(token_ids[1:]) == ["\\x9f", "\\x99", "\\x82"]
    assert PIECES.piece(token_ids[0]) == "\\xf0"


def test_special_and_unknown_tokens() -> None:
    assert PIECES.pieces([TOKENIZER.eos_token_id, 10**6]) == ["<|end|>", ""]
    assert PIECES.pieces([]) == []
    assert max(TOKENIZER.get_vocab().values()) + 1 == PIECES.n_ids


def sentencepiece(*, strip: bool) -> Any:
    """Llama's scheme (`strip`: no space before the first word) or Gemma's, with byte fallback."""
    tokens = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "Ġ"]
    tokens += [*string.ascii_lowercase, *(f"▁{c}" for c in string.ascii_lowercase)]
    core = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [("▁", c) for c in string.ascii_lowercase],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    core.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if strip else []), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if strip else []))
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("strip", [True, False])
def test_sentencepiece(strip: bool) -> None:
    tokenizer = sentencepiece(strip=strip)
    pieces = TokenPieces(tokenizer)

    @given(st.text(st.sampled_from("ab é日🙂")).map(lambda text: f"a{text}"))
    def joins(text: str) -> None:
        token_ids = tokenizer.encode(text)
        assert "".join(pieces.pieces(token_ids)) == tokenizer.decode(token_ids) == text

    joins()


def test_wordpiece() -> None:
    words = ["[UNK]", "[CLS]", "[SEP]", "play", "##ing", "##s", "he", "日"]
    core = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=core, cls_token="[CLS]")
    token_ids = [1, *tokenizer.encode("he plays playing 日")]
    pieces = TokenPieces(tokenizer).pieces(token_ids)
    assert pieces == ["[CLS]", " he", " play", "s", " play", "ing", " 日"]
    assert "".join(pieces) == tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)


@given(st.text(st.characters()))
def test_visible_text_is_printable_and_on_one_line(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable()
    shown.encode()  # no lone surrogates
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", "a↵b→c"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x9b\x7f\r\x00", "\\x9b\\x7f\\x0d\\x00"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\u200b\u2066\ufeff\U000e0041", "\\u200b\\u2066\\ufeff\\U000e0041"),
        ("\ud800", "\\ud800"),
        ("日本 [bold]é", "日本 [bold]é"),
    ],
)
def test_what_could_harm_a_terminal_is_spelt_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_one_is_not_several() -> None:
    assert [counted(n, "label") for n in (0, 1, 2048)] == ["0 labels", "1 label", "2,048 labels"]
