"""Everything that can be known, and can fail, before training: model, text, widths, needs."""

import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sae import checkpoint, language_model, steps
from sae.activations import read
from sae.autoencoder import SparseAutoencoder, locate, locate_all, read_config
from sae.config import TYPICAL_L0, TrainConfig, points, run_name
from sae.data import TokenBatch, TokenSource, open_source
from sae.errors import ConfigError, DataError, RunError, SAEError
from sae.hooks import Hookpoint, resolve, width
from sae.language_model import LanguageModel
from sae.memory import MicroBatch
from sae.routes import Route
from sae.sparsity import Sparsity, make_sparsity, settings_of
from sae.store import LOCK, folder_name, versions

ADAM_COPIES = 4
"""Weights, gradients and Adam's two moments."""
SOURCE_BYTES = 16
"""Document and position of a token in the pool."""
TIMED_STEPS = 3
PREDICTIONS = 4
"""Plain and spliced ones, the logits these are made of, and their gradient."""
LONGEST_NAME = 200
"""Characters of an SAE's folder; file systems take 255, and temporary ones have longer names."""


@dataclass(frozen=True)
class Inputs:
    """A language model and the text it reads, on a device."""

    device: torch.device
    lm: LanguageModel
    source: TokenSource


@dataclass(frozen=True)
class Member:
    """One SAE of a run: what it reads and rebuilds, its own config, and what of it a grid sets."""

    route: Route
    config: TrainConfig
    settings: dict[str, Any]
    d_in: int
    d_out: int

    @property
    def d_sae(self) -> int:
        """Its number of features."""
        return self.config.sae.width(self.d_in)


@dataclass(frozen=True)
class Plan(Inputs):
    """A checked run: `lines` says in words what it will read, make and need.

    `members`: the SAEs by name, one for each hookpoint (or the map) and point of the grid.
    `kept_as` is the type of the activations in the pool: under autocast some stay in fp32.
    """

    config: TrainConfig
    dtype: torch.dtype
    members: dict[str, Member]
    widths: dict[Hookpoint, int]
    kept_as: dict[Hookpoint, torch.dtype]
    output: Path

    @property
    def hookpoints(self) -> list[Hookpoint]:
        """All that are read, each once."""
        return list(self.widths)

    def lines(self) -> Iterator[tuple[str, str]]:
        """Pairs of what and how much, for the table shown before the start."""
        config, available = self.config, self.source.tokens_available
        yield "model", f"{self.lm.name} on {self.device}, {str(self.dtype).removeprefix('torch.')}"
        yield "text", f"{self.source.name}, fingerprint {self.source.fingerprint}"
        for name, member in self.members.items():
            to = f" → {member.d_out}" if member.route.is_map else ""
            size = f"{member.d_in} → {member.d_sae:,} features{to}"
            yield "SAE", f"{name}: {size}, {_recipe(member)}"
        have = "unknown (a stream)" if available is None else f"{available:,}"
        yield "tokens", f"{config.tokens:,} needed, {have} in one pass of the training text"
        if available is not None and config.tokens > available:
            yield "", f"so the text is READ {config.tokens / available:.1f} TIMES (data.repeat)"
        if self.source.heldout_available == 0:
            yield "", "NOTHING IS HELD OUT, so sae evaluate will have no text; see data.heldout"
        if tuned := config.finetune.tokens:
            yield "", f"on the last {tuned:,} of them the model's predictions count too"
        yield "pool", f"{config.optim.pool:,} tokens are read before the first step"
        yield "memory", f"about {self.memory_bytes() / 1e9:.2f} GB beside the libraries"
        kept = (config.checkpoint.keep + 1) * self.checkpoint_bytes() / 1e6
        yield "disk", f"{self.sae_bytes() / 1e6:.0f} MB in {self.output}"
        yield "", f"and up to {kept:,.0f} MB of checkpoints until it is complete"

    def memory_bytes(self) -> int:
        """Model, pool, four copies of every SAE's weights, and the text where that is kept."""
        weights = sum(p.nbytes for p in self.lm.model.parameters())
        text = self.source.memory_bytes if self.device.type == "cpu" else 0
        saes = ADAM_COPIES * self.sae_bytes()
        return weights + text + self.pool_bytes() + saes + self.predictions_bytes()

    def predictions_bytes(self) -> int:
        """What fine-tuning holds of the model's predictions, fp32, for about a batch of tokens."""
        vocabulary = self.lm.model.config.get_text_config().vocab_size
        tokens = max(self.config.optim.batch, self.config.data.context)
        return 4 * PREDICTIONS * tokens * vocabulary if self.config.finetune.tokens else 0

    def pool_bytes(self) -> int:
        """The activations kept to be mixed, and the document and position of each."""
        acts = sum(d * self.kept_as[point].itemsize for point, d in self.widths.items())
        return self.config.optim.pool * (acts + SOURCE_BYTES)

    def checkpoint_bytes(self) -> int:
        """The pool, weights and Adam's two moments."""
        return self.pool_bytes() + (ADAM_COPIES - 1) * self.sae_bytes()

    def sae_bytes(self) -> int:
        """fp32 weights of every SAE."""
        return 4 * sum(
            each.d_sae * (each.d_in + each.d_out + 1)
            + each.d_out
            + (each.d_in * each.d_out if each.config.sae.skip else 0)
            for each in self.members.values()
        )

    def seconds_per_token(self) -> float:
        """Time of the language model's part, measured on one batch."""
        rows = next(self.source.train(self.config.optim.llm_batch, repeat=False))
        seconds = _seconds(
            self.device, 1, lambda: read(self.lm.model, self.hookpoints, rows, self.dtype)
        )
        return seconds / rows.tokens.numel()


