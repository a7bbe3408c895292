"""Resampling moves dead features, and nothing else, to tokens drawn in proportion to their squared
loss, and Adam forgets what it knew about the moved ones."""

from collections import Counter

import torch
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.revival import ENCODER_SHARE, resample
from sae.sparsity import Gated, ReluL1

D, D_SAE, N = 6, 10, 40
DEAD = torch.tensor([i in (2, 5, 9) for i in range(D_SAE)])


def trained(d_out: int = D) -> tuple[SparseAutoencoder, torch.optim.Adam, Tensor, Tensor]:
    """An autoencoder after three Adam steps, and a batch."""
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(D, D_SAE, ReluL1(1.0), d_out=d_out, subtract_b_dec=d_out == D)
    sae.initialise(torch.zeros(d_out), generator)
    x = torch.randn(N, D, generator=generator)
    y = x if d_out == D else torch.randn(N, d_out, generator=generator)
    adam = torch.optim.Adam(sae.parameters(), lr=0.1)
    for _ in range(3):
        adam.zero_grad()
        (sae(x).recon - y).square().sum().backward()
        adam.step()
    return sae, adam, x, y


def revive(seed: int = 0, dead: Tensor = DEAD, d_out: int = D):
    """The autoencoder, its Adam, the residuals before, and which features were moved."""
    sae, adam, x, y = trained(d_out)
    with torch.no_grad():
        residual = y - sae(x).recon
    moved = resample(sae, adam, x, y, dead, torch.Generator().manual_seed(seed))
    return sae, adam, x, residual, moved


def moments(sae: SparseAutoencoder, adam: torch.optim.Adam) -> list[tuple[Tensor, Tensor]]:
    """Parameters and each of their moments, the feature axis first (b_dec left out)."""
    pairs = ((sae.W_enc, 1), (sae.W_dec, 0), (sae.b_enc, 0))
    names = ("exp_avg", "exp_avg_sq")
    return [(p, adam.state[p][name].movedim(axis, 0)) for p, axis in pairs for name in names]


def test_dead_features_point_at_residuals() -> None:
    before, _, _, _ = trained()
    sae, _, _, residual, moved = revive()
    assert torch.equal(moved, DEAD)
    directions = torch.nn.functional.normalize(residual, dim=1)
    cosines = torch.nn.functional.normalize(sae.W_dec[DEAD], dim=1) @ directions.T
    assert (cosines.max(1).values > 1 - 1e-5).all()
    assert len(cosines.argmax(1).unique()) == 3  # without replacement
    norm = before.decoder_norms[~DEAD].mean()
    torch.testing.assert_close(sae.decoder_norms[DEAD], norm.expand(3))
    encoder = before.W_enc[:, ~DEAD].norm(dim=0).mean() * ENCODER_SHARE
    torch.testing.assert_close(sae.W_enc[:, DEAD].T, sae.W_dec[DEAD] / norm * encoder)
    assert (sae.b_enc[DEAD] == 0).all()


def test_living_features_stay_as_they_are() -> None:
    before, old, _, _ = trained()
    sae, adam, *_ = revive()
    assert torch.equal(sae.b_dec, before.b_dec)
    assert torch.equal(sae.W_enc[:, ~DEAD], before.W_enc[:, ~DEAD])
    assert torch.equal(sae.W_dec[~DEAD], before.W_dec[~DEAD])
    assert torch.equal(sae.b_enc[~DEAD], before.b_enc[~DEAD])
    for (_, now), (_, then) in zip(moments(sae, adam), moments(before, old), strict=True):
        assert torch.equal(now[~DEAD], then[~DEAD])
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(adam.state[sae.b_dec][name], old.state[before.b_dec][name])


def test_adam_forgets_the_moved_features() -> None:
    before, old, _, _ = trained()
    assert all(then[DEAD].any() for _, then in moments(before, old))
    sae, adam, *_ = revive()
    assert all((now[DEAD] == 0).all() for _, now in moments(sae, adam))


