"""What removing or setting single features does to the sports the model knows; for study_facts.py.

Features are chosen on sentences that the language model has read, and judged on pairs of person and
template that it has not; only facts that it knows unchanged are asked.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sae import hooks, intervention
from sae.hooks import Hookpoint
from sae.intervention import Autoencoders, Changes, Questions
from sae.language_model import LanguageModel

FEATURES_A_LAYER = 4
STRICTNESS = (0.07, 0.2)
"""What a feature carries for all other persons together counts so much against it."""
A_LAYER = (1, FEATURES_A_LAYER)
"""Features of a sport that are set at each hookpoint."""
GAINS = (1.0, 2.0, 4.0)
"""Multiples of its usual activation that a feature is set to."""

Attributed = Mapping[Hookpoint, Tensor]


def sides(lm: LanguageModel) -> tuple[Questions, Questions]:
    """The known facts in sentences that were read, and in those that were not."""
    asked = intervention.questions(lm.tokenizer, "sport")
    known = intervention.correct(intervention.answer(lm.model, asked), asked) > 0
    return asked[known & ~asked.heldout], asked[known & asked.heldout]


def lost(lm: LanguageModel, asked: Questions, changes: Changes) -> tuple[Tensor, Tensor]:
    """[n] 1 for answers that are no longer right, and [n] the probabilities of the right ones."""
    probability = intervention.answer(lm.model, asked, changes)
    right = probability.gather(1, asked.right[:, None])[:, 0]
    return 1 - intervention.correct(probability, asked), right.double()


def attribution(lm: LanguageModel, saes: Autoencoders, asked: Questions) -> Attributed:
    """By person, what each feature adds to the log-probability of the right answer."""
    found = intervention.attribution(lm.model, saes, asked)
    return {point: intervention.by_subject(values, asked) for point, values in found.items()}


def study_removal(lm: LanguageModel, saes: Autoencoders, strictness: float) -> dict[str, Any]:
    """Of each person what is lost without 1 to FEATURES_A_LAYER of their features at a hookpoint.

    `own`, `others` and `same` (others with the same sport) are shares of the known facts, `random`
    is `own` with random directions, `probability` what the right answers lose.
    """
    read, asked = sides(lm)
    attributed = attribution(lm, saes, read)
    generator = torch.Generator().manual_seed(0)
    before = lost(lm, asked, {})[1]
    persons = []
    for person in asked.subject.unique().tolist():
        own = asked.subject == person
        same = ~own & (asked.right == asked.right[own][0])
        row: dict[str, Any] = {"person": asked.subjects[person]}
        for n in range(1, FEATURES_A_LAYER + 1):
            features = intervention.own_features(attributed, person, n, strictness)
            gone, right = lost(lm, asked, intervention.remove(saes, features))
            aside = intervention.remove_random(saes, features, generator)
            step = {
                "features": sum(map(len, features.values())),
                "own": gone[own].mean().item(),
                "probability": (before - right)[own].mean().item(),
                "random": lost(lm, asked[own], aside)[0].mean().item(),
                "others": gone[~own].mean().item(),
                "same": gone[same].mean().item() if same.any() else 0.0,
            }
            for key, value in step.items():
                row.setdefault(key, []).append(value)
        persons.append(row)
    return {"questions": len(asked), "persons": persons}


def study_setting(lm: LanguageModel, saes: Autoencoders) -> list[dict[str, Any]]:
    """How often the answer becomes the sport whose features are set, for each sport.

    A sport's features are those with the largest attribution for its questions, less what they
    carry for other sports; each is set, at every token, to a multiple of its mean where it is on.
    """
    read, asked = sides(lm)
    sports = range(len(asked.answers))
    by_sport = {
        point: torch.stack([values[read.right == sport].mean(0) for sport in sports])
        for point, values in intervention.attribution(lm.model, saes, read).items()
    }
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"features": n, "gain": gain, "moved": [], "random": []} for n in A_LAYER for gain in GAINS
    ]
    for sport in sports:
        usual = usual_values(lm, saes, read[read.right == sport])
        others = asked[asked.right != sport]
        for row in rows:
            own = intervention.own_features(by_sport, sport, row["features"])
            changes, aside = {}, {}
            for point, features in own.items():
                value = row["gain"] * usual[point][features]
                sae = saes[point]
                drawn = intervention.random_directions(sae.W_dec[features], generator)
                changes[point] = intervention.set_to(sae, features, value)
                aside[point] = intervention.set_to(sae, features, value, drawn)
            for name, change in (("moved", changes), ("random", aside)):
                said = intervention.answer(lm.model, others, change).argmax(1)
                row[name].append((said == sport).double().mean().item())
    return rows


@torch.no_grad()
def usual_values(lm: LanguageModel, saes: Autoencoders, asked: Questions) -> Attributed:
    """[d_sae] each feature's mean over the tokens of these questions where it is on."""
    with hooks.capture(lm.model, list(saes)) as acts:
        lm.model(asked.tokens)
    inside = torch.arange(asked.tokens.shape[1]) <= asked.last[:, None]
    found = {}
    for point, sae in saes.items():
        own = sae.encode(acts[point][inside])
        found[point] = own.sum(0) / (own > 0).sum(0).clamp_min(1)
    return found
