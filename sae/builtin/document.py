"""One text with a name, and what is known about its parts."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple


class Span(NamedTuple):
    """Characters `start:end` of a text carry `value` of the latent variable `latent` (an index)."""

    start: int
    end: int
    latent: int
    value: int


@dataclass(frozen=True)
class Document:
    """A text (or its token ids), a `key` unique in its source, and labelled spans.

    `heldout` says on which side of the split a document lies where its source decides that itself;
    None leaves it to the hash of the key.
    """

    key: str
    text: str | list[int]
    spans: tuple[Span, ...] = ()
    heldout: bool | None = None


def hash_unit(key: str) -> float:
    """A number in [0, 1) that depends on the key alone: the same split on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:7]) / 2**56
