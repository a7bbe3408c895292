"""`builtin:facts`: sentences written from templates and a table of true facts.

Every latent variable of every sentence is known at every character: what relation it states, about
whom, with which answer, in which template, and which part of the sentence the character is in. So
features can be scored against a ground truth.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import yaml

from sae.builtin.document import Document, Span, hash_unit

LATENTS = ("relation", "subject", "answer", "template", "part")
PARTS = ("before", "subject", "between", "answer", "after")

HELDOUT_PAIRS = 0.15
"""Share of the fact × template pairs never trained on; each fact and each template is seen
elsewhere."""

PASSES = 3
"""How often the text goes through all pairs, each time in another order."""

SENTENCES_PER_DOCUMENT = 12


@dataclass(frozen=True)
class Fact:
    """`subject` stands in `relation` to `answer`."""

    relation: str
    subject: str
    answer: str


@dataclass(frozen=True)
class Template:
    """A sentence with {subject} and, behind it, {answer}."""

    relation: str
    text: str
    number: int
    unseen: bool


@dataclass(frozen=True)
class Table:
    """All relations, facts, answers and templates; a latent's value is an index into these."""

    relations: tuple[str, ...]
    facts: tuple[Fact, ...]
    templates: tuple[Template, ...]
    subjects: tuple[str, ...]
    answers: tuple[str, ...]

    def answers_of(self, relation: str) -> list[str]:
        """The distinct answers of one relation, in alphabetical order."""
        return sorted({fact.answer for fact in self.facts if fact.relation == relation})


@dataclass(frozen=True)
class Sentence:
    """One fact in one template."""

    fact: Fact
    template: Template

    @property
    def prompt(self) -> str:
        """The sentence up to its answer, without the space before it."""
        before = self.template.text.partition("{answer}")[0]
        return before.replace("{subject}", self.fact.subject).rstrip()

    @property
    def text(self) -> str:
        """The whole sentence."""
        return self.template.text.format(subject=self.fact.subject, answer=self.fact.answer)

    @property
    def completion(self) -> str:
        """The space, the answer, and the mark or word that ends it."""
        behind = self.template.text.partition("{answer}")[2]
        end = behind[:1] if behind[:1] != " " else " " + behind.split()[0].rstrip(".,;")
        return f" {self.fact.answer}{end}"

    @property
    def heldout(self) -> bool:
        """Whether this fact and this template are never trained on together."""
        key = f"{self.fact.relation}/{self.fact.subject}/{self.template.text}"
        return hash_unit(key) < HELDOUT_PAIRS

    def spans(self, start: int) -> Iterator[Span]:
        """The latent variables of a sentence that begins at character `start`.

        They hold from the space in front of it on, which may be a token of its own.
        """
        table = load()
        first, end = max(start - 1, 0), start + len(self.text)
        values = (
            table.relations.index(self.fact.relation),
            table.subjects.index(self.fact.subject),
            table.answers.index(self.fact.answer),
            self.template.number,
        )
        for latent, value in enumerate(values):
            yield Span(first, end, latent, value)
        subject = start + self.template.text.index("{subject}")
        behind = subject + len(self.fact.subject)
        answer = start + len(self.prompt)
        edges = (first, subject, behind, answer, answer + 1 + len(self.fact.answer), end)
        for part, (left, right) in enumerate(pairwise(edges)):
            if left < right:
                yield Span(left, right, LATENTS.index("part"), part)


@cache
def load() -> Table:
    """The table of facts that comes with the package."""
    raw = yaml.safe_load(Path(__file__).with_name("facts.yaml").read_text(encoding="utf-8"))
    facts, templates = [], []
    for relation, entry in raw["relations"].items():
        for subject, answer in entry["facts"].items():
            facts.append(Fact(relation, subject, answer))
        for text, unseen in [(t, False) for t in entry["templates"]] + [
            (t, True) for t in entry["unseen_templates"]
        ]:
            templates.append(Template(relation, text, len(templates), unseen))
    subjects = tuple(sorted({fact.subject for fact in facts}))
    answers = tuple(sorted({fact.answer for fact in facts}))
    return Table(tuple(raw["relations"]), tuple(facts), tuple(templates), subjects, answers)


def sentences(*, heldout: bool) -> list[Sentence]:
    """All sentences of one side of the split, without the templates that are never read."""
    table = load()
    pairs = (
        Sentence(fact, template)
        for fact in table.facts
        for template in table.templates
        if template.relation == fact.relation and not template.unseen
    )
    return [pair for pair in pairs if pair.heldout == heldout]


def unseen_template_sentences() -> list[Sentence]:
    """All facts in the templates that no training text contains."""
    table = load()
    return [
        Sentence(fact, template)
        for fact in table.facts
        for template in table.templates
        if template.relation == fact.relation and template.unseen
    ]


def documents() -> Iterator[Document]:
    """Documents of a dozen sentences about mixed subjects; the training side in PASSES orders."""
    for heldout, passes in ((False, PASSES), (True, 1)):
        pool = sentences(heldout=heldout)
        for index in range(passes):
            order = random.Random(f"facts {heldout} {index}").sample(pool, len(pool))
            for start in range(0, len(order), SENTENCES_PER_DOCUMENT):
                key = f"facts/{'heldout' if heldout else 'train'}/{index}/{start}"
                yield _document(key, order[start : start + SENTENCES_PER_DOCUMENT], heldout)


def _document(key: str, members: list[Sentence], heldout: bool) -> Document:
    text, spans = "", []
    for sentence in members:
        text += " " if text else ""
        spans.extend(sentence.spans(len(text)))
        text += sentence.text
    return Document(key, text, tuple(spans), heldout)
