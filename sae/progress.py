"""Progress of long work: a bar on a terminal, one line now and then elsewhere."""

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class Bar:
    """Tokens done of `total`; hears the number done (`update`) or newly done (`advance`).

    `start` of them were done before, and do not count for the speed.
    """

    def __init__(self, title: str, total: int, file: Any = None, start: int = 0):
        self._title, self._total, self._start = title, total, start
        console = Console(file=file or sys.stderr, markup=False, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._line: Callable[[str], None] | None = None
        if not console.is_terminal:
            self._line = partial(console.print, soft_wrap=True)
        self._done, self._started, self._said = start, 0.0, 0.0
        self._finished = False

    def __enter__(self):
        self._progress.start()
        self._task = self._progress.add_task(self._title, total=self._total, status="")
        self._started = self._said = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, tokens: int) -> None:
        """`tokens` more are done."""
        self.update(self._done + tokens)

    def update(self, done: int, status: str = "") -> None:
        """`done` tokens in all; `status` is shown beside the speed."""
        self._done = done
        now = time.perf_counter()
        speed = (done - self._start) / max(now - self._started, 1e-9)
        status = f"{status}{speed:,.0f} tokens/s"
        self._progress.update(self._task, completed=min(done, self._total), status=status)
        due = now - self._said >= SECONDS_BETWEEN_LINES
        if self._line and (due or done >= self._total) and not self._finished:
            self._said, self._finished = now, done >= self._total
            left = max(self._total - done, 0) / speed if speed else 0
            self._line(f"{self._title} {done:,}/{self._total:,}  {status}  {left:,.0f} s left")


class TrainingProgress(Bar):
    """A bar with loss, L0, FVU and dead share, averaged over the hookpoints."""

    def __init__(self, total: int, start: int = 0, file: Any = None):
        super().__init__("training", total, file, start)

    def report(self, tokens: int, metrics: dict[str, dict[str, float]]) -> None:
        """Show one logged step."""
        mean = {
            key: sum(row[key] for row in metrics.values()) / len(metrics)
            for key in ("loss", "l0", "fvu", "dead")
        }
        self.update(
            tokens,
            f"loss {mean['loss']:.1f}  L0 {mean['l0']:.1f}  FVU {mean['fvu']:.3f}  "
            f"dead {mean['dead']:.1%}  ",
        )
