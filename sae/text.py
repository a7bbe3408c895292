"""What one may show: pieces of byte-level tokens, escaping for terminals, numbers of things."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

_SHOWN = {"\n": "↵", "\t": "→"}
_METASPACE = "▁"


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer here."""

    def get_vocab(self) -> dict[str, int]: ...
    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any: ...


def visible(text: str) -> str:
    """`text` on one line, every character printable: a newline is ↵, a tab →, the rest \\xNN.

    Escape sequences, bidi overrides, zero-width characters and lone surrogates come from the text
    that was scanned; shown raw they would recolour, reorder or break the terminal.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _SHOWN.get(c) or _escape(c) for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def counted(n: int, thing: str) -> str:
    """1 label, 2,048 labels."""
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


class TokenPieces:
    """The text of each token in its sequence, for byte-level BPE, SentencePiece and WordPiece.

    A character that is split across tokens is shown whole at the token that completes it; bytes
    that never complete one are shown as \\xNN where they stand. Pieces of complete text join to
    what the tokenizer decodes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokens = tokenizer.get_vocab()
        self._tokens = {token_id: token for token, token_id in tokens.items()}
        self.n_ids = max(self._tokens, default=-1) + 1
        self._bytes_of, self._first = _scheme(tokenizer, tokens)
        self._cache: dict[int, tuple[bytes, str | None]] = {}

    def piece(self, token_id: int) -> str:
        """The text of one token on its own, a leading space kept."""
        raw, whole = self._look_up(int(token_id))
        return whole if whole is not None else _resolve([raw])[0]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token of a sequence; an id the tokenizer does not know gives ''."""
        found = [self._look_up(int(i)) for i in ids]
        pieces, start = [], 0
        while start < len(found):
            # A token that is whole begins with a first byte, so it cannot complete an earlier
            # character: only runs of broken (or empty) tokens need resolving together.
            stop = start
            while stop < len(found) and not found[stop][1]:
                stop += 1
            if stop > start:
                pieces += _resolve([raw for raw, _ in found[start:stop]])
            if stop < len(found):
                pieces.append(found[stop][1] or "")
            start = stop + 1
        if pieces:
            pieces[0] = self._first(pieces[0])
        return pieces

    def _look_up(self, token_id: int) -> tuple[bytes, str | None]:
        """The token's bytes and, where they are complete UTF-8, their text."""
        if token_id not in self._cache:
            raw = self._bytes_of(self._tokens.get(token_id, ""))
            try:
                self._cache[token_id] = raw, raw.decode()
            except UnicodeDecodeError:
                self._cache[token_id] = raw, None
        return self._cache[token_id]


def _resolve(parts: list[bytes]) -> list[str]:
    """Decode consecutive pieces of bytes; each character goes to the part that completes it."""
    flat = b"".join(parts)
    owner = [i for i, part in enumerate(parts) for _ in part]
    shown = [""] * len(parts)
    at = 0
    while at < len(flat):
        character = _character_at(flat, at)
        if character is None:
            shown[owner[at]] += f"\\x{flat[at]:02x}"
            at += 1
        else:
            at += len(character.encode())
            shown[owner[at - 1]] += character
    return shown


def _character_at(flat: bytes, at: int) -> str | None:
    """The UTF-8 character that begins at byte `at`, if one does."""
    first = flat[at]
    length = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
    try:
        return flat[at : at + length].decode()
    except UnicodeDecodeError:
        return None


def _byte_alphabet() -> dict[str, int]:
    """The characters by which GPT-2's vocabulary writes the 256 bytes (its bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _scheme(
    tokenizer: Tokenizer, vocabulary: dict[str, int]
) -> tuple[Callable[[str], bytes], Callable[[str], str]]:
    """How this vocabulary writes bytes, and what its decoder does to the start of a text."""
    added = set(getattr(tokenizer, "get_added_vocab", dict)())
    regular = vocabulary.keys() - added
    characters = {character for token in regular for character in token}
    alphabet = _byte_alphabet()
    if "Ġ" in characters and characters <= alphabet.keys():
        return (lambda token: _from_byte_level(token, alphabet)), lambda first: first
    if _METASPACE in characters:
        return _from_sentencepiece, _start_of_sentencepiece(tokenizer, vocabulary)
    if any(token.startswith("##") for token in regular):
        return (lambda token: _from_wordpiece(token, added)), lambda first: first.removeprefix(" ")
    return str.encode, lambda first: first


def _from_byte_level(token: str, alphabet: dict[str, int]) -> bytes:
    """Each character stands for a byte; a token with any other character (an added one) is text."""
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()


def _from_sentencepiece(token: str) -> bytes:
    """'▁' is a space and '<0xNN>' a byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace(_METASPACE, " ").encode()


def _start_of_sentencepiece(
    tokenizer: Tokenizer, vocabulary: dict[str, int]
) -> Callable[[str], str]:
    """Llama's decoder drops the space before the first word, Gemma's keeps it: ask by trying."""
    worded = (
        i for token, i in vocabulary.items() if token[:1] == _METASPACE and token[1:].isalpha()
    )
    probe = next(worded, None)
    if probe is None or str(tokenizer.decode([probe])).startswith(" "):
        return lambda first: first
    return lambda first: first.removeprefix(" ")


def _from_wordpiece(token: str, added: set[str]) -> bytes:
    """'##' continues a word; every other token, special ones too, begins one after a space."""
    if token.startswith("##") and token not in added:
        return token[2:].encode()
    return f" {token}".encode()
