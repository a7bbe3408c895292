"""Hookpoints mean the same thing in every family, and hooking changes nothing.

On tiny random models of each family: a hooked pass equals the plain one bit for bit; the sites are
what the weights say by hand; the residual stream adds up; the pass stops where it should; what is
replaced is used and given back; names that do not exist are answered with those that do.
"""

import gc
import weakref

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from sae.errors import HookpointError
from sae.hooks import (
    SITES,
    Hookpoint,
    capture,
    embedding,
    mlp_norm_gain,
    mlp_weights,
    replace,
    resolve,
    unembedding,
    width,
)

D, MLP, VOCAB, LAYERS, SEQ = 16, 24, 40, 3, 6

_LLAMA = dict(
    hidden_size=D,
    intermediate_size=MLP,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    max_position_embeddings=32,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=1,
)
_ROTARY = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_GPT = dict(
    n_embd=D, n_inner=MLP, n_layer=LAYERS, n_head=2, n_positions=32, vocab_size=VOCAB
) | dict(bos_token_id=0, eos_token_id=0)
_OPT = dict(
    hidden_size=D,
    word_embed_proj_dim=D,
    ffn_dim=MLP,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    vocab_size=VOCAB,
    max_position_embeddings=32,
)
CONFIGS = {
    "gpt2": lambda: hf.GPT2Config(activation_function="relu", **_GPT),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        hidden_size=D,
        intermediate_size=MLP,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        num_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(use_parallel_residual=True, **_ROTARY),
    "gpt_neox_serial": lambda: hf.GPTNeoXConfig(use_parallel_residual=False, **_ROTARY),
    "gptj": lambda: hf.GPTJConfig(rotary_dim=4, **_GPT),
    "opt": lambda: hf.OPTConfig(**_OPT),
    "opt_post_norm": lambda: hf.OPTConfig(do_layer_norm_before=False, **_OPT),
    "llama": lambda: hf.LlamaConfig(**_LLAMA),
    "gemma": lambda: hf.GemmaConfig(head_dim=8, **_LLAMA),
    "gemma2": lambda: hf.Gemma2Config(head_dim=8, **_LLAMA),
    "qwen3": lambda: hf.Qwen3Config(head_dim=8, **_LLAMA),
    "phi3": lambda: hf.Phi3Config(**_LLAMA),
    "phi": lambda: hf.PhiConfig(**_LLAMA),
    "olmo2": lambda: hf.Olmo2Config(rms_norm_eps=1e-6, **_LLAMA),
    "mixtral": lambda: hf.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **_LLAMA),
    "bert": lambda: hf.BertConfig(**_ROTARY),
    "bert_chunked": lambda: hf.BertConfig(chunk_size_feed_forward=2, **_ROTARY),
}
POST_NORM = ("opt_post_norm", "bert", "bert_chunked")
_models: dict[tuple[str, bool], hf.PreTrainedModel] = {}


def make(family: str, head: bool = True) -> hf.PreTrainedModel:
    """A tiny random model in eval mode, with every bias and gain away from its neutral value."""
    if (family, head) not in _models:
        torch.manual_seed(0)
        head_class = hf.AutoModelForMaskedLM if "bert" in family else hf.AutoModelForCausalLM
        model = (head_class if head else hf.AutoModel).from_config(CONFIGS[family]()).eval()
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.data += (0.3 if parameter.ndim == 1 else 0.15) * noise
        _models[family, head] = model
    return _models[family, head]


def tokens(batch: int = 3, seq: int = SEQ) -> Tensor:
    return torch.randint(2, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(batch))


def run(model: hf.PreTrainedModel, ids: Tensor, keyword: bool = True) -> Tensor:
    with torch.no_grad():
        output = model(input_ids=ids) if keyword else model(ids)
    return output[0]


def read(model: hf.PreTrainedModel, *names: str, batch: int = 3) -> list[Tensor]:
    with capture(model, [Hookpoint(name) for name in names], stop=False) as found:
        run(model, tokens(batch))
    return [found[Hookpoint(name)] for name in names]


