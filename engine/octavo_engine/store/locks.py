"""A lock between processes, on a file of its own. Released by the kernel when its holder ends, however that comes."""

from __future__ import annotations

import asyncio
import fcntl
import os
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

_POLL_SECONDS: Final = 0.2


@asynccontextmanager
async def locked(path: Path) -> AsyncIterator[None]:
    """Hold the lock `path`, a file that is there only while somebody holds it or waits for it."""
    while True:
        with path.open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(_POLL_SECONDS)
            if not _is(path, file.fileno()):  # whoever held it has removed it: others lock another file by now
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)  # noqa: ASYNC240 - as quick as the lock itself
            return


def _is(path: Path, fd: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(fd))
    return False