def _recipe(member: Member) -> str:
    config, target = member.config, member.config.sae.sparsity.wanted_l0()
    sparsity = sparsity_of(config, member.d_in)
    amount = f"{sparsity.l0_knob} {sparsity.config()[sparsity.l0_knob]:g}"
    steered = f"L0 {target:g} by steering {sparsity.l0_knob}" if target else amount
    p = config.sae.sparsity.at(1.0).p
    power = f", p 1 → {p:g}" if p != 1 else ""
    return f"{sparsity.kind} {steered}{power}{' and W_skip' if config.sae.skip else ''}"


def plan(config: TrainConfig, *, resuming: bool = False, begun: bool = False) -> Plan:
    """Load the model and the text and check that they suffice; writes nothing.

    Unless `resuming`, the output may not exist yet. `begun`: there is a checkpoint to go on with,
    so that the weights to start from are not needed any more.

    Raises:
        SAEError: what is wrong, before any time is spent.
    """
    output = output_of(config)
    if not resuming:
        _refuse_output(output)
    _check_pool(config)
    if not begun:
        _check_starts(config)
    device = pick_device(config.device)
    lm = open_model(config, device)
    routes = _routes(lm, config)
    widths = {point: width(lm.model, point) for route in routes for point in route.points}
    members = _members(routes, config, widths)
    for name, member in members.items():
        _check_member(name, member)
        if config.init_from is not None and not begun:
            _check_start(config.init_from, name, member, lm)
    _check_predicts(config, lm)
    source = open_source(config.data, lm.tokenizer, config.seed)
    _check_amount(config, source)
    dtype = pick_dtype(config.model.dtype, device)
    made = Plan(
        device=device,
        lm=lm,
        source=source,
        config=config,
        dtype=dtype,
        members=members,
        widths=widths,
        kept_as=_types(lm, list(widths), dtype),
        output=output,
    )
    _check_room(made)
    return made


def _routes(lm: LanguageModel, config: TrainConfig) -> list[Route]:
    """An SAE for each hookpoint, or the one map that is wanted."""
    if not config.inputs:
        return [Route.at(point) for point in resolve(lm.model, config.hookpoints)]
    inputs, targets = (tuple(resolve(lm.model, s)) for s in (config.inputs, config.targets))
    return [Route(inputs, targets)]


def _members(
    routes: list[Route], config: TrainConfig, widths: dict[Hookpoint, int]
) -> dict[str, Member]:
    """Each point of the grid at each place; ConfigError where a name is too long for a folder."""
    found, grid = {}, points(config)
    for route in routes:
        sides = (route.inputs, route.targets)
        d_in, d_out = (sum(widths[point] for point in side) for side in sides)
        for point in grid:
            own = Member(route, point.config, point.settings, d_in, d_out)
            found[f"{route}{point.suffix}"] = own
    if config.grid and len(longest := max(map(folder_name, found), key=len)) > LONGEST_NAME:
        raise ConfigError(
            f"grid: an SAE would be named {longest[:60]}…, {len(longest)} characters, wanted at "
            f"most {LONGEST_NAME}; vary fewer settings at a time"
        )
    return found


