"""Change a few features inside a model and see which facts it still tells.

x is replaced by x + Σ_i (value_i − acts_i) · W_dec[i] over the changed features alone: what the SAE
does not explain stays, and so does everything where those features have their value already.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sae import hooks
from sae.autoencoder import SparseAutoencoder
from sae.builtin import facts
from sae.hooks import Activation, Hookpoint

Autoencoders = Mapping[Hookpoint, SparseAutoencoder]
Features = Mapping[Hookpoint, Int[Tensor, " m"]]
"""A few features at each hookpoint."""
Changes = Mapping[Hookpoint, Callable[[Activation], Activation]]


@dataclass(frozen=True)
class Questions:
    """Sentences of one relation up to their answers, padded on the right."""

    tokens: Int[Tensor, "n seq"]
    last: Int[Tensor, " n"]
    """Position of each one's last token, whose logits answer."""
    subject: Int[Tensor, " n"]
    """Index into `subjects`."""
    template: Int[Tensor, " n"]
    """Index among the relation's templates that are read."""
    right: Int[Tensor, " n"]
    """Index into `answers`."""
    heldout: Bool[Tensor, " n"]
    """Whether the language model never read this fact in this template."""
    answer_tokens: Int[Tensor, " answers"]
    """First token of each answer."""
    subjects: tuple[str, ...]
    answers: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, chosen: Tensor) -> "Questions":
        columns = ("tokens", "last", "subject", "template", "right", "heldout")
        return replace(self, **{name: getattr(self, name)[chosen] for name in columns})


def questions(tokenizer: Any, relation: str) -> Questions:
    """Every fact of a relation in every template that is read, by subject, then template.

    The relation's answers must differ in their first token.
    """
    every = facts.sentences(heldout=False) + facts.sentences(heldout=True)
    asked = [sentence for sentence in every if sentence.fact.relation == relation]
    subjects = sorted({sentence.fact.subject for sentence in asked})
    answers = facts.load().answers_of(relation)
    first = min(sentence.template.number for sentence in asked)
    asked.sort(key=lambda sentence: (sentence.fact.subject, sentence.template.number))

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rows = [[tokenizer.bos_token_id, *ids(sentence.prompt)] for sentence in asked]
    tokens = torch.full((len(rows), max(map(len, rows))), tokenizer.bos_token_id)
    for row, own in enumerate(rows):
        tokens[row, : len(own)] = torch.tensor(own)
    answer_tokens = torch.tensor([ids(f" {answer}")[0] for answer in answers])
    assert len(set(answer_tokens.tolist())) == len(answers), "answers begin with the same token"
    return Questions(
        tokens,
        torch.tensor([len(row) - 1 for row in rows]),
        torch.tensor([subjects.index(sentence.fact.subject) for sentence in asked]),
        torch.tensor([sentence.template.number - first for sentence in asked]),
        torch.tensor([answers.index(sentence.fact.answer) for sentence in asked]),
        torch.tensor([sentence.heldout for sentence in asked]),
        answer_tokens,
        tuple(subjects),
        tuple(answers),
    )


@contextmanager
def changed(model: PreTrainedModel, changes: Changes) -> Iterator[None]:
    """Forward passes inside the block go on with each activation as its change makes it."""
    with ExitStack() as stack:
        for hookpoint, change in changes.items():
            stack.enter_context(hooks.replace(model, hookpoint, change))
        yield


def set_to(
    sae: SparseAutoencoder,
    features: Int[Tensor, " m"],
    value: Float[Tensor, " m"] | float = 0.0,
    directions: Float[Tensor, "m d_out"] | None = None,
) -> Callable[[Activation], Activation]:
    """x → x + Σ_i (value_i − acts_i) · W_dec[i] over `features`, at every token; 0 removes them.

    `directions` in place of W_dec[i] make a control that changes x as much, but elsewhere.
    """
    W = sae.W_dec[features] if directions is None else directions

    @torch.no_grad()
    def change(x: Activation) -> Activation:
        return x + (value - sae.encode(x)[..., features]) @ W

    return change


