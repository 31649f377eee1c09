from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

import pytest

from octavo_engine.client import EngineClient
from octavo_engine.errors import EngineDead, EngineRefused
from octavo_engine.plan import SamplingParams
from octavo_engine.transport import ClientChannel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.engine.serving.conftest import Eventually, FakeEngine

    from octavo_engine.config import ServerConfig
    from octavo_engine.messages import SchedulerStats
    from octavo_engine.stream import Answered

PROMPT = [3 + byte for byte in b"Hi"]
SAMPLING = SamplingParams(max_tokens=100)


class Notes:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.first: list[tuple[int, int]] = []
        self.num_next = 0
        self.answered: list[Answered] = []
        self.num_computed = 0
        self.stats: SchedulerStats | None = None

    def on_first_tokens(self, *, seconds: float, num_prompt_tokens: int, num_tokens: int) -> None:
        """As EngineObserver."""
        self.first.append((num_prompt_tokens, num_tokens))
        assert seconds >= 0

    def on_next_tokens(self, *, seconds: float, num_tokens: int) -> None:
        """As EngineObserver."""
        self.num_next += num_tokens
        assert seconds >= 0

    def on_answered(self, answered: Answered) -> None:
        """As EngineObserver."""
        self.answered.append(answered)

    def on_step(self, stats: SchedulerStats, *, num_tokens: int) -> None:
        """As EngineObserver."""
        self.stats = stats
        self.num_computed += num_tokens


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def loading(engine: FakeEngine) -> None:
    """The engine does not come to the end of loading until the test says so."""
    engine.loaded.clear()


@pytest.fixture
async def client(engine: FakeEngine, config: ServerConfig, notes: Notes) -> AsyncIterator[EngineClient]:
    process, sock = engine.spawn(config.engine)
    client = EngineClient(process, await ClientChannel.open(sock), notes)
    yield client
    engine.loaded.set()
    engine.steps.set()
    await client.close()


async def text_of(client: EngineClient, request_id: str) -> tuple[str, str | None]:
    """All of a request's text, and why it ended."""
    tokens: list[int] = []
    reason = None
    async for update in client.generate(request_id, PROMPT, SAMPLING):
        tokens += update.token_ids
        reason = update.finish_reason
    return bytes(token - 3 for token in tokens[:-1]).decode(), reason


async def test_a_request_yields_its_tokens_and_why_it_ended(client: EngineClient) -> None:
    await client.ready()
    assert await text_of(client, "a") == ("The answer is 42.", "stop")


async def test_many_requests_each_get_their_own_tokens(client: EngineClient) -> None:
    await client.ready()
    answers = await asyncio.gather(*(text_of(client, f"request-{i}") for i in range(40)))
    assert set(answers) == {("The answer is 42.", "stop")}


async def test_a_slow_reader_gets_what_has_come_at_once(
    client: EngineClient, notes: Notes, eventually: Eventually
) -> None:
    await client.ready()
    num_tokens = len("The answer is 42.") + 1
    updates = client.generate("a", PROMPT, SAMPLING)

    async def all_came() -> bool:
        return len(notes.first) + notes.num_next == num_tokens

    async with contextlib.aclosing(updates):
        first = await anext(updates)
        await eventually(all_came)
        rest = [update async for update in updates]
    assert len(rest) <= 1
    assert sum(len(update.token_ids) for update in (first, *rest)) == num_tokens


async def test_leaving_early_aborts_the_request(client: EngineClient, notes: Notes, eventually: Eventually) -> None:
    await client.ready()
    updates = client.generate("a", PROMPT, SamplingParams(max_tokens=300, ignore_eos=True))
    await anext(updates)
    await updates.aclose()

    async def idle() -> bool:
        return notes.stats is not None and notes.stats.num_running == 0 and notes.stats.num_used_blocks == 0

    await eventually(idle)


async def test_the_observer_is_told_of_every_token(client: EngineClient, notes: Notes) -> None:
    await client.ready()
    await text_of(client, "a")
    assert notes.first == [(len(PROMPT), 1)]
    assert notes.num_next == len("The answer is 42.")  # EOS counts


async def test_the_observer_learns_where_the_time_went(
    client: EngineClient, engine: FakeEngine, notes: Notes, eventually: Eventually
) -> None:
    """Over a request that found the engine busy, so that it waited for a step to end before its own began."""
    await client.ready()
    engine.steps.clear()
    first = asyncio.create_task(text_of(client, "first"))

    async def is_busy() -> bool:
        return engine.num_steps == 1

    await eventually(is_busy)
    started = time.monotonic()
    second = asyncio.create_task(text_of(client, "second"))
    await asyncio.sleep(0.2)  # what is to be seen as its time in the queue
    engine.steps.set()
    await asyncio.gather(first, second)
    seconds = time.monotonic() - started
    num_tokens = len("The answer is 42.") + 1
    for answered in notes.answered:
        assert (answered.num_prompt_tokens, answered.num_tokens, answered.max_tokens) == (2, num_tokens, 100)
        assert min(answered.queue_seconds, answered.prefill_seconds, answered.decode_seconds) >= 0
    waited, worked = sorted(notes.answered, key=lambda answered: -answered.queue_seconds)
    assert worked.prefill_seconds >= 0.2 > worked.queue_seconds
    assert waited.queue_seconds >= 0.2
    assert waited.queue_seconds + waited.prefill_seconds + waited.decode_seconds <= seconds
    assert notes.num_computed == 2 * (2 + num_tokens - 1)


@pytest.mark.usefixtures("loading")
async def test_loading_is_told_and_is_no_problem(client: EngineClient, eventually: Eventually) -> None:
    async def told() -> bool:
        return (client.loading.phase, client.loading.done, client.loading.total) == ("Loading", 25, 100)

    await eventually(told)
    assert client.problem is None


@pytest.mark.usefixtures("loading")
async def test_a_refusal_carries_the_reason_of_the_engine(client: EngineClient, engine: FakeEngine) -> None:
    engine.refusal = "no such architecture"
    engine.loaded.set()
    with pytest.raises(EngineRefused, match="no such architecture") as error:
        await client.ready()
    assert error.value.reason == "ModelUnsupported"


@pytest.mark.usefixtures("loading")
async def test_death_while_loading_is_told_with_its_signal(client: EngineClient, engine: FakeEngine) -> None:
    engine.processes[0].kill()
    engine.loaded.set()
    with pytest.raises(EngineDead, match="SIGKILL"):
        await client.ready()


async def test_death_ends_every_request_and_refuses_the_next(client: EngineClient, engine: FakeEngine) -> None:
    await client.ready()
    engine.steps.clear()
    running = [asyncio.create_task(text_of(client, f"r{i}")) for i in range(3)]
    await asyncio.sleep(0)
    engine.processes[0].kill(exit_code=3)
    engine.steps.set()
    for task in running:
        with pytest.raises(EngineDead, match="exit code 3"):
            await task
    with pytest.raises(EngineDead, match="exit code 3"):
        await text_of(client, "late")
    assert "exit code 3" in await client.died()
    assert client.problem is not None


async def test_closing_ends_the_engine_and_tells_what_still_runs(client: EngineClient, engine: FakeEngine) -> None:
    await client.ready()
    engine.steps.clear()
    running = asyncio.create_task(text_of(client, "a"))
    await asyncio.sleep(0)
    closing = asyncio.create_task(client.close())
    with pytest.raises(EngineDead, match="shut down"):
        await running
    engine.steps.set()
    await closing
    assert engine.processes[0].wait() == 0
