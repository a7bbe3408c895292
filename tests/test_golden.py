"""A fixed config on text tracked here gives the losses it always gave.

To the bit on the kind of machine where they were written down; elsewhere sums round otherwise, so
the first 20 steps, in fp32, agree within 1e-4. After a change that is meant to change them:

    python tests/test_golden.py
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import byte_tokenizer, tiny_model
from tiny import RELU

from sae import config as settings
from sae import training
from sae.planning import environment, plan

GOLDEN = Path(__file__).parent / "data" / "golden.json"
SAME_PLATFORM = ("device", "cpu", "threads", "torch")
KINDS: dict[str, dict[str, str | None]] = {
    "topk": {"sae.sparsity.kind": "topk", "sae.sparsity.k": "4"},
    "relu_l1": RELU | {"optim.dead_after": "200"},
}


def losses(folder: Path, kind: str) -> tuple[dict[str, Any], list[float]]:
    """Where it was computed, and the loss of each of 100 steps."""
    tokenizer = byte_tokenizer()
    for part in (tiny_model(len(tokenizer)), tokenizer):
        part.save_pretrained(folder / "model")
    given = {
        "model.name": str(folder / "model"),
        "model.dtype": "float32",
        "data.source": str(Path(__file__).parent / "data" / "tides.txt"),
        "data.context": "32",
        "data.repeat": "true",
        "data.heldout": "0",
        "hookpoints": "layers.1.mlp_act",
        "sae.d_sae": "64",
        "optim.batch": "64",
        "optim.pool": "512",
        "optim.llm_batch": "4",
        "optim.dead_after": "500",
        "tokens": "6400",
        "device": "cpu",
        "output": str(folder / kind),
    }
    given |= {key: value for key, value in KINDS[kind].items() if value is not None}
    planned = plan(settings.resolve(None, given))
    run = training.train(planned)
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return environment(planned), [row["loss"] for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_what_they_were(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LOG_EVERY_STEPS", 1)
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    here, found = losses(tmp_path, kind)
    expected = golden["losses"][kind]
    assert len(found) == len(expected) == 100 and found[-1] < found[0]
    assert found[:20] == pytest.approx(expected[:20], rel=1e-4)
    if all(here[key] == golden["environment"][key] for key in SAME_PLATFORM):
        assert found == expected


def write() -> None:
    """Write the losses of this machine down."""
    torch.set_num_threads(1)
    training.LOG_EVERY_STEPS = 1
    found: dict[str, list[float]] = {}
    where: dict[str, Any] = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            where, found[kind] = losses(Path(folder), kind)
    kept = {"environment": {key: where[key] for key in SAME_PLATFORM}, "losses": found}
    GOLDEN.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
