"""Where activations live inside a Hugging Face model: read them, swap them, find the weights.

A hookpoint is `layers.<i>.<site>` or `module:<path of any module>`; its activation is
[batch seq d] in every family. The table `FAMILIES` is the only place that knows module names. A
family is recognised by what its blocks are made of, so Mistral, Qwen and Gemma 1 are rows already.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial
from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sae.errors import HookpointError, suggest

SITES = ("mlp_in", "mlp_act", "mlp_out", "attn_out", "resid_pre", "resid_post")
_READ_AT_INPUT = frozenset({"mlp_in", "mlp_act", "resid_pre"})  # the others at a module's output

Activation = Float[Tensor, "batch seq d"]


@dataclass(frozen=True)
class Family:
    """Module paths inside one block, by default Llama's; 'a|b' means whichever is there."""

    block: str  # the children that hold the block's weights
    mlp_in: str = "mlp"  # the module that receives what the first projection receives
    up: str = (  # the first projection; in gated MLPs the gate
        "mlp.gate_proj|mlp.gate_up_proj|mlp.up_proj|mlp.c_fc|mlp.fc1|mlp.fc_in|mlp.dense_h_to_4h"
    )
    down: str = "mlp.down_proj|mlp.c_proj|mlp.fc2|mlp.fc_out|mlp.dense_4h_to_h"
    mlp_out: str = "mlp"
    attn_out: str = "self_attn"
    mlp_norm: str | None = "post_attention_layernorm"  # scales what the MLP reads
    post_norm: str | None = None  # scales what the MLP writes
    final_norm: str | None = "norm|final_layernorm"  # beside the list of blocks

    def place(self, block: nn.Module, site: str) -> nn.Module | None:
        """The module whose input or output is the site."""
        if site.startswith("resid"):
            return block
        return _child(block, self.down if site == "mlp_act" else getattr(self, site))


# The first row that fits is taken. Where a dropout module follows, its output is the site: that is
# what is added to the residual stream, in training too.
FAMILIES = {
    "gpt2, gpt_neo, gpt_bigcode": Family(
        "ln_1 attn ln_2 mlp", attn_out="attn", mlp_norm="ln_2", final_norm="ln_f"
    ),
    "gptj, codegen": Family("ln_1 attn mlp", attn_out="attn", mlp_norm="ln_1", final_norm="ln_f"),
    "gpt_neox": Family(
        "input_layernorm post_attention_layernorm attention mlp",
        mlp_out="post_mlp_dropout",
        attn_out="post_attention_dropout",
        final_norm="final_layer_norm",
    ),
    "opt": Family(
        "self_attn self_attn_layer_norm fc1 fc2 final_layer_norm",
        mlp_in="fc1",
        up="fc1",
        down="fc2",
        mlp_out="fc2",
        mlp_norm="final_layer_norm",
        final_norm="final_layer_norm|layer_norm",
    ),
    "phi3": Family(
        "self_attn mlp input_layernorm post_attention_layernorm "
        "resid_attn_dropout resid_mlp_dropout",
        mlp_out="resid_mlp_dropout",
        attn_out="resid_attn_dropout",
    ),
    "llama, mistral, mixtral, qwen, gemma": Family(
        "self_attn mlp input_layernorm post_attention_layernorm"
    ),
    "mixtral in transformers 4": Family(
        "self_attn block_sparse_moe input_layernorm post_attention_layernorm",
        mlp_in="block_sparse_moe",
        mlp_out="block_sparse_moe",
    ),
    "gemma2, gemma3": Family(
        "self_attn mlp input_layernorm post_attention_layernorm "
        "pre_feedforward_layernorm post_feedforward_layernorm",
        mlp_out="post_feedforward_layernorm",
        attn_out="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        post_norm="post_feedforward_layernorm",
    ),
    "olmo2": Family(
        "self_attn mlp post_attention_layernorm post_feedforward_layernorm",
        mlp_out="post_feedforward_layernorm",
        attn_out="post_attention_layernorm",
        mlp_norm=None,
        post_norm="post_feedforward_layernorm",
    ),
    "phi": Family(
        "self_attn mlp input_layernorm",
        mlp_norm="input_layernorm",
    ),
    "bert, roberta": Family(
        "attention intermediate output",
        mlp_in="intermediate",
        up="intermediate.dense",
        down="output.dense",
        mlp_out="output.dropout",
        attn_out="attention.output.dropout",
        mlp_norm="attention.output.LayerNorm",
        final_norm=None,
    ),
}


