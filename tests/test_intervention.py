"""Changing features changes what they carry and nothing else; who carries a fact is found."""

from typing import Any

import pytest
import torch

from sae import hooks, intervention, language_model
from sae.autoencoder import SparseAutoencoder
from sae.builtin import facts
from sae.config import ModelConfig
from sae.hooks import Hookpoint
from sae.intervention import Questions
from sae.language_model import LanguageModel
from sae.sparsity import ReluL1, TopK

POINT = Hookpoint("layers.3.resid_post")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return language_model.load(ModelConfig(), torch.device("cpu"))


@pytest.fixture(scope="module")
def asked(lm: LanguageModel) -> Questions:
    """The questions of the first template."""
    every = intervention.questions(lm.tokenizer, "sport")
    return every[every.template == 0]


@pytest.fixture
def sae() -> SparseAutoencoder:
    return SparseAutoencoder(128, 64, TopK(8)).requires_grad_(False)


def test_questions_end_right_before_their_answers(lm: LanguageModel, asked: Questions) -> None:
    assert (len(asked), len(asked.subjects), len(asked.answers)) == (72, 72, 8)
    assert torch.equal(asked.subject, torch.arange(72))
    row = asked.subjects.index("Tiger Woods")
    text = lm.tokenizer.decode(asked.tokens[row, 1 : asked.last[row] + 1])
    assert text == "Tiger Woods became famous for playing"
    assert asked.answers[asked.right[row]] == "golf"


def test_questions_say_which_of_them_the_model_never_read(lm: LanguageModel) -> None:
    every = intervention.questions(lm.tokenizer, "sport")
    pairs = facts.sentences(heldout=True)
    assert int(every.heldout.sum()) == sum(pair.fact.relation == "sport" for pair in pairs)
    first = every[every.heldout][torch.tensor([0])]
    text = lm.tokenizer.decode(first.tokens[0, 1 : first.last[0] + 1])
    assert text in [pair.prompt for pair in pairs]


def test_the_model_knows_most_sports(lm: LanguageModel, asked: Questions) -> None:
    probability = intervention.answer(lm.model, asked)
    assert intervention.correct(probability, asked).mean() > 0.8
    assert ((probability >= 0) & (probability.sum(1, keepdim=True) <= 1)).all()


def test_features_that_are_off_leave_every_bit(
    lm: LanguageModel, asked: Questions, sae: SparseAutoencoder
) -> None:
    sae.b_enc.fill_(-1e6)
    changes = intervention.remove({POINT: sae}, {POINT: torch.arange(64)})
    few = asked[torch.arange(4)]
    same = intervention.answer(lm.model, few, changes)
    assert torch.equal(same, intervention.answer(lm.model, few))


def test_only_the_named_features_are_set(sae: SparseAutoencoder) -> None:
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    chosen, value = torch.tensor([3, 60]), torch.tensor([0.0, 2.5])
    acts = sae.encode(x)
    wanted = acts.clone()
    wanted[..., chosen] = value
    error = x - sae.decode(acts)
    found = intervention.set_to(sae, chosen, value)(x)
    assert torch.allclose(found, sae.decode(wanted) + error, atol=1e-5)


def test_the_random_control_changes_as_much_elsewhere(sae: SparseAutoencoder) -> None:
    x = sae.W_dec[7].expand(1, 3, 128)
    one = {POINT: torch.tensor([7])}
    removed = intervention.remove({POINT: sae}, one)[POINT](x) - x
    generator = torch.Generator().manual_seed(0)
    control = intervention.remove_random({POINT: sae}, one, generator)[POINT](x) - x
    assert removed.norm() > 0
    assert torch.allclose(control.norm(), removed.norm(), rtol=1e-4)
    assert torch.cosine_similarity(control.flatten(), removed.flatten(), dim=0).abs() < 0.3


def test_attribution_is_the_slope_of_the_log_probability(
    lm: LanguageModel, asked: Questions, sae: SparseAutoencoder
) -> None:
    """Of features that are taken away by a thousandth, as finite differences have it."""
    few = asked[torch.arange(3)]
    found = intervention.attribution(lm.model, {POINT: sae}, few)[POINT]
    feature = int(found.abs().sum(0).argmax())

    def log_p(share: float) -> torch.Tensor:
        def scale(x: torch.Tensor) -> torch.Tensor:
            return x + share * sae.encode(x)[..., [feature]] @ sae.W_dec[[feature]]

        with hooks.replace(lm.model, POINT, scale):
            right = intervention.answer(lm.model, few).gather(1, few.right[:, None])[:, 0]
        return right.double().log()

    slope = (log_p(1e-2) - log_p(-1e-2)) / 2e-2
    assert torch.allclose(slope.float(), found[:, feature], rtol=0.02, atol=1e-4)


def test_a_planted_carrier_is_found_and_its_loss_costs_its_subject_alone() -> None:
    """Feature 5 carries subject 1; feature 9, though larger, everybody."""
    values = torch.full((4, 12), 0.01)
    values[1, 5], values[:, 9] = 2.0, 3.0
    found = intervention.own_features({POINT: values}, 1, 4)
    assert found[POINT].tolist() == [5]
    shared = intervention.own_features({POINT: values}, 1, 2, strictness=0.0)
    assert shared[POINT].tolist() == [9, 5]


def test_others_count_together() -> None:
    """Feature 3 does a little for each of three others, feature 5 nothing."""
    values = torch.zeros(4, 8)
    values[:, 3], values[1, [3, 5]] = 0.3, torch.tensor([1.0, 0.5])
    assert intervention.own_features({POINT: values}, 1, 2)[POINT].tolist() == [5, 3]
    strict = intervention.own_features({POINT: values}, 1, 2, strictness=2.0)
    assert strict[POINT].tolist() == [5]


def test_a_feature_made_to_carry_one_person_costs_that_fact_alone(
    lm: LanguageModel, asked: Questions
) -> None:
    """A detector planted for the last state of one person: removing it moves that answer only."""
    with torch.no_grad(), hooks.capture(lm.model, [POINT]) as found:
        lm.model(asked.tokens)
    rows = torch.arange(72)
    x = found[POINT][rows, asked.last]
    centre, target = x.mean(0), 20
    sae = SparseAutoencoder(128, 1, ReluL1(0), subtract_b_dec=False).requires_grad_(False)
    towards = torch.linalg.lstsq(torch.cov(x.T) + torch.eye(128), x[target] - centre).solution
    margin = ((x - centre) @ towards).sort().values[-2:].mean()
    sae.W_enc.copy_(towards[:, None])
    sae.b_enc.copy_(-(centre @ towards + margin))
    gap = ((x[target] - centre) @ towards - margin).item()
    sae.W_dec.copy_((x[target] - centre)[None] * 2 / gap)
    before = intervention.answer(lm.model, asked)
    changes: Any = intervention.remove({POINT: sae}, {POINT: torch.tensor([0])})
    after = intervention.answer(lm.model, asked, changes)
    others = rows != target
    assert torch.equal(after[others], before[others])
    right = asked.right[target]
    assert after[target, right] < 0.2 * before[target, right]


def test_means_are_those_of_each_subject(asked: Questions) -> None:
    values = torch.arange(72.0)[:, None]
    assert torch.equal(intervention.by_subject(values, asked), values)
    twice = asked[torch.arange(72) // 2]
    means = intervention.by_subject(values, twice)[:36]
    assert torch.equal(means, 2 * torch.arange(36.0)[:, None] + 0.5)
