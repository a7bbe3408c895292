"""Where documents come from: built-in text, local files, and anything `datasets` can open."""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sae import builtin
from sae.builtin.document import Document
from sae.config import DataConfig
from sae.errors import DataError, suggest
from sae.hub import cache_only_if_silent

IN_MEMORY_BYTES = 1 << 26
"""Data up to this size is tokenised once, before the start, and kept; larger data is streamed."""

PIECE_CHARACTERS = 1 << 13
"""Text files are cut at the first line end behind this many characters, each piece a document: so
one long file can be split into training and held-out text too."""


class Documents:
    """The documents of a source, readable as often as wanted, always in the same order.

    `origin` is what names the source beside its documents' keys: nothing for local files, so that
    their fingerprint is the same wherever they lie.
    """

    def __init__(self, config: DataConfig):
        self.origin = config.source
        if config.source.startswith(builtin.PREFIX):
            _refuse_unread(config, "split", "column", "name", "streaming")
            self._read: Callable[[], Iterator[Document]] = lambda: builtin.documents(config.source)
            self.in_memory = True
        elif path := _local(config.source):
            files = _files(path)
            prose = all(
                READERS.get(file.suffix.lower(), _text_rows) is _text_rows for file in files
            )
            _refuse_unread(config, "split", "name", *(["column"] if prose else []))
            root = path if path.is_dir() else path.parent
            self.origin = ""
            self._read = lambda: _read_files(files, root, config.column)
            self.in_memory = _fits(sum(file.stat().st_size for file in files), config)
        else:
            opened = _open_dataset(config)
            self._read = lambda: _from_rows(_guarded(opened, config), config.source, config.column)
            self.in_memory = _fits(getattr(getattr(opened, "data", None), "nbytes", None), config)

    def __iter__(self) -> Iterator[Document]:
        return self._read()


def _refuse_unread(config: DataConfig, *names: str) -> None:
    """DataError with a line for each setting that was given though nothing reads it."""
    given = {name: getattr(config, name) for name in names}
    lines = [
        f"data.{name}: {value!r} came, but {config.source} is read without it; leave it out"
        for name, value in given.items()
        if value != DataConfig.model_fields[name].default
    ]
    if lines:
        raise DataError("\n".join(lines))


def _fits(size: int | None, config: DataConfig) -> bool:
    """Whether data of `size` bytes (None: nobody knows) is to be kept in memory."""
    return size is not None and size <= IN_MEMORY_BYTES and not config.streaming


# Local files


def _local(source: str) -> Path | None:
    """A file or folder of text; None for what only `datasets` can open."""
    path = Path(source).expanduser() if source[:2] in ("~", "~/") else Path(source)
    if path.is_dir():
        return None if _is_dataset(path) else path
    if path.is_file():
        return path
    if path.exists():
        raise DataError(f"data.source: {path} is a pipe or a device; save its text in a file")
    if path.suffix.lower() in READERS or source[0] in "./~" or source.count("/") > 1:
        raise DataError(f"data.source: no file or folder {path}{_near(source)}")
    return None


def _near(source: str) -> str:
    """The built-in text or neighbouring file whose name is nearest to one that does not exist."""
    folder = Path(source).parent
    there = [str(p) for p in folder.iterdir()] if folder.is_dir() else []
    return suggest(source, [*builtin.SOURCES, *there])


def _is_dataset(folder: Path) -> bool:
    """Saved by `datasets`, or with a data set card that says which files are what."""
    if any((folder / name).is_file() for name in SAVED):
        return True
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = text.partition("\n---")[0] if text.startswith("---") else ""
    return "\nconfigs:" in head or "\ndataset_info:" in head


def _files(path: Path) -> list[Path]:
    """The file itself, or all that can be read in a folder and below, but for hidden ones."""
    if path.suffix.lower() in TABLES and path.is_file():
        raise DataError(
            f"data.source: {path} would be read as prose, commas and braces too; make it JSONL or "
            "Parquet, such as by pandas.read_csv(…).to_parquet(…)"
        )
    if path.is_file():
        return [path]
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in READERS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        wanted = ", ".join(READERS)
        raise DataError(f"data.source: no text in {path}; wanted files ending in {wanted}")
    return files


