"""`priority` of a request, which counts where the server was started with --scheduling-policy priority."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from tests.engine.serving.conftest import tokens_of

if TYPE_CHECKING:
    import httpx
    from tests.engine.serving.conftest import Eventually, FakeEngine

    from octavo_engine.config import SchedulingPolicy, ServerConfig
    from octavo_engine.server.service import Service


@pytest.fixture
def policy() -> SchedulingPolicy:
    """A test may parametrize it."""
    return "priority"


@pytest.fixture
def config(config: ServerConfig, policy: SchedulingPolicy) -> ServerConfig:
    """A server with one seat."""
    return replace(config, engine=replace(config.engine, max_num_seqs=1), scheduling_policy=policy)


def body(path: str, **fields: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": "Hi"}
    return {"model": "fake", "max_tokens": 2} | asked | fields


async def test_of_requests_that_wait_the_one_with_the_lower_priority_goes_first(
    ready: httpx.AsyncClient, engine: FakeEngine, eventually: Eventually, service: Service
) -> None:
    engine.steps.clear()
    tasks: list[asyncio.Task[httpx.Response]] = []

    async def all_are_there() -> bool:
        return service.num_admitted == len(tasks) and engine.num_steps == 1

    for priority in (9, 7, None, -3, 5):  # the first has the seat before the others come
        asked = body("/v1/completions", prompt=str(priority), priority=priority)
        tasks.append(asyncio.create_task(ready.post("/v1/completions", json=asked)))
        await eventually(all_are_there)
    engine.steps.set()
    responses = await asyncio.gather(*tasks)

    assert {response.status_code for response in responses} == {200}
    assert engine.begun == [tokens_of(str(priority)) for priority in (9, -3, None, 5, 7)]


@pytest.mark.parametrize("policy", ["fcfs"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_without_the_policy_a_priority_is_refused_and_none_is_not(ready: httpx.AsyncClient, path: str) -> None:
    refusal = await ready.post(path, json=body(path, priority=1))

    assert refusal.status_code == 400
    assert refusal.json()["error"]["param"] == "priority"
    assert "--scheduling-policy priority" in refusal.json()["error"]["message"]
    for nothing in (0, None):
        assert (await ready.post(path, json=body(path, priority=nothing))).status_code == 200
