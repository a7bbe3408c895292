"""Gather prose from this machine: docstrings, help topics and licences of installed Python code.

    python scripts/collect_prose.py prose/ [--limit-mb 4]

Writes one text file per package into the folder; takes about 20 seconds. Some English to train on
where there is no network.
"""

import argparse
import ast
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

SHORTEST = 200
"""Docstrings below this many characters are mostly signatures and one-liners."""


def docstrings(file: Path) -> Iterator[str]:
    """The longer docstrings of a source file, indentation removed."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) >= SHORTEST and ">>>" not in text:
                yield text


def prose() -> Iterator[tuple[str, str]]:
    """Pairs of package and text."""
    for name, text in topics.items():
        yield "help-topics", f"{name}\n\n{text}"
    stdlib, site = (Path(sysconfig.get_paths()[key]) for key in ("stdlib", "purelib"))
    for root in (stdlib, site):
        for file in sorted(root.rglob("*")):
            parts = file.relative_to(root).parts
            if not file.is_file() or (root == stdlib and "site-packages" in parts):
                continue
            if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")):
                yield "licences", file.read_text(encoding="utf-8", errors="replace")
            elif file.suffix == ".py" and not {"test", "tests"} & set(parts):
                for text in docstrings(file):
                    yield parts[0].removesuffix(".py"), text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit-mb", type=float, default=4.0)
    args = parser.parse_args()
    texts: dict[str, dict[str, None]] = defaultdict(dict)  # a dict keeps order and drops repeats
    size = 0
    for package, text in prose():
        if text not in texts[package]:
            texts[package][text] = None
            size += len(text)
        if size > args.limit_mb * 1e6:
            break
    args.folder.mkdir(parents=True, exist_ok=True)
    for package, members in texts.items():
        (args.folder / f"{package}.txt").write_text("\n\n".join(members), encoding="utf-8")
    print(f"{size / 1e6:.1f} MB from {len(texts)} packages in {args.folder}")


if __name__ == "__main__":
    main()
