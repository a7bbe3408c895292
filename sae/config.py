"""Every setting of a training run: its default, its range and its help text.

YAML files and command-line flags are merged first and checked once, so both follow the same rules
and all mistakes are reported together. The docstring below each field is its `--help` text.
"""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from operator import attrgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from sae.errors import ConfigError, suggest

YAML_BYTES = 1 << 20
YAML_DEPTH = 64
YAML_NODES = 1 << 18
"""What a YAML file may hold once its aliases are written out."""

# Types of settings

Keys = tuple[str, ...]


@dataclass(frozen=True)
class Wanted:
    """What a setting accepts, in the words its error message uses."""

    text: str


def _number(value: object) -> object:
    """Refuse true and false, which Python would count as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("not a number")
    return value


def _rising(value: tuple[float, float]) -> tuple[float, float]:
    """Refuse a span that ends before it starts."""
    if value[0] > value[1]:
        raise ValueError("ends before it starts")
    return value


def _listed(value: object) -> object:
    """A lone text stands for a list of one."""
    return [value] if isinstance(value, str) else value


def _to_the_end(value: tuple[float, ...]) -> tuple[float, ...]:
    """Refuse shares that do not rise from above 0 to 1."""
    if not value or value[-1] != 1 or any(b <= a for a, b in zip((0, *value), value, strict=False)):
        raise ValueError("not rising to 1")
    return value


def _axes(value: object) -> object:
    """Pairs of a dotted setting and its values: `sae: {d_sae: 8}` is `sae.d_sae: [8]`."""
    if value is None:  # every line below it commented out
        return ()
    return tuple(_pairs(value)) if isinstance(value, Mapping) else value


def _pairs(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _pairs(value, f"{prefix}{key}.")
        else:
            values = value if isinstance(value, list | tuple) else [value]
            yield f"{prefix}{key}", tuple(map(_frozen, values))


def _frozen(value: object) -> object:
    """Lists as tuples, which can be hashed."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _of_a_grid(value: "Axes") -> "Axes":
    """Refuse settings that all SAEs of a run share, any given twice, and too many SAEs."""
    names = [key for key, _ in value]
    twice = dict.fromkeys(key for key in names if names.count(key) > 1)
    lines = [f"grid: {_show(key)} is given twice, as a.b and below a; keep one" for key in twice]
    lines += [line for key, values in value for line in _axis_mistakes(key, values)]
    if (count := math.prod(len(values) for _, values in value)) > MOST_POINTS:
        lines.append(f"grid: {count:,} SAEs a hookpoint came, wanted at most {MOST_POINTS}")
    if lines:
        raise PydanticCustomError("grid", "{lines}", {"lines": "\n".join(lines)})
    return value


def _axis_mistakes(key: str, values: tuple[Any, ...]) -> Iterator[str]:
    keys = grid_keys()
    shown = f"grid.{key}" if key.isprintable() else f"grid: {_show(key)}"
    if key not in keys:
        shared = key in {leaf.name for leaf in _leaves(TrainConfig)}
        why = "all SAEs of a run share it" if shared else "unknown setting"
        near = "" if shared else suggest(key, keys)
        yield f"{shown}: {why}{near or '; wanted sae.*, seed, or such as optim.lr'}"
    elif not values:
        yield f"{shown}: [] came, wanted at least one value"
    elif len({value_name(each) for each in values}) < len(values):
        yield f"{shown}: {_show(values)} came, wanted each value once"


_Int = Annotated[int, BeforeValidator(_number)]
_Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]

Count = Annotated[_Int, Field(ge=1), Wanted("a whole number of at least 1")]
Amount = Annotated[_Int, Field(ge=0), Wanted("a whole number of at least 0")]
Context = Annotated[_Int, Field(ge=2), Wanted("a whole number of at least 2")]
Seed = Annotated[_Int, Field(ge=0, lt=2**32), Wanted(f"a whole number from 0 to {2**32 - 1}")]
Positive = Annotated[_Float, Field(gt=0), Wanted("a number above 0")]
NotNegative = Annotated[_Float, Field(ge=0), Wanted("a number of at least 0")]
Share = Annotated[_Float, Field(ge=0, le=1), Wanted("a share from 0 to 1")]
Power = Annotated[_Float, Field(gt=0, le=1), Wanted("a number above 0, at most 1")]
Fraction = Annotated[_Float, Field(ge=0, lt=1), Wanted("a number from 0 to below 1")]
Betas = Annotated[tuple[Fraction, Fraction], Wanted("two numbers, each from 0 to below 1")]
Span = Annotated[
    tuple[Share, Share],
    AfterValidator(_rising),
    Wanted("two shares from 0 to 1, the second not below the first"),
]
Prefixes = Annotated[
    tuple[Share, ...],
    AfterValidator(_to_the_end),
    Wanted("shares above 0 that rise to 1, the last of them"),
]
Switch = Annotated[bool, Wanted("true or false")]
Text = Annotated[str, Field(pattern=r"\S"), Wanted("text, in quotes where it looks like a number")]
Device = Annotated[
    str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$"), Wanted("auto, cpu, cuda or cuda:N")
]
Places = Annotated[
    tuple[Text, ...],
    BeforeValidator(_listed),
    Wanted("a list of hookpoints, at least one and each once"),
]
Axes = tuple[tuple[Text, tuple[Any, ...]], ...]
Grid = Annotated[
    Axes,
    BeforeValidator(_axes),
    AfterValidator(_of_a_grid),
    PlainSerializer(dict),
    Wanted("settings of an SAE, each with a list of values, such as sae.sparsity.l1: [4, 8]"),
]

# The settings


