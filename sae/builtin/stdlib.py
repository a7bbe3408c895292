"""`builtin:stdlib`: the source and prose of the Python standard library that runs this program.

Real text that is on every user's disk. It differs a little with each Python version, so results
name the version and a fingerprint.
"""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from sae.builtin.document import Document, hash_unit

HELDOUT = 0.08
"""Share of the files never trained on, by the hash of their relative path: one split for all."""

CODEC_SHARE = 0.01
"""Codec tables stay below this share of the characters, which keeps them below 2 % of the tokens
(their digits cost about twice as many tokens a character)."""

SKIPPED_FOLDERS = {
    "test", "tests", "idlelib", "lib2to3", "distutils", "site-packages", "dist-packages",
    "__pycache__", "lib-dynload", "_bundled",
}  # fmt: skip
TOPICS = "pydoc_data/topics.py"


def documents() -> Iterator[Document]:
    """Every file as one document, in the order of the hash of its relative path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root).as_posix(): path for path in _sources(root)}
    files |= {path.name: path for path in root.glob("LICENSE*.txt")}
    texts = {key: path.read_text(encoding="utf-8", errors="replace") for key, path in files.items()}
    texts |= _topics(texts.pop(TOPICS, ""))
    kept = _capped_codecs(texts)
    for key in sorted(kept, key=hash_unit):
        yield Document(f"stdlib/{key}", kept[key], heldout=hash_unit(key) < HELDOUT)


def _sources(folder: Path) -> Iterator[Path]:
    """All Python files below a folder, without entering those to be skipped."""
    for path in folder.iterdir():
        name = path.name
        if path.is_dir() and not path.is_symlink():
            if not (
                name in SKIPPED_FOLDERS or name.endswith("_test") or name.startswith("config-")
            ):
                yield from _sources(path)
        elif path.suffix == ".py" and not name.startswith("_sysconfigdata"):  # of one machine only
            yield path


def _topics(source: str) -> dict[str, str]:
    """The help texts in `pydoc_data/topics.py` as prose, without the quotes of source."""
    if "topics = " not in source:
        return {}
    table = ast.literal_eval(source.partition("topics = ")[2].strip())
    return {f"pydoc_data/topics/{name}.txt": text for name, text in table.items()}


def _capped_codecs(texts: dict[str, str]) -> dict[str, str]:
    """Drop codec tables, largest hash first, until they are a small share of the characters."""
    codecs = [key for key in texts if key.startswith("encodings/") and "_table" in texts[key]]
    kept = {key: text for key, text in texts.items() if key not in set(codecs)}
    room = CODEC_SHARE * sum(map(len, kept.values()))
    for key in sorted(codecs, key=hash_unit):
        room -= len(texts[key])
        if room < 0:
            break
        kept[key] = texts[key]
    return kept
