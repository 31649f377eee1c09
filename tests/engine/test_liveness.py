from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from octavo_engine.liveness import (
    LOAD_STUCK_SECONDS,
    LONGEST_STEP_SECONDS,
    LOOK_SECONDS,
    STUCK_SECONDS,
    Activity,
    Progress,
    look_at,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STUCK_LOOKS = round(STUCK_SECONDS / LOOK_SECONDS)
LONGEST_STEP_LOOKS = round(LONGEST_STEP_SECONDS["cpu"] / LOOK_SECONDS)


class Computing:
    """Activity of a process that computes, in whatever state a look finds it."""

    def __init__(self, state: str) -> None:
        self._state = state
        self._cpu_ticks = 0

    def __call__(self) -> Activity:
        """The next look."""
        self._cpu_ticks += 3  # hundredths of a second
        return Activity(self._state, self._cpu_ticks)


def waiting(state: str) -> Callable[[], Activity]:
    """Activity of a process that uses no processor time."""
    return lambda: Activity(state, 17)


def after(num_looks: int, activity: Callable[[], Activity | None], device: str | None = "cpu") -> Progress:
    """What is known after so many looks at a process that said something before the first one."""
    progress = Progress(4242, device)
    progress.look(activity())
    progress.heard()
    for _ in range(num_looks):
        progress.look(activity())
    return progress


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("T", "stopped by a signal"),
        ("t", "stopped by a debugger"),
        ("D", "waiting for a disk or device"),
        ("S", "it is waiting"),
    ],
)
def test_a_process_that_neither_speaks_nor_computes_is_stuck(state: str, told: str) -> None:
    assert after(STUCK_LOOKS - 1, waiting(state)).problem is None
    problem = after(STUCK_LOOKS, waiting(state)).problem
    assert problem is not None
    assert "4242" in problem
    assert told in problem


@pytest.mark.parametrize("activity", [Computing("S"), Computing("R"), waiting("R"), lambda: None])
def test_a_long_step_is_no_problem_while_the_process_computes_or_would_if_it_could(
    activity: Callable[[], Activity | None],
) -> None:
    assert after(10 * STUCK_LOOKS, activity).problem is None


def test_an_endless_loop_is_stuck_however_busy() -> None:
    assert after(LONGEST_STEP_LOOKS - 1, Computing("R")).problem is None
    assert "busy" in str(after(LONGEST_STEP_LOOKS, Computing("R")).problem)


def test_a_load_may_take_as_long_as_it_goes_on_and_a_disk_may_pause() -> None:
    load_looks = round(LOAD_STUCK_SECONDS / LOOK_SECONDS)
    assert load_looks > STUCK_LOOKS
    assert after(10 * load_looks, Computing("D"), device=None).problem is None
    assert after(load_looks - 1, waiting("D"), device=None).problem is None
    assert "waiting for a disk" in str(after(load_looks, waiting("D"), device=None).problem)


def test_waiting_for_a_gpu_looks_busy_and_is_given_less_time() -> None:
    num_looks = round(LONGEST_STEP_SECONDS["cuda"] / LOOK_SECONDS)
    assert num_looks < LONGEST_STEP_LOOKS
    assert "busy" in str(after(num_looks, Computing("R"), "cuda").problem)


def test_a_word_or_a_moment_of_computing_clears_the_suspicion() -> None:
    progress = after(STUCK_LOOKS, waiting("T"))
    progress.heard()
    assert progress.problem is None
    progress = after(STUCK_LOOKS, waiting("T"))
    progress.look(Activity("S", 20))
    assert progress.problem is None


@pytest.fixture
def loop() -> Iterator[subprocess.Popen[bytes]]:
    """A process that computes without end."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        yield process
        process.kill()


def test_a_process_that_computes_uses_time_and_one_that_is_stopped_does_not(loop: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60

    def poll(condition: Callable[[Activity], bool]) -> Activity:
        while not condition(activity := look_at(loop.pid) or Activity("", 0)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return activity

    first = poll(lambda activity: activity.state == "R")
    poll(lambda activity: activity.cpu_ticks > first.cpu_ticks)
    os.kill(loop.pid, signal.SIGSTOP)
    stopped = poll(lambda activity: activity.state == "T")
    assert look_at(loop.pid) == stopped


def test_an_engine_of_several_ranks_is_stuck_if_none_computes_and_the_one_that_is_stopped_is_named() -> None:
    ticks = itertools.count()  # of threads of torch's in the others
    stuck = after(STUCK_LOOKS, lambda: Activity("T", next(ticks), pid=99)).problem
    assert stuck is not None
    assert "the engine process (pid 4242) has been silent" in stuck
    assert "its process 99 is stopped by a signal" in stuck


def test_the_time_of_all_ranks_counts_and_the_state_of_the_one_that_has_something_to_say(
    loop: subprocess.Popen[bytes], wait_until: Callable[..., None]
) -> None:
    with subprocess.Popen(["sleep", "1000"]) as engine:

        def is_seen(state: str) -> bool:
            activity = look_at(engine.pid, loop.pid)
            return activity is not None and (activity.state, activity.pid) == (state, loop.pid)

        wait_until(lambda: is_seen("R"))
        os.kill(loop.pid, signal.SIGSTOP)
        wait_until(lambda: is_seen("T"))
        waiting_one, stopped_one = look_at(engine.pid), look_at(loop.pid)
        assert waiting_one is not None
        assert stopped_one is not None
        ticks = waiting_one.cpu_ticks + stopped_one.cpu_ticks
        assert look_at(engine.pid, loop.pid) == Activity("T", ticks, pid=loop.pid)
        assert look_at(engine.pid, 2**22 + 1) == waiting_one  # one that is gone says nothing
        engine.kill()


def test_a_process_that_is_gone_cannot_be_looked_at() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert look_at(process.pid) is None
