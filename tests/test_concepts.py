"""The concepts are what the table of facts has, and on exactly where the text tells them."""

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from sae import builtin, concepts
from sae.builtin import facts
from sae.concepts import ANSWER, RELATION, SUBJECT, TEMPLATE, VARIABLES


@pytest.fixture(scope="module")
def bpe() -> Any:
    return AutoTokenizer.from_pretrained(builtin.model_path())


@pytest.fixture(scope="module")
def labelled(bpe: Any) -> concepts.Labelled:
    return concepts.read(bpe, heldout=True, documents=8)


def test_the_list_is_fixed_by_the_table() -> None:
    found = concepts.concepts()
    per_variable = [sum(c.variable == variable for c in found) for variable in VARIABLES]
    assert per_variable == [9, 26, 39, 92]
    assert len(concepts.concepts(at_least=1)) == 789
    names = {concept.name for concept in found}
    assert {"sport", "soccer", "Europe", "The capital of {subject} is {answer}."} <= names


def test_one_missed_sentence_does_not_decide() -> None:
    def f1(n: int) -> float:
        return (n - 1) / (n - 0.5)

    assert f1(concepts.ENOUGH) >= concepts.ISOLATED > f1(concepts.ENOUGH - 1)


def test_onsets_are_those_of_the_definition() -> None:
    texts = ["Niger is big.", "Nigeria is big.", "Nigeria is wide.", "It is big.", "It is wide."]
    told = [1, 2, 2, 3, 3]
    expected = []
    for text, value in zip(texts, told, strict=True):
        for end in range(1, len(text) + 1):
            like = {v for t, v in zip(texts, told, strict=True) if t.startswith(text[:end])}
            if like == {value}:
                expected.append(end - 1)
                break
    assert concepts.onsets(texts, told) == expected == [5, 5, 5, 0, 0]


def test_nothing_else_can_follow_where_a_value_is_on(bpe: Any) -> None:
    """The beginning of a sentence tells a value at its onset, and not a character before."""
    every = facts.sentences(heldout=False) + facts.sentences(heldout=True)
    columns = list(zip(*map(concepts.values, every), strict=True))
    texts = [sentence.text for sentence in every]
    for column in columns[SUBJECT], columns[TEMPLATE]:
        found = concepts.onsets(texts, column)
        for index in range(0, len(every), 997):
            for end, alone in ((found[index], False), (found[index] + 1, True)):
                begin = texts[index][:end]
                told = {v for t, v in zip(texts, column, strict=True) if t.startswith(begin)}
                assert (told == {column[index]}) == alone


def test_labels_of_a_sentence(bpe: Any, labelled: concepts.Labelled) -> None:
    """The template is known before the name, the name from its deciding piece to the full stop."""
    table = facts.load()
    tokens, on = labelled.tokens[3, 1:], labelled.values[3, 1:]
    n = tokens.tolist().index(bpe(".")["input_ids"][-1]) + 1
    text = bpe.decode(tokens[:n])
    (sentence,) = [s for s in facts.sentences(heldout=True) if s.text == text]
    value = concepts.values(sentence)
    for column in (RELATION, SUBJECT, ANSWER, TEMPLATE):
        seen = on[:n, column].tolist()
        off = seen.count(-1)
        assert seen == [-1] * off + [value[column]] * (n - off)
        assert 0 < off < n
    name = bpe.decode(tokens[:n][on[:n, SUBJECT] >= 0])
    assert table.subjects[value[SUBJECT]].endswith(name.split(" is ")[0])


def test_every_token_of_a_whole_sentence_is_kept(labelled: concepts.Labelled) -> None:
    assert not labelled.kept[:, 0].any()
    assert labelled.kept.float().mean() > 0.8
    assert (labelled.values[~labelled.kept] == -1).all()


def test_the_model_is_asked_right_before_each_answer(bpe: Any, labelled: concepts.Labelled) -> None:
    table, asked = facts.load(), labelled.asking.nonzero().tolist()
    assert len(asked) > 80
    for row, position in asked:
        answer = table.answers[int(labelled.values[row, position, ANSWER])]
        text = bpe.decode(labelled.tokens[row, position + 1 :])
        assert text.startswith(f" {answer}")
        assert (labelled.values[row, position] >= 0).all()


def test_a_short_context_cuts_sentences_out_whole(bpe: Any, labelled: concepts.Labelled) -> None:
    short = concepts.read(bpe, heldout=True, documents=8, context=40)
    assert torch.equal(short.tokens, labelled.tokens[:, :40])
    full_stop = bpe(".")["input_ids"][-1]
    for row in range(8):
        kept = short.tokens[row][short.kept[row]]
        assert kept[-1] == full_stop
        assert torch.equal(kept, labelled.tokens[row][labelled.kept[row]][: len(kept)])


def test_names_are_the_tokens_of_the_subjects(bpe: Any, labelled: concepts.Labelled) -> None:
    table, found = facts.load(), 0
    for row in range(len(labelled.tokens)):
        on = labelled.naming[row].nonzero()[:, 0]
        told = labelled.values[row, :, SUBJECT]
        for run in torch.tensor_split(on, (on.diff() > 1).nonzero()[:, 0] + 1):
            name = bpe.decode(labelled.tokens[row, run]).strip()
            assert name in table.subjects
            assert told[run[-1] + 1] == table.subjects.index(name)
            found += 1
    assert found == int(labelled.asking.sum())
