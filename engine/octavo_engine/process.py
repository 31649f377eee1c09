"""How processes of one server end: with the one that started them. Called first thing in each that is started."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2)
_PR_SET_NAME = 15


def bind_to_parent(name: bytes) -> None:
    """Leave ending to the API process, and never outlive it.

    Args:
        name: for ps and top, at most 15 bytes.

    It drains on SIGTERM and SIGINT and then closes the socket, while a terminal or a process manager sends these
    signals to this process too. Closing the socket ends the loop between two steps; on Linux the death of the parent
    also ends a step that never returns, and a process that is stopped. What the engine process starts (ranks.py) ends
    with it in the same way.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(_PR_SET_NAME, name)


def how_it_ended(exit_code: int) -> str:
    """For people, after "ended": from an exit code as subprocess has it, negative for signals."""
    if exit_code >= 0:
        return f"with exit code {exit_code}"
    hint = " (often the kernel's answer to too little memory)" if exit_code == -signal.SIGKILL else ""
    return f"by signal {signal.Signals(-exit_code).name}{hint}"
