"""Every file in configs/ loads, and plans a run against a tiny model of the same architecture."""

import fnmatch
from pathlib import Path

import pytest
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from sae.config import load, resolve
from sae.planning import plan

FOLDER = Path(__file__).parents[1] / "configs"
RECIPES = sorted(p for p in FOLDER.glob("*.yaml") if not p.name.startswith("pretrain"))


def tiny(name: str, vocab: int):
    """A model of the family that `name` belongs to, with at least nine layers of width 16."""
    common = {"vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 0}
    if "Llama" in name:
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=9,
                num_attention_heads=2,
                num_key_value_heads=2,
                **common,
            )
        )
    if "pythia" in name:
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=9,
                num_attention_heads=2,
                **common,
            )
        )
    if "TinyStories" in name:
        return GPTNeoForCausalLM(
            GPTNeoConfig(
                hidden_size=16,
                num_layers=2,
                num_heads=2,
                window_size=8,
                attention_types=[[["global", "local"], 1]],
                **common,
            )
        )
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=9, n_head=2, n_positions=2048, **common))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_plans(path, tmp_path, tokenizer, text_file):
    config = load(path)
    model = tiny(config.model.name, len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    small = {
        "model.name": str(tmp_path / "model"),
        "data.source": str(text_file),
        "data.name": "null",
        "data.streaming": "false",
        "data.context": "16",
        "data.repeat": "true",
        "output": str(tmp_path / "run"),
    }
    planned = plan(resolve(path, small))
    read = {str(point) for point in planned.hookpoints}
    for wanted in (*config.hookpoints, *config.inputs, *config.targets):
        assert fnmatch.filter(read, wanted)
    assert len(planned.members) == (len(config.hookpoints) or 1)
    assert all(width in (16, 32, 64) for width in planned.widths.values())
    assert dict(planned.lines())["tokens"].startswith(f"{config.tokens:,}")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_what_it_is_for(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("Hardware:" in line for line in header)
    assert len(header) >= 2 and len(header[0]) > 20
    assert not any(word in line for line in header for word in ("TIME", "RESULT"))
