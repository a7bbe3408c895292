"""Load the language model and its tokenizer: bundled, from a folder, or from the Hub."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sae import builtin
from sae.config import ModelConfig
from sae.errors import ModelError, suggest
from sae.hub import cache_only_if_silent

LONGEST = 1 << 24
"""A tokenizer that knows no limit says 1e30."""
HASHED_BYTES = 1 << 30
"""Of weights files larger than this only samples are hashed: whole ones take a second per GB."""
SAMPLES, SAMPLE_BYTES = 256, 1 << 16


@dataclass(frozen=True)
class LanguageModel:
    """A frozen transformer in eval mode, its tokenizer, and what it was loaded from.

    `revision` is the commit it came from, of a folder the identity of its weights; `context` its
    longest input in tokens, None without a limit.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    revision: str | None
    context: int | None


def load(config: ModelConfig, device: torch.device) -> LanguageModel:
    """Load in float32 (the weights of bf16 files too), in eval mode, gradients off.

    Raises:
        ModelError: no such model, a folder that holds none, or one without a tokenizer.
    """
    source = _locate(config.name)
    local = Path(source).is_dir()
    if local and config.revision is not None:
        raise ModelError(
            f"model.revision: {config.revision!r} came, but {config.name} lies on this disk and "
            "has no revisions; leave it out"
        )
    try:
        with nullcontext() if local else cache_only_if_silent(source), _no_progress_bar():
            model, tokenizer = _load(source, config.revision)
    except Exception as error:  # the Hub, safetensors, tokenizers: each has errors of its own
        first = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ModelError(
            f"model.name: {config.name!r} cannot be loaded as a transformers model{_near(source)}\n"
            f"  {first}\n"
            "  give 'builtin:', a folder with config.json and safetensors, or a Hub name"
        ) from error
    _check_tokenizer(config.name, tokenizer)
    settings: Any = model.config
    commit = getattr(settings, "_commit_hash", None) or config.revision
    return LanguageModel(
        model=model.to(device).eval().requires_grad_(False),
        tokenizer=tokenizer,
        name=config.name,
        revision=_identity(Path(source)) if local else commit,
        context=_context(settings, tokenizer),
    )


def predicts(model: PreTrainedModel) -> bool:
    """Whether the model predicts the next token: a masked-language-model head does not."""
    return model.can_generate() and not getattr(model.config, "is_encoder_decoder", False)


def _locate(name: str) -> str:
    """The bundled model's folder, a folder that holds a model, or a Hub name as it is."""
    if name.startswith(builtin.PREFIX.rstrip(":")) and ":" in name:
        return str(builtin.model_path(name))
    path = Path(name).expanduser() if name[:2] in ("~", "~/") else Path(name)
    try:
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise ModelError(f"model.name: {path} is not a model folder: it has no config.json")
            return str(path)
    except OSError as error:  # a name too long, a folder that may not be read
        raise ModelError(f"model.name: {name} cannot be read: {error.strerror}") from error
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"model.name: no folder {path}{_near(name)}")
    return name


def _identity(folder: Path) -> str:
    """16 hex digits of SHA-256 over the weights files of a folder.

    Of a file above HASHED_BYTES its size and SAMPLES pieces of it, the first with its header.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= HASHED_BYTES:
                digest.update(hashlib.file_digest(file, "sha256").digest())
                continue
            for start in range(0, size, size // SAMPLES):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return f"sha256:{digest.hexdigest()[:16]}"


def _near(name: str) -> str:
    """The neighbouring folder whose name is nearest to one that does not exist."""
    folder = Path(name).parent
    there = map(str, folder.iterdir()) if folder.is_dir() else ()
    return suggest(name, (path for path in there if path != name))


def _load(source: str, revision: str | None) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    settings = AutoConfig.from_pretrained(source, revision=revision)
    names: list[str] = getattr(settings, "architectures", None) or []
    has_head = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    kind = AutoModelForCausalLM if has_head else AutoModel
    model = kind.from_pretrained(
        source, revision=revision, dtype=torch.float32, use_safetensors=True
    )
    return model, AutoTokenizer.from_pretrained(source, revision=revision)


def _check_tokenizer(name: str, tokenizer: Any) -> None:
    """Without files of a tokenizer transformers makes one that knows only its special tokens."""
    ids = tokenizer("a b c", add_special_tokens=False)["input_ids"]
    if set(ids) <= set(tokenizer.all_special_ids):
        raise ModelError(
            f"model.name: {name} has no tokenizer, or one without a vocabulary\n"
            "  copy tokenizer.json and tokenizer_config.json (or vocab.json and merges.txt, "
            "vocab.txt, tokenizer.model) of the model into its folder"
        )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Without transformers' bar, which says nothing of the model that we do not."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            with warnings.catch_warnings():  # that HF_HUB_DISABLE_PROGRESS_BARS forbids the Hub's
                warnings.simplefilter("ignore")
                logging.enable_progress_bar()


def _context(settings: Any, tokenizer: Any) -> int | None:
    """The smaller of the model's and the tokenizer's limit (RoBERTa: 514 positions, 512 tokens)."""
    limits = (getattr(settings, "max_position_embeddings", None), tokenizer.model_max_length)
    return min((n for n in limits if isinstance(n, int) and n < LONGEST), default=None)
