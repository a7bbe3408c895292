"""What all tests share: one thread, no network, no progress bars, and fixed text with a tokenizer
made from it."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
LONG = ["browser", "resume", "cli", "exchange", "publishing", "contributing", "memory"]
LONG += ["training", "sparsity", "terminal", "runs", "safety", "steps", "records"]
"""Files that take longest. They begin, so that at the end no worker waits for another's file."""


def pytest_configure() -> None:
    """Before any test module imports the libraries, which read these variables once."""
    os.environ.update(QUIET)
    os.fsync = lambda fd: None  # a third of the time of many tests, and no test cuts the power
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files of LONG first."""
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def text_file() -> Path:
    """4 KB of prose and code that never change."""
    return Path(__file__).parent / "data" / "tides.txt"


@pytest.fixture(scope="session")
def paragraphs(text_file: Path) -> list[str]:
    """The fixed text in pieces of uneven length."""
    return text_file.read_text(encoding="utf-8").strip().split("\n\n")


@pytest.fixture(scope="session")
def tokenizer(paragraphs: list[str]) -> Any:
    """A byte-level BPE with BOS in front of every text, like that of the bundled model."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core: Any = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|bos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(paragraphs, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|bos|>", eos_token="<|bos|>"
    )


@pytest.fixture(scope="session")
def bert_tokenizer(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Whole words in lower case between [CLS] and [SEP]."""
    import re

    import transformers

    words = sorted(set(re.findall(r"\w+|[^\w\s]", " ".join(paragraphs).lower())))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    file = tmp_path_factory.mktemp("bert") / "vocab.txt"
    file.write_text("\n".join(vocabulary), encoding="utf-8")
    return transformers.BertTokenizerFast(vocab=str(file))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A scanned SAE whose features are known."""
    from planted import planted

    return planted(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def dictionary(made: Any) -> Any:
    """Its feature dictionary."""
    from sae.records import FeatureDictionary

    return FeatureDictionary(made.folder / "features")
