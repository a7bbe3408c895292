"""A tiny model, a folder of texts and the settings of a run on them, for tests to share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from planted import _WORDS as WORDS
from planted import byte_tokenizer, tiny_model

from sae import config as settings
from sae.planning import Plan, plan

CONTEXT, BATCH, TOKENS = 32, 64, 2048


def save_model(folder: Path, model: Any = None) -> Path:
    """A random two-layer ReLU GPT-2 (or `model`) and its byte-level tokenizer."""
    tokenizer = byte_tokenizer()
    (model or tiny_model(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def llama() -> Any:
    """A random two-layer gated model."""
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=len(byte_tokenizer()),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=CONTEXT,
            initializer_range=0.5,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def save_texts(folder: Path, documents: int = 100) -> Path:
    """Files of 60 random words each."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    for number in range(documents):
        drawn = torch.randint(len(WORDS), (60,), generator=generator).tolist()
        (folder / f"{number}.txt").write_text(" ".join(WORDS[i] for i in drawn))
    return folder


def overrides(folder: Path) -> dict[str, str]:
    """Settings of 32 quick steps with the model and the texts that `save` put into `folder`."""
    return {
        "model.name": str(folder / "model"),
        "model.dtype": "float32",
        "data.source": str(folder / "texts"),
        "data.context": str(CONTEXT),
        "data.heldout": "0.2",
        "data.eval_tokens": "500",
        "hookpoints": "layers.1.mlp_act",
        "sae.d_sae": "48",
        "sae.sparsity.kind": "topk",
        "sae.sparsity.k": "4",
        "optim.batch": str(BATCH),
        "optim.pool": "512",
        "optim.llm_batch": "4",
        "optim.dead_after": "500",
        "tokens": str(TOKENS),
        "device": "cpu",
        "output": str(folder / "run"),
    }


def save(folder: Path, model: Any = None) -> Path:
    """A model and texts."""
    save_model(folder / "model", model)
    save_texts(folder / "texts")
    return folder


RELU = {"sae.sparsity.kind": "relu_l1", "sae.sparsity.k": None, "sae.sparsity.l1": "1"}
"""Changes that make the run one of the other sparsity."""


def along(inputs: list[str], targets: list[str], **changes: str) -> dict[str, Any]:
    """Changes that make the run one map."""
    return {"hookpoints": None, "inputs": inputs, "targets": targets} | changes


OUTS = ["layers.*.mlp_out"]
MAPS = {
    "transcoder": along(["layers.1.mlp_in"], ["layers.1.mlp_out"]),
    "skip transcoder": along(["layers.1.mlp_in"], ["layers.1.mlp_out"], **{"sae.skip": "true"}),
    "crosscoder": along(OUTS, OUTS),
    "all to all": along(["layers.*.mlp_in"], OUTS, **{"sae.skip": "true", "sae.init": "data"}),
}
"""Changes that make the run a map, or an autoencoder at several hookpoints."""


def planned(
    folder: Path, changes: Mapping[str, Any] | None = None, *, resuming: bool = False
) -> Plan:
    """A plan under `changes`; None leaves a setting at its default."""
    given = overrides(folder) | dict(changes or {})
    chosen = settings.resolve(None, {k: v for k, v in given.items() if v is not None})
    return plan(chosen, resuming=resuming)