def _types(
    lm: LanguageModel, hookpoints: list[Hookpoint], dtype: torch.dtype
) -> dict[Hookpoint, torch.dtype]:
    """The type in which activations arrive, tried on two tokens."""
    ids = torch.zeros(1, 2, dtype=torch.long)
    acts, _ = read(lm.model, hookpoints, TokenBatch(ids, ids, ids, ids == 0), dtype)
    return {point: values.dtype for point, values in acts.items()}


def output_of(config: TrainConfig) -> Path:
    """The folder of the run."""
    given = config.output or str(Path("checkpoints") / run_name(config))
    return Path(given).expanduser()


def environment(plan: Plan) -> dict[str, Any]:
    """What the bits of a run depend on beside its config."""
    device = plan.device
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "cpu": f"{_processor()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "dtype": str(plan.dtype),
        "model": f"{plan.lm.name} {plan.lm.revision or ''}".strip(),
        "text": plan.source.fingerprint,
        **versions(),
    }


def _processor() -> str:
    """The model of CPU: libraries choose their code by it, and so the order of sums."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except (OSError, UnicodeDecodeError):
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in first.splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    wanted = ("model name", "cpu family", "model", "CPU part")
    return " ".join(fields[name] for name in wanted if name in fields)


def estimate(plan: Plan) -> list[tuple[str, str]]:
    """How long the run will take, from one batch of text and a few steps on random activations."""
    config = plan.config
    reading = plan.seconds_per_token()
    stepping = sum(_step_seconds(plan, name) for name in plan.members) / config.optim.batch
    tokens = config.tokens - config.finetune.tokens
    seconds = (tokens + config.optim.pool) * reading + tokens * stepping
    more = ", and the fine-tuning" if config.finetune.tokens else ""
    return [("time", f"about {_duration(seconds)} ({tokens / seconds:,.0f} tokens/s){more}")]


def _step_seconds(plan: Plan, name: str) -> float:
    """Time of one training step of an SAE as sparse as a trained one."""
    member = plan.members[name]
    config, route, sparsity = member.config, member.route, sparsity_of(member.config, member.d_in)
    shape = member.d_in, member.d_sae, sparsity, member.d_out, not route.is_map
    sae = SparseAutoencoder(*shape, skip=config.sae.skip, device=plan.device)
    x = torch.randn(config.optim.batch, member.d_in, device=plan.device)
    y = torch.randn(config.optim.batch, member.d_out, device=plan.device) if route.is_map else x
    with torch.no_grad():
        pre = sae.pre(x[:64]).flatten()
        active = min(len(x[:64]) * TYPICAL_L0, len(pre))
        sae.b_enc.sub_(pre.topk(active).values[-1])
    adam = torch.optim.Adam(sae.parameters(), fused=True)
    chunk = MicroBatch(f"the step of {name}", "tokens", "lower optim.batch or sae.d_sae")

    gradients = partial(
        steps.step,
        *(sae, x, y, config.sae.sparsity.at(1.0)),
        prefixes=config.sae.prefix_sizes(sae.d_sae),
        matmul_dtype=plan.dtype,
    )

    def step() -> None:
        chunk.fit(len(x), lambda n: gradients(chunk=n))
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        adam.step()

    return _seconds(plan.device, TIMED_STEPS, step)


def sparsity_of(config: TrainConfig, d_in: int) -> Sparsity:
    """The sparsity that a config asks for, of activations of this width."""
    chosen, given = config.sae.sparsity, config.sae.sparsity.arguments(d_in)
    return make_sparsity(chosen.kind, **{name: given[name] for name in settings_of(chosen.kind)})


def _seconds(device: torch.device, times: int, work: Callable[[], object]) -> float:
    """Mean time of `work`, after a first run that is not counted."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    work()
    start = now()
    for _ in range(times):
        work()
    return (now() - start) / times