# ---------------------------------------------------------------------------------------- names


@dataclass(frozen=True)
class Hookpoint:
    """A place in a model: 'layers.2.mlp_act' or 'module:transformer.h.2.mlp.act'.

    Raises HookpointError if no model can have it.
    """

    name: str

    def __post_init__(self) -> None:
        name = self.name.strip()
        match = re.fullmatch(r"layers\.([0-9]{1,9})\.(\w+)", name, re.ASCII)
        if match and match[2] in SITES:
            name = f"layers.{int(match[1])}.{match[2]}"
        elif not name.removeprefix("module:") or not name.startswith("module:"):
            number = re.search(r"(?<![0-9])[0-9]{1,9}(?![0-9])", name)
            layer = number[0] if number else "0"
            near = suggest(name, [f"layers.{layer}.{site}" for site in SITES])
            raise HookpointError(
                f"hookpoint {name[:80]}: expected layers.<i>.<site> with a site of "
                f"{', '.join(SITES)}, or module:<path>{near}"
            )
        object.__setattr__(self, "name", name)

    @classmethod
    def parse(cls, text: str) -> "Hookpoint":
        """The hookpoint `text` names, whether or not some model has it."""
        return cls(text)

    @property
    def layer(self) -> int | None:
        """Index of the block, None for `module:` paths."""
        return None if self.module else int(self.name.split(".")[1])

    @property
    def site(self) -> str | None:
        """One of SITES, None for `module:` paths."""
        return None if self.module else self.name.split(".")[2]

    @property
    def module(self) -> str | None:
        """The path behind 'module:', None for the named sites."""
        return self.name.removeprefix("module:") if self.name.startswith("module:") else None

    @property
    def space(self) -> str:
        """What its activations are vectors of: the residual stream, but for neurons and modules."""
        return self.name if self.site in (None, "mlp_act") else "the residual stream"

    def __lt__(self, other: "Hookpoint") -> bool:
        return self._order < other._order

    @property
    def _order(self) -> tuple[int, int, int, str]:
        if self.layer is None or self.site is None:
            return 1, 0, 0, self.name
        return 0, self.layer, SITES.index(self.site), ""

    def __str__(self) -> str:
        return self.name


_SCALES = ("residual_multiplier", "mlp_beta_factor")  # Granite, MiniMax


