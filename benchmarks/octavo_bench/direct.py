"""An engine process driven directly, with no HTTP and no text: what its users would see if these cost nothing.

Used where the engine itself is measured: http_cost.py and gpu_acceptance.py. The work and the counts are client.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from octavo_bench.client import RequestFailed, Seen
from octavo_engine.client import EngineClient
from octavo_engine.plan import SamplingParams
from octavo_engine.transport import spawn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from octavo_bench.client import Job, Work
    from octavo_engine.config import EngineConfig


@contextlib.asynccontextmanager
async def running(config: EngineConfig) -> AsyncIterator[EngineClient]:
    """Start an engine, wait until it takes requests, and end it.

    Raises:
        EngineRefused, EngineDead: it cannot start.
    """
    engine = await EngineClient.start(*spawn(config))
    try:
        await engine.ready()
        yield engine
    finally:
        await engine.close()


async def run(engine: EngineClient, work: Work, *, temperature: float = 0.0) -> Seen:
    """Let the users do the work; what client.run calls a chunk is an update here, and nothing comes before.

    Raises:
        EngineDead: the engine ended.
        RequestFailed: a request got no whole answer.
    """
    seen, jobs = Seen(), enumerate(work.jobs)

    async def user() -> None:
        for number, job in jobs:  # shared: whoever is free takes the next one
            await _ask(engine, f"r{number}", job, temperature, seen)

    cpu, started = time.process_time(), time.perf_counter()
    await asyncio.gather(*(user() for _ in range(work.num_users)))
    seen.seconds = time.perf_counter() - started
    seen.client_cpu_seconds = time.process_time() - cpu
    return seen


async def _ask(engine: EngineClient, name: str, job: Job, temperature: float, seen: Seen) -> None:
    sampling = SamplingParams(max_tokens=job.num_output_tokens, temperature=temperature, ignore_eos=True)
    last = started = time.perf_counter()
    num_tokens = 0
    async for update in engine.generate(name, job.prompt, sampling):
        if update.error is not None:
            raise RequestFailed(f"request {name}: {update.error}")
        now = time.perf_counter()
        if num_tokens:
            seen.gap_seconds.append(now - last)
        else:
            seen.first_token_seconds.append(now - started)
        last = now
        seen.num_chunks += 1
        num_tokens += len(update.token_ids)
    if num_tokens != job.num_output_tokens:
        raise RequestFailed(f"request {name} ended with {num_tokens} tokens and not {job.num_output_tokens}")
    seen.num_output_tokens += num_tokens
    seen.num_requests += 1
