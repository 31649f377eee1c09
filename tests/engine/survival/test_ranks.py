"""Several ranks behind one server: one that is killed or stopped is told and ends it, and no process is left over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.engine.conftest import ServedModel
    from tests.engine.survival.conftest import MakeLoad

    WaitUntil = Callable[..., None]

pytestmark = pytest.mark.timeout(400)

SECONDS_TO_TELL = 10.0
SECONDS_TO_END = 60.0  # a rank that does not answer is given up after 20
SIZE = ("--tensor-parallel-size", "4")  # of a model with two KV heads


def ranks_of(served: ServedModel) -> list[int]:
    """The processes beside the engine process."""
    pid = served.engine_pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}/stat").exists()


def ends_with_all_its_processes(served: ServedModel, wait_until: WaitUntil, pids: list[int]) -> None:
    assert served.process.wait(SECONDS_TO_END) == 1
    wait_until(lambda: all(is_gone(pid) for pid in pids), SECONDS_TO_TELL)


async def test_a_rank_that_is_killed_under_load_is_told_by_name_and_ends_the_server(
    start: Callable[..., ServedModel], wait_until: WaitUntil, load: MakeLoad
) -> None:
    with start(*SIZE) as served:
        first, second, third = ranks_of(served)
        pids = [first, second, third, served.engine_pid]
        async with load(served, num_users=8, max_tokens=4000) as users:
            await asyncio.to_thread(wait_until, lambda: served.metric("vllm:num_requests_running") == 8)
            os.kill(second, signal.SIGKILL)
            async with asyncio.timeout(SECONDS_TO_TELL):
                errors = await asyncio.gather(*users.answers)
            assert {error["code"] for error in errors} == {"engine_dead"}
            health = await asyncio.to_thread(served.get, "/health")
        assert health.status_code == 503
        assert f"rank 2 (pid {second}) ended by signal SIGKILL" in health.json()["reason"]
        await asyncio.to_thread(ends_with_all_its_processes, served, wait_until, pids)


@pytest.mark.parametrize(
    "num_users", [pytest.param(0, id="idle"), pytest.param(4, id="under load", marks=pytest.mark.long)]
)
async def test_a_rank_that_is_stopped_is_told_by_name_and_ends_the_server(
    start: Callable[..., ServedModel], wait_until: WaitUntil, load: MakeLoad, num_users: int
) -> None:
    with start("--tensor-parallel-size", "2") as served:
        (rank,) = ranks_of(served)
        pids = [rank, served.engine_pid]
        async with load(served, num_users=num_users, max_tokens=7000):
            await asyncio.to_thread(wait_until, lambda: served.metric("vllm:num_requests_running") == num_users)
            os.kill(rank, signal.SIGSTOP)
            await asyncio.to_thread(wait_until, lambda: served.get("/health").status_code == 503, SECONDS_TO_TELL)
            told = (await asyncio.to_thread(served.get, "/health")).json()["reason"]
            assert f"its process {rank} is stopped by a signal" in told
            await asyncio.to_thread(ends_with_all_its_processes, served, wait_until, pids)
        assert f"rank 1 (pid {rank}) is stopped by a signal" in served.log.read_text()


@contextlib.contextmanager
def hanging(pid: int) -> Iterator[None]:
    """Lets a process do nothing for a while, as in a deadlock: no signal has stopped it."""
    root = Path("/sys/fs/cgroup")
    version_1 = root / "freezer"
    group = (version_1 if version_1.is_dir() else root) / f"octavo-test-{os.getpid()}"
    file, hangs, goes_on = ("freezer.state", "FROZEN", "THAWED") if version_1.is_dir() else ("cgroup.freeze", "1", "0")
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(pid))
        (group / file).write_text(hangs)
        yield
    finally:
        (group / file).write_text(goes_on)
        (group.parent / "cgroup.procs").write_text(str(pid))
        group.rmdir()


async def test_a_rank_that_hangs_under_load_is_told_and_loses_nothing_if_it_goes_on(
    start: Callable[..., ServedModel], wait_until: WaitUntil, load: MakeLoad
) -> None:
    with start("--tensor-parallel-size", "2") as served:
        (rank,) = ranks_of(served)
        async with load(served, num_users=2, max_tokens=4000):
            await asyncio.to_thread(wait_until, lambda: served.metric("vllm:num_requests_running") == 2)
            with hanging(rank):
                await asyncio.to_thread(wait_until, lambda: served.get("/health").status_code == 503, SECONDS_TO_TELL)
                told = (await asyncio.to_thread(served.get, "/health")).json()["reason"]
            assert "has been silent" in told
            await asyncio.to_thread(wait_until, lambda: served.get("/health").status_code == 200, SECONDS_TO_TELL)
            assert served.metric("vllm:num_requests_running") == 2


def test_no_rank_outlives_a_server_that_is_killed_or_asked_to_end(
    start: Callable[..., ServedModel], wait_until: WaitUntil
) -> None:
    for way in (signal.SIGKILL, signal.SIGTERM):
        with start("--tensor-parallel-size", "2") as served:
            pids = [*ranks_of(served), served.engine_pid]
            assert len(pids) == 2
            served.process.send_signal(way)
            assert served.process.wait(SECONDS_TO_END) == (-way if way == signal.SIGKILL else 0)
            wait_until(lambda pids=pids: all(is_gone(pid) for pid in pids), SECONDS_TO_TELL)