class Settings(BaseModel):
    """Base of every group of settings: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(Settings):
    """The language model whose activations are read."""

    name: Text = "builtin:"
    """Language model: 'builtin:' (in the package), a Hugging Face name or a local folder."""
    revision: Text | None = None
    """Branch, tag or commit of a model on the Hub; null takes its main branch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the language model; auto takes bfloat16 where the hardware has it."""


class DataConfig(Settings):
    """The text it reads."""

    source: Text = "builtin:"
    """Text: 'builtin:' (all built-in text), 'builtin:stdlib', 'builtin:facts', a Hugging Face
    data set, or a file or folder of text, JSONL or Parquet."""
    split: Text = "train"
    """Split of a Hugging Face data set."""
    column: Text = "text"
    """Column of the data set that holds the text, or token ids if it is tokenised already."""
    name: Text | None = None
    """Configuration of a Hugging Face data set that has several, such as 'en'."""
    streaming: Switch = False
    """Read a Hugging Face data set over the network as training goes, without storing it."""
    context: Context = 256
    """Tokens per sequence given to the language model, 64 to 2048."""
    heldout: Fraction = 0.05
    """Share of the documents kept for evaluation and never trained on, 0.01 to 0.1."""
    repeat: Switch = False
    """Read the text again from the start if it ends before the token budget does."""
    eval_tokens: Count = 100_000
    """Held-out tokens the evaluation reads, 1e5 to 1e7."""


@dataclass(frozen=True)
class Moment:
    """The settings of a sparsity that move, at one moment of the training."""

    coef: float = 0.0
    """What its penalty is multiplied by."""
    k: int = 0
    """Features active per token."""
    p: float = 1.0
    """The power of activations that its penalty adds up."""


TYPICAL_L0 = 32
"""Active features a token of most trained SAEs."""
NARROW = 0.1
"""A kernel's width in activations of usual size. At mlp_out of the bundled model and L0 32 (262,144
tokens, rate 4e-3) 0.15 left 58 % of the features dead and 0.25 still 56 %, 0.1 and 0.05 3 %."""


class SparsityConfig(Settings):
    """Base of the settings of each kind of sparsity: which there are, and how they move."""

    kind: Any  # narrowed by each class; here so that it comes first in files
    """What keeps the features sparse."""

    def at(self, done: float) -> Moment:
        """The settings that move, once the share `done` of the tokens is trained on."""
        return Moment()

    def wanted_l0(self) -> float | None:
        """The L0 that the penalty's coefficient is steered to; None where it is not."""
        return None

    def revival(self, d_in: int) -> tuple[int, float]:
        """Dead features that the auxiliary loss takes for each token, and its coefficient."""
        return 0, 0.0

    def arguments(self, d_in: int) -> dict[str, Any]:
        """All settings, as a sparsity of activations of this width takes them."""
        return self.model_dump()


class PenaltyConfig(SparsityConfig):
    """Sparse by a penalty, whose weight may be left to the L0 it is to give."""

    target_l0: Positive | None = None
    """Active features per token wanted, 8 to 128: training moves the penalty's weight, which then
    is only where it starts, until it has them; null keeps the weight."""

    def wanted_l0(self) -> float | None:
        """`target_l0`."""
        return self.target_l0


class L1Config(PenaltyConfig):
    """An L1 penalty."""

    l1: NotNegative = 5.0
    """Weight of the L1 penalty on activations of mean norm √d_in, 1 to 10; higher is sparser."""
    l1_warmup: Share = 0.05
    """Share of the tokens over which the L1 penalty rises from 0, 0 to 0.2."""

    def at(self, done: float) -> Moment:
        """The coefficient, which rises from 0 over `l1_warmup`."""
        return Moment(coef=self.l1 * warmed_up(done, self.l1_warmup))


class ReluL1Config(L1Config):
    """ReLU features under an L1 penalty weighted by decoder norms."""

    kind: Literal["relu_l1"] = "relu_l1"
    """ReLU features under an L1 penalty."""
    refit: Fraction = 0.1
    """Share of the tokens, at the end, that train the decoder alone and without penalty, which
    undoes the shrinkage the penalty causes, 0 to 0.2."""
    p_end: Power = 1.0
    """Power of the activations that the penalty adds up in the end, 0.2 to 1; it is 1 at first.
    Below 1 small activations are penalised more, and large ones shrink less."""
    p_ramp: Span = (0.1, 0.9)
    """From which to which share of the tokens the power goes from 1 to p_end."""

    def at(self, done: float) -> Moment:
        """The coefficient, and the power, which goes from 1 to `p_end` over `p_ramp`."""
        return replace(super().at(done), p=moving(1.0, self.p_end, done, self.p_ramp))


class KLargestConfig(SparsityConfig):
    """Only the largest features are active; no penalty."""

    k: Count = 16
    """Features active per token, 8 to 128; lower is sparser."""
    k_start: Count | None = None
    """Features active per token at first, k/4 to 4k; null keeps k throughout. Fewer than k leave
    more features alive where k is large: those found then stay in use."""
    k_ramp: Span = (0.8, 0.95)
    """From which to which share of the tokens k_start goes to k in equal steps, such as 0.8 0.95
    (while the learning rate falls) or 0 0.5."""
    auxk: Count | None = None
    """Dead features that rebuild the error left over, 128 to 4096; null takes d_in/2."""
    auxk_coef: NotNegative = 1 / 32
    """Weight of the dead features' loss, 0.01 to 0.1; 0 switches it off."""

    def at(self, done: float) -> Moment:
        """k, which goes from `k_start` to `k` over `k_ramp`."""
        start = self.k if self.k_start is None else self.k_start
        return Moment(k=round(moving(start, self.k, done, self.k_ramp)))

    def revival(self, d_in: int) -> tuple[int, float]:
        """`auxk` and its coefficient."""
        return self.auxk or d_in // 2, self.auxk_coef


class TopKConfig(KLargestConfig):
    """The k largest features of each token."""

    kind: Literal["topk"] = "topk"
    """The k largest features of each token."""


class BatchTopKConfig(KLargestConfig):
    """The k largest features of each token on average: n·k of a batch of n tokens."""

    kind: Literal["batchtopk"] = "batchtopk"
    """The k largest features of each token on average."""


