"""What fine-tuning pulls at: the gradient of the divergence is that of the model run on with the
reconstruction in place, the model stays as it is, and its predictions come back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import byte_tokenizer, tiny_model
from tiny import BATCH, MAPS, along, planned, save

from sae import planning, training
from sae.activations import read
from sae.autoencoder import SparseAutoencoder
from sae.config import TrainConfig
from sae.errors import ConfigError
from sae.finetuning import Sequences, spliced_passes
from sae.planning import Plan
from sae.store import Run

PLACES: dict[str, dict[str, Any]] = {
    "mlp_act": {},
    "resid_post": {"hookpoints": "layers.0.resid_post"},
    "transcoder": MAPS["transcoder"],
    "crosscoder": along(["layers.*.mlp_out"], ["layers.*.mlp_out"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("finetuning"))


def sequences(plan: Plan, rows: int = 3, max_norm: float | None = None) -> Sequences:
    """The first training rows as the model sees them."""
    batch = next(plan.source.train(rows))
    points, passes = plan.hookpoints, spliced_passes()
    return Sequences.read(plan.lm.model, points, batch, plan.dtype, passes, max_norm)


@pytest.mark.parametrize("place", PLACES)
def test_the_gradient_of_the_divergence_by_finite_differences(folder: Path, place: str) -> None:
    """In fp64, along random directions; rows may go through the model one at a time."""
    plan = planned(folder, PLACES[place])
    plan.lm.model.double()
    (member,) = plan.members.values()
    seen = sequences(plan)
    y = seen.batch(member.route).y
    generator = torch.Generator().manual_seed(0)
    recon = y + 0.3 * torch.randn(y.shape, generator=generator, dtype=y.dtype)
    kl, grad = seen.divergence(member.route, recon)
    assert kl > 0 and grad.shape == recon.shape
    for _ in range(3):
        towards = torch.randn(y.shape, generator=generator, dtype=y.dtype)
        above, below = (
            seen.divergence(member.route, recon + h * towards)[0] for h in (1e-6, -1e-6)
        )
        assert ((above - below) / 2e-6).item() == pytest.approx((grad * towards).sum().item(), 1e-5)
    exact, flat = seen.divergence(member.route, y)
    assert exact.item() == pytest.approx(0, abs=1e-12) and flat.abs().max() < 1e-9
    seen.passes.size = 1
    alone, same = seen.divergence(member.route, recon)
    torch.testing.assert_close(alone, kl)
    torch.testing.assert_close(same, grad)


def test_sequences_hold_what_a_stream_reads_but_for_massive_tokens(folder: Path) -> None:
    plan = planned(folder)
    (point,) = plan.hookpoints
    seen, rows = sequences(plan), next(plan.source.train(3))
    acts, source = read(plan.lm.model, [point], rows, plan.dtype)
    assert torch.equal(seen.acts[point], acts[point]) and torch.equal(seen.rows.source, source)
    norms = acts[point].norm(dim=1)
    fewer = sequences(plan, max_norm=1.0)
    assert torch.equal(fewer.acts[point], acts[point][norms <= norms.median()])
    assert len(fewer.log_probs) == len(fewer.acts[point]) == int(fewer.rows.kept.sum())


FINETUNED = {"finetune.tokens": "2048", "finetune.lr": "0.01", "optim.lr": "0.01"}
SHORT = FINETUNED | {"finetune.tokens": "256", "tokens": "512"}


def kl_of(plan: Plan, run: Path) -> float:
    """The divergence of a run's one SAE on held-out text."""
    sae = SparseAutoencoder.from_pretrained(run)
    (member,) = plan.members.values()
    rows, passes = next(plan.source.heldout(8)), spliced_passes()
    seen = Sequences.read(plan.lm.model, plan.hookpoints, rows, plan.dtype, passes)
    batch = seen.batch(member.route)
    with torch.no_grad():
        return seen.divergence(member.route, sae(batch.x).recon)[0].item()


