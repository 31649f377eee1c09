"""What the person at the terminal sees while something takes long. All of it goes to stderr: stdout is for results."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEARTBEAT_SECONDS = 15.0

_terminal = threading.Lock()


def say(text: str) -> None:
    """Print one line; lines of different threads never mix."""
    with _terminal:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def duration(seconds: float) -> str:
    """Seconds as a person says them: `0.4 s`, `12 s`, `3 min 05 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


@contextlib.contextmanager
def step(title: str, expected: str = "", detail: Callable[[], str] = str) -> Iterator[None]:
    """Announce a step, show that it lives every 15 seconds, and say how long it took.

    Args:
        title: what is being done, such as "Go tools: building".
        expected: how long it is known to take, such as "about 6 min on 2 cores".
        detail: called at each heartbeat; says how far the step is.
    """
    begin = time.monotonic()
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            so_far = detail()
            say(f"    {title} ... {duration(time.monotonic() - begin)}" + (f", {so_far}" if so_far else ""))

    say(f"  > {title}" + (f" ({expected})" if expected else ""))
    heartbeat = threading.Thread(target=beat, daemon=True)
    heartbeat.start()
    try:
        yield
    except BaseException:
        say(f"  ! {title}: failed after {duration(time.monotonic() - begin)}")
        raise
    else:
        say(f"    {title}: {duration(time.monotonic() - begin)}")
    finally:
        ended.set()
        heartbeat.join()