def test_the_generator_decides() -> None:
    first, again, other = (revive(seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first.W_dec, again.W_dec) and torch.equal(first.W_enc, again.W_enc)
    assert not torch.equal(first.W_dec, other.W_dec)


def test_other_outputs_than_inputs() -> None:
    """The decoder takes the direction of the target's residual, the encoder that of the input."""
    sae, _, x, residual, _ = revive(d_out=4)
    for rows, all_of_them in ((sae.W_dec[DEAD], residual), (sae.W_enc[:, DEAD].T, x)):
        cosines = torch.cosine_similarity(rows[:, None], all_of_them[None], dim=2)
        assert (cosines.max(1).values > 1 - 1e-5).all()


def test_nothing_to_do() -> None:
    before, _, _, _ = trained()
    sae, _, _, _, moved = revive(dead=torch.zeros(D_SAE, dtype=torch.bool))
    assert not moved.any()
    assert torch.equal(sae.W_dec, before.W_dec)


def test_all_features_dead() -> None:
    """Then their own norms are the measure, as no living one is left."""
    before, _, _, _ = trained()
    sae, _, _, _, moved = revive(dead=torch.ones(D_SAE, dtype=torch.bool))
    assert moved.all()
    norm = before.decoder_norms.mean()
    torch.testing.assert_close(sae.decoder_norms, norm.expand(D_SAE))


def test_no_more_features_than_tokens_with_a_loss() -> None:
    sae, adam, x, _ = trained()
    with torch.no_grad():
        y = sae(x).recon.clone()
    y[3] += 1
    direction = torch.nn.functional.normalize(torch.ones(D), dim=0)
    moved = resample(sae, adam, x, y, DEAD, torch.Generator().manual_seed(0))
    assert moved.nonzero().tolist() == [[2]]
    torch.testing.assert_close(torch.nn.functional.normalize(sae.W_dec[2], dim=0), direction)


def test_tokens_are_drawn_in_proportion_to_their_squared_loss() -> None:
    """Four tokens with losses 1, 2, 3, 4, each along an axis of its own: 1 : 4 : 9 : 16."""
    sae = SparseAutoencoder(4, 3, ReluL1(1.0))
    adam = torch.optim.Adam(sae.parameters())
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        sae.W_dec.fill_(1)
    x = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]).sqrt())
    dead, generator = torch.tensor([True, False, False]), torch.Generator().manual_seed(0)
    drawn = Counter[int]()
    draws = 3000
    for _ in range(draws):
        resample(sae, adam, x, x, dead, generator)
        drawn[int(sae.W_dec[0].argmax())] += 1
        with torch.no_grad():
            sae.W_enc.zero_()  # so that the next draw sees the same losses
    for token, weight in enumerate((1, 4, 9, 16)):
        share = weight / 30
        deviation = (share * (1 - share) / draws) ** 0.5
        assert abs(drawn[token] / draws - share) < 4 * deviation


@torch.no_grad()
def test_what_the_sparsity_holds_of_a_feature_begins_anew():
    sae, drawn = SparseAutoencoder(4, 3, Gated(1.0)), torch.Generator().manual_seed(0)
    for parameter in sae.sparsity.parameters():
        parameter.fill_(2.0)
    adam, x = torch.optim.Adam(sae.parameters()), torch.randn(8, 4, generator=drawn)
    for parameter in sae.parameters():
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    before = [parameter.clone() for parameter in sae.sparsity.parameters()]
    moved = resample(sae, adam, x, x, torch.tensor([False, True, False]), drawn)
    assert moved.tolist() == [False, True, False]
    for parameter, old in zip(sae.sparsity.parameters(), before, strict=True):
        assert parameter.tolist() == [old[0], 0, old[2]]
        assert adam.state[parameter]["exp_avg"][1] == 0 != adam.state[parameter]["exp_avg"][0]