class JumpReluConfig(PenaltyConfig):
    """Features above a learned threshold, under a penalty on how many are active."""

    kind: Literal["jumprelu"] = "jumprelu"
    """Features above a learned threshold."""
    l0_coef: NotNegative = 3.0
    """Weight of the penalty on active features, for activations of mean norm √d_in, 0.3 to 30;
    higher is sparser."""
    l0_warmup: Share = 0.2
    """Share of the tokens over which the penalty rises from 0, 0.05 to 1."""
    bandwidth: Positive | None = None
    """Width of the kernel around a threshold, and where thresholds start, 0.1 to 2; null: a tenth
    of the activations' size where target_l0 of them (else 32) make up a token, 0.1·√(d_in / L0).
    Too wide a kernel kills features, thresholds of too narrow a one hardly move."""
    tanh: NotNegative = 0.0
    """0 penalises the number of active features; above 0, the sum of tanh(tanh × activation ×
    decoder norm), such as 4."""
    preact_coef: NotNegative = 3e-4
    """Weight of the loss that lifts dead features towards their thresholds; 0 switches it off."""

    def at(self, done: float) -> Moment:
        """The coefficient, which rises from 0 over `l0_warmup`."""
        return Moment(coef=self.l0_coef * warmed_up(done, self.l0_warmup))

    def arguments(self, d_in: int) -> dict[str, Any]:
        """All settings, with the bandwidth that null stands for."""
        size = math.sqrt(d_in / (self.target_l0 or TYPICAL_L0))
        return super().arguments(d_in) | {"bandwidth": self.bandwidth or NARROW * size}


class GatedConfig(L1Config):
    """Features with a gate apart from their magnitude, under an L1 penalty on the gate."""

    kind: Literal["gated"] = "gated"
    """Features with a gate, under an L1 penalty on the gate alone."""


class SAEConfig(Settings):
    """The sparse autoencoder."""

    expansion_factor: Count = 8
    """Features per input dimension, 4 to 64: d_sae = expansion_factor × d_in."""
    d_sae: Count | None = None
    """Number of features, 1e3 to 1e6; overrides expansion_factor."""
    subtract_b_dec: Switch = True
    """Subtract the decoder bias from the input before encoding, where the input is rebuilt."""
    skip: Switch = False
    """Add a dense linear map of the input to what the features rebuild (a skip transcoder), where
    targets are other than inputs."""
    init: Literal["random", "data"] = "random"
    """Directions to start from: random ones, or those of tokens from the mean; data leaves fewer
    features dead under topk, at a little more error."""
    prefixes: Prefixes = (1.0,)
    """Shares of the features that learn to rebuild the input by themselves (Matryoshka), such as
    0.0625 0.125 0.25 0.5 1: the first become general, the rest specific; 1 alone is plain."""
    sparsity: ReluL1Config | TopKConfig | BatchTopKConfig | JumpReluConfig | GatedConfig = Field(
        default=ReluL1Config(), discriminator="kind"
    )
    """What keeps the features sparse: relu_l1 (an L1 penalty), topk (the k largest of each token),
    batchtopk (k a token on average), jumprelu (those above a learned threshold) or gated (an L1
    penalty on a gate alone)."""

    @field_validator("sparsity", mode="before")
    @classmethod
    def _default_kind(cls, value: object) -> object:
        if isinstance(value, Mapping) and "kind" not in value:
            return {"kind": _DEFAULT_KIND, **value}
        return value

    @model_validator(mode="after")
    def _fits(self) -> "SAEConfig":
        for name in ("auxk", "k", "k_start", "target_l0"):
            amount = getattr(self.sparsity, name, None)
            if self.d_sae is not None and amount is not None and amount > self.d_sae:
                raise _clash(f"sparsity.{name}", amount, "at most {other}", "d_sae", self.d_sae)
        return self

    def width(self, d_in: int) -> int:
        """Number of features d_sae for activations of width d_in."""
        return self.d_sae if self.d_sae is not None else self.expansion_factor * d_in

    def prefix_sizes(self, d_sae: int) -> tuple[int, ...]:
        """The prefixes as numbers of features, each once and at least 1."""
        return tuple(sorted({max(1, round(share * d_sae)) for share in self.prefixes}))


class OptimConfig(Settings):
    """Adam, its schedule, and the pool that mixes the activations."""

    lr: Positive = 2e-3
    """Peak learning rate of Adam, 5e-5 (1e8 tokens and more) to 4e-3 (1e6 tokens)."""
    batch: Count = 1024
    """Tokens per optimiser step, 1024 to 8192."""
    betas: Betas = (0.9, 0.999)
    """Adam's two decay rates, such as 0.9 0.999; 0 0.999 is common too."""
    lr_warmup: Share = 0.02
    """Share of the tokens over which the learning rate rises from 0, 0 to 0.1."""
    lr_decay: Share = 0.2
    """Share of the tokens, at the end, over which the learning rate falls to 0, 0 to 0.5."""
    dead_after: Count = 50_000
    """Tokens without firing after which a feature counts as dead, 5e4 to 1e7."""
    pool: Count = 131_072
    """Tokens whose activations are held in memory to be mixed, 1e5 to 1e6; far above batch."""
    grad_clip: Positive | None = 1.0
    """Largest norm of the gradient, 0.1 to 10; null leaves it unclipped."""
    llm_batch: Count = 16
    """Sequences the language model reads at a time, 4 to 128; lower needs less memory."""
    max_norm: Positive | None = None
    """Leave out tokens whose norm is above so many times the median, such as 10 where attention
    sinks dominate the loss; null keeps them. Special tokens are always left out."""

    @model_validator(mode="after")
    def _fits(self) -> "OptimConfig":
        if self.batch > self.pool:
            raise _clash("batch", self.batch, "at most {other}", "pool", self.pool)
        if self.lr_warmup + self.lr_decay > 1 + 1e-9:  # 1e-9: rounding of the sum
            wanted = "a sum of at most 1 with {other}"
            raise _clash("lr_warmup", self.lr_warmup, wanted, "lr_decay", self.lr_decay)
        return self