def _read_files(files: list[Path], root: Path, column: str) -> Iterator[Document]:
    warned = False  # of the first file: the others will be like it
    for file in files:
        key = file.relative_to(root).as_posix()
        rows = READERS.get(file.suffix.lower(), _text_rows)(file, column)
        for document in _from_rows(rows, key, column):
            if not warned and "\ufffd" in document.text:
                warned = True
                warnings.warn(
                    f"data.source: {file} holds bytes that are not UTF-8, or characters lost "
                    "before (\ufffd); convert it, such as by iconv -f latin1 -t utf-8",
                    stacklevel=1,
                )
            yield document


def _text_rows(file: Path, column: str) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8-sig", errors="replace") as text:
        while piece := text.read(PIECE_CHARACTERS) + text.readline(PIECE_CHARACTERS):
            if "\0" in piece:
                raise DataError(f"data.source: {file} is not UTF-8 text; convert it or remove it")
            yield {column: piece}


def _jsonl_rows(file: Path, column: str) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line.strip() else {column: None}
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise DataError(
                    f"data.source: {file} line {number} is no JSON object; wanted one a line, such "
                    f'as {{"{column}": "…"}}'
                )
            yield row


def _parquet_rows(file: Path, column: str) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(file) as table:
            there = column in table.schema_arrow.names
            for batch in table.iter_batches(columns=[column] if there else None):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise DataError(
            f"data.source: {file} cannot be read as Parquet; convert it or remove it\n"
            f"  {_first_line(error)}"
        ) from error


READERS: dict[str, Callable[[Path, str], Iterator[dict[str, Any]]]] = {
    ".jsonl": _jsonl_rows,
    ".md": _text_rows,
    ".parquet": _parquet_rows,
    ".txt": _text_rows,
}
TABLES = (".json", ".csv", ".tsv")
"""Files that hold text in a form we do not read."""
SAVED = ("state.json", "dataset_dict.json")
"""What `save_to_disk` writes: one of these, for a data set or for several splits."""


# Rows of data sets


def _from_rows(rows: Iterable[Any], key: str, column: str) -> Iterator[Document]:
    """A document for each row but for empty ones."""
    for index, row in enumerate(rows):
        if column not in row:
            raise _no_column(key, column, row)
        text: Any = row[column]
        if isinstance(text, str) and not text.strip():
            continue
        is_ids = isinstance(text, list) and all(type(item) is int for item in text)
        if not (is_ids or isinstance(text, str | None)):
            raise DataError(
                f"data.column: {key}, row {index}, column {column!r} holds "
                f"{type(text).__name__}; wanted text or a list of token ids"
            )
        if text:
            yield Document(f"{key}#{index}", text)


def _no_column(where: str, column: str, columns: Iterable[str]) -> DataError:
    columns = list(columns)
    return DataError(
        f"data.column: {where} has no column {column!r}{suggest(column, columns)}\n"
        f"  its columns are {', '.join(columns[:20])}"
    )


def _open_dataset(config: DataConfig) -> Any:
    """A data set by its Hub name, or in a folder, through `datasets`; only the column wanted."""
    import datasets

    source, folder = config.source, Path(config.source).expanduser()
    try:
        if any((folder / name).is_file() for name in SAVED):
            _refuse_unread(config, "name")
            opened: Any = datasets.load_from_disk(str(folder))
        else:
            local = folder.is_dir()
            with nullcontext() if local else cache_only_if_silent(source, "dataset"):
                opened = datasets.load_dataset(
                    str(folder) if local else source,
                    config.name,
                    split=config.split,
                    streaming=config.streaming,
                )
    except Exception as error:  # network, cache, names: `datasets` raises errors of many kinds
        raise DataError(
            f"data.source: {source!r} is no file, folder or built-in text, and split "
            f"{config.split!r} of such a data set cannot be opened{_near(source)}\n"
            f"  {_first_line(error)}"
        ) from error
    if isinstance(opened, dict):
        opened = _pick_split(opened, config)
    names = opened.column_names
    if names and config.column not in names:
        raise _no_column(source, config.column, names)
    return (opened.select_columns([config.column]) if names else opened).with_format(None)


def _pick_split(splits: dict[Any, Any], config: DataConfig) -> Any:
    if config.split not in splits:
        names = list(map(str, splits))
        raise DataError(
            f"data.split: {config.source} has no split {config.split!r}"
            f"{suggest(config.split, names)}; it has {', '.join(names)}"
        )
    return splits[config.split]


def _guarded(rows: Iterable[Any], config: DataConfig) -> Iterator[Any]:
    """The same rows; what goes wrong in reading them is a DataError."""
    try:
        yield from rows
    except Exception as error:  # see _open_dataset
        raise DataError(
            f"data.source: reading {config.source} failed: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
