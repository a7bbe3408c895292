"""Every module imports only from rows above its own, and the source keeps the rules it claims.

Imports inside functions and under TYPE_CHECKING count; a module that is not in the table fails.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sae"
SOURCES = sorted(PACKAGE.rglob("*.py"))

ROWS = (
    "errors stopping",
    "hub steering untrusted memory",
    "config builtin",
    "store text hooks documents sparsity language_model mirror geometry",
    "labels company plane kernels",
    "fingerprint data progress records checkpoint steps concepts routes",
    "autoencoder browser",
    "activations losses revival",
    "formats evaluation planning synthetic finetuning",
    "learner resuming features terminal scores superposition isolation intervention",
    "training live fitting importing publishing",
    "runs verification",
    "cli",
)
ROW = {name: row for row, names in enumerate(ROWS) for name in names.split()}

LINES = 60

FORBIDDEN = (
    r"(?<!allow.)pickle",
    r"torch\.load\b",
    r"(?<![\w.])(eval|exec)\(",  # model.eval() and ast.literal_eval() are other things
    "trust_remote_code",
    "innerHTML",
)


def module(file: Path) -> str:
    """The name in the table: a subpackage is one module, "" is sae/__init__.py."""
    first = file.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of this package that are imported anywhere in the source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "sae" and not rest.startswith("__"):  # `from sae import __version__`
                yield rest.partition(".")[0]


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_imports_come_from_rows_above(file: Path) -> None:
    own = module(file)
    if not own:
        assert list(imported(parsed(file))) == []
        return
    assert own in ROW, f"{own} is not in the table; give it a row"
    for name in imported(parsed(file)):
        assert name == own or ROW[name] < ROW[own], f"{own} imports {name}"


def test_the_table_has_no_module_that_is_gone() -> None:
    assert {module(file) for file in SOURCES} - {""} == ROW.keys()


def test_the_readme_names_every_module() -> None:
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    paths = {file for file in PACKAGE.glob("*.py") if file.stem != "__init__"}
    paths |= {file.parent for file in PACKAGE.glob("*/__init__.py")}
    names = (f"`sae/{path.name}{'/' if path.is_dir() else ''}`" for path in sorted(paths))
    assert [name for name in names if name not in readme] == []


def test_imports_are_found_wherever_they_hide() -> None:
    source = """
from typing import TYPE_CHECKING
from sae import config as settings
if TYPE_CHECKING:
    from sae.builtin.facts import LATENTS
def f():
    import sae.store
    from sae import __version__, data
"""
    assert sorted(imported(ast.parse(source))) == ["builtin", "config", "data", "store"]


def test_functions_are_short() -> None:
    found = set()
    for file in SOURCES:
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > LINES:
                    found.add(f"{file.relative_to(PACKAGE.parent).as_posix()}:{node.name}")
    assert not found


EXEMPT = {(FORBIDDEN[0], "formats/torch_file.py")}
"""What it may do is in tests/test_safety.py."""


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_what_runs_foreign_code_is_nowhere(pattern: str) -> None:
    """Not in comments either, so that a search stays empty."""
    binary = {".pyc", ".safetensors"}
    for file in (f for f in PACKAGE.rglob("*") if f.is_file() and f.suffix not in binary):
        if (pattern, file.relative_to(PACKAGE).as_posix()) in EXEMPT:
            continue
        found = re.search(pattern, file.read_text(encoding="utf-8"))
        assert not found, f"{file}: {found}"


def test_imports_are_absolute() -> None:
    for file in SOURCES:
        for node in ast.walk(parsed(file)):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}:{node.lineno}"
