"""What /health and /ready say, while a real engine process is stopped, goes on, computes for long or is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.engine.conftest import ServedModel
    from tests.engine.survival.conftest import MakeLoad

    WaitUntil = Callable[..., None]

pytestmark = pytest.mark.timeout(400)

SECONDS_TO_TELL = 10.0


def stop_and_go_on(served: ServedModel, wait_until: WaitUntil) -> None:
    """Stop the engine process, see that it is told with the reason, and let it go on."""
    engine_pid = served.engine_pid
    os.kill(engine_pid, signal.SIGSTOP)
    stopped = time.monotonic()
    wait_until(lambda: served.get("/health").status_code == 503, SECONDS_TO_TELL)
    assert time.monotonic() - stopped < SECONDS_TO_TELL
    told = served.get("/health").json()
    assert told["status"] == "failed"
    assert f"(pid {engine_pid}) has been silent for" in told["reason"]
    assert "stopped by a signal" in told["reason"]
    ready = served.get("/ready")
    assert (ready.status_code, ready.json()["phase"]) == (503, "Failed")
    assert "stopped by a signal" in ready.json()["reason"]
    os.kill(engine_pid, signal.SIGCONT)
    wait_until(lambda: served.get("/health").status_code == 200, SECONDS_TO_TELL)
    assert served.get("/ready").status_code == 200


def test_an_idle_engine_that_is_stopped_is_told_until_it_goes_on(served: ServedModel, wait_until: WaitUntil) -> None:
    stop_and_go_on(served, wait_until)


async def test_an_engine_that_is_stopped_under_load_is_told_and_then_loses_nothing(
    served: ServedModel, wait_until: WaitUntil, load: MakeLoad
) -> None:
    async with load(served) as users:
        await asyncio.to_thread(wait_until, lambda: served.metric("vllm:num_requests_running") == 32)
        await asyncio.to_thread(stop_and_go_on, served, wait_until)
        assert not any(answer.done() for answer in users.answers), "they ended before the engine was stopped"
        assert await users.all_tokens() == [300] * 32


async def test_a_stopped_api_process_that_goes_on_does_not_blame_the_engine(served: ServedModel) -> None:
    """The messages of that time are still in the socket, and are read before the first look."""
    os.kill(served.process.pid, signal.SIGSTOP)
    asking = asyncio.create_task(asyncio.to_thread(served.get, "/health"))
    await asyncio.sleep(SECONDS_TO_TELL)  # longer than an engine may be silent: there is nothing to poll for
    os.kill(served.process.pid, signal.SIGCONT)
    assert (await asking).status_code == 200
    assert served.get("/ready").status_code == 200


async def test_an_engine_that_is_killed_under_load_is_told_to_all_at_once_and_ends_the_server(
    start: Callable[..., ServedModel], wait_until: WaitUntil, load: MakeLoad
) -> None:
    with start() as served:
        async with load(served) as users:
            await asyncio.to_thread(wait_until, lambda: served.metric("vllm:num_requests_running") == 32)
            os.kill(served.engine_pid, signal.SIGKILL)
            async with asyncio.timeout(SECONDS_TO_TELL):
                errors = await asyncio.gather(*users.answers)
            for error in errors:
                assert (error["code"], "SIGKILL" in error["message"]) == ("engine_dead", True)
            health = await asyncio.to_thread(served.get, "/health")
            assert (health.status_code, "SIGKILL" in health.json()["reason"]) == (503, True)
            assert (await asyncio.to_thread(served.get, "/ready")).json()["phase"] == "Failed"
        assert await asyncio.to_thread(served.process.wait, 30) == 1
        assert "SIGKILL" in served.log.read_text()
