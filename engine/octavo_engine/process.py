"""What the processes that the API process starts have in common. Called first thing in each of them."""

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
    also ends a step that never returns.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(_PR_SET_NAME, name)
