"""A tiny language model, an SAE on its neurons and a scanned dictionary, for tests to share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sae.autoencoder import SparseAutoencoder
from sae.data import TokenBatch
from sae.features import ScanSettings, scan
from sae.sparsity import ReluL1, Sparsity
from sae.store import write_atomic, write_manifest

SITE = "layers.1.mlp_act"
CONTEXT, ROWS, NEURONS, D_SAE = 32, 40, 24, 37
DEAD, DENSE = 5, 7
SOURCE = {"model": "tiny", "revision": "abc", "data": "f00d"}

_LICENCE = "This software comes as it is, without a warranty of any kind — naïve 日本語 🙂.\n"
_WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "green",
    "birds",
    "sang",
    "to",
    "an",
    "old",
    "king",
)


def byte_tokenizer() -> Any:
    """A byte-level BPE tokenizer with an end-of-text token, trained on a little text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(_WORDS), _LICENCE], trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def tiny_model(vocabulary: int) -> Any:
    """A random two-layer GPT-2 with ReLU, whose norms have gains that are not 1."""
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(
        hf.GPT2Config(
            n_layer=2,
            n_embd=16,
            n_inner=NEURONS,
            n_head=2,
            n_positions=CONTEXT,
            vocab_size=vocabulary,
            activation_function="relu",
            initializer_range=0.5,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    for name, weight in model.named_parameters():
        if "ln_" in name and name.endswith("weight"):
            torch.nn.init.uniform_(weight, 0.5, 2)
    return model.eval().requires_grad_(False)


def make_sae(sparsity: Sparsity | None = None) -> SparseAutoencoder:
    """Random directions with biases that make features rare; one never fires, one always does."""
    sae = SparseAutoencoder(NEURONS, D_SAE, sparsity or ReluL1(1.0))
    with torch.no_grad():
        sae.b_enc.copy_(torch.linspace(-0.8, 0.1, D_SAE))
        sae.b_enc[DEAD], sae.b_enc[DENSE] = -1e6, 100
    return sae


def rows(tokenizer: Any) -> TokenBatch:
    """Packed documents, a third of which begin with the same passage; separators are not kept."""
    generator = torch.Generator().manual_seed(0)
    ids, document, position = [], [], []
    while len(ids) < ROWS * CONTEXT:
        number = document[-1] + 1 if document else 0
        drawn = torch.randint(len(_WORDS), (20,), generator=generator).tolist()
        body = " ".join(_WORDS[i] for i in drawn)
        own = tokenizer.encode(_LICENCE + body if number % 3 == 0 else body)
        ids += [*own, tokenizer.eos_token_id]
        document += [number] * (len(own) + 1)
        position += [*range(len(own)), -1]
    size = ROWS * CONTEXT
    tokens, document, position = (
        torch.tensor(column[:size]).view(ROWS, CONTEXT) for column in (ids, document, position)
    )
    return TokenBatch(tokens, document, position, tokens != tokenizer.eos_token_id)


@dataclass(frozen=True)
class Planted:
    """Everything a scan was made from, and the folder of the SAE that holds its result."""

    model: Any
    tokenizer: Any
    sae: SparseAutoencoder
    rows: TokenBatch
    folder: Path


def planted(run: Path, settings: ScanSettings | None = None) -> Planted:
    """A run under `run` with one SAE, scanned in batches of 7 rows and chunks of 50 tokens."""
    tokenizer = byte_tokenizer()
    model, sae, text = tiny_model(len(tokenizer)), make_sae(), rows(tokenizer)
    folder = run / "saes" / SITE
    sae.save_pretrained(folder, {"hookpoint": SITE}, inputs=torch.eye(NEURONS))
    write_manifest(folder, SOURCE)
    write_atomic(run / "config.yaml", "seed: 0\n")
    batches = [text[i : i + 7] for i in range(0, ROWS, 7)]
    settings = settings or ScanSettings(memory=64 * 50 * 4 * D_SAE, blocks=4)
    scan(model, tokenizer, {SITE: folder}, batches, 10**9, source=SOURCE, settings=settings)
    return Planted(model, tokenizer, sae, text, folder)