class FinetuneConfig(Settings):
    """The last part of the training, which also keeps what the language model predicts."""

    tokens: Amount = 0
    """Tokens, the last of all, on which the language model runs on with the reconstruction in
    place and its predictions count as much as the reconstruction, 2 to 10 % of all; 0 does
    without."""
    lr: Positive = 1e-3
    """Learning rate there, falling to 0 in proportion, a fifth to all of optim.lr."""


class CheckpointConfig(Settings):
    """Training state kept on disk, from which an interrupted run goes on."""

    minutes: Positive = 10
    """Minutes from one checkpoint to the next, 1 to 60."""
    every_tokens: Count | None = None
    """Tokens from one checkpoint to the next, whichever comes first; null goes by time alone."""
    keep: Count = 2
    """Checkpoints kept while the run is not complete; each holds the pool and three copies of the
    weights."""


class WandbConfig(Settings):
    """Weights & Biases, a mirror of metrics.jsonl."""

    project: Text | None = None
    """Weights & Biases project that gets a copy of the metrics; null sends nothing."""
    mode: Literal["online", "offline"] = "online"
    """Send the metrics at once (online) or keep them for `wandb sync` (offline)."""


class TrainConfig(Settings):
    """A whole training run."""

    model: ModelConfig = ModelConfig()
    """The language model."""
    data: DataConfig = DataConfig()
    """The text."""
    hookpoints: Places = ("layers.2.mlp_act",)
    """Where to read activations, such as layers.2.mlp_act or layers.*.mlp_out; one SAE each."""
    inputs: Places = ()
    """In place of hookpoints, train one map: where it reads, such as layers.2.mlp_in."""
    targets: Places = ()
    """Where the map writes, such as layers.2.mlp_out (a transcoder). Several hookpoints on a side,
    such as layers.*.mlp_out on both, make a crosscoder."""
    sae: SAEConfig = SAEConfig()
    """The sparse autoencoder."""
    optim: OptimConfig = OptimConfig()
    """The optimiser."""
    finetune: FinetuneConfig = FinetuneConfig()
    """The end-to-end fine-tuning."""
    tokens: Count = 1_500_000
    """Tokens to train on, 1e6 to 1e9."""
    seed: Seed = 0
    """Seed of every random choice, 0 to 4294967295."""
    grid: Grid = ()
    """Settings of which several values are trained side by side from one reading of the text, such
    as sae.sparsity.l1: [4, 8] and seed: [0, 1]: an SAE for each combination and hookpoint. May be
    any of sae, the optimiser's but for batch, pool, llm_batch and max_norm, and seed (that of the
    weights; the order of the text is that of the run's own)."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda or cuda:N; auto takes a GPU where there is one."""
    output: Text | None = None
    """Folder of the run; null derives checkpoints/<name> from the settings."""
    init_from: Text | None = None
    """Folder of a run or SAE whose weights to start from; null starts afresh."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Training state on disk."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""

    @model_validator(mode="before")
    @classmethod
    def _either(cls, data: Any) -> Any:
        """Where a map is wanted, nothing else is by default."""
        is_map = isinstance(data, Mapping) and (data.get("inputs") or data.get("targets"))
        return {"hookpoints": (), **data} if is_map else data

    @field_validator("hookpoints", "inputs", "targets")
    @classmethod
    def _once_each(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("given twice")
        return value

    @model_validator(mode="after")
    def _fits(self) -> "TrainConfig":
        self._check_places()
        if self.tokens < self.optim.batch:
            wanted = "at least {other}"
            raise _clash("tokens", self.tokens, wanted, "optim.batch", self.optim.batch)
        if self.tokens < self.finetune.tokens + self.optim.batch:
            wanted = "less by optim.batch at least than {other}"
            raise _clash("finetune.tokens", self.finetune.tokens, wanted, "tokens", self.tokens)
        return self

    def shares(self, done: float) -> tuple[float, float]:
        """How far training and fine-tuning are, 0 to 1 each, once the share `done` of all is."""
        start = 1 - self.finetune.tokens / self.tokens
        return min(1.0, done / start), max(0.0, done - start) / (1 - start) if start < 1 else 0.0

    def _check_places(self) -> None:
        """Hookpoints, or both sides of a map."""
        inputs, targets = ", ".join(self.inputs) or "none", ", ".join(self.targets) or "none"
        if not (self.hookpoints or self.inputs or self.targets):
            raise _clash("hookpoints", [], "at least one, or {other} of a map", "inputs", inputs)
        if self.hookpoints and (self.inputs or self.targets):
            wanted = "none beside a map's {other}"
            raise _clash("hookpoints", [*self.hookpoints], wanted, "targets", targets)
        if self.inputs and not self.targets:
            raise _clash("inputs", [*self.inputs], "{other} beside them", "targets", targets)
        if self.targets and not self.inputs:
            raise _clash("targets", [*self.targets], "{other} beside them", "inputs", inputs)


SHARED = ("optim.batch", "optim.pool", "optim.llm_batch", "optim.max_norm")
"""Settings of the optimiser that are about the text, which all SAEs of a run read together."""
MOST_POINTS = 256
"""SAEs that a grid may have at each hookpoint."""
RAMPS = {"p_ramp": "p_end", "k_ramp": "k_start"}
"""From when to when a setting of the sparsity moves, and what makes it move."""
EXACT = 1e15
"""Below it a float that is whole has all its digits, and is named by them."""

_DEFAULT_KIND = "relu_l1"
_KIND = "sae.sparsity.kind"


def _clash(key: str, value: object, wanted: str, other: str, limit: object) -> PydanticCustomError:
    """Two settings that do not fit each other; their keys are relative to the group that checks."""
    context = {"key": key, "value": value, "wanted": wanted, "other": other, "limit": limit}
    return PydanticCustomError("clash", "{key} does not fit {other}", context)


# Schedules


def warmed_up(done: float, share: float) -> float:
    """0 → 1 over the first `share` of the tokens."""
    return min(1.0, done / share) if share else 1.0


def moving(start: float, end: float, done: float, span: tuple[float, float]) -> float:
    """`start` → `end` in proportion, from one share of the tokens to another."""
    first, last = span
    if done >= last:
        return end
    if done <= first:
        return start
    return start + (end - start) * (done - first) / (last - first)


# Grids


def grid_keys() -> list[str]:
    """The settings that may differ between the SAEs of one run."""
    names = dict.fromkeys(leaf.name for leaf in _leaves(TrainConfig))
    own = ("sae", "optim", "seed")
    return [name for name in names if name.partition(".")[0] in own and name not in SHARED]


class Point(NamedTuple):
    """A combination of a grid's values, and the config with them in place and no grid."""

    settings: dict[str, Any]
    config: TrainConfig

    @property
    def suffix(self) -> str:
        """What tells its SAE from others in file names: '-l1=8-seed=1', '' without a grid."""
        pairs = self.settings.items()
        return "".join(f"-{key.rpartition('.')[2]}={value_name(value)}" for key, value in pairs)


