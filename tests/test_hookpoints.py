"""Names mean the same place on both sides: every translation comes back, module paths hold the
very numbers that our hookpoint reads, and what has no counterpart says so."""

from pathlib import Path

import pytest
import torch
from test_hooks import make, tokens

from sae.formats.hookpoints import (
    Match,
    from_module,
    from_transformer_lens,
    model_type,
    to_module,
    to_nnsight,
    to_transformer_lens,
)
from sae.hooks import SITES, Hookpoint, capture

FAMILIES = ("gpt2", "gpt_neo", "gpt_neox", "llama", "gemma", "gemma2", "qwen3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model folder of each family."""
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        make(family).config.save_pretrained(folder)
        found[family] = str(folder)
    return found


@pytest.mark.parametrize("site", SITES)
def test_transformer_lens_and_back(site: str) -> None:
    point = Hookpoint(f"layers.3.{site}")
    there = to_transformer_lens(point)
    if site == "mlp_in":
        assert there.match is Match.NONE and there.name == str(point)
        return
    assert from_transformer_lens(there.name) == type(there)(str(point), there.match)
    assert (there.match is Match.EXACT) == (site == "mlp_act")


@pytest.mark.parametrize(
    "name",
    [
        *("blocks.0.hook_mlp_in", "blocks.0.ln2.hook_normalized", "blocks.0.attn.hook_z"),
        *("hook_embed", f"blocks.{'9' * 5000}.hook_mlp_out"),
    ],
    ids=lambda name: name[:30],
)
def test_what_only_transformer_lens_has(name: str) -> None:
    assert from_transformer_lens(name).match is Match.NONE


@pytest.mark.parametrize("family", FAMILIES)
def test_module_paths_hold_the_same_numbers(folders: dict[str, str], family: str) -> None:
    model, seen, handles = make(family), {}, []
    points = [Hookpoint(f"layers.1.{site}") for site in SITES]
    for point in points:
        path = to_nnsight(point, folders[family])
        assert path.match is Match.EXACT
        assert from_module(path.name, folders[family]).name == str(point)
        name, _, side = path.name.rpartition(".")
        module = model.get_submodule(name)

        def keep(_module, args, kwargs, output, *, point=point, side=side) -> None:
            inputs = args[0] if args else kwargs["hidden_states"]
            value = inputs if side == "input" else output
            seen[point] = value[0] if isinstance(value, tuple) else value

        handles.append(module.register_forward_hook(keep, with_kwargs=True))
    with torch.no_grad(), capture(model, points, stop=False) as found:
        model(input_ids=tokens())
    for handle in handles:
        handle.remove()
    for point in points:
        assert torch.equal(seen[point], found[point]), point


def test_modules_as_sparsify_counts_them(folders: dict[str, str]) -> None:
    resid, act = Hookpoint("layers.2.resid_post"), Hookpoint("layers.2.mlp_act")
    assert to_module(resid, folders["gpt_neox"]).name == "layers.2"
    assert to_module(act, folders["gpt2"]).name == "h.2.mlp.act"
    assert to_module(act, folders["llama"]).match is Match.NONE  # an input, no module's output
    assert to_module(Hookpoint("module:transformer.h.2"), folders["gpt2"]).name == "h.2"
    for point in (resid, act):
        name = to_module(point, folders["gpt2"]).name
        assert from_module(name).name == str(point)


def test_families_that_differ_are_told_apart() -> None:
    assert from_module("model.layers.4.mlp", "meta-llama/Llama-3.2-1B").name == "layers.4.mlp_out"
    assert from_module("layers.4.mlp", "google/gemma-2-2b").match is Match.NONE
    after = "model.layers.4.post_feedforward_layernorm.output"
    assert from_module(after, "google/gemma-3-1b-pt").name == "layers.4.mlp_out"
    assert from_module("layers.4.mlp.act_fn").match is Match.NONE  # the gate, not the neurons
    assert from_module("embed_tokens").match is Match.NONE
    assert from_module(f"h.{'9' * 5000}.mlp").match is Match.NONE


def test_model_types(tmp_path: Path) -> None:
    assert model_type("builtin:") == "gpt2"
    assert model_type(str(tmp_path)) is None
    assert model_type("nobody/nothing") is None
    assert model_type("not a name") is None
