"""Running other programs: one error that tells what failed, and waiting with a deadline."""

from __future__ import annotations

import shlex
import subprocess
import time
from typing import TYPE_CHECKING, TypeAlias

from octavo_cluster.errors import CommandFailed, NotReady

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import IO

TAIL_LINES = 30

Missing: TypeAlias = "Callable[[], str | None]"  # says what is still missing; None when nothing is


def run(
    command: Sequence[str | Path],
    *,
    check: bool = True,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with its output captured.

    Args:
        command: program and arguments.
        check: whether a status other than 0 raises.
        stdin: what the program reads; None is nothing.
        env: its whole environment; None is this process's.
        cwd: the folder it runs in.
        timeout: seconds after which it is killed.

    Raises:
        CommandFailed: it is not there, ended with an error (and `check`), or took longer than `timeout`.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            check=False,
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            env=env,
            cwd=cwd,
            timeout=timeout,
        )
    except FileNotFoundError as error:
        raise CommandFailed(f"{words[0]}: no such program") from error
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(f"{shlex.join(words)}: no end after {timeout} s") from error
    if check and done.returncode != 0:
        raise CommandFailed(f"{shlex.join(words)}: exit status {done.returncode}\n{tail(done.stdout + done.stderr)}")
    return done


def run_logged(
    command: Sequence[str | Path], log: Path, *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> None:
    """Run a program to its end, with its output in a file that shows progress while it runs.

    Raises:
        CommandFailed: it is not there or ended with an error; the message holds the log's last lines.
    """
    words = [str(word) for word in command]
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                words, check=False, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, cwd=cwd
            )
        except FileNotFoundError as error:
            raise CommandFailed(f"{words[0]}: no such program") from error
    if done.returncode != 0:
        last = tail(log.read_text(errors="replace"))
        raise CommandFailed(f"{shlex.join(words)}: exit status {done.returncode}; {log} ends with\n{last}")


def detach(command: Sequence[str | Path], output: IO[bytes]) -> None:
    """Run a program that puts itself into the background; only its output's file is kept open by what stays."""
    words = [str(word) for word in command]
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/")


def tail(text: str, lines: int = TAIL_LINES) -> str:
    """The last lines of a program's output, indented."""
    return "\n".join("    " + line for line in text.strip().splitlines()[-lines:])


def wait_until(seen: Missing, *, what: str, seconds: float, poll: float = 0.1) -> None:
    """Poll until `seen` returns None.

    Args:
        seen: returns what is still missing, or None when nothing is; raises when waiting has become pointless.
        what: what is awaited, for the error.
        seconds: the deadline.
        poll: seconds between two looks.

    Raises:
        NotReady: the deadline passed; the message holds what `seen` last said.
    """
    deadline = time.monotonic() + seconds
    while (missing := seen()) is not None:
        if time.monotonic() > deadline:
            raise NotReady(f"{what}: not ready after {seconds:.0f} s: {missing}")
        time.sleep(poll)
