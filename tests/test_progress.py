"""Outside a terminal a bar is one line now and then; in one it fits the width."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from sae import progress
from sae.progress import Bar, TrainingProgress

ROW = {"loss": 123.4, "l0": 16.0, "fvu": 0.25, "dead": 0.125}


def test_a_file_gets_a_line_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    with TrainingProgress(4000, file=out) as bar:
        bar.report(1000, {"a": ROW, "b": ROW | {"l0": 32.0}})
        assert out.getvalue() == ""
        monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
        bar.report(2000, {"a": ROW, "b": ROW | {"l0": 32.0}})
        bar.report(4000, {"a": ROW})
    middle, last = out.getvalue().splitlines()
    assert middle.startswith("training 2,000/4,000  loss 123.4  L0 24.0  FVU 0.250  dead 12.5%  ")
    assert middle.endswith("s left") and "tokens/s" in middle
    assert last.startswith("training 4,000/4,000") and last.endswith(" 0 s left")


def test_advance_adds_up() -> None:
    out = io.StringIO()
    with Bar("scanning", 100, out) as bar:
        bar.advance(60)
        bar.advance(60)
        bar.advance(1)
    assert out.getvalue().startswith("scanning 120/100") and out.getvalue().count("\n") == 1


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_terminal_gets_a_bar_on_one_line(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()

    def console(**given):
        return Console(**given, force_terminal=True, color_system=None, width=width, _environ={})

    monkeypatch.setattr(progress, "Console", console)
    with TrainingProgress(4_000_000, file=out) as bar:
        bar.report(1_000_000, {"a": ROW})
        bar._progress.refresh()
    shown = [line.rpartition("\r")[2] for line in out.getvalue().split("\n")]
    assert all(cell_len(line.split("\x1b[2K")[-1]) <= width for line in shown)
    assert "FVU 0.250" in out.getvalue() and "training" in out.getvalue()