class _Layout:
    """A model's blocks and the table row they match; `family` is None where none does."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.family = model, None
        self.blocks: list[nn.Module] = []
        self.parent: nn.Module = model  # holds the list of blocks and the final norm
        for path, module in model.named_modules():
            family = _family(list(module)) if isinstance(module, nn.ModuleList) else None
            if family is not None and isinstance(module, nn.ModuleList):
                self.family, self.blocks = family, list(module)
                self.parent = model.get_submodule(path.rpartition(".")[0])
                return

    @cached_property
    def names(self) -> list[str]:
        """Every `layers.<i>.<site>` this model has."""
        return [
            f"layers.{i}.{site}"
            for i, block in enumerate(self.blocks)
            for site in SITES
            if self.refusal(block, site) is None
        ]

    @property
    def exists(self) -> str:
        """What there is to hook, in words."""
        if self.family is None:
            kind = type(self.model).__name__
            return f"{kind} is laid out as none of the known families; use module:<path>"
        last = len(self.blocks) - 1
        return f"this model has layers 0-{last}" if last else "this model has only layer 0"

    def refusal(self, block: nn.Module, site: str) -> str | None:
        """Why this block has no such site, None if it has."""
        assert self.family is not None
        if self.family.place(block, site) is None:
            experts = hasattr(_child(block, self.family.mlp_in), "experts")
            return (
                "a mixture-of-experts layer has no one set of neurons (each token runs through "
                "a few experts of its own); use mlp_in or mlp_out"
                if experts and site == "mlp_act"
                else "this block has no module for it; use module:<path>"
            )
        if site in ("mlp_out", "attn_out") and any(getattr(block, at, 1) != 1 for at in _SCALES):
            return (
                "this block scales what it adds to the residual stream, outside of any module; "
                "use module:<path>"
            )
        return None

    def block(self, hookpoint: Hookpoint) -> nn.Module:
        """The block of `layers.<i>.<site>`; HookpointError if it is not there or refuses."""
        assert hookpoint.layer is not None and hookpoint.site is not None
        if self.family is None or hookpoint.layer >= len(self.blocks):
            raise HookpointError(f"hookpoint {hookpoint}: {self.exists}")
        block = self.blocks[hookpoint.layer]
        if reason := self.refusal(block, hookpoint.site):
            raise HookpointError(f"hookpoint {hookpoint}: {reason}")
        return block


def _family(blocks: Sequence[nn.Module]) -> Family | None:
    """The first row of the table that all `blocks` fit."""

    def fits(block: nn.Module, names: set[str]) -> bool:
        children = dict(block.named_children())
        weighty = {
            name for name, child in children.items() if any(True for _ in child.parameters())
        }
        own = any(True for _ in block.parameters(recurse=False))  # Doge scales its residual stream
        return not own and weighty <= names <= children.keys()

    for family in FAMILIES.values():
        if blocks and all(fits(block, set(family.block.split())) for block in blocks):
            return family
    return None


def _child(parent: nn.Module, paths: str | None) -> nn.Module | None:
    """The first module there is among 'a.b|c.d' under `parent`."""
    for path in (paths or "").split("|"):
        module: Any = parent
        for name in path.split("."):
            module = getattr(module, name, None)
        if isinstance(module, nn.Module):
            return module
    return None


def resolve(model: PreTrainedModel, patterns: Sequence[str]) -> list[Hookpoint]:
    """The hookpoints that `patterns` name, each once, in the order asked for.

    `*`, `?` and `[0-2]` are wildcards ('layers.*.mlp_act'); a pattern takes what it matches.
    Raises one HookpointError with a line for each pattern that names nothing.
    """
    layout = _Layout(model)
    found: dict[Hookpoint, None] = {}
    mistakes = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            found.update(dict.fromkeys(_expand(model, layout, pattern.strip())))
        except HookpointError as mistake:
            mistakes.append(str(mistake))
    if mistakes:
        raise HookpointError("\n".join(mistakes))
    return list(found)


def _expand(model: PreTrainedModel, layout: _Layout, pattern: str) -> list[Hookpoint]:
    """The hookpoints one pattern names, at least one."""
    if not re.search(r"[*?\[]", pattern):
        try:
            hookpoint = Hookpoint(pattern)
        except HookpointError as mistake:
            module = pattern and pattern in dict(model.named_modules())
            near = f"; did you mean 'module:{pattern}'?" if module else ""
            raise HookpointError(f"{mistake}{near} ({layout.exists})") from None
        _locate(model, hookpoint, layout)
        return [hookpoint]
    modules = [f"module:{path}" for path, _ in model.named_modules() if path]
    names = modules if pattern.startswith("module:") else layout.names
    matches = [Hookpoint(name) for name in names if fnmatchcase(name, pattern)]
    if matches:
        return matches
    refused = (
        layout.refusal(block, site)
        for i, block in enumerate(layout.blocks)
        for site in SITES
        if fnmatchcase(f"layers.{i}.{site}", pattern)
    )
    reason = next((reason for reason in refused if reason), None)
    if reason is None:
        near = suggest(pattern, [f"layers.*.{site}" for site in SITES])
        reason = f"matches nothing; {layout.exists}{near}"
    raise HookpointError(f"hookpoint {pattern}: {reason}")


# --------------------------------------------------------------------------------------- places


class _Place(NamedTuple):
    """A module, which of its sides is read, and the block around it (None: outside the blocks)."""

    module: nn.Module
    at_input: bool
    block: nn.Module | None


def _locate(model: PreTrainedModel, hookpoint: Hookpoint, layout: _Layout | None = None) -> _Place:
    """Where in `model` the hookpoint is; HookpointError with what exists if nowhere."""
    layout = layout or _Layout(model)
    if hookpoint.module is not None:
        module = _module(model, hookpoint.module)
        around = (block for block in layout.blocks if any(m is module for m in block.modules()))
        return _Place(module, False, next(around, None))
    block, site = layout.block(hookpoint), hookpoint.site
    assert layout.family is not None and site is not None
    module = layout.family.place(block, site)
    assert module is not None  # layout.block() would have refused
    return _Place(module, site in _READ_AT_INPUT, block)


def _module(model: PreTrainedModel, path: str) -> nn.Module:
    """The module at `path`, with or without the prefix a language-model head puts before it."""
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    for name in (path, path.removeprefix(prefix), prefix + path):
        if name in modules:
            return modules[name]
    parent = path
    while parent and parent not in modules:
        parent = parent.rpartition(".")[0]
    children = [f"{parent}.{name}".strip(".") for name, _ in modules[parent].named_children()]
    near = suggest(path, children) or suggest(path, modules)
    there = ", ".join(children[:12]) or "nothing"
    raise HookpointError(
        f"hookpoint module:{path}: no such module; under {parent or 'the model'} there is "
        f"{there}{', …' if len(children) > 12 else ''}{near}"
    )


def width(model: PreTrainedModel, hookpoint: Hookpoint) -> int:
    """Number of components d of the activation; a `module:` is run on two tokens to see."""
    place = _locate(model, hookpoint)
    if hookpoint.site == "mlp_act":
        return _read_write(place.module)[0].shape[1]
    if hookpoint.site is not None:
        return model.config.get_text_config().hidden_size
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with torch.no_grad(), capture(model, [hookpoint]) as found:
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    return found[hookpoint].shape[-1]


# ------------------------------------------------------------------------------ capture, replace


class _Stop(BaseException):
    """Unwinds a forward pass whose last hookpoint is behind it; `except Exception` lets it pass."""

    def __init__(self, owner: object):
        super().__init__()
        self.owner = owner


@contextmanager
def capture(
    model: PreTrainedModel, hookpoints: Sequence[Hookpoint], stop: bool = True
) -> Iterator[dict[Hookpoint, Activation]]:
    """The activations [batch seq d] of a forward pass run inside the block, as the model has them.

    With `stop` the pass ends behind the last hookpoint and the block is left quietly: nothing after
    the model's call runs. Without, the latest pass is kept and the output is the plain one.
    Raises HookpointError if a hookpoint does not exist or its module did not run.
    """
    found: dict[Hookpoint, Activation] = {}
    wanted = dict.fromkeys(hookpoints)

    def keep(hookpoint: Hookpoint, activation: Activation) -> None:
        found[hookpoint] = activation
        if stop and found.keys() == wanted.keys():
            raise _Stop(found)

    def check(*_: object) -> None:
        if missed := sorted(wanted.keys() - found.keys()):
            names = ", ".join(str(hookpoint) for hookpoint in missed)
            raise HookpointError(f"hookpoint {names}: the forward pass did not run this module")

    with ExitStack() as stack:
        layout = _Layout(model)
        for hookpoint in wanted:
            place = _locate(model, hookpoint, layout)
            stack.enter_context(_tap(hookpoint, place, partial(keep, hookpoint)))
        stack.callback(model.register_forward_hook(check).remove)
        try:
            yield found
        except _Stop as end:
            if end.owner is not found:
                raise


@contextmanager
def replace(
    model: PreTrainedModel, hookpoint: Hookpoint, fn: Callable[[Activation], Activation]
) -> Iterator[None]:
    """Every forward pass inside the block goes on with fn(activation [batch seq d]) instead.

    The result is brought to the activation's dtype and device. The model is as before when the
    block ends, however it ends. A `capture` opened inside sees the result, one around it does not.
    """
    place = _locate(model, hookpoint)

    def swap(activation: Activation) -> Activation:
        result = fn(activation)
        if result.shape != activation.shape:
            raise HookpointError(
                f"hookpoint {hookpoint}: the replacement has shape {list(result.shape)}, "
                f"expected {list(activation.shape)}"
            )
        return result.to(activation)

    with _unchunked(place.block), _tap(hookpoint, place, swap):
        yield


def masked(
    mask: Bool[Tensor, "batch seq"], fn: Callable[[Float[Tensor, "n d"]], Tensor]
) -> Callable[[Activation], Activation]:
    """For `replace`: `fn` of the n activations that `mask` chooses; the others stay as they are."""

    def swap(activation: Activation) -> Activation:
        out = activation.clone()
        out[mask] = fn(activation[mask]).to(activation)
        return out

    return swap


@contextmanager
def _tap(
    hookpoint: Hookpoint, place: _Place, use: Callable[[Activation], Activation | None]
) -> Iterator[None]:
    """Calls `use` on the activation in each forward pass and puts its result, if any, in place."""
    gather = _Gather(hookpoint)

    def visit(raw: Tensor) -> Tensor | None:
        whole = gather.add(raw)
        new = None if whole is None else use(whole)
        return None if new is None else new.reshape(raw.shape)

    def at_input(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        key, raw = _input(hookpoint, args, kwargs)
        new = visit(raw)
        if new is None:
            return None
        if isinstance(key, int):
            return (*args[:key], new, *args[key + 1 :]), kwargs
        return args, {**kwargs, key: new}

    def at_output(module: nn.Module, args: tuple, output: Any) -> Any:
        new = visit(_output(hookpoint, output))
        if new is None or isinstance(output, Tensor):
            return new
        return type(output)([new, *output[1:]])

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        gather.begin(_input(hookpoint, args, kwargs)[1])

    with ExitStack() as stack:
        if place.block is not None:
            handle = place.block.register_forward_pre_hook(begin, with_kwargs=True)
            stack.callback(handle.remove)
        if place.at_input:
            handle = place.module.register_forward_pre_hook(at_input, with_kwargs=True)
        else:
            handle = place.module.register_forward_hook(at_output)
        stack.callback(handle.remove)
        yield


class _Gather:
    """Makes [batch seq d] of what a module sees: flattened [batch·seq d], or pieces along seq."""

    def __init__(self, hookpoint: Hookpoint):
        self.hookpoint = hookpoint
        self.size: tuple[int, int] | None = None  # batch, seq of the pass; known inside a block
        self.pieces: list[Tensor] = []

    def begin(self, block_input: Tensor) -> None:
        self.size = (block_input.shape[0], block_input.shape[1])
        self.pieces = []

    def add(self, raw: Tensor) -> Activation | None:
        """The whole activation, or None while pieces of it are missing."""
        size = self.size or raw.shape[:2]
        if raw.ndim == 2 and self.size and raw.shape[0] == prod(size):
            return raw.reshape(*size, -1)
        if raw.ndim != 3 or raw.shape[0] != size[0] or raw.shape[1] > size[1]:
            raise HookpointError(
                f"hookpoint {self.hookpoint}: expected an activation [batch seq d], got "
                f"{list(raw.shape)}"
            )
        if raw.shape[1] == size[1]:
            return raw
        self.pieces.append(raw)
        if sum(piece.shape[1] for piece in self.pieces) < size[1]:
            return None
        pieces, self.pieces = self.pieces, []
        return torch.cat(pieces, dim=1)


def _input(hookpoint: Hookpoint, args: tuple, kwargs: dict) -> tuple[int | str, Tensor]:
    """The tensor a module is called with, and where it stands; blocks take it either way."""
    named = [(key, kwargs[key]) for key in ("hidden_states", *kwargs) if key in kwargs]
    for key, value in (*enumerate(args), *named):
        if isinstance(value, Tensor):
            return key, value
    raise HookpointError(f"hookpoint {hookpoint}: its module was called without a tensor")


def _output(hookpoint: Hookpoint, output: Any) -> Tensor:
    """The tensor a module returns, the first one if it returns several."""
    # Blocks return a tuple or a tensor depending on the version of transformers.
    first = output[0] if isinstance(output, tuple | list) and output else output
    if isinstance(first, Tensor):
        return first
    kind = type(output).__name__
    raise HookpointError(f"hookpoint {hookpoint}: its module returns {kind}, expected a tensor")


@contextmanager
def _unchunked(block: nn.Module | None) -> Iterator[None]:
    """Moves BERT's chunks of the feed-forward from the block into its innermost modules.

    A replacement needs the whole sequence at once, and with pieces of the same size inside, the
    arithmetic stays the plain pass's to the bit.
    """
    size = getattr(block, "chunk_size_feed_forward", 0)
    if block is None or not size:
        yield
        return
    parts = (
        module for name in ("intermediate", "output") for module in getattr(block, name).modules()
    )
    leaves = [module for module in parts if not any(True for _ in module.children())]

    def chunked(forward: Callable[[Tensor], Tensor], first: bool, x: Tensor) -> Tensor:
        # The block hands views to its first projection; what follows gets tensors of its own.
        # Linear rounds differently on the two.
        pieces = x.split(size, dim=1)
        return torch.cat([forward(p if first else p.contiguous()) for p in pieces], dim=1)

    with ExitStack() as stack:
        stack.enter_context(_attribute(block, "chunk_size_feed_forward", 0))
        for i, leaf in enumerate(leaves):
            forward = partial(chunked, leaf.forward, i == 0)
            stack.enter_context(_attribute(leaf, "forward", forward))
        yield


@contextmanager
def _attribute(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """Sets an attribute of this instance for the length of the block."""
    own = vars(module)
    before = {name: own[name]} if name in own else {}
    own[name] = value
    try:
        yield
    finally:
        del own[name]
        own.update(before)


# -------------------------------------------------------------------------------------- weights


class MLPWeights(NamedTuple):
    """An MLP's matrices in one orientation, views of the model's own; never written to.

    `W_up` is the gate in gated MLPs. `post_gain`: what is added to the residual stream is
    normalised and scaled by this first (Gemma 2, OLMo 2), None elsewhere.
    """

    W_up: Float[Tensor, "d_mlp d_model"]
    W_down: Float[Tensor, "d_model d_mlp"]
    b_down: Float[Tensor, " d_model"] | None
    post_gain: Float[Tensor, " d_model"] | None


def mlp_weights(model: PreTrainedModel, layer: int) -> MLPWeights | None:
    """The matrices of one layer's MLP; None in mixture-of-experts layers and unknown families."""
    layout = _Layout(model)
    if layout.family is None:
        return None
    block = layout.block(Hookpoint(f"layers.{layer}.resid_pre"))
    up, down = _child(block, layout.family.up), _child(block, layout.family.down)
    if up is None or down is None:
        return None
    (W_up, _), (W_down, b_down) = _read_write(up), _read_write(down)
    if not (W_up.is_floating_point() and W_up.ndim == W_down.ndim == 2):  # quantised, packed
        return None
    # Phi-3 stacks gate and up in one matrix, the gate first.
    post_norm = _child(block, layout.family.post_norm)
    post_gain = None if post_norm is None else _gain(post_norm, W_down.shape[0])
    return MLPWeights(W_up[: W_down.shape[1]], W_down, b_down, post_gain)


