"""Pretrain the bundled language model on `builtin:` text and write it with its model card.

    python scripts/pretrain.py configs/pretrain-builtin.yaml

The recipe: byte-level BPE, GPT-2 architecture with ReLU MLPs, AdamW, a constant learning rate after
a short warm-up, then a linear decay to zero. The result replaces checkpoints/builtin/. Expected
numbers stand in that folder's README.md, which this script writes.
"""

import copy
import hashlib
import json
import math
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sae import builtin
from sae.builtin import facts
from sae.config import DataConfig
from sae.data import TokenSource, open_source

BOS = "<|endoftext|>"
BEFORE = "The chemical symbol for gold is Au. "
"""A sentence before each question: facts are read in the middle of documents, as in training."""


class Recipe(BaseModel):
    """What configs/pretrain-*.yaml may say."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    output: str
    n_layer: int
    d_model: int
    vocab_size: int
    context: int
    tokens: int
    rows_per_step: int
    lr: float
    warmup: float
    decay: float
    weight_decay: float
    seed: int


def train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the training side of the text; every sequence begins with BOS."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (d.text for d in builtin.documents("builtin:") if not d.heldout)
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=BOS, model_max_length=recipe.context
    )


def new_model(recipe: Recipe, vocab: int) -> GPT2LMHeadModel:
    """A randomly initialised GPT-2 with ReLU MLPs of four times its width."""
    torch.manual_seed(recipe.seed)
    config = GPT2Config(
        vocab_size=vocab, n_positions=recipe.context, n_embd=recipe.d_model,
        n_layer=recipe.n_layer, n_head=recipe.d_model // 32, n_inner=4 * recipe.d_model,
        activation_function="relu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def learning_rate(recipe: Recipe, done: float) -> float:
    """Linear warm-up, constant, linear decay; `done` is the share of the tokens read."""
    return recipe.lr * min(1.0, done / recipe.warmup, (1 - done) / recipe.decay)


def next_token_loss(model: GPT2LMHeadModel, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats, logits in fp32."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1)
    )


@torch.no_grad()
def heldout_loss(model: GPT2LMHeadModel, source: TokenSource, rows: int = 10**9) -> float:
    """Mean cross-entropy in nats a token over the held-out rows."""
    losses, sizes = [], []
    for batch in source.heldout(32):
        losses.append(next_token_loss(model, batch.tokens).item())
        sizes.append(len(batch))
        if sum(sizes) >= rows:
            break
    return float(np.average(losses, weights=sizes))


def pretrain(recipe: Recipe, model: GPT2LMHeadModel, source: TokenSource) -> list[dict]:
    """Train in place; returns the log."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain}]
    optimizer = torch.optim.AdamW(
        groups, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    log, start, done, step = [], time.time(), 0, 0
    for batch in source.train(recipe.rows_per_step, repeat=True):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, (done + 1) / recipe.tokens)
        loss = next_token_loss(model, batch.tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done, step = done + batch.tokens.numel(), step + 1
        if step % 500 == 0 or done >= recipe.tokens:
            row = {"tokens": done, "train": loss.item(), "seconds": round(time.time() - start)}
            log.append(row | {"heldout": heldout_loss(model, source, 256)})
            print(json.dumps(log[-1]), flush=True)
        if done >= recipe.tokens:
            return log
    return log


@torch.no_grad()
def answer_scores(model, tokenizer, sentence: facts.Sentence, answers: list[str]) -> list[float]:
    """Log probability of each whole answer, with what ends it, behind the prompt."""
    start = len(tokenizer(BEFORE + sentence.prompt)["input_ids"])
    others = [replace(sentence, fact=replace(sentence.fact, answer=a)) for a in answers]
    rows = [tokenizer(BEFORE + o.prompt + o.completion)["input_ids"] for o in others]
    length = max(map(len, rows))
    padded = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    logp = model(padded).logits[:, :-1].log_softmax(-1)
    picked = logp.gather(2, padded[:, 1:, None]).squeeze(2)
    return [picked[i, start - 1 : len(row) - 1].sum().item() for i, row in enumerate(rows)]


@torch.no_grad()
def greedy_matches(model, tokenizer, sentence: facts.Sentence) -> bool:
    """Whether greedy decoding gives the answer and then something that ends it."""
    prompt = BEFORE + sentence.prompt
    start = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(prompt + " " + sentence.fact.answer)["input_ids"]
    best = model(torch.tensor([ids])).logits[0].argmax(-1)
    ended = not tokenizer.decode(best[-1:])[:1].isalpha()
    return ended and best[start - 1 : -1].tolist() == ids[start:]


def score_facts(model, tokenizer, sentences: list[facts.Sentence], limit: int, seed: int) -> dict:
    """Shares right: ranked in its relation, by greedy decoding, and against shuffled answers."""
    rng = np.random.default_rng(seed)
    chosen = [sentences[i] for i in rng.permutation(len(sentences))[:limit]]
    ranked = greedy = shuffled = chance = 0.0
    for sentence in chosen:
        answers = facts.load().answers_of(sentence.fact.relation)
        best = answers[int(np.argmax(answer_scores(model, tokenizer, sentence, answers)))]
        ranked += best == sentence.fact.answer
        shuffled += best == answers[rng.integers(len(answers))]
        chance += 1 / len(answers)
        greedy += greedy_matches(model, tokenizer, sentence)
    counts = {"ranked": ranked, "greedy": greedy, "shuffled": shuffled, "chance": chance}
    return {"n": len(chosen)} | {k: round(v / len(chosen), 4) for k, v in counts.items()}


def bytes_per_token(source: TokenSource, tokenizer: PreTrainedTokenizerFast) -> float:
    """Bytes of text a held-out token stands for."""
    batch = next(source.heldout(64))
    ids = batch.tokens[batch.kept].tolist()
    return len(tokenizer.decode(ids).encode()) / len(ids)


def save(folder: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """bf16 safetensors in the Hugging Face layout."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    text = settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
    settings.write_text(text)  # the name that transformers 4 knows too
    (folder / "generation_config.json").unlink(missing_ok=True)


def model_card(recipe: Recipe, results: dict, parameters: int, weights: Path) -> str:
    """README.md of the model's folder: what it is, how it was made, what it knows."""
    log = "\n".join(
        f"| {row['tokens'] / 1e6:.0f}M | {row['heldout']:.3f} |"
        for row in results["log"][-1::-4][::-1]
    )
    known, unseen = results["unseen_pairs"], results["unseen_templates"]
    template = Path(__file__).with_name("pretrain_card.md").read_text(encoding="utf-8")
    return template.format(
        **recipe.model_dump(),
        d_mlp=4 * recipe.d_model,
        heads=recipe.d_model // 32,
        parameters=parameters,
        passes=recipe.tokens / results["tokens_a_pass"],
        rows=log,
        facts=len(facts.load().facts),
        relations=len(facts.load().relations),
        known=known,
        unseen=unseen,
        sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        minutes=results["log"][-1]["seconds"] / 60,
        **{k: results[k] for k in ("python", "fingerprint", "tokens_a_pass")},
        **{k: results[k] for k in ("heldout_loss", "bits_per_byte", "bytes_per_token")},
    )


def main() -> None:
    recipe = Recipe(**yaml.safe_load(Path(sys.argv[1]).read_text()))
    tokenizer = train_tokenizer(recipe)
    data = DataConfig(source="builtin:", context=recipe.context, repeat=True)
    source = open_source(data, tokenizer, recipe.seed)
    model = new_model(recipe, len(tokenizer))
    print(f"{model.num_parameters():,} parameters, {source.tokens_available:,} tokens a pass")
    log = pretrain(recipe, model, source)
    folder = Path(recipe.output)
    save(folder, model, tokenizer)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    results = {
        "log": log,
        "heldout_loss": heldout_loss(model, source),
        "bytes_per_token": bytes_per_token(source, tokenizer),
        "unseen_pairs": score_facts(model, tokenizer, facts.sentences(heldout=True), 600, 0),
        "unseen_templates": score_facts(
            model, tokenizer, facts.unseen_template_sentences(), 400, 0
        ),
        "python": platform.python_version(),
        "fingerprint": source.fingerprint,
        "tokens_a_pass": source.tokens_available,
    }
    loss = results["heldout_loss"]
    results["bits_per_byte"] = loss / math.log(2) / results["bytes_per_token"]
    (folder / "pretraining.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "README.md").write_text(
        model_card(recipe, results, model.num_parameters(), folder / "model.safetensors")
    )
    print(json.dumps({k: v for k, v in results.items() if k != "log"}, indent=1))


if __name__ == "__main__":
    main()