def hooks_left(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


families = pytest.mark.parametrize("family", CONFIGS)
with_neurons = pytest.mark.parametrize("family", [name for name in CONFIGS if name != "mixtral"])


# ------------------------------------------------------------------------------- same everywhere


@families
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_captured_pass_is_the_plain_one_and_gives_batch_seq_d(family, head, batch):
    model, ids = make(family, head), tokens(batch)
    hookpoints = resolve(model, ["layers.*.*"])
    with capture(model, hookpoints, stop=False) as found:
        hooked = run(model, ids, keyword=batch == 1)
    assert torch.equal(hooked, run(model, ids))
    assert found.keys() == set(hookpoints)
    for hookpoint, activation in found.items():
        assert activation.shape == (batch, SEQ, width(model, hookpoint)), hookpoint
    assert hooks_left(model) == 0


@families
def test_every_site_replaced_by_itself_changes_no_bit(family):
    model, ids = make(family), tokens()
    plain = run(model, ids)
    for site in {hookpoint.site for hookpoint in resolve(model, ["layers.*.*"])}:
        with replace(model, Hookpoint(f"layers.1.{site}"), lambda x: x):
            assert torch.equal(run(model, ids), plain), site
    assert hooks_left(model) == 0


@families
def test_the_residual_stream_adds_up(family):
    model = make(family)
    last, sites = model.config.num_hidden_layers - 1, ("resid_pre", "attn_out", "mlp_out")
    if family not in POST_NORM:
        for layer in range(last + 1):
            *parts, after = read(
                model, *(f"layers.{layer}.{site}" for site in (*sites, "resid_post"))
            )
            torch.testing.assert_close(sum(parts), after)
    post, pre = read(model, "layers.0.resid_post", "layers.1.resid_pre")
    assert torch.equal(post, pre)


def test_bert_normalises_the_sum_of_what_is_added():
    model = make("bert")
    block = model.bert.encoder.layer[1]
    pre, attn, read_in, mlp, post = read(
        model,
        *(f"layers.1.{s}" for s in ("resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post")),
    )
    middle = block.attention.output.LayerNorm(pre + attn)
    torch.testing.assert_close(read_in, middle)
    torch.testing.assert_close(post, block.output.LayerNorm(middle + mlp))


def test_opt_350m_normalises_the_sum_of_what_is_added():
    model = make("opt_post_norm")
    block = model.model.decoder.layers[1]
    pre, attn, mlp, post = read(
        model, *(f"layers.1.{s}" for s in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
    )
    middle = block.self_attn_layer_norm(pre + attn)
    torch.testing.assert_close(post, block.final_layer_norm(middle + mlp))


# Each family's MLP written out from its parameters: (neurons, output) of x [batch seq d_model].


def _plain(up, down, act):
    def mlp(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = block.get_submodule(up), block.get_submodule(down)
        neurons = act(x @ first.weight.T + first.bias)
        return neurons, neurons @ second.weight.T + second.bias

    return mlp


def _gated(act):
    def mlp(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        m = block.mlp
        neurons = act(x @ m.gate_proj.weight.T) * (x @ m.up_proj.weight.T)
        return neurons, neurons @ m.down_proj.weight.T

    return mlp


def _gpt2(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    neurons = torch.relu(x @ block.mlp.c_fc.weight + block.mlp.c_fc.bias)
    return neurons, neurons @ block.mlp.c_proj.weight + block.mlp.c_proj.bias


def _phi3(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    both = x @ block.mlp.gate_up_proj.weight.T
    neurons = nn.functional.silu(both[..., :MLP]) * both[..., MLP:]
    return neurons, neurons @ block.mlp.down_proj.weight.T


def _post_normed(act, one: float):
    def mlp(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        neurons, out = _gated(act)(block, x)
        scale = (out.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return neurons, out * scale * (one + block.post_feedforward_layernorm.weight)

    return mlp


def gelu_tanh(x: Tensor) -> Tensor:
    return nn.functional.gelu(x, approximate="tanh")


gelu, silu = nn.functional.gelu, nn.functional.silu
_bert = _plain("intermediate.dense", "output.dense", gelu)
_neox = _plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", gelu)
BY_HAND = {
    "gpt2": _gpt2,
    "gpt_neo": _plain("mlp.c_fc", "mlp.c_proj", gelu_tanh),
    "gpt_neox": _neox,
    "gpt_neox_serial": _neox,
    "gptj": _plain("mlp.fc_in", "mlp.fc_out", gelu_tanh),
    "opt": _plain("fc1", "fc2", torch.relu),
    "opt_post_norm": _plain("fc1", "fc2", torch.relu),
    "llama": _gated(silu),
    "gemma": _gated(gelu_tanh),
    "gemma2": _post_normed(gelu_tanh, 1),
    "qwen3": _gated(silu),
    "phi3": _phi3,
    "phi": _plain("mlp.fc1", "mlp.fc2", gelu_tanh),
    "olmo2": _post_normed(silu, 0),
    "bert": _bert,
    "bert_chunked": _bert,
}


def blocks_of(model: hf.PreTrainedModel) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


@with_neurons
def test_neurons_and_mlp_output_are_what_the_weights_say(family):
    model = make(family)
    x, neurons, out = read(model, "layers.1.mlp_in", "layers.1.mlp_act", "layers.1.mlp_out")
    with torch.no_grad():
        neurons_by_hand, out_by_hand = BY_HAND[family](blocks_of(model)[1], x)
    torch.testing.assert_close(neurons, neurons_by_hand)
    torch.testing.assert_close(out, out_by_hand)


# ------------------------------------------------------------------------------------- stopping


@families
def test_stop_runs_no_layer_behind_the_last_hookpoint(family):
    model = make(family)
    blocks, ran = blocks_of(model), []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(blocks)]
    wanted = [Hookpoint("layers.1.mlp_out"), Hookpoint("layers.0.resid_pre")]
    try:
        with capture(model, wanted) as found:
            run(model, tokens())
            pytest.fail("the pass went on")
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0]  # the block of the last hookpoint is left before it returns
    full = read(model, *(hookpoint.name for hookpoint in wanted))
    assert all(torch.equal(found[h], x) for h, x in zip(wanted, full, strict=True))
    assert hooks_left(model) == 0


def test_stop_leaves_nothing_behind():
    model, names = make("gpt2"), ["layers.1.mlp_act"]
    plain = run(model, tokens())
    gc.disable()
    try:
        with capture(model, resolve(model, names)) as found:
            run(model, tokens())
        activation = weakref.ref(found[Hookpoint(names[0])])
        del found
        assert activation() is None  # no cycle keeps the unwound pass in memory
    finally:
        gc.enable()
    assert torch.equal(run(model, tokens()), plain)


def test_an_inner_capture_stops_only_its_own_block():
    model = make("llama")
    outer, inner = Hookpoint("layers.1.mlp_out"), Hookpoint("layers.0.mlp_out")
    with capture(model, [outer]) as found:
        with capture(model, [inner]) as first:
            run(model, tokens())
        assert first.keys() == {inner} and not found
        run(model, tokens())
    assert found.keys() == {outer}


def test_other_errors_pass_through_capture_and_replace():
    model, hookpoint = make("gpt2"), Hookpoint("layers.0.mlp_out")
    with pytest.raises(ZeroDivisionError), capture(model, [hookpoint]):
        _ = 1 / 0
    with pytest.raises(ZeroDivisionError), replace(model, hookpoint, lambda x: x * 0):
        _ = 1 / 0
    assert hooks_left(model) == 0


def test_a_module_that_never_runs_is_an_error():
    model = make("gpt2")
    lists = Hookpoint("module:transformer.h")  # a container: nothing calls it
    with pytest.raises(HookpointError, match="did not run"), capture(model, [lists]):
        run(model, tokens())
    assert hooks_left(model) == 0


# ------------------------------------------------------------------------------------ replacing


@families
def test_replacements_are_used_and_given_back(family):
    model, ids = make(family), tokens()
    plain, seen = run(model, ids), []
    first_layer = resolve(model, ["layers.0.*"])
    for hookpoint in first_layer:

        def half(x: Tensor) -> Tensor:
            seen.append(x.shape)
            return x / 2

        with replace(model, hookpoint, half), capture(model, [hookpoint], stop=False) as found:
            changed = run(model, ids)
        before = read(model, hookpoint.name)[0]
        assert torch.equal(found[hookpoint], before / 2)
        assert not torch.equal(changed, plain), hookpoint
        assert torch.equal(run(model, ids), plain)
    assert len(seen) == len(first_layer) and all(shape[:2] == (3, SEQ) for shape in seen)
    assert hooks_left(model) == 0


@families
def test_the_residual_stream_replaced_sets_what_the_next_layer_receives(family):
    model = make(family)
    swapped = torch.randn(3, SEQ, D, generator=torch.Generator().manual_seed(1))
    for name in ("layers.0.resid_post", "layers.1.resid_pre"):
        with replace(model, Hookpoint(name), lambda x: swapped):
            (received,) = read(model, "layers.1.resid_pre")
        assert name.endswith("resid_pre") or torch.equal(received, swapped)


@pytest.mark.parametrize("family", [f for f in CONFIGS if f not in POST_NORM and f != "mixtral"])
def test_an_mlp_replaced_by_zero_adds_nothing(family):
    model = make(family)
    with replace(model, Hookpoint("layers.1.mlp_out"), torch.zeros_like):
        pre, attn, post = read(
            model, *(f"layers.1.{s}" for s in ("resid_pre", "attn_out", "resid_post"))
        )
    torch.testing.assert_close(pre + attn, post)


@with_neurons
def test_neurons_replaced_by_zero_leave_the_output_bias(family):
    model = make(family)
    weights = mlp_weights(model, 1)
    with replace(model, Hookpoint("layers.1.mlp_act"), torch.zeros_like):
        (out,) = read(model, "layers.1.mlp_out")
    bias = torch.zeros(D) if weights.b_down is None else weights.b_down
    torch.testing.assert_close(out, bias.expand_as(out))


def test_chunks_are_undone_without_changing_the_arithmetic():
    torch.manual_seed(0)
    config = _ROTARY | dict(hidden_size=128, intermediate_size=500, num_hidden_layers=1)
    model = hf.BertModel(hf.BertConfig(chunk_size_feed_forward=1, **config)).eval()
    ids, seen = tokens(1, 31), []
    plain = run(model, ids)
    with replace(model, Hookpoint("layers.0.mlp_act"), lambda x: seen.append(x.shape) or x):
        assert torch.equal(run(model, ids), plain)
    assert seen == [(1, 31, 500)]


def test_nested_replacements_apply_in_the_order_they_were_opened():
    model, hookpoint = make("gpt2"), Hookpoint("layers.1.mlp_out")
    with replace(model, hookpoint, lambda x: x * 0 + 1), replace(model, hookpoint, lambda x: x + 2):
        (out,) = read(model, hookpoint.name)
    assert torch.equal(out, torch.full_like(out, 3))
    other = Hookpoint("layers.1.mlp_act")
    bert, ids = make("bert_chunked"), tokens()
    plain = run(bert, ids)
    with replace(bert, hookpoint, lambda x: x), replace(bert, other, lambda x: x):
        assert torch.equal(run(bert, ids), plain)
    block = blocks_of(bert)[1]
    assert block.chunk_size_feed_forward == 2 and "forward" not in vars(block.output.dense)


def test_a_replacement_takes_the_dtype_of_the_activation_and_must_keep_its_shape():
    model, hookpoint = make("llama"), Hookpoint("layers.1.mlp_out")
    plain = run(model, tokens())
    with replace(model, hookpoint, lambda x: x.double()):
        assert torch.equal(run(model, tokens()), plain)
    with (
        pytest.raises(HookpointError, match=r"layers\.1\.mlp_out.*\[3, 6, 15\].*\[3, 6, 16\]"),
        replace(model, hookpoint, lambda x: x[..., 1:]),
    ):
        run(model, tokens())
    assert hooks_left(model) == 0


def test_gradients_flow_through_a_replacement_and_a_capture():
    model, hookpoint = make("gpt2"), Hookpoint("layers.1.mlp_act")
    shift = torch.zeros(MLP, requires_grad=True)
    with replace(model, hookpoint, lambda x: x + shift), capture(model, [hookpoint]) as found:
        model(tokens())
    found[hookpoint].sum().backward()
    assert torch.equal(shift.grad, torch.full((MLP,), 3.0 * SEQ))
    model.zero_grad()


# ------------------------------------------------------------------------------------ any module


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("head", [True, False])
def test_a_module_path_reads_that_modules_output_with_or_without_a_head(prefix, head):
    model = make("gpt2", head)
    (hookpoint,) = resolve(model, [f"module:{prefix}h.1.mlp.act"])
    neurons, same = read(model, hookpoint.name, "layers.1.mlp_act")
    assert torch.equal(neurons, same)
    assert width(model, hookpoint) == MLP


def test_a_module_path_takes_the_first_of_several_outputs():
    model = make("llama")
    attn, same = read(model, "module:model.layers.1.self_attn", "layers.1.attn_out")
    assert torch.equal(attn, same)


def test_a_module_path_undoes_flattening_and_chunks():
    for family, path in (
        ("opt", "module:model.decoder.layers.1.activation_fn"),
        ("bert_chunked", "module:bert.encoder.layer.1.intermediate.intermediate_act_fn"),
    ):
        model = make(family)
        neurons, same = read(model, path, "layers.1.mlp_act")
        assert torch.equal(neurons, same)
        with replace(model, Hookpoint(path), torch.zeros_like):
            (zero,) = read(model, "layers.1.mlp_act")
        assert zero.shape == same.shape and not zero.any()


def test_modules_outside_the_blocks():
    model = make("gpt2")
    head, logits = Hookpoint("module:lm_head"), run(model, tokens())
    with capture(model, [head]) as found:
        run(model, tokens())
    assert torch.equal(found[head], logits)
    with (
        pytest.raises(HookpointError, match="returns"),
        capture(model, [Hookpoint("module:transformer")]),
    ):
        run(model, tokens())


# ----------------------------------------------------------------------------------------- names


def test_names_have_one_form_and_a_natural_order():
    assert Hookpoint.parse(" layers.02.mlp_act ") == Hookpoint("layers.2.mlp_act")
    names = ["layers.2.mlp_in", "layers.2.resid_post", "layers.10.mlp_in", "module:a"]
    assert [h.name for h in sorted(map(Hookpoint, reversed(names)))] == names
    hookpoint = Hookpoint("layers.2.mlp_act")
    assert (hookpoint.layer, hookpoint.site, hookpoint.module) == (2, "mlp_act", None)
    path = Hookpoint("module:transformer.h.2")
    assert (path.layer, path.site, path.module) == (None, None, "transformer.h.2")


def test_wildcards_take_what_matches_once_in_the_order_asked_for():
    model = make("gpt2")
    names = [f"layers.{i}.mlp_act" for i in range(LAYERS)]
    assert [h.name for h in resolve(model, ["layers.*.mlp_act"])] == names
    assert [h.name for h in resolve(model, [names[2], "layers.*.mlp_act"])] == [
        names[2],
        *names[:2],
    ]
    assert len(resolve(model, ["layers.[01].*"])) == 2 * len(SITES)
    paths = resolve(model, ["module:transformer.h.*.mlp.act"])
    assert [h.name for h in paths] == [f"module:transformer.h.{i}.mlp.act" for i in range(LAYERS)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("layers.12.mlp_out", ["layers.12.mlp_out: this model has layers 0-2"]),
        ("layers.2.mlp_ac", ["'layers.2.mlp_act'", "resid_post", "layers 0-2"]),
        ("layer.1.mlp_out", ["'layers.1.mlp_out'"]),
        ("layers.*.mlp_ac", ["matches nothing", "'layers.*.mlp_act'", "layers 0-2"]),
        ("layers.-1.mlp_act", ["layers 0-2"]),
        ("transformer.h.1.mlp", ["'module:transformer.h.1.mlp'"]),
        ("module:transformer.h.1.mlp.ac", ["c_fc", "'transformer.h.1.mlp.act'"]),
        ("module:nowhere", ["transformer", "lm_head"]),
        ("module:", ["module:<path>"]),
        ("", ["layers.<i>.<site>"]),
    ],
)
def test_a_wrong_name_is_answered_with_what_exists(text, says):
    with pytest.raises(HookpointError) as error:
        resolve(make("gpt2"), [text])
    message = str(error.value)
    assert all(words in message for words in says), message
    assert message.startswith(f"hookpoint {text}: ") and "\n" not in message


def test_all_mistakes_come_at_once_one_line_each():
    with pytest.raises(HookpointError) as error:
        resolve(make("gpt2"), ["layers.7.mlp_in", "layers.0.mlp_in", "layers.0.mlp"])
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "hookpoint layers.7.mlp_in",
        "hookpoint layers.0.mlp",
    ]


def test_capture_replace_and_width_refuse_what_does_not_exist():
    model, missing = make("gpt2"), Hookpoint("layers.9.mlp_in")
    for use in (
        lambda: width(model, missing),
        lambda: capture(model, [Hookpoint("layers.0.mlp_in"), missing]).__enter__(),
        lambda: replace(model, missing, lambda x: x).__enter__(),
        lambda: mlp_weights(model, 9),
    ):
        with pytest.raises(HookpointError, match=r"layers\.9.*layers 0-2"):
            use()
    assert hooks_left(model) == 0


def test_mixture_of_experts_has_no_neurons_but_the_other_sites():
    model = make("mixtral")
    for text in ("layers.1.mlp_act", "layers.*.mlp_act"):
        with pytest.raises(HookpointError, match="mixture-of-experts"):
            resolve(model, [text])
    sites = {hookpoint.site for hookpoint in resolve(model, ["layers.*.*"])}
    assert sites == set(SITES) - {"mlp_act"}
    assert mlp_weights(model, 1) is None


def test_a_block_that_scales_what_it_adds_refuses_those_sites():
    granite = hf.GraniteConfig(residual_multiplier=0.5, **_LLAMA)
    model = hf.AutoModel.from_config(granite)
    assert {h.site for h in resolve(model, ["layers.*.*"])} == set(SITES) - {"mlp_out", "attn_out"}
    with pytest.raises(HookpointError, match="scales"):
        resolve(model, ["layers.0.mlp_out"])


def test_a_block_with_weights_of_its_own_is_no_known_family():
    model = hf.AutoModel.from_config(hf.LlamaConfig(**_LLAMA))
    model.layers[1].residual_scale = nn.Parameter(torch.ones(D))
    with pytest.raises(HookpointError, match="module:<path>"):
        resolve(model, ["layers.*.*"])


def test_gpt1_normalises_its_sums_so_no_gain_precedes_the_mlp():
    config = {key: value for key, value in _GPT.items() if key != "n_inner"}
    model = hf.AutoModel.from_config(hf.OpenAIGPTConfig(**config)).eval()
    assert mlp_norm_gain(model, 1) is None
    attn, mlp = read(model, "layers.1.attn_out", "layers.1.mlp_out")
    assert attn.shape == mlp.shape == (3, SEQ, D)


def test_an_unknown_family_still_has_module_paths():
    config = hf.T5Config(d_model=D, d_kv=8, d_ff=MLP, num_layers=1, num_heads=2, vocab_size=VOCAB)
    model = hf.T5EncoderModel(config).eval()
    with pytest.raises(HookpointError, match=r"T5EncoderModel.*module:<path>"):
        resolve(model, ["layers.0.mlp_act"])
    path = "module:encoder.block.0.layer.1.DenseReluDense.act"
    assert read(model, path)[0].shape == (3, SEQ, MLP)
    assert mlp_weights(model, 0) is None and mlp_norm_gain(model, 0) is None
    with pytest.raises(HookpointError, match="module:<path>"):
        resolve(model, ["layers.*.*"])


# --------------------------------------------------------------------------------------- weights


@with_neurons
def test_mlp_weights_have_one_orientation(family):
    """out = neurons · W_downᵀ + b_down; W_up's rows are what the first projection asks for."""
    model = make(family)
    weights = mlp_weights(model, 1)
    x, neurons, out = read(model, "layers.1.mlp_in", "layers.1.mlp_act", "layers.1.mlp_out")
    by_hand = neurons @ weights.W_down.T + (0 if weights.b_down is None else weights.b_down)
    if weights.post_gain is not None:
        by_hand = by_hand * (by_hand.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        by_hand = by_hand * weights.post_gain
    torch.testing.assert_close(out, by_hand)
    block = blocks_of(model)[1]
    first = next(
        m
        for name, m in block.named_modules()
        if name.rpartition(".")[2] in ("gate_proj", "gate_up_proj", "c_fc", "fc1", "fc_in")
        or name in ("mlp.dense_h_to_4h", "intermediate.dense")
    )
    with torch.no_grad():
        zero = torch.zeros_like(x)
        answers = (first(x) - first(zero))[..., :MLP]
    torch.testing.assert_close(x @ weights.W_up.T, answers, atol=1e-5, rtol=1e-4)
    assert not weights.W_up.requires_grad


NORMS = {  # (the norm before the MLP, the norm before the head, what its gain adds to the weight)
    "gpt2": ("ln_2", "transformer.ln_f", 0),
    "gpt_neo": ("ln_2", "transformer.ln_f", 0),
    "gpt_neox": ("post_attention_layernorm", "gpt_neox.final_layer_norm", 0),
    "gpt_neox_serial": ("post_attention_layernorm", "gpt_neox.final_layer_norm", 0),
    "gptj": ("ln_1", "transformer.ln_f", 0),
    "opt": ("final_layer_norm", "model.decoder.final_layer_norm", 0),
    "opt_post_norm": (None, None, 0),
    "llama": ("post_attention_layernorm", "model.norm", 0),
    "gemma": ("post_attention_layernorm", "model.norm", 1),
    "gemma2": ("pre_feedforward_layernorm", "model.norm", 1),
    "qwen3": ("post_attention_layernorm", "model.norm", 0),
    "phi3": ("post_attention_layernorm", "model.norm", 0),
    "phi": ("input_layernorm", "model.final_layernorm", 0),
    "olmo2": (None, "model.norm", 0),
    "mixtral": ("post_attention_layernorm", "model.norm", 0),
    "bert": ("attention.output.LayerNorm", None, 0),
    "bert_chunked": ("attention.output.LayerNorm", None, 0),
}


@families
def test_gains_and_the_two_embeddings(family):
    model = make(family)
    before_mlp, before_head, one = NORMS[family]
    gain, head = mlp_norm_gain(model, 1), unembedding(model)
    if before_mlp is None:
        assert gain is None
    else:
        assert torch.equal(gain, blocks_of(model)[1].get_submodule(before_mlp).weight + one)
    assert torch.equal(embedding(model)[tokens()], model.get_input_embeddings().weight[tokens()])
    assert unembedding(make(family, head=False)) is None
    if before_head is None:
        assert head is None
        return
    W_U, final_gain = head
    norm = model.get_submodule(before_head)
    assert torch.equal(final_gain, norm.weight + one)
    with torch.no_grad():
        (normed,) = read(model, f"module:{before_head}")
        bias = getattr(model.get_output_embeddings(), "bias", None)
        logits = normed @ W_U + (0 if bias is None else bias)
    torch.testing.assert_close(logits, model.get_output_embeddings()(normed))


def test_norms_without_a_learned_gain_have_gain_one():
    model = hf.AutoModelForCausalLM.from_config(hf.OlmoConfig(**_LLAMA)).eval()
    assert torch.equal(mlp_norm_gain(model, 0), torch.ones(D))
    assert torch.equal(unembedding(model)[1], torch.ones(D))
    pre, attn, mlp, post = read(
        model, *(f"layers.1.{s}" for s in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
    )
    torch.testing.assert_close(pre + attn + mlp, post)


def test_nothing_here_edits_a_weight():
    model = make("gemma2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for hookpoint in resolve(model, ["layers.*.*"]):
        with replace(model, hookpoint, torch.zeros_like):
            run(model, tokens())
    mlp_weights(model, 1), mlp_norm_gain(model, 1), unembedding(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
