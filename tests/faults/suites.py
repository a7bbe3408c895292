"""Faults that the test suite injects already, in tables: counted here, case by case."""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.tools import Bench, Outcome

ROOT = Path(__file__).parents[2]


def _suite(*selection: str) -> Callable[[Bench], Iterator[Outcome]]:
    """The outcomes of some tests: files, or a file and the words of -k."""

    def run(_: Bench) -> Iterator[Outcome]:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection]
            subprocess.run(
                [*command, f"--junit-xml={report}"],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                capture_output=True,
                check=False,
            )
            cases = list(ElementTree.parse(report).iter("testcase"))
        for case in cases:
            wrong = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            held = None if "skipped" in wrong else not wrong
            yield held, f"{case.get('classname')}.{case.get('name')}: {' '.join(wrong)}"

    return run


out_of_memory = _suite("tests/test_memory.py")
canaries = _suite("tests/test_safety.py", "-k", "canary or canaries or pickle")
banned_calls = _suite("tests/test_safety.py", "-k", "ban")
hostile_files = _suite("tests/test_untrusted.py")
hostile_text = _suite("tests/test_terminal.py", "tests/test_text.py")
bad_input = _suite("tests/test_cli.py", "-k", "mistakes")
matrices = _suite("tests/test_hooks.py", "tests/test_data.py")
golden = _suite("tests/test_golden.py")
