"""Why work ends before its time: a signal, or a time limit. Asked between two steps."""

import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Notes SIGINT and SIGTERM while its block runs, instead of letting them strike anywhere.

    A second signal of the same kind has its ordinary effect again: it ends the process at once.
    Signals that were ignored stay ignored. In other threads than the main one only the time counts,
    as Python delivers signals to none of them.
    """

    def __init__(self, max_seconds: float | None = None):
        self._deadline = None if max_seconds is None else time.perf_counter() + max_seconds
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)

    def reason(self) -> str | None:
        """SIGINT, SIGTERM or max-time; None while there is none."""
        if self._signal is not None:
            return self._signal.name
        if self._deadline is not None and time.perf_counter() >= self._deadline:
            return "max-time"
        return None