def mlp_norm_gain(model: PreTrainedModel, layer: int) -> Float[Tensor, " d_model"] | None:
    """The gain of the norm before one layer's MLP, fp32; None where nothing normalises it."""
    layout = _Layout(model)
    if layout.family is None:
        return None
    block = layout.block(Hookpoint(f"layers.{layer}.resid_pre"))
    norm = _child(block, layout.family.mlp_norm)
    final = layout.family.final_norm
    if norm is None or (final and _child(layout.parent, final) is None):
        return None  # without a final norm the blocks normalise their sums: OPT-350m, GPT-1
    return _gain(norm, model.config.get_text_config().hidden_size)


def embedding(model: PreTrainedModel) -> Float[Tensor, "vocab d_model"] | None:
    """W_E; None where tokens are embedded in another width than the residual stream's."""
    table = model.get_input_embeddings()
    weight = getattr(table, "weight", None)
    fits = weight is not None and weight.shape[-1] == model.config.get_text_config().hidden_size
    return weight.detach() if weight is not None and fits else None


def unembedding(
    model: PreTrainedModel,
) -> tuple[Float[Tensor, "d_model vocab"], Float[Tensor, " d_model"]] | None:
    """W_U and the gain (fp32) of the norm before it; None without a head that reads that norm."""
    layout = _Layout(model)
    head = model.get_output_embeddings()
    norm = _child(layout.parent, layout.family.final_norm) if layout.family else None
    d_model = model.config.get_text_config().hidden_size
    if norm is None or not isinstance(head, nn.Module):
        return None
    W_U = _read_write(head)[0].T
    return (W_U, _gain(norm, d_model)) if W_U.shape[0] == d_model else None


def _read_write(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [d_out d_in] and bias [d_out] of a Linear or of GPT-2's (transposed) Conv1D."""
    weight, bias = linear.get_parameter("weight"), getattr(linear, "bias", None)
    weight = weight.T if isinstance(linear, Conv1D) else weight
    return weight.detach(), bias.detach() if isinstance(bias, Tensor) else None


def _gain(norm: nn.Module, d_model: int) -> Float[Tensor, " d_model"]:
    """What a norm multiplies with: its weight, or 1 + weight (Gemma), told apart by trying it."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):  # no learned gain
        return torch.ones(d_model)
    with torch.no_grad():
        x = torch.ones_like(weight)  # ±1 in turn: mean 0, variance 1, so it normalises to itself
        x[1::2] = -1
        up, down = norm.forward(x[None, None]), norm.forward(-x[None, None])
        applied = ((up - down) / 2 * x).flatten().float()
        return weight.float() + (applied - weight.float()).mean().round()