def test_predictions_come_back_and_the_model_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where half the neurons are large and nobody reads them; against the same run whose
    fine-tuning hears nothing of the predictions."""
    model = tiny_model(len(byte_tokenizer()))
    mlp = model.transformer.h[1].mlp
    with torch.no_grad():
        mlp.c_fc.weight[:, :12] *= 3
        mlp.c_proj.weight[:12], mlp.c_proj.weight[12:] = 0, 3 * mlp.c_proj.weight[12:]
    place, divergence, found = save(tmp_path, model), Sequences.divergence, {}
    for name in ("deaf", "tuned"):
        if name == "deaf":
            deaf = lambda *given: (divergence(*given)[0], torch.zeros_like(given[2]))  # noqa: E731
            monkeypatch.setattr(Sequences, "divergence", deaf)
        plan = planned(place, FINETUNED | {"output": str(tmp_path / name), "tokens": "4096"})
        before = {key: value.clone() for key, value in plan.lm.model.state_dict().items()}
        run = training.train(plan)
        monkeypatch.undo()
        found[name] = kl_of(plan, run)
        assert all(torch.equal(v, before[k]) for k, v in plan.lm.model.state_dict().items())
        assert all(p.grad is None for p in plan.lm.model.parameters())
    assert found["tuned"] < 0.93 * found["deaf"], found
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [("kl" in row) for row in rows] == [row["tokens"] > 2048 for row in rows]
    assert all(row["l0"] <= 4 for row in rows) and rows[-1]["tokens"] >= 4096


def test_rows_of_special_tokens_alone_pass_by(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no loss: 0/0 was skipped as a step that is not finite."""
    made = training.Training(planned(folder, FINETUNED | {"tokens": "4096"}))
    made.tokens = 2048
    rows = made.stream.rows(2)
    assert rows is not None
    given = iter([replace(rows, kept=torch.zeros_like(rows.kept)), rows, None])
    monkeypatch.setattr(made.stream, "rows", lambda n: next(given))
    (batch,) = (made.draw(lambda: False) or {}).values()
    assert len(batch.x) == int(rows.kept.sum()) > 0
    assert made.draw(lambda: False) is None and made.ended() == "text ended"


def test_all_saes_of_a_run_are_tuned_each_alone(folder: Path, tmp_path: Path) -> None:
    """To the bit what each is by itself."""
    both = {"hookpoints": "layers.*.mlp_act", "grid.sae.sparsity.k": ["2", "4"]}
    plan = planned(folder, SHORT | both | {"output": str(tmp_path / "both")})
    together = Run(training.train(plan)).sae("layers.1.mlp_act-k=4") / "sae.safetensors"
    plan = planned(folder, SHORT | {"output": str(tmp_path / "one")})
    alone = Run(training.train(plan)).sae() / "sae.safetensors"
    assert together.read_bytes() == alone.read_bytes()


def test_a_refit_decoder_alone_is_tuned(folder: Path, tmp_path: Path) -> None:
    """What is active stays so: the encoder does not move any more."""
    relu = {"sae.sparsity.kind": "relu_l1", "sae.sparsity.k": None, "sae.sparsity.refit": "0.5"}
    encoders = []
    for tuned in (1, 512):
        changes = FINETUNED | relu | {"output": str(tmp_path / str(tuned)), "seed": "1"}
        changes |= {"tokens": str(512 + tuned), "finetune.tokens": str(tuned)}
        run = training.train(planned(folder, changes))
        encoders.append(SparseAutoencoder.from_pretrained(run))
    assert torch.equal(encoders[0].W_enc, encoders[1].W_enc)
    assert not torch.equal(encoders[0].W_dec, encoders[1].W_dec)


def test_a_model_without_predictions_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning.language_model, "predicts", lambda _: False)
    with pytest.raises(ConfigError, match=r"finetune.tokens: 64 came, but .* has no head"):
        planned(folder, {"finetune.tokens": "64"})


def test_a_plan_counts_predictions(folder: Path) -> None:
    plain, tuned = planned(folder), planned(folder, {"finetune.tokens": str(BATCH)})
    vocabulary = plain.lm.model.config.vocab_size
    assert tuned.memory_bytes() - plain.memory_bytes() == 4 * 4 * BATCH * vocabulary
    assert any("last 64 of them" in text for _, text in tuned.lines())


def test_shares() -> None:
    config = TrainConfig().model_copy(update={"tokens": 1000})
    assert config.shares(0.3) == (0.3, 0.0) and config.shares(1.0) == (1.0, 0.0)
    part = config.model_copy(
        update={"finetune": config.finetune.model_copy(update={"tokens": 250})}
    )
    assert part.shares(0.375) == (0.5, 0.0)
    assert part.shares(0.875) == (1.0, 0.5)