def points(config: TrainConfig) -> list[Point]:
    """Every combination, the last setting changing fastest; without a grid the config alone.

    Another `sae.sparsity.kind` drops the settings of the config's own kind. Raises ConfigError
    naming every wrong setting, with two of its values where there are many.
    """
    if not config.grid:
        return [Point({}, config)]
    names, values = zip(*config.grid, strict=True)
    found, mistakes = [], dict[str, None]()
    for combination in itertools.product(*values):
        settings = dict(zip(names, combination, strict=True))
        try:
            own = _with(config, settings)
            _check_width(own, settings)
        except ConfigError as error:
            mistakes |= dict.fromkeys(f"grid.{line}" for line in str(error).splitlines())
        else:  # as they were understood: 1 and 1.0 are one number, and one name
            found.append(Point({key: attrgetter(key)(own) for key in names}, own))
    if not mistakes and len({point.suffix for point in found}) < len(found):
        mistakes["grid: two SAEs would be the same, as 1 and 1.0 are; wanted each value once"] = (
            None
        )
    if mistakes:
        raise ConfigError("\n".join(_three_each(mistakes)))
    return found


def _check_width(config: TrainConfig, settings: Mapping[str, Any]) -> None:
    """ConfigError where a factor of the grid is overridden, so that its SAEs are equally wide."""
    if "sae.expansion_factor" in settings and config.sae.d_sae is not None:
        raise ConfigError(
            f"sae.expansion_factor: sae.d_sae ({config.sae.d_sae}) overrides it; leave either out"
        )


def _three_each(mistakes: Iterable[str]) -> Iterator[str]:
    """At most three lines a setting: the first two and how many more there are."""
    by_key: dict[str, list[str]] = {}
    for line in mistakes:
        by_key.setdefault(line.partition(":")[0], []).append(line)
    for key, lines in by_key.items():
        more = len(lines) - 2
        yield from lines if more <= 1 else (*lines[:2], f"{key}: and {more} more")