def _duration(seconds: float) -> str:
    """In the unit that people would use: 40 s, 3 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def open_inputs(config: TrainConfig, device: torch.device) -> Inputs:
    """Load the model, its tokenizer and the text of a config."""
    lm = open_model(config, device)
    return Inputs(device, lm, open_source(config.data, lm.tokenizer, config.seed))


def open_model(config: TrainConfig, device: torch.device) -> LanguageModel:
    """Load the model of a config and its tokenizer.

    Raises:
        DataError: it reads fewer tokens at once than `data.context`.
    """
    lm = language_model.load(config.model, device)
    if lm.context is not None and config.data.context > lm.context:
        raise DataError(
            f"data.context: {config.data.context} tokens came, but {lm.name} reads at most "
            f"{lm.context}; give at most {lm.context}"
        )
    return lm


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ConfigError for a device that is not there."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", name):
        raise ConfigError(f"device: {name} came, wanted auto, cpu, cuda or cuda:N")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {name} came, but torch sees {torch.cuda.device_count()} CUDA devices; "
            "give cpu or auto"
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the hardware multiplies it (CUDA, or a CPU with AVX512-BF16 or AMX)."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every torch
    fast = any(getattr(torch.cpu, name, bool)() for name in asked)
    return torch.bfloat16 if fast else torch.float32


def _refuse_output(output: Path) -> None:
    """RunError where something is already, or where nothing can be written."""
    try:
        taken = output.is_symlink() and not output.exists()
        if output.is_dir():
            taken = any(entry.name != LOCK for entry in output.iterdir())
        if taken or (output.exists() and not output.is_dir()):
            raise RunError(f"output: {output} exists already; {_way_out(output)}")
        above = next(p for p in (output, *output.absolute().parents) if p.exists())
    except OSError as error:  # a name too long, a folder that may not be listed
        raise RunError(f"output: {output} cannot be used ({error.strerror})") from None
    if not above.is_dir():
        raise RunError(f"output: {above} is a file, not a folder; give --output another folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise RunError(f"output: {above} cannot be written to; give --output another folder")


def _way_out(output: Path) -> str:
    if (output / checkpoint.FOLDER).is_dir():
        return f"go on with that run by --resume {output}, or give --output another folder"
    return "give --output another folder, or delete it"


def _check_pool(config: TrainConfig) -> None:
    """The pool must have room for one more forward pass whenever less than a batch is left."""
    optim, context = config.optim, config.data.context
    needed = optim.batch + optim.llm_batch * context
    if optim.pool < needed:
        raise ConfigError(
            f"optim.pool: {optim.pool} came, wanted at least {needed} (optim.batch {optim.batch} + "
            f"optim.llm_batch {optim.llm_batch} × data.context {context}); change one of them"
        )


def _check_amount(config: TrainConfig, source: TokenSource) -> None:
    """Refuse at once a text that is known to be too short."""
    batch, have = config.optim.batch, source.tokens_available
    ahead = config.optim.pool if config.finetune.tokens else 0  # read, and then not trained on
    if have is None or config.data.repeat or have >= config.tokens + ahead:
        return
    enough = max(have - ahead, 0) // batch * batch
    less = f"--tokens {enough} or less, " if enough else ""
    pool = f" and {ahead:,} for the pool, which fine-tuning leaves behind," if ahead else ""
    raise DataError(
        f"tokens: {config.tokens:,}{pool} wanted, but {source.name} has {have:,} to train on; give "
        f"{less}more text, or --data.repeat true"
    )


def _check_predicts(config: TrainConfig, lm: LanguageModel) -> None:
    if config.finetune.tokens and not language_model.predicts(lm.model):
        raise ConfigError(
            f"finetune.tokens: {config.finetune.tokens} came, but {lm.name} has no head that "
            "predicts the next token; give 0"
        )


def _check_member(name: str, member: Member) -> None:
    """The sparsity fits the width."""
    config, sparsity = member.config, member.config.sae.sparsity
    for key in ("k", "k_start", "target_l0"):
        if (amount := getattr(sparsity, key, None) or 0) > member.d_sae:
            raise ConfigError(
                f"sae.sparsity.{key}: {amount:g} came, wanted at most the {member.d_sae} features "
                f"of {name}"
            )
    if config.sae.skip and not member.route.is_map:
        raise ConfigError(
            f"sae.skip: true came, but {name} is rebuilt from itself; give inputs and targets "
            "that differ, or leave it out"
        )


def _check_starts(config: TrainConfig) -> None:
    """SAEError where no SAE at `init_from` is of the kind and size that one of the run has.

    That is known before the model is loaded; `_check_start` knows the rest.
    """
    if config.init_from is None:
        return
    with _about_the_start():
        there = {folder: _traits(read_config(folder)) for folder in locate_all(config.init_from)}
    for point in points(config):
        wanted = _wanted_traits(point.config)
        unlike = [_unlike(folder, traits, wanted) for folder, traits in there.items()]
        if all(unlike):
            raise ConfigError(unlike[0])


def _check_start(start: str, name: str, member: Member, lm: LanguageModel) -> None:
    """SAEError where `start` holds an SAE of another kind, size or place, or a damaged one."""
    sae, route = member.config.sae, member.route
    with _about_the_start():
        folder = locate(start, name)
        old = read_config(folder)
        SparseAutoencoder.from_pretrained(folder)  # now, while nothing is written yet
    _check_origin(lm, str(route), folder, old.get("metadata") or {})
    wanted = _wanted_traits(member.config) | {
        "d_in": member.d_in,
        "d_sae": member.d_sae,
        "d_out": member.d_out,
        "subtract_b_dec": sae.subtract_b_dec and not route.is_map,
    }
    if unlike := _unlike(folder, _traits(old), wanted):
        raise ConfigError(unlike)


@contextmanager
def _about_the_start() -> Iterator[None]:
    """Name the setting in what is raised."""
    try:
        yield
    except SAEError as error:
        raise type(error)(f"init_from: {error}") from None


def _traits(old: dict[str, Any]) -> dict[str, Any]:
    """What of an SAE's cfg.yaml must be as in the run that starts from it."""
    plain = {key: old[key] for key in ("d_in", "d_sae", "d_out", "subtract_b_dec")}
    return plain | {"skip": old.get("skip", False), "sparsity.kind": old["sparsity"]["kind"]}


