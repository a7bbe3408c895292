"""Text → packed token sequences that keep, for every token, its document and its position.

Documents are tokenised, joined with the tokenizer's separator and cut into rows of exactly
`context` tokens, each beginning (and ending) with the special tokens that the tokenizer adds. Some
documents are held out by a hash of their key: training never reads them. Data that fits in memory
is read in an order that is a pure function of (seed, epoch); streams are read in order.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sae.builtin.document import Document, hash_unit
from sae.builtin.facts import LATENTS
from sae.config import DataConfig
from sae.documents import Documents
from sae.errors import DataError

DOCUMENTS_PER_CHUNK = 256
SAMPLED_DOCUMENTS = 64
"""Documents of a stream that its fingerprint is made from."""


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens; `position` counts inside the document, −1 where the row adds a token.

    `kept` is False at special tokens (by id). `latents` are those of `builtin:facts`, −1 unknown.
    """

    tokens: Int[Tensor, "batch seq"]
    document: Int[Tensor, "batch seq"]
    position: Int[Tensor, "batch seq"]
    kept: Bool[Tensor, "batch seq"]
    latents: Int[Tensor, "batch seq n_latents"] | None = None

    COLUMNS: ClassVar = ("tokens", "document", "position", "kept")
    """What every batch has, by name."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Any) -> "TokenBatch":
        latents = None if self.latents is None else self.latents[rows]
        columns = self.columns().values()
        return TokenBatch(*(column[rows] for column in columns), latents=latents)

    def columns(self) -> dict[str, Tensor]:
        """Those of COLUMNS."""
        return {name: getattr(self, name) for name in self.COLUMNS}

    @property
    def source(self) -> Int[Tensor, "n 2"]:
        """Document and position of every kept token."""
        return torch.stack([self.document[self.kept], self.position[self.kept]], dim=1)

    @property
    def memory_bytes(self) -> int:
        """The bytes of all columns."""
        columns = (*self.columns().values(), self.latents)
        return sum(column.nbytes for column in columns if column is not None)

    @staticmethod
    def join(batches: "list[TokenBatch]") -> "TokenBatch":
        """All rows one below the other."""

        def cat(name: str) -> Tensor:
            return torch.cat([getattr(batch, name) for batch in batches])

        latents = None if batches[0].latents is None else cat("latents")
        return TokenBatch(*map(cat, TokenBatch.COLUMNS), latents=latents)


class TokenSource:
    """The rows of one text: `train` and `heldout` sides, never a document in both.

    `tokens_available` is the number of kept training tokens of one pass, `heldout_available` that
    of the held-out side; None where only a stream knows. `fingerprint` names the text read: 16 hex
    digits of SHA-256 over the keys and texts of its documents (of a stream: the first few).
    """

    def __init__(self, documents: Documents, packer: "Packer", config: DataConfig, seed: int):
        self.name = config.source
        self.special_ids = packer.special_ids
        self.tokens_available: int | None = None
        self.heldout_available: int | None = None if config.heldout else 0
        self._documents, self._packer, self._config, self._seed = documents, packer, config, seed
        self._kept: dict[bool, TokenBatch] = {}
        self._always_heldout: str | None = None
        read = list(itertools.islice(documents, None if documents.in_memory else SAMPLED_DOCUMENTS))
        if not read:
            raise DataError(f"data.source: {self.name} holds no text; give a source with text")
        self.fingerprint = _fingerprint(documents.origin, read)
        if documents.in_memory:
            self._keep(read)

    def train(
        self, batch: int, *, repeat: bool | None = None, start: int = 0
    ) -> Iterator[TokenBatch]:
        """Batches of `batch` training rows, the last of each pass may be shorter.

        Ends with the data unless `repeat` (default: data.repeat). The first `start` batches, over
        any number of passes, are left out; a stream has to read them once more.
        """
        repeat = self._config.repeat if repeat is None else repeat
        for epoch in itertools.count() if repeat else range(1):
            found = 0
            for rows in self._rows(batch, heldout=False, order=[self._seed, epoch]):
                found += 1
                if found > start:
                    yield rows
            if not found:  # no row at all: another pass would find none either
                return
            start = max(start - found, 0)

    def heldout(self, batch: int) -> Iterator[TokenBatch]:
        """Batches of held-out rows, the last may be shorter, in one order for every seed."""
        return self._rows(batch, heldout=True, order=0)

    def preview(self, rows: int = 2, tokens: int = 60) -> list[str]:
        """The first tokens of the first rows, decoded with their special tokens."""
        batch = next(self.train(rows, repeat=False), None)
        if batch is None or len(batch) < rows:
            raise self._too_little(rows)
        decode = self._packer.tokenizer.decode
        return [str(decode(row[:tokens].tolist())) for row in batch.tokens]

    def _keep(self, documents: list[Document]) -> None:
        """Tokenise all; of two documents or more, at least one is held out."""
        if self._config.heldout > 0 and len(documents) > 1:
            self._always_heldout = min((d.key for d in documents), key=hash_unit)
        for heldout in (False, True):
            chunks = list(self._packer.rows(self._side(documents, heldout=heldout)))
            self._kept[heldout] = TokenBatch.join(chunks or [self._packer.no_rows()])
        if not len(self._kept[False]):
            raise self._too_little(1)
        self.tokens_available = int(self._kept[False].kept.sum())
        self.heldout_available = int(self._kept[True].kept.sum())

    @property
    def memory_bytes(self) -> int:
        """What is kept of the text between passes."""
        return sum(rows.memory_bytes for rows in self._kept.values())

    def _rows(self, batch: int, *, heldout: bool, order: Any) -> Iterator[TokenBatch]:
        if heldout not in self._kept:
            rows = self._packer.rows(self._side(self._documents, heldout=heldout))
            yield from _batches(rows, batch)
            return
        kept = self._kept[heldout]
        mixed = torch.from_numpy(np.random.default_rng(order).permutation(len(kept)))
        for start in range(0, len(kept), batch):
            yield kept[mixed[start : start + batch]]

    def _side(
        self, documents: Iterable[Document], *, heldout: bool
    ) -> Iterator[tuple[int, Document]]:
        for index, document in enumerate(documents):
            if self._is_heldout(document) == heldout:
                yield index, document

    def _is_heldout(self, document: Document) -> bool:
        if document.heldout is not None:
            return document.heldout
        return document.key == self._always_heldout or (
            hash_unit(document.key) < self._config.heldout
        )

    def _too_little(self, rows: int) -> DataError:
        return DataError(
            f"data.source: {self.name} holds less than {rows} training rows of "
            f"{self._config.context} tokens; give more text or a smaller data.context"
        )


class Packer:
    """Documents → rows of exactly `context` tokens.

    Inside, tokens stand in columns of an int64 array [3 + n_latents, n]: id, document, position,
    latents.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int, *, latents: bool):
        self.tokenizer, self.context = tokenizer, context
        self.n_latents = len(LATENTS) if latents and tokenizer.is_fast else 0  # needs offsets
        self.special_ids = sorted(set(tokenizer.all_special_ids))
        self.prefix, self.suffix = added_ids(tokenizer)
        ends = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id)
        self.separator = [i for i in ends if i is not None][:1]
        self.body = context - len(self.prefix) - len(self.suffix)
        if self.body < 2:
            added = context - self.body
            raise DataError(
                f"data.context: {context} leaves no room for text beside the {added} special "
                f"tokens of a row; give at least {added + 2}"
            )

    def rows(self, documents: Iterable[tuple[int, Document]]) -> Iterator[TokenBatch]:
        """Chunks of full rows; what is left at the end, less than a row, is dropped."""
        rest = np.zeros((3 + self.n_latents, 0), dtype=np.int64)
        documents = iter(documents)
        while chunk := list(itertools.islice(documents, DOCUMENTS_PER_CHUNK)):
            columns = np.concatenate([rest, *self._encode(chunk)], axis=1)
            full = columns.shape[1] // self.body * self.body
            rest = columns[:, full:]
            if full:
                yield self._batch(columns[:, :full])

    def no_rows(self) -> TokenBatch:
        """A batch without rows."""
        return self._batch(np.zeros((3 + self.n_latents, 0), dtype=np.int64))

    def _encode(self, chunk: list[tuple[int, Document]]) -> Iterator[np.ndarray]:
        """The columns of each document, its separator behind it."""
        ids, offsets = self._tokenise([document.text for _, document in chunk])
        for (index, document), own, where in zip(chunk, ids, offsets, strict=True):
            n = len(own)
            columns = np.full((3 + self.n_latents, n + len(self.separator)), -1, dtype=np.int64)
            columns[0, :n], columns[0, n:] = own, self.separator
            columns[1] = index
            columns[2, :n] = np.arange(n)
            if document.spans and where:
                _label(columns[3:, :n], document, where)
            yield columns

    def _tokenise(self, texts: list[Any]) -> tuple[list[list[int]], list[Any]]:
        """Token ids and, where latents are known, the characters each token covers."""
        kinds = {type(text) for text in texts}
        if len(kinds) > 1:
            raise DataError("data.column: holds text and token ids; give a column of one kind")
        if kinds == {list}:
            self._check_ids(texts)
            return texts, [None] * len(texts)
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=self.n_latents > 0,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        offsets: Any = encoded["offset_mapping"] if self.n_latents else [None] * len(texts)
        return encoded["input_ids"], offsets  # pyright: ignore[reportReturnType]

    def _check_ids(self, rows: list[list[int]]) -> None:
        low, high = min(map(min, rows)), max(map(max, rows))
        if low < 0 or high >= len(self.tokenizer):
            raise DataError(
                f"data.column: token ids from {low} to {high} came, but the model's tokenizer has "
                f"0 to {len(self.tokenizer) - 1}; give the model they were made for, or the text"
            )

    def _batch(self, columns: np.ndarray) -> TokenBatch:
        left, right = len(self.prefix), self.context - len(self.suffix)
        rows = columns.reshape(len(columns), -1, self.body)
        rows = np.pad(rows, ((0, 0), (0, 0), (left, self.context - right)), constant_values=-1)
        tokens, document, position = (column.copy() for column in rows[:3])
        tokens[:, :left], tokens[:, right:] = self.prefix, self.suffix
        document[:, :left], document[:, right:] = document[:, [left]], document[:, [right - 1]]
        kept = ~np.isin(tokens, self.special_ids)
        latents = None
        if self.n_latents:
            latents = torch.from_numpy(rows[3:].transpose(1, 2, 0).astype(np.int16))
        tensors = map(torch.from_numpy, (tokens, document, position, kept))
        return TokenBatch(*tensors, latents=latents)