def remove(saes: Autoencoders, features: Features) -> Changes:
    """Take these features out at every token."""
    return {point: set_to(saes[point], own) for point, own in features.items() if len(own)}


def remove_random(saes: Autoencoders, features: Features, generator: torch.Generator) -> Changes:
    """The same activations taken out along random directions of the same norms."""
    changes = {}
    for point, own in features.items():
        drawn = random_directions(saes[point].W_dec[own].detach(), generator)
        changes[point] = set_to(saes[point], own, directions=drawn)
    return changes


def random_directions(
    rows: Float[Tensor, "m d"], generator: torch.Generator
) -> Float[Tensor, "m d"]:
    """As many at random, with the norms of `rows`."""
    drawn = torch.randn(rows.shape, generator=generator)
    return drawn * (rows.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True))


@torch.no_grad()
def answer(
    model: PreTrainedModel, asked: Questions, changes: Changes | None = None
) -> Float[Tensor, "n answers"]:
    """Probability of each answer's first token, among all tokens."""
    with changed(model, changes or {}):
        logits = model(asked.tokens).logits
    found = logits[torch.arange(len(asked)), asked.last].softmax(-1)
    return found[:, asked.answer_tokens]


def correct(probability: Float[Tensor, "n answers"], asked: Questions) -> Float[Tensor, " n"]:
    """1 where the right answer is the likeliest of the relation's answers, otherwise 0."""
    return (probability.argmax(1) == asked.right).double()


def attribution(
    model: PreTrainedModel, saes: Autoencoders, asked: Questions
) -> dict[Hookpoint, Float[Tensor, "n d_sae"]]:
    """To first order, how much each feature adds to the log-probability of the right answer.

    acts_i · (W_dec[i] · ∂ log p / ∂x), summed over the tokens. Marks et al. 2024, arXiv:2403.19647.
    """
    kept: dict[Hookpoint, Tensor] = {}

    def keep(point: Hookpoint) -> Callable[[Activation], Activation]:
        def change(x: Activation) -> Activation:
            kept[point] = x if x.requires_grad else x.detach().requires_grad_()
            return kept[point]

        return change

    with torch.enable_grad(), changed(model, {point: keep(point) for point in saes}):
        logits = model(asked.tokens).logits
        log_p = logits[torch.arange(len(asked)), asked.last].log_softmax(-1)
        right = log_p.gather(1, asked.answer_tokens[asked.right][:, None]).sum()
        gradients = torch.autograd.grad(right, [kept[point] for point in saes])
    inside = (torch.arange(asked.tokens.shape[1]) <= asked.last[:, None])[..., None]
    with torch.no_grad():
        return {
            point: (sae.encode(kept[point]) * (gradient @ sae.W_dec.T) * inside).sum(1)
            for (point, sae), gradient in zip(saes.items(), gradients, strict=True)
        }


def by_subject(values: Float[Tensor, "n d"], asked: Questions) -> Float[Tensor, "subjects d"]:
    """Means over the questions about each subject."""
    shape = (len(asked.subjects), *values.shape[1:])
    sums = torch.zeros(shape, dtype=values.dtype).index_add_(0, asked.subject, values)
    counts = torch.bincount(asked.subject, minlength=len(sums)).clamp_min(1)
    return sums / counts.reshape(-1, *[1] * (values.ndim - 1))


def own_features(
    attributed: Mapping[Hookpoint, Float[Tensor, "subjects d_sae"]],
    subject: int,
    n: int,
    strictness: float = 1.0,
) -> dict[Hookpoint, Int[Tensor, " n"]]:
    """At each hookpoint at most `n` features that carry one subject's answer and few others'.

    Largest first by attribution for the subject, less `strictness` times what they carry for all
    other subjects together; those that are not above 0 are left out. So at 1 a feature has to do
    more for the subject than for all others.
    """
    found = {}
    for point, values in attributed.items():
        others = values.abs().sum(0) - values[subject].abs()
        score, feature = (values[subject] - strictness * others).topk(n)
        found[point] = feature[score > 0]
    return found