def _wanted_traits(config: TrainConfig) -> dict[str, Any]:
    """Those of an SAE of the run that are known without the model."""
    sae = config.sae
    known = {"skip": sae.skip, "sparsity.kind": sae.sparsity.kind}
    known |= {} if sae.d_sae is None else {"d_sae": sae.d_sae}
    return known | ({"subtract_b_dec": sae.subtract_b_dec} if config.hookpoints else {})


def _unlike(folder: Path, traits: dict[str, Any], wanted: dict[str, Any]) -> str:
    """How an SAE is not as wanted, in words; "" where it is."""
    wrong = [f"{key} {traits[key]}, not {v}" for key, v in wanted.items() if traits[key] != v]
    return f"init_from: {folder} has {', '.join(wrong)}; make sae.* the same" if wrong else ""


def _check_origin(lm: LanguageModel, place: str, folder: Path, metadata: dict[str, Any]) -> None:
    """ConfigError where an SAE says that it is of another model or hookpoint.

    A model may have moved: it is the same where its revision is.
    """
    model, revision = metadata.get("model", lm.name), metadata.get("revision")
    moved = revision is not None and revision == lm.revision
    if model != lm.name and not moved:
        raise ConfigError(f"init_from: {folder} is of the model {model}, not of {lm.name}")
    if metadata.get("hookpoint", place) != place:
        raise ConfigError(f"init_from: {folder} is of {metadata['hookpoint']}, not of {place}")


def _check_room(plan: Plan) -> None:
    """Refuse what cannot fit into the memory or onto the disk there is."""
    needed, there = plan.memory_bytes(), _memory(plan.device)
    if there is not None and needed > there:
        widths, pool = plan.widths.values(), plan.config.optim.pool
        most = max(member.d_sae for member in plan.members.values())
        largest = f"sae.d_sae: {most:,} features"
        if plan.pool_bytes() > ADAM_COPIES * plan.sae_bytes():
            largest = f"optim.pool: {pool:,} tokens of {sum(widths):,} activations"
        raise ConfigError(
            f"{largest} need {needed / 1e9:,.0f} GB of memory in all, {plan.device} has "
            f"{there / 1e9:,.0f} GB; lower it, or train fewer hookpoints at a time"
        )
    above = next(p for p in (plan.output, *plan.output.absolute().parents) if p.exists())
    free = shutil.disk_usage(above).free
    needed = plan.sae_bytes() + plan.checkpoint_bytes()
    if needed > free:
        raise RunError(
            f"output: {plan.output} needs {needed / 1e6:,.1f} MB, the disk has "
            f"{free / 1e6:,.1f} MB left; make room or give --output another disk"
        )


def _memory(device: torch.device) -> int | None:
    """Bytes of memory a device has in all; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # no sysconf on Windows
        return None
