"""One at a time: a lock between processes that share the cache or the cluster."""

from __future__ import annotations

import contextlib
import fcntl
from typing import TYPE_CHECKING

from octavo_cluster.progress import say

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`; the kernel lets go of it when the process dies, however it dies.

    Args:
        path: the lock file; made when it is not there, and left.
        what: what the holder does, told while waiting for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"    waiting for another process: {what}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
