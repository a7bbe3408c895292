"""The concepts of `builtin:facts`: values of its latent variables, and where the text tells them.

The list follows from the table of facts alone, by one rule, so no result can choose it. A concept
is on from the token where the text determines it to the end of the sentence: where every sentence
of the table that begins with the characters read so far has this value.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae.builtin import facts
from sae.builtin.document import Document, Span
from sae.builtin.facts import LATENTS, PARTS, Sentence

VARIABLES = LATENTS[:4]
"""relation, subject, answer, template: what holds to the end of a sentence (its parts do not)."""
RELATION, SUBJECT, ANSWER, TEMPLATE = range(len(VARIABLES))
SUBJECT_PART, ANSWER_PART = (
    (LATENTS.index("part"), PARTS.index(name)) for name in ("subject", "answer")
)

ISOLATED = 0.9
"""F1 from which a unit isolates a concept."""

ENOUGH = 6
"""Held-out sentences a concept needs: with fewer, one missed sentence of n, F1 = (n − 1) / (n − ½),
would alone decide whether F1 reaches ISOLATED."""


@dataclass(frozen=True)
class Concept:
    """One value of one latent variable."""

    variable: str
    value: int
    """Index into what `facts.load()` lists of this variable."""
    name: str
    heldout: int
    """Held-out sentences that have it."""

    @property
    def column(self) -> int:
        """Index of the variable among VARIABLES."""
        return VARIABLES.index(self.variable)


@dataclass(frozen=True)
class Labelled:
    """Text whose concepts are known, a document a row, behind the token that begins every row."""

    tokens: Int[Tensor, "rows seq"]
    kept: Bool[Tensor, "rows seq"]
    """Tokens of sentences that the row holds whole."""
    values: Int[Tensor, "rows seq variables"]
    """Of each of VARIABLES the value that is on, −1 where none is yet."""
    asking: Bool[Tensor, "rows seq"]
    """The kept tokens right before an answer: there the model has to have all of them at hand."""
    naming: Bool[Tensor, "rows seq"]
    """The kept tokens of the subjects' names."""


def concepts(at_least: int = ENOUGH) -> tuple[Concept, ...]:
    """Every value of every variable that `at_least` so many held-out sentences have."""
    found, held = [], map(values, facts.sentences(heldout=True))
    counts = [Counter(column) for column in zip(*held, strict=True)]
    for variable, count, names in zip(VARIABLES, counts, _names(), strict=True):
        found += [
            Concept(variable, value, names[value], count[value])
            for value in sorted(count)
            if count[value] >= at_least
        ]
    return tuple(found)


def _names() -> tuple[tuple[str, ...], ...]:
    """Of each of VARIABLES what its values are called."""
    table = facts.load()
    templates = tuple(template.text for template in table.templates)
    return table.relations, table.subjects, table.answers, templates


def values(sentence: Sentence) -> tuple[int, int, int, int]:
    """The value of each of VARIABLES in a sentence."""
    table, fact = facts.load(), sentence.fact
    return (
        table.relations.index(fact.relation),
        table.subjects.index(fact.subject),
        table.answers.index(fact.answer),
        sentence.template.number,
    )


def onsets(texts: Sequence[str], told: Sequence[int]) -> list[int]:
    """Of each text the index of the character that determines what it tells.

    That is the number of characters it shares with the most similar beginning of a text that tells
    something else; in alphabetical order that is the nearest such text on either side.
    """
    order = sorted(range(len(texts)), key=texts.__getitem__)
    found = [0] * len(texts)
    for direction in (order, order[::-1]):
        shared = 0
        for before, here in itertools.pairwise(direction):
            common = _shared(texts[before], texts[here])
            shared = common if told[before] != told[here] else min(shared, common)
            found[here] = max(found[here], shared)
    return found


def _shared(one: str, other: str) -> int:
    """Number of characters with which both begin."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in pairs)


@cache
def _onsets() -> dict[tuple[int, int], tuple[int, ...]]:
    """By template and subject, the character that determines each of VARIABLES."""
    every = facts.sentences(heldout=False) + facts.sentences(heldout=True)
    texts = [sentence.text for sentence in every]
    columns = list(zip(*map(values, every), strict=True))
    where = zip(*(onsets(texts, column) for column in columns), strict=True)
    keys = zip(columns[TEMPLATE], columns[SUBJECT], strict=True)
    return dict(zip(keys, where, strict=True))


def read(
    tokenizer: Any, *, heldout: bool, documents: int | None = None, context: int = 256
) -> Labelled:
    """The first `documents` of one side of the split (default all), each cut at `context` tokens.

    The tokenizer must be a fast one that knows its BOS token.
    """
    side = (document for document in facts.documents() if document.heldout == heldout)
    chosen = list(itertools.islice(side, documents))
    shape = (len(chosen), context)
    tokens = torch.full(shape, tokenizer.bos_token_id)
    kept = torch.zeros(shape, dtype=torch.bool)
    labels = torch.full((*shape, len(VARIABLES)), -1)
    asking, naming = torch.zeros(2, *shape, dtype=torch.bool)
    for row, document in enumerate(chosen):
        encoded = tokenizer(
            document.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        n = min(len(encoded["input_ids"]), context - 1)
        tokens[row, 1 : n + 1] = torch.tensor(encoded["input_ids"][:n])
        last = torch.tensor([end - 1 for _, end in encoded["offset_mapping"]])
        _label(document, last, kept[row, 1:], labels[row, 1:])
        starts = torch.tensor([span.start for span in _parts(document, ANSWER_PART)])
        before = torch.searchsorted(last, starts)
        asking[row, before[before < context]] = True
        for span in _parts(document, SUBJECT_PART):
            naming[row, 1 : n + 1] |= ((last >= span.start) & (last < span.end))[:n]
    return Labelled(tokens, kept, labels, asking & kept, naming & kept)


def _parts(document: Document, part: tuple[int, int]) -> list[Span]:
    """Where a document's sentences have that part, a latent variable and its value."""
    return [span for span in document.spans if (span.latent, span.value) == part]


def _label(
    document: Document,
    last: Int[Tensor, " n"],
    kept: Bool[Tensor, " seq"],
    labels: Int[Tensor, "seq variables"],
) -> None:
    """Fill in a row's labels; `last` is each token's last character, of all of the document."""
    text = document.text
    assert isinstance(text, str)
    spans = [span for span in document.spans if span.latent < len(VARIABLES)]
    for first in range(0, len(spans), len(VARIABLES)):
        by = {span.latent: span.value for span in spans[first : first + len(VARIABLES)]}
        start, end = spans[first].start, spans[first].end
        whole = (last >= start) & (last < end)
        if not whole[: len(kept)].any() or whole[len(kept) :].any():
            continue
        kept[: len(last)] |= whole[: len(kept)]
        start += text[start] == " "
        for column, onset in enumerate(_onsets()[by[TEMPLATE], by[SUBJECT]]):
            told = whole & (last >= start + onset)
            labels[: len(last), column][told[: len(kept)]] = by[column]
