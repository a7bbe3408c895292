"""Folders of any architecture load frozen and in float32, and what cannot be loaded is said in at
most three lines."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from planted import tiny_model

from sae import builtin, language_model
from sae.config import ModelConfig
from sae.errors import ModelError
from sae.language_model import LanguageModel

CPU = torch.device("cpu")


def load(name: Path | str, **settings: Any) -> LanguageModel:
    return language_model.load(ModelConfig(name=str(name), **settings), CPU)


def save(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bert(kind: Any, tokenizer: Any) -> Any:
    torch.manual_seed(0)
    return kind(
        hf.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=40,
        )
    )


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    model = tiny_model(len(tokenizer)).to(torch.bfloat16).train()
    return save(tmp_path_factory.mktemp("models") / "gpt2", model, tokenizer)


def test_a_folder_with_gpt2(gpt2: Path, tokenizer: Any) -> None:
    lm = load(gpt2)
    assert (lm.name, lm.context) == (str(gpt2), 32)
    assert not lm.model.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in lm.model.parameters())
    original = tiny_model(len(tokenizer)).to(torch.bfloat16)
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(parameter, original.get_parameter(name).float())
    ids = lm.tokenizer("the tides", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [tokenizer("the tides")["input_ids"]]
    assert lm.model(ids).logits.shape == (1, ids.shape[1], len(tokenizer))


@pytest.mark.parametrize("kind", [hf.BertModel, hf.BertForMaskedLM])
def test_a_folder_with_bert_has_no_head(tmp_path: Path, bert_tokenizer: Any, kind: Any) -> None:
    original = bert(kind, bert_tokenizer)
    lm = load(save(tmp_path, original, bert_tokenizer))
    assert lm.context == 40
    ids = torch.tensor([[2, 7, 8, 3]])
    encoder = (original if kind is hf.BertModel else original.bert).eval()
    torch.testing.assert_close(lm.model(ids)[0], encoder(ids)[0])


def test_the_tokenizer_may_know_a_smaller_limit(gpt2: Path, tmp_path: Path) -> None:
    lm = load(gpt2)
    lm.tokenizer.model_max_length = 20
    assert load(save(tmp_path, lm.model, lm.tokenizer)).context == 20


def test_the_bundled_model() -> None:
    lm = load("builtin:")
    assert lm.name == "builtin:" and lm.context is not None
    assert lm.model.config.activation_function == "relu"
    assert lm.tokenizer("a")["input_ids"][0] == lm.tokenizer.bos_token_id


def test_weights_on_the_disk_have_an_identity(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load(gpt2)
    assert lm.revision is not None and lm.revision.startswith("sha256:")
    folder = Path(shutil.copytree(gpt2, tmp_path / "copy"))
    assert load(folder).revision == lm.revision
    for limit in (language_model.HASHED_BYTES, 1000):  # of the whole file, and of samples
        monkeypatch.setattr(language_model, "HASHED_BYTES", limit)
        before = load(folder).revision
        other = load(folder).model
        other.get_parameter("transformer.wte.weight").mul_(2)
        other.save_pretrained(folder)
        assert load(folder).revision != before


@pytest.mark.parametrize("name", ["builtin:", None])
def test_a_revision_of_a_model_on_the_disk_is_refused(gpt2: Path, name: str | None) -> None:
    with pytest.raises(ModelError, match=r"model.revision: 'main' came"):
        load(name or gpt2, revision="main")


def test_no_progress_bar_of_transformers(
    gpt2: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import logging

    monkeypatch.setattr(logging, "_tqdm_active", True)
    load(gpt2)
    assert logging.is_progress_bar_enabled() and "Loading" not in "".join(capfd.readouterr())


def refused(name: Path | str, *wanted: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(name)
    message = str(caught.value)
    assert message.startswith("model.name") and len(message.splitlines()) <= 3
    for part in wanted:
        assert part in message


def test_what_is_not_there(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(gpt2.parent)
    refused("./gpt3", "no folder gpt3")
    refused(gpt2.parent / "gtp2", "no folder", "did you mean", "gpt2'?")
    refused("gpt", "'gpt' cannot be loaded", "did you mean 'gpt2'?", "give 'builtin:'")
    refused("nobody/nothing", "'nobody/nothing' cannot be loaded")
    refused("~/no/such/model", "no folder")
    refused("~nobody/model", "no folder")
    refused(tmp_path, "no config.json")
    refused("builtin:big", "no built-in model 'builtin:big'")
    refused("x" * 300, "cannot be")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", json.dumps({"model_type": "no such type"})),
        ("model.safetensors", "not tensors at all"),
        ("model.safetensors", None),
        ("tokenizer.json", None),
        ("tokenizer.json", "{}"),
    ],
)
def test_broken_folders(gpt2: Path, tmp_path: Path, file: str, content: str | None) -> None:
    lm = load(gpt2)
    folder = save(tmp_path / "model", lm.model, lm.tokenizer)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    refused(folder, "cannot be loaded as a transformers model")


def test_a_model_without_tokenizer(tmp_path: Path, bert_tokenizer: Any) -> None:
    tiny_model(300).save_pretrained(tmp_path / "gpt2")
    bert(hf.BertModel, bert_tokenizer).save_pretrained(tmp_path / "bert")
    for name in ("gpt2", "bert"):
        refused(tmp_path / name, name, "has no tokenizer", "copy tokenizer.json")


def test_a_missing_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "__file__", str(tmp_path / "a" / "b" / "__init__.py"))
    refused("builtin:", "the bundled model is missing")