def _with(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    data = config.model_dump(mode="json", exclude={"grid"})
    if _KIND in settings:
        _switch_kind(data, settings[_KIND])
    for key, value in settings.items():
        _put(data, key, value)
    return _validate(data, [])


def value_name(value: object) -> str:
    """A value as a part of a file name: 8 (8.0 too), 0.001, topk, 0.25_1."""
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
        value = int(value)
    if isinstance(value, list | tuple):
        return "_".join(map(value_name, value))
    return _safe(str(value).lower() if isinstance(value, bool | None) else str(value))


# For the command line


@dataclass(frozen=True)
class Flag:
    """One setting as a command-line option: `--<name> <type>`."""

    name: str
    type: str
    default: Any
    help: str
    many: bool = False


def flags() -> list[Flag]:
    """Every setting in order, those of all kinds of sparsity included, each name once."""
    same_name: dict[str, list[_Leaf]] = {}
    for leaf in _leaves(TrainConfig):
        same_name.setdefault(leaf.name, []).append(leaf)
    return [_flag(leaves) for leaves in same_name.values()]


def grid_help() -> str:
    """What `grid` is."""
    return " ".join((TrainConfig.model_fields["grid"].description or "").split())


def _flag(leaves: list["_Leaf"]) -> Flag:
    name, field, default, _ = leaves[0]
    text = " ".join((field.description or "").split())
    kinds = [leaf.kind for leaf in leaves if leaf.kind]
    if kinds:
        text += f" [{_KIND} {' or '.join(kinds)}]"
    return Flag(name, _type_name(field), default, text, _many(field))


def run_name(config: TrainConfig) -> str:
    """Name of the run's folder: model, hookpoints, sparsity, width, then what sweeps often vary."""
    model = config.model.name.rstrip(":/\\").replace("\\", "/").rsplit("/", 1)[-1]
    sides = dict.fromkeys(filter(None, (config.hookpoints, config.inputs, config.targets)))
    places = "-to-".join(map(_named, sides))
    sparsity, sae = config.sae.sparsity, config.sae
    width = f"x{sae.expansion_factor}" if sae.d_sae is None else f"d{sae.d_sae}"
    parts = [model, places, sparsity.kind, width]
    parts += ["grid", *(key.rpartition(".")[2] for key, _ in config.grid)] if config.grid else []
    if sae.skip:
        parts.append("skip")
    if len(sae.prefixes) > 1:
        parts.append("matryoshka")
    if config.finetune.tokens:
        parts.append("finetuned")
    standard = TrainConfig()
    for now, default, names in (
        (
            sparsity,
            type(sparsity)(),
            ("target_l0", "l1", "l0_coef", "p_end", "k", "k_start", "k_ramp"),
        ),
        (config.optim, standard.optim, ("lr",)),
        (config, standard, ("tokens", "seed")),
    ):
        for name in names:
            value = getattr(now, name, None)
            if value != getattr(default, name, None):
                parts.append(f"{name}_{value}")
    return "-".join(_safe(part) for part in parts)


def _named(places: tuple[str, ...]) -> str:
    first, *others = places
    return first.replace("*", "all") + (f"-and-{len(others)}-more" if others else "")


def _safe(text: str) -> str:
    """Only letters, digits, '.', '_' and '-', no leading dot or dash, at most 60 characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-")[:60] or "x"


# Reading and writing


def load(path: str | Path) -> TrainConfig:
    """The config that a run's YAML file holds. Raises ConfigError naming every mistake."""
    return _validate(_tidy(_read(Path(path)), TrainConfig), [])


def resolve(
    path: str | Path | None, overrides: Mapping[str, object], *, begun: bool = False
) -> TrainConfig:
    """The config of a YAML file (or the defaults) under `overrides`, dotted keys as typed.

    An override of `sae.sparsity.kind` drops the settings of the file's own kind. What is given
    must have an effect, which is not asked of a run that was `begun` already, as by `load`.
    Raises ConfigError naming every mistake of both.
    """
    data = _tidy({} if path is None else _read(Path(path)), TrainConfig)
    leaves = {leaf.name: leaf.field for leaf in _leaves(TrainConfig)}
    leaves |= {f"grid.{key}": leaves[key] for key in grid_keys()}
    if _KIND in overrides:
        _switch_kind(data, overrides[_KIND])
    lines: list[str] = []
    for key, value in overrides.items():
        known = key in leaves
        if not _put(data, key, _typed(value, leaves[key]) if known else value) and not known:
            lines.append(f"{key}: unknown setting; nothing goes below {key.rpartition('.')[0]}")
    config = _validate(data, lines)
    if not begun:
        refuse_idle_ramps(config)
    return config


def refuse_idle_ramps(config: TrainConfig) -> None:
    """ConfigError for a ramp that is given and moves nothing in any SAE of the run."""
    sparsities = [point.config.sae.sparsity for point in points(config)]
    for ramp, mover in RAMPS.items():
        having = [sparsity for sparsity in sparsities if ramp in type(sparsity).model_fields]
        given = [sparsity for sparsity in having if _is_given(sparsity, ramp)]
        if given and not any(_is_given(sparsity, mover) for sparsity in having):
            came, at = _show(getattr(given[0], ramp)), _show(getattr(given[0], mover))
            raise ConfigError(
                f"sae.sparsity.{ramp}: {came} came, but sae.sparsity.{mover} ({at}) moves nothing; "
                "change either"
            )


def _is_given(sparsity: SparsityConfig, name: str) -> bool:
    return getattr(sparsity, name) != type(sparsity).model_fields[name].default


def dump(config: TrainConfig) -> str:
    """The config as YAML that loads back to an equal config."""
    return dump_yaml(config.model_dump(mode="json"))


def dump_yaml(data: Any) -> str:
    """Plain data as YAML that `parse_yaml`, and any other reader, gives back as it was."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (3e-4 a number; no, off and 12:30 text), no key twice in a mapping."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[str, yaml.ScalarNode] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in first:
                line = first[key.value].start_mark.line + 1
                problem = f"{key.value!r} is given twice, first on line {line}; keep one"
                raise _DuplicateKey(None, None, problem, key.start_mark)
            first[key.value] = key
        return node

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        self._go_deeper(self.flow_level)
        super().fetch_flow_collection_start(TokenClass)

    def add_indent(self, column: int) -> bool:
        self._go_deeper(len(self.indents))
        return super().add_indent(column)

    def _go_deeper(self, depth: int) -> None:
        """PyYAML's time grows with the square of the depth: 20,000 brackets take 20 s."""
        if depth >= YAML_DEPTH:
            raise _TooMuchError(None, None, "nested too deeply", self.get_mark())

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:  # such as !!int abc
            raise yaml.MarkedYAMLError(None, None, str(error), node.start_mark) from None

    def construct_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value.replace("_", ""))


def parse_yaml(text: str) -> Any:
    """The content of a YAML text, read by the rules of _Loader.

    Raises yaml.YAMLError, also for aliases that repeat so much, or nest so deeply, that the result
    would be out of all proportion.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count_nodes(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Nodes of the document with every alias written out, each counted once and looked up after."""
    if id(node) in known:
        if not known[id(node)]:
            raise _TooMuchError(None, None, "a value that holds itself", node.start_mark)
        return known[id(node)]
    known[id(node)] = 0
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inner = node.value
    elif isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    known[id(node)] = 1 + sum(_count_nodes(part, known) for part in inner)
    if known[id(node)] > YAML_NODES:
        raise _TooMuchError(None, None, "aliases that repeat too much", node.start_mark)
    return known[id(node)]


class _TooMuchError(yaml.MarkedYAMLError):
    """A document that would fill the memory, or the stack."""


class _DuplicateKey(yaml.MarkedYAMLError):
    """A key that one mapping holds twice; YAML itself would silently take the last."""


