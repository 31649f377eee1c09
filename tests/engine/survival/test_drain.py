"""SIGTERM to a real server under load."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.engine.conftest import ServedModel
    from tests.engine.survival.conftest import MakeLoad

pytestmark = pytest.mark.timeout(400)

NUM_USERS = 32


def is_running(pid: int) -> bool:
    """Whether there is a process of that number that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_sigterm_under_load_loses_no_request_and_sends_new_ones_away(
    start: Callable[..., ServedModel], wait_until: Callable[..., None], load: MakeLoad
) -> None:
    with start() as served:
        engine_pid = served.engine_pid
        async with load(served, num_users=NUM_USERS) as users, httpx.AsyncClient(base_url=served.url) as late:
            assert (await late.get("/health")).status_code == 200  # its connection is kept
            await asyncio.to_thread(wait_until, lambda: served.metric("vllm:num_requests_running") == NUM_USERS)
            served.process.terminate()
            await asyncio.to_thread(wait_until, lambda: served.get("/ready").json()["phase"] == "Draining")
            refused = await late.post("/v1/completions", json={"model": "tiny", "prompt": "Hi"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert int(refused.headers["Retry-After"]) > 0
            assert refused.headers["Connection"] == "close", "the next request should go elsewhere"
            assert (await late.get("/health")).status_code == 200
            assert not any(answer.done() for answer in users.answers), "they ended before the signal"
            assert await users.all_tokens() == [300] * NUM_USERS
        assert await asyncio.to_thread(served.process.wait, 30) == 0
        await asyncio.to_thread(wait_until, lambda: not is_running(engine_pid))


async def test_what_outlasts_the_drain_limit_is_told_so(
    start: Callable[..., ServedModel], wait_until: Callable[..., None], load: MakeLoad
) -> None:
    with start("--shutdown-timeout", "0.5") as served:
        engine_pid = served.engine_pid
        async with load(served) as users:
            await asyncio.to_thread(wait_until, lambda: served.metric("vllm:num_requests_running") == 32)
            served.process.terminate()
            errors = await asyncio.gather(*users.answers)
        assert all("shut down" in error["message"] for error in errors), errors
        assert await asyncio.to_thread(served.process.wait, 30) == 0
        await asyncio.to_thread(wait_until, lambda: not is_running(engine_pid))


async def test_a_second_sigterm_ends_it_at_once(
    start: Callable[..., ServedModel], wait_until: Callable[..., None], load: MakeLoad
) -> None:
    with start() as served:
        engine_pid = served.engine_pid
        async with load(served):
            await asyncio.to_thread(wait_until, lambda: served.metric("vllm:num_requests_running") == 32)
            served.process.terminate()
            await asyncio.to_thread(wait_until, lambda: served.get("/ready").json()["phase"] == "Draining")
            served.process.terminate()
            assert await asyncio.to_thread(served.process.wait, 5) == 128 + signal.SIGTERM
        await asyncio.to_thread(wait_until, lambda: not is_running(engine_pid), 5)
