"""Every script can be imported, does nothing then, says what it is for with --help, and is in the
README."""

import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
NAMES = sorted(file.stem for file in SCRIPTS.glob("*.py"))
ASKED = [name for name in NAMES if "parse_args()" in (SCRIPTS / f"{name}.py").read_text()]


@pytest.mark.parametrize("name", NAMES)
def test_an_import_prints_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    assert importlib.import_module(name).__doc__
    assert capsys.readouterr().out == ""


def test_the_readme_names_every_script() -> None:
    readme = (SCRIPTS.parent / "README.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"`scripts/{name}.py`" not in readme] == []


@pytest.mark.parametrize("name", ASKED)
def test_help_says_what_it_is_for(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert ended.value.code == 0
    assert "--help" in capsys.readouterr().out