class _Dumper(yaml.SafeDumper):
    """Quotes every text that either YAML 1.1 or _Loader would read as something else."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML writes U+0085 unescaped in plain and single quoted text and reads it as a newline
        return self.represent_scalar(_TAG + "str", data, None if data.isprintable() else '"')


_Loader.yaml_implicit_resolvers = {}  # without the rules of YAML 1.1
_TAG = "tag:yaml.org,2002:"
_DIGITS = "[0-9][0-9_]{0,200}"
for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", rf"[-+]?{_DIGITS}", list("-+0123456789")),
    (
        "float",
        rf"[-+]?(?:{_DIGITS}(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor(_TAG + "int", _Loader.construct_int)
_Dumper.add_representer(str, _Dumper.represent_str)


def _read(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file; {} where the file holds nothing but comments."""
    try:
        with path.open("rb") as file:  # which may be a pipe: sae train <(…)
            content = file.read(YAML_BYTES + 1)
        if len(content) > YAML_BYTES:
            raise ConfigError(f"{path}: more than {YAML_BYTES:,} bytes came, wanted settings")
        data = parse_yaml(content.decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(_missing(path)) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from None
    except UnicodeDecodeError as error:
        where = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path} line {where}: not UTF-8 text; save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(_syntax(path, error)) from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: {_show(data)} came, wanted settings, one 'key: value' a line, such as seed: 1"
        )
    return data


