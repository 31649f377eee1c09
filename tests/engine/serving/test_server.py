from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from typing import TYPE_CHECKING, Any, Self

import httpx
import pytest

from octavo_engine.errors import ConfigError, EngineDead, EngineRefused
from octavo_engine.server import run

if TYPE_CHECKING:
    from tests.engine.serving.conftest import Eventually, FakeEngine

    from octavo_engine.server.service import Service


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]} | fields


class Running:
    """A server of its own for tests in which it ends."""

    def __init__(self, service: Service) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.socket.getsockname()[1]}", timeout=30)
        self.task = asyncio.create_task(run.run_service(service, self.socket))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.http.aclose()
        self.socket.close()

    async def phase(self) -> str:
        """What /ready says, on a connection of its own: a server that begins to drain ends idle ones."""
        async with httpx.AsyncClient(base_url=self.http.base_url, timeout=30) as http:
            phase: str = (await http.get("/ready")).json()["phase"]
        return phase

    async def is_ready(self) -> bool:
        """Whether it takes requests."""
        return await self.phase() == "Ready"


async def test_the_socket_answers_while_the_model_loads(
    service: Service, engine: FakeEngine, eventually: Eventually
) -> None:
    engine.loaded.clear()
    async with Running(service) as server:

        async def is_loading() -> bool:
            return await server.phase() == "Loading"

        await eventually(is_loading)
        ready = await server.http.get("/ready")
        assert ready.status_code == 503
        assert ready.json() == {"phase": "Loading", "done": 25, "total": 100, "reason": "the model is being loaded"}
        assert (await server.http.get("/health")).status_code == 200
        refused = await server.http.post("/v1/chat/completions", json=chat())
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "service_unavailable_error")
        assert int(refused.headers["Retry-After"]) > 0
        assert (await server.http.get("/v1/models")).status_code == 503
        engine.loaded.set()
        await eventually(server.is_ready)
        assert (await server.http.post("/v1/chat/completions", json=chat())).status_code == 200


async def test_a_refusal_of_the_engine_ends_the_server_with_its_reason(service: Service, engine: FakeEngine) -> None:
    engine.refusal = "no such architecture"
    async with Running(service) as server:
        with pytest.raises(EngineRefused, match="no such architecture") as error:
            await server.task
    assert error.value.reason == "ModelUnsupported"


async def test_sigterm_finishes_what_runs_and_refuses_what_comes(
    service: Service, engine: FakeEngine, eventually: Eventually
) -> None:
    async with Running(service) as server:
        await eventually(server.is_ready)
        engine.steps.clear()
        whole = asyncio.create_task(server.http.post("/v1/chat/completions", json=chat()))
        streamed = asyncio.create_task(server.http.post("/v1/chat/completions", json=chat(stream=True)))

        async def both_run() -> bool:
            return service.readiness.phase == "Ready" and service.num_in_flight >= 2 and engine.num_steps > 0

        await eventually(both_run)
        os.kill(os.getpid(), signal.SIGTERM)

        async def drains() -> bool:
            return await server.phase() == "Draining"

        await eventually(drains)
        refused = await server.http.post("/v1/chat/completions", json=chat())
        assert (refused.status_code, refused.headers["Connection"]) == (503, "close")
        assert int(refused.headers["Retry-After"]) > 0
        assert (await server.http.get("/ready")).status_code == 503
        assert (await server.http.get("/health")).status_code == 200
        assert not server.task.done()
        engine.steps.set()
        assert (await whole).json()["choices"][0]["message"]["content"] == "The answer is 42."
        assert (await streamed).text.endswith("data: [DONE]\n\n")
        async with asyncio.timeout(30):
            await server.task
    assert engine.processes[0].wait() == 0


async def test_sigterm_ends_connections_so_that_their_clients_go_elsewhere(
    service: Service, engine: FakeEngine, eventually: Eventually
) -> None:
    async with Running(service) as server:
        await eventually(server.is_ready)
        idle, streaming = [await asyncio.open_connection(*server.socket.getsockname()) for _ in range(2)]
        idle[1].write(b"GET /version HTTP/1.1\r\nHost: h\r\n\r\n")
        assert b"200 OK" in await idle[0].readuntil(b"\r\n\r\n")
        engine.steps.clear()
        body = json.dumps(chat(stream=True)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n"
        streaming[1].write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        assert b"connection: close" not in await streaming[0].readuntil(b"\r\n\r\n")
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(30):
            await idle[0].read()  # to its end
            assert not server.task.done()
            engine.steps.set()
            assert b"data: [DONE]" in await streaming[0].read()
            await server.task
        for _, writer in (idle, streaming):
            writer.close()


async def test_sigterm_on_an_idle_server_ends_it_at_once(
    service: Service, engine: FakeEngine, eventually: Eventually
) -> None:
    async with Running(service) as server:
        await eventually(server.is_ready)
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(30):
            await server.task


@pytest.mark.parametrize("shutdown_timeout", [0.2])
async def test_what_does_not_end_in_time_is_told_so(
    service: Service, engine: FakeEngine, eventually: Eventually
) -> None:
    async with Running(service) as server:
        await eventually(server.is_ready)
        engine.steps.clear()
        request = asyncio.create_task(server.http.post("/v1/chat/completions", json=chat()))

        async def runs() -> bool:
            return engine.num_steps > 0

        await eventually(runs)
        os.kill(os.getpid(), signal.SIGTERM)
        response = await request
        engine.steps.set()
        assert response.status_code == 503
        assert "shut down" in response.json()["error"]["message"]
        async with asyncio.timeout(30):
            await server.task


async def test_the_death_of_the_engine_fails_what_runs_and_then_ends_the_server(
    service: Service, engine: FakeEngine, eventually: Eventually
) -> None:
    async with Running(service) as server:
        await eventually(server.is_ready)
        engine.steps.clear()
        whole = asyncio.create_task(server.http.post("/v1/chat/completions", json=chat()))
        streamed = asyncio.create_task(server.http.post("/v1/chat/completions", json=chat(stream=True)))

        async def both_run() -> bool:
            return service.num_in_flight >= 2 and engine.num_steps > 0

        await eventually(both_run)
        engine.processes[0].kill()
        engine.steps.set()
        assert (await whole).status_code == 503
        assert "SIGKILL" in (await whole).json()["error"]["message"]
        assert '"code":"engine_dead"' in (await streamed).text
        health = await server.http.get("/health")
        assert (health.status_code, "SIGKILL" in health.json()["reason"]) == (503, True)
        assert await server.phase() == "Failed"
        with pytest.raises(EngineDead, match="SIGKILL"):
            await server.task


async def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}"):
            run.listen("127.0.0.1", port)
