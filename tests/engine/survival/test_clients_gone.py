"""Clients that leave a real server: what they held is free within a second, however they leave and however often."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.engine.conftest import ServedModel

pytestmark = pytest.mark.timeout(400)

NUM_DISCONNECTS = 200
SECONDS_TO_FREE = 1.0

Gauges = dict[str, float]


async def request(served: ServedModel, method: str, path: str, body: bytes = b"") -> asyncio.StreamWriter:
    """Send a request on a connection of its own."""
    return (await exchange(served, method, path, body))[1]


async def exchange(
    served: ServedModel, method: str, path: str, body: bytes = b""
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The same, with what the response can be read from."""
    host, port = served.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    return reader, writer


def asking(max_tokens: int = 7000, *, stream: bool) -> bytes:
    """The body of a request that runs for seconds."""
    body = {"model": "tiny", "prompt": "Hi " * 20, "temperature": 0, "ignore_eos": True}
    body |= {"max_tokens": max_tokens, "stream": stream}
    return json.dumps(body).encode()


async def gauges(served: ServedModel) -> Gauges:
    """What the metrics say of the engine now."""
    reader, writer = await exchange(served, "GET", "/metrics")
    text = (await reader.read()).decode()
    writer.close()
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return {name: float(re.findall(rf"^vllm:{name}{{.*}} (\S+)$", text, re.MULTILINE)[0]) for name in names}


async def eventually(served: ServedModel, condition: Callable[[Gauges], bool], seconds: float = 60.0) -> None:
    """Poll the gauges until a condition holds."""
    async with asyncio.timeout(seconds):
        while not condition(await gauges(served)):  # noqa: ASYNC110 - it is on the other side of a network
            await asyncio.sleep(0.01)


def is_free(now: Gauges) -> bool:
    """Whether nothing runs, waits or holds KV."""
    return not any(now.values())


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_while_it_is_answered_frees_its_blocks_within_a_second(
    served: ServedModel, *, stream: bool
) -> None:
    await eventually(served, is_free)
    leaver = await request(served, "POST", "/v1/completions", asking(stream=stream))
    await eventually(served, lambda now: now["num_requests_running"] == 1 and now["kv_cache_usage_perc"] > 0)
    leaver.transport.abort()
    await eventually(served, is_free, SECONDS_TO_FREE)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_while_it_waits_in_the_queue_is_gone_from_it(
    start: Callable[..., ServedModel], *, stream: bool
) -> None:
    with start("--max-num-seqs", "1") as served:
        first = await request(served, "POST", "/v1/completions", asking(stream=stream))
        await eventually(served, lambda now: now["num_requests_running"] == 1)
        second = await request(served, "POST", "/v1/completions", asking(stream=stream))
        await eventually(served, lambda now: now["num_requests_waiting"] == 1)
        second.transport.abort()
        await eventually(served, lambda now: now["num_requests_waiting"] == 0, SECONDS_TO_FREE)
        assert (await gauges(served))["num_requests_running"] == 1, "the other one was not touched"
        first.transport.abort()
        await eventually(served, is_free, SECONDS_TO_FREE)


async def test_many_that_leave_at_any_moment_leave_the_pool_whole(served: ServedModel) -> None:
    """Idle engines check their own integrity (core.py): one that lost a block would end with the reason."""

    async def at_once(_reader: asyncio.StreamReader) -> None:
        """Leave before anything has come of it."""

    async def after_the_first_bytes(reader: asyncio.StreamReader) -> None:
        await reader.read(1)

    moments: list[Callable[[asyncio.StreamReader], Awaitable[None]]] = [at_once, after_the_first_bytes]
    for number in range(NUM_DISCONNECTS):
        stream = number % 2 == 0
        reader, writer = await exchange(served, "POST", "/v1/completions", asking(stream=stream))
        # Without streaming the first bytes are the last ones too: those who do not wait for them leave half-way.
        await moments[number // 2 % 2 if stream else 0](reader)
        if number % 5 == 0:
            await eventually(served, lambda now: now["num_requests_running"] > 0)
        writer.transport.abort()
    await eventually(served, is_free, SECONDS_TO_FREE)
    reader, writer = await exchange(served, "POST", "/v1/completions", asking(8, stream=False))
    assert b'"completion_tokens":8' in await reader.read()
    writer.close()
    await eventually(served, is_free)
    assert served.get("/health").status_code == 200
