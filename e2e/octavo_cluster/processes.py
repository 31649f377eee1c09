"""Child processes that live exactly as long as the object that started them."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

from octavo_cluster import shell
from octavo_cluster.errors import CommandFailed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

STOP_SECONDS = 10.0


class Child:
    """A server that ends with this process, also when this process is killed (on Linux: by its parent-death signal)."""

    def __init__(self, name: str, command: Sequence[str | Path], log: Path) -> None:
        """Start it.

        Args:
            name: what messages call it.
            command: program and arguments.
            log: the file that gets its output.
        """
        self.name = name
        self.log = log
        guard = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*guard, *(str(word) for word in command)], stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def check_alive(self) -> None:
        """Raise CommandFailed with the log's last lines when it has ended."""
        status = self._process.poll()
        if status is not None:
            last = shell.tail(self.log.read_text(errors="replace"))
            raise CommandFailed(f"{self.name}: ended with status {status}; {self.log} ends with\n{last}")

    def stop(self) -> None:
        """Ask it to end; kill it when it does not."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