def open_source(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> TokenSource:
    """Find, read and tokenise a text.

    Raises:
        DataError: no such data, no such column, no text, or too little for one row.
    """
    latents = config.source in ("builtin:", "builtin:facts")
    packer = Packer(tokenizer, config.context, latents=latents)
    try:
        return TokenSource(Documents(config), packer, config, seed)
    except OSError as error:  # no right to read, a disk that fails, a name too long
        raise DataError(f"data.source: {config.source} cannot be read: {error.strerror}") from error


def added_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and behind a text of its own accord."""
    plain: Any = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: Any = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def _label(columns: np.ndarray, document: Document, offsets: list[tuple[int, int]]) -> None:
    """Write the value of each latent [n_latents n] at each token's last character."""
    last = np.asarray([max(start, end - 1) for start, end in offsets])
    for span in document.spans:
        left, right = np.searchsorted(last, [span.start, span.end])
        columns[span.latent, left:right] = span.value


def _batches(chunks: Iterator[TokenBatch], batch: int) -> Iterator[TokenBatch]:
    """Rows that come in chunks of any size, in batches of `batch`; the last may be shorter."""
    waiting: list[TokenBatch] = []
    for chunk in chunks:
        waiting.append(chunk)
        if sum(map(len, waiting)) < batch:
            continue
        joined = TokenBatch.join(waiting)
        full = len(joined) // batch * batch
        for start in range(0, full, batch):
            yield joined[start : start + batch]
        waiting = [joined[full:]]
    if sum(map(len, waiting)):
        yield TokenBatch.join(waiting)


def _fingerprint(origin: str, documents: list[Document]) -> str:
    digest = hashlib.sha256(origin.encode("utf-8", "surrogatepass"))
    for document in documents:
        digest.update(document.key.encode("utf-8", "surrogatepass"))
        digest.update(str(document.text).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
