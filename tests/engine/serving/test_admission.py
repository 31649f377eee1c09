"""What is let in: the queue limit, the size of bodies, the age of connections."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn

from octavo_engine.config import ServerConfig
from octavo_engine.server.app import CONNECTED_AT, MAX_BODY_BYTES, MAX_CONNECTION_SECONDS, create_app
from octavo_engine.server.run import Connection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.engine.serving.conftest import Eventually, FakeEngine

    from octavo_engine.server.service import Service

NUM_SEATS, QUEUE_LIMIT = 2, 3


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": "Hi"} | fields


async def rejections(http: httpx.AsyncClient, reason: str) -> float:
    """What the metrics say."""
    start = f'vllm:admission_rejections_total{{model_name="fake",reason="{reason}"}} '
    (line,) = [line for line in (await http.get("/metrics")).text.splitlines() if line.startswith(start)]
    return float(line.removeprefix(start))


@pytest.fixture
def config(config: ServerConfig) -> ServerConfig:
    """A server with few seats and a short queue."""
    engine = replace(config.engine, max_num_seqs=NUM_SEATS)
    return replace(config, engine=engine, max_num_queued_reqs=QUEUE_LIMIT)


def test_by_default_four_requests_may_wait_for_each_that_runs(config: ServerConfig) -> None:
    assert ServerConfig(engine=config.engine).queue_limit == 4 * NUM_SEATS
    assert replace(config, max_num_queued_reqs=0).queue_limit == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_sends_away_and_lets_in_again(
    ready: httpx.AsyncClient, engine: FakeEngine, eventually: Eventually, *, stream: bool
) -> None:
    engine.steps.clear()
    body = completion(stream=stream, max_tokens=50)
    inside = [asyncio.create_task(ready.post("/v1/completions", json=body)) for _ in range(NUM_SEATS + QUEUE_LIMIT)]

    async def refused() -> bool:
        response = await ready.post("/v1/completions", json={"of no request": "does anything look at it"})
        if response.status_code == 400:  # the others have not all come yet
            return False
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["code"]) == (503, "service_unavailable_error", "queue_full")
        assert f"{QUEUE_LIMIT} requests wait already" in error["message"]
        assert int(response.headers["Retry-After"]) > 0
        return True

    await eventually(refused)
    assert await rejections(ready, "queue_full") == 1
    assert (await ready.get("/v1/models")).status_code == 200, "only generation waits in the queue"
    engine.steps.set()
    for response in await asyncio.gather(*inside):
        assert response.status_code == 200
    assert (await ready.post("/v1/completions", json=body)).status_code == 200


async def test_requests_that_fail_or_leave_give_their_place_back(
    ready: httpx.AsyncClient, engine: FakeEngine, service: Service
) -> None:
    engine.failing = "poison"
    for _ in range(2 * (NUM_SEATS + QUEUE_LIMIT)):
        assert (await ready.post("/v1/completions", json=completion(prompt="poison"))).status_code == 500
        assert (await ready.post("/v1/completions", json=completion(model="another"))).status_code == 404
        assert (await ready.post("/v1/completions", content=b"{")).status_code == 400
        engine.steps.clear()
        with pytest.raises(httpx.ReadTimeout):
            await ready.post("/v1/completions", json=completion(stream=True), timeout=0.05)
        engine.steps.set()
    assert (await ready.post("/v1/completions", json=completion())).status_code == 200


@pytest.fixture
def loading(engine: FakeEngine) -> None:
    """The engine does not come to the end of loading until the test says so."""
    engine.loaded.clear()


@pytest.mark.usefixtures("loading")
async def test_other_refusals_are_counted_by_their_reasons(
    http: httpx.AsyncClient, engine: FakeEngine, eventually: Eventually
) -> None:
    response = await http.post("/v1/completions", json=completion())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
    assert await rejections(http, "loading") == 1
    engine.loaded.set()
    engine.steps.clear()

    async def loaded() -> bool:
        return (await http.get("/ready")).status_code == 200

    await eventually(loaded)
    running = asyncio.create_task(http.post("/v1/completions", json=completion()))

    async def runs() -> bool:
        return engine.num_steps > 0

    await eventually(runs)
    os.kill(os.getpid(), signal.SIGTERM)

    async def draining() -> bool:
        async with httpx.AsyncClient(base_url=http.base_url, timeout=30) as new:  # idle connections end
            response = await new.post("/v1/completions", json=completion(max_tokens=1))
        return bool(response.json().get("error", {}).get("code") == "draining")

    await eventually(draining)
    async with httpx.AsyncClient(base_url=http.base_url, timeout=30) as new:
        assert await rejections(new, "draining") == 1
    engine.steps.set()
    assert (await running).status_code == 200


async def in_pieces(num_bytes: int) -> AsyncIterator[bytes]:
    """A body whose length is not told beforehand."""
    for _ in range(num_bytes // 2**16):
        yield b" " * 2**16


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("num_bytes", [MAX_BODY_BYTES + 2**16, 3 * MAX_BODY_BYTES])
async def test_a_body_that_is_too_large_is_refused(ready: httpx.AsyncClient, num_bytes: int, *, declared: bool) -> None:
    content: Any = b" " * num_bytes if declared else in_pieces(num_bytes)
    response = await ready.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["type"], response.headers["Connection"]) == (
        413,
        "invalid_request_error",
        "close",
    )
    assert "8 MiB" in error["message"]


@pytest.mark.parametrize("declared", [False, True])
async def test_a_body_of_the_most_that_is_taken_is_read(ready: httpx.AsyncClient, *, declared: bool) -> None:
    content: Any = b" " * MAX_BODY_BYTES if declared else in_pieces(MAX_BODY_BYTES)
    response = await ready.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, "not valid JSON" in response.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize("body", [b"[" * 10**6, b'{"a":' * 10**6], ids=["lists", "objects"])
async def test_json_that_is_too_deep_is_refused(ready: httpx.AsyncClient, body: bytes) -> None:
    response = await ready.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert len(response.content) < 1000
    assert (await ready.post("/v1/completions", json=completion())).status_code == 200


async def test_an_old_connection_is_ended_and_a_young_one_kept(service: Service) -> None:
    async def connection_header(age: float) -> bytes | None:
        headers: dict[bytes, bytes] = {}

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            headers.update(message.get("headers", ()))

        state = {CONNECTED_AT: time.monotonic() - age}
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/version",
            "headers": [],
            "query_string": b"",
            "state": state,
        }
        await create_app(service)(scope, receive, send)
        return headers.get(b"connection")

    assert await connection_header(MAX_CONNECTION_SECONDS + 1) == b"close"
    assert await connection_header(MAX_CONNECTION_SECONDS - 30) is None


async def test_the_age_of_a_connection_is_that_of_its_first_request() -> None:
    async def app(scope: Any, _receive: object, send: Any) -> None:
        body = str(scope["state"][CONNECTED_AT]).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = uvicorn.Server(uvicorn.Config(app, http=Connection, lifespan="off", log_config=None))
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        before = time.monotonic()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", timeout=30) as kept:
            first, second = [(await kept.get("/")).text for _ in range(2)]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", timeout=30) as new:
            third = (await new.get("/")).text
        assert before < float(first) == float(second) < float(third)
        server.should_exit = True
        await serving
