"""Is the engine process making progress? The one place that decides it.

client.py feeds it; /health, /ready and the admission of requests ask it, through `EngineClient.problem`. Knows nothing
of HTTP, asyncio or what the engine does.

The engine speaks after every step, and twice a second while idle (core.py). So what has to be judged is silence, and
silence has two honest causes: a step that takes long, and a machine that gives the process no time. Hence the rule:

- It is stuck after STUCK_SECONDS in which it said nothing and did nothing: next to no processor time used by all of its
  threads (waiting for a lock, a disk or a device that does not answer; stopped by a signal). A process that is ready to
  run but gets no processor counts as busy: that is the machine's fault, and a restart would not help.
  An engine of several ranks counts as one: those that wait for one that hangs use as little, and threads of torch's
  that wake up now and then are not work.
- It is stuck after LONGEST_STEP_SECONDS without a word, however busy: then it is an endless loop. On a GPU the limit is
  lower: no step takes so long there, and a process that waits for a GPU that hangs is busy waiting.
- An engine that still loads its model may take as long as it computes or reads: it is stuck after LOAD_STUCK_SECONDS in
  which it said nothing and did nothing. Disks and networks do pause, so that is long.

Time is counted in looks, not read from a clock: where this process itself was stopped or starved, the engine's messages
of that time lie in the socket still unread, and must not be missed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

LOOK_SECONDS: Final = 1.0  # how often client.py looks
STUCK_SECONDS: Final = 5.0  # so that it is told within 10 s, also where this process gets little time to look
LOAD_STUCK_SECONDS: Final = 600.0
LONGEST_STEP_SECONDS: Final = {"cpu": 300.0, "cuda": 60.0}  # by device

_READY_TO_RUN: Final = "R"
_STOPPED: Final = "Tt"
_WAKING_TICKS: Final = 2  # in LOOK_SECONDS; no step computes so little
STATES: Final = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "waiting for a disk or device"}


@dataclass(frozen=True, slots=True)
class Activity:
    """What the kernel tells of the processes of an engine (proc(5), /proc/PID/stat)."""

    state: str  # of a main thread, one letter: of one that is ready to run, else of one that can say why it is not
    cpu_ticks: int  # processor time that all their threads have used, in clock ticks
    pid: int | None = None  # whose state it is, if not that of the engine process itself


def look_at(pid: int, *rank_pids: int) -> Activity | None:
    """Look at an engine process and those beside it; None where that cannot be told (it is gone; this is not Linux)."""
    engine = _look_at(pid)
    if engine is None or not rank_pids:
        return engine
    ranks = [replace(seen, pid=rank) for rank in rank_pids if (seen := _look_at(rank)) is not None]
    telling = (_READY_TO_RUN, *STATES)
    shown = min((engine, *ranks), key=lambda seen: telling.index(seen.state) if seen.state in telling else len(telling))
    return replace(shown, cpu_ticks=engine.cpu_ticks + sum(seen.cpu_ticks for seen in ranks))


def _look_at(pid: int) -> Activity | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # after the name, which may hold anything
    return Activity(state=fields[0], cpu_ticks=int(fields[11]) + int(fields[12]))  # utime and stime


class Progress:
    """What is known of one engine process.

    Args:
        pid: its process id, to be told.
        device: what it computes on, a key of LONGEST_STEP_SECONDS; None while it loads its model.
    """

    def __init__(self, pid: int, device: str | None) -> None:
        self._pid = pid
        self._patience = LOAD_STUCK_SECONDS if device is None else STUCK_SECONDS
        self._longest_step = math.inf if device is None else LONGEST_STEP_SECONDS[device]
        self._silent = 0.0  # seconds since its last word
        self._inactive = 0.0  # seconds of these since it was last seen doing something
        self._last: Activity | None = None

    def heard(self) -> None:
        """It said something."""
        self._silent = self._inactive = 0.0

    def look(self, activity: Activity | None) -> None:
        """Take in what it does; to be called every LOOK_SECONDS."""
        self._silent += LOOK_SECONDS
        active = (
            activity is None  # not known, and so not held against it
            or activity.state == _READY_TO_RUN
            or self._last is None
            or (activity.state not in _STOPPED and activity.cpu_ticks > self._last.cpu_ticks + _WAKING_TICKS)
        )
        self._inactive = 0.0 if active else self._inactive + LOOK_SECONDS
        self._last = activity

    @property
    def problem(self) -> str | None:
        """Why it is held to be stuck, or None."""
        if self._inactive >= self._patience and self._last is not None:
            state = STATES.get(self._last.state, "waiting")
            who = "it" if self._last.pid is None else f"its process {self._last.pid}"
            return (
                f"the engine process (pid {self._pid}) has been silent for {self._silent:.0f} s and has used next "
                f"to no processor time for {self._inactive:.0f} s: {who} is {state}"
            )
        if self._silent >= self._longest_step:
            return (
                f"the engine process (pid {self._pid}) has been silent for {self._silent:.0f} s, longer than any step "
                "takes, though it is busy"
            )
        return None