def _missing(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{path}: there is no folder {folder}; check the path"
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml"))
    near = suggest(path.name, names)
    if not near and names:
        near = f"; {folder} has " + ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return f"{path}: no such file{near or '; check the path'}"


def _syntax(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not valid YAML"
    where = f"{path} line {mark.line + 1}" if mark else str(path)
    if isinstance(error, _DuplicateKey):
        return f"{where}: {problem}"
    if isinstance(error, _TooMuchError):
        return f"{where}: {problem}; wanted settings such as seed: 1"
    hint = "indent with spaces and put text with : * # @ or & in quotes, such as 'builtin:'"
    return f"{where}: not valid YAML ({' '.join(problem.split())}); {hint}"


# Merging


def _tidy(data: Mapping[Any, Any], model: type[BaseModel]) -> dict[str, Any]:
    """A copy without empty groups (`optim:` with every line below it commented out)."""
    tidy: dict[str, Any] = {}
    for key, value in data.items():
        key = str(key)
        groups = _groups(model.model_fields[key]) if key in model.model_fields else {}
        if groups and value is None:
            continue
        if groups and isinstance(value, Mapping):
            value = _tidy(value, next(iter(groups.values())))
        tidy[key] = value
    return tidy


def _switch_kind(data: dict[str, Any], kind: object) -> None:
    """Drop from `data` the settings that belong to the kind of sparsity it had."""
    sae = data.get("sae")
    sparsity = sae.get("sparsity") if isinstance(sae, dict) else None
    if not isinstance(sparsity, dict):
        return
    before = sparsity.get("kind", _DEFAULT_KIND)
    kinds = _groups(SAEConfig.model_fields["sparsity"])
    if isinstance(before, str) and before != kind and before in kinds:
        for name in kinds[before].model_fields:
            sparsity.pop(name, None)


def _put(data: dict[str, Any], key: str, value: object) -> bool:
    """Set a dotted key; False where something other than a group is in the way.

    What stands there dotted, as in a grid, is replaced where it stands.
    """
    while "." in key and key not in data:
        group, _, key = key.partition(".")
        data = data.setdefault(group, {})
        if not isinstance(data, dict):
            return False
    data[key] = value
    return True


def _typed(value: object, field: FieldInfo) -> object:
    """An override as typed on the command line, read by the rules of YAML.

    Text stays as it is, so that `builtin:` and a commit of digits need no quotes.
    """
    if isinstance(value, list):
        alone = value[0] if len(value) == 1 else None
        if isinstance(alone, str) and alone.startswith("["):
            return _parse(alone)
        return [_typed(item, field) for item in value]
    if not isinstance(value, str):
        return value
    if _type_name(field) in ("int", "float", "bool") or (_many(field) and value.startswith("[")):
        return _parse(value)
    return None if _optional(field) and value in ("null", "~") else value


def _parse(text: str) -> object:
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return text
    return text if isinstance(value, dict) else value


# Checking


class _Mistake(NamedTuple):
    """A line to show and the settings it is about: one, or two that do not fit each other."""

    paths: tuple[Keys, ...]
    line: str


def _validate(data: dict[str, Any], lines: list[str]) -> TrainConfig:
    """The config, or a ConfigError with one line a mistake, after the `lines` there are already.

    pydantic compares two settings only once each is sound by itself. So what is wrong is taken
    out and the rest checked again, leaving aside comparisons with anything taken out.
    """
    wrong: set[Keys] = set()
    while True:
        try:
            config = TrainConfig.model_validate(data)
            break
        except ValidationError as error:
            mistakes = [_mistake(detail, data) for detail in error.errors(include_url=False)]
        for mistake in mistakes:
            about_wrong = any(path[:n] in wrong for path in mistake.paths for n in range(1, 9))
            if not about_wrong and mistake.line not in lines:
                lines.append(mistake.line)
        wrong.update(mistake.paths[0] for mistake in mistakes)
        # of two settings that do not fit, one goes: the second only where the first is a default
        if not [m for m in mistakes if any(_drop(data, path) for path in m.paths)]:
            raise ConfigError("\n".join(lines))
    if lines:
        raise ConfigError("\n".join(lines))
    points(config)
    return config


def _mistake(error: ErrorDetails, data: Mapping[Any, Any]) -> _Mistake:
    """One of pydantic's errors in plain words, and the settings it is about."""
    place = _locate(error["loc"])
    if error["type"] == "grid":
        return _Mistake((place.path,), error.get("ctx", {})["lines"])
    if error["type"] == "clash":
        return _clashing(place.path, error.get("ctx", {}))
    key = ".".join(place.path)
    if place.field is None:
        shown = key if key.isprintable() else _show(key)
        return _Mistake((place.path,), f"{shown}: unknown setting{_advice(place)}")
    value = _dig(data, place.path)
    groups = _groups(place.field)
    if error["type"] == "union_tag_invalid":
        key, value, groups = f"{key}.kind", _dig(data, (*place.path, "kind")), {}
    wanted = _below(groups) if groups else _wanted(place.field)
    near = suggest(value, _choices(place.field)) if isinstance(value, str) and not groups else ""
    return _Mistake((place.path,), f"{key}: {_show(value)} came, wanted {wanted}{near}")


def _below(groups: Mapping[str, type[BaseModel]]) -> str:
    names = [name for model in groups.values() for name in model.model_fields]
    return "settings below it: " + ", ".join(dict.fromkeys(names))


def _clashing(group: Keys, ctx: Mapping[str, Any]) -> _Mistake:
    paths = tuple((*group, *ctx[name].split(".")) for name in ("key", "other"))
    first, second = (".".join(path) for path in paths)
    wanted = ctx["wanted"].format(other=f"{second} ({ctx['limit']})")
    return _Mistake(paths, f"{first}: {_show(ctx['value'])} came, wanted {wanted}; change either")


class _Place(NamedTuple):
    path: Keys
    owner: type[BaseModel]
    field: FieldInfo | None


def _locate(loc: tuple[int | str, ...]) -> _Place:
    """The setting a pydantic location is about: no names of variants, no positions in lists."""
    owner, field, path = TrainConfig, None, ()
    inside: type[BaseModel] | None = TrainConfig
    groups: Mapping[str, type[BaseModel]] = {}
    for part in map(str, loc):
        if inside is None:
            if part not in groups:
                break
            inside = groups[part]
            continue
        owner, field, path = inside, inside.model_fields.get(part), (*path, part)
        groups = _groups(field) if field else {}
        inside = groups.get("")
    return _Place(path, owner, field)


def _advice(place: _Place) -> str:
    """What to write instead of an unknown setting."""
    *parents, name = place.path
    known = {leaf.name for leaf in _leaves(TrainConfig)}
    if name in known and "." in name:
        group, _, last = name.rpartition(".")
        return f"; in a file write `{last}:` indented below `{group.replace('.', ': ')}:`"
    own = place.owner.model_fields
    variants = _groups(SAEConfig.model_fields["sparsity"]).items()
    kinds = [kind for kind, model in variants if name in model.model_fields]
    if "kind" in own and kinds:
        return f"; it belongs to {_KIND}: {' or '.join(kinds)}"
    elsewhere = sorted(full for full in known if full.rpartition(".")[2] == name)
    if elsewhere:
        return f"; did you mean {' or '.join(map(repr, elsewhere))}?"
    siblings = {short: ".".join([*parents, short]) for short in own}
    for options in (siblings, {full.rpartition(".")[2]: full for full in sorted(known)}):
        if near := get_close_matches(name, options, n=1):
            return f"; did you mean {options[near[0]]!r}?"
    return f"; {'.'.join(parents) or 'a config'} has {', '.join(own)}"


def _dig(data: Any, path: Keys) -> Any:
    for part in path:
        data = data.get(part) if isinstance(data, Mapping) else None
    return data


def _drop(data: dict[Any, Any], path: Keys) -> bool:
    """Take a setting out; False where it is not there."""
    group = _dig(data, path[:-1])
    if not path or not isinstance(group, dict) or path[-1] not in group:
        return False
    del group[path[-1]]
    return True


def _show(value: object) -> str:
    """A value as one writes it in YAML, on one line, at most 60 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError):
        text = repr(value)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 60 else text[:57] + "..."


# Reading the types


class _Leaf(NamedTuple):
    name: str
    field: FieldInfo
    default: Any
    kind: str | None


def _leaves(model: type[BaseModel], prefix: str = "", kind: str | None = None) -> Iterator[_Leaf]:
    """Every single setting of a group and the groups below it, variants one after the other.

    But for `grid`, which holds settings itself.
    """
    for name, field in model.model_fields.items():
        groups = _groups(field)
        if "" in groups:
            yield from _leaves(groups[""], f"{prefix}{name}.")
        elif groups:
            yield _Leaf(f"{prefix}{name}.kind", field, _DEFAULT_KIND, None)
            for variant, group in groups.items():
                yield from _leaves(group, f"{prefix}{name}.", variant)
        elif not (kind and name == "kind") and name != "grid":
            yield _Leaf(prefix + name, field, field.default, kind)


def _groups(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """The models a field may hold, by kind; {"": model} where there is no choice, {} if none."""
    options = get_args(field.annotation) or (field.annotation,)
    models = [m for m in options if isinstance(m, type) and issubclass(m, BaseModel)]
    choice = field.discriminator is not None
    return {m.model_fields["kind"].default if choice else "": m for m in models}


def _types(field: FieldInfo) -> tuple[list[Any], list[Any]]:
    """The bare types a field accepts (None apart) and the notes made on them by Annotated."""
    union = get_origin(field.annotation) in (Union, UnionType)
    bare, notes = [], list(field.metadata)
    for option in get_args(field.annotation) if union else (field.annotation,):
        if get_origin(option) is Annotated:
            option, *more = get_args(option)
            notes += more
        bare.append(option)
    return bare, notes


def _optional(field: FieldInfo) -> bool:
    return NoneType in _types(field)[0]


def _many(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def _choices(field: FieldInfo) -> list[str]:
    """The names a setting chooses from, [] where it is not a choice."""
    groups = _groups(field)
    if groups:
        return [name for name in groups if name]
    return [str(v) for t in _types(field)[0] if get_origin(t) is Literal for v in get_args(t)]


def _type_name(field: FieldInfo) -> str:
    """int, float, bool, text or the choices, such as auto|float32|bfloat16."""
    bare = _types(field)[0][0]
    if _many(field):
        bare = get_args(field.annotation)[0]
        bare = get_args(bare)[0] if get_origin(bare) is Annotated else bare
    names = {int: "int", float: "float", bool: "bool", str: "text"}
    return "|".join(_choices(field)) or names[bare]


def _wanted(field: FieldInfo) -> str:
    """What a setting accepts, in words."""
    words = [note.text for note in _types(field)[1] if isinstance(note, Wanted)]
    text = "one of " + ", ".join(_choices(field)) if _choices(field) else words[-1]
    return f"{text}, or null" if _optional(field) else text
