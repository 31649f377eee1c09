"""How far a download is, for people: shown by the command line while pull.py works."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from typing import TextIO

_BAR_WIDTH: Final = 20


class ProgressLine:
    """How far a download is: one line that is written over on a terminal, a line for every ten percent in a log."""

    def __init__(self, name: str, stream: TextIO) -> None:
        self._name = name
        self._stream = stream
        self._started = time.monotonic()
        self._bytes_at_start: int | None = None
        self._last_shown = 0.0
        self._last_tenth = -1

    def show(self, done: int, total: int | None) -> None:
        """Tell, if it is time to tell."""
        now = time.monotonic()
        if self._bytes_at_start is None:
            self._bytes_at_start = done
        rate = (done - self._bytes_at_start) / max(now - self._started, 1e-6)
        percent = f"{100 * done // total:3d} % of {total / 1e6:.0f} MB" if total else f"{done / 1e6:.0f} MB"
        line = f"{self._name}: {percent}, {rate / 1e6:.1f} MB/s"
        if self._stream.isatty():
            if total:
                filled = _BAR_WIDTH * done // total
                line = f"{line} [{'=' * filled}{' ' * (_BAR_WIDTH - filled)}]"
            if now - self._last_shown >= 0.1 or done == total:
                self._last_shown = now
                print(f"\r\x1b[K{line}", end="\n" if done == total else "", file=self._stream, flush=True)
        elif total and 10 * done // total > self._last_tenth:
            self._last_tenth = 10 * done // total
            print(line, file=self._stream, flush=True)
