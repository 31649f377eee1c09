"""`python -m octavo_bench.http_cost`: what HTTP and streaming cost beside the engine, at 32 users.

The same requests go through the server and, in turns, to an engine process driven directly, with no HTTP and no text.
Printed are tokens/s of both, and the processor time of the API process as a share of the engine's.
"""

from __future__ import annotations

import asyncio
import statistics
from typing import TYPE_CHECKING, Final

from octavo_bench import client, direct, peers, processes
from octavo_bench.engines import CONTEXT, MODEL_NAME, NUM_USERS, octavo, serving
from octavo_engine.config import EngineConfig

if TYPE_CHECKING:
    from pathlib import Path

    from octavo_bench.engines import Engine

# ruff: noqa: T201 - printing is what this is for

_TURNS: Final = 3
_NUM_REQUESTS: Final = 128


def main() -> None:
    """Measure and print."""
    asyncio.run(_measure())


async def _measure() -> None:
    weights = peers.weights()
    engine = octavo(weights)
    work = client.fixed_work(NUM_USERS, _NUM_REQUESTS)
    served, direct, shares = [], [], []
    for _ in range(_TURNS):
        speed, share = await _through_http(engine, work)
        served.append(speed)
        shares.append(share)
        direct.append(await _directly(weights.stored, work))
        print(
            f"through HTTP {served[-1]:.1f} tokens/s, directly {direct[-1]:.1f}: {served[-1] / direct[-1]:.3f}; "
            f"API process {100 * shares[-1]:.1f} % of the engine's processor time"
        )
    ratio, share = statistics.median(served) / statistics.median(direct), statistics.median(shares)
    print(f"medians: {ratio:.3f} of the direct speed; {100 * share:.1f} % of the engine's processor time")


async def _through_http(engine: Engine, work: client.Work) -> tuple[float, float]:
    """Tokens per second, and the API process' processor time over the engine's."""
    with serving(engine) as server:
        (core,) = (pid for pid in processes.tree(server.pid) if pid != server.pid)
        await client.run(server.url, MODEL_NAME, client.fixed_work(NUM_USERS, NUM_USERS))
        before, core_before = processes.cpu_seconds(server.pid), processes.cpu_seconds(core)
        seen = await client.run(server.url, MODEL_NAME, work)
        core_used = processes.cpu_seconds(core) - core_before
        used = processes.cpu_seconds(server.pid) - before - core_used
    return seen.num_output_tokens / seen.seconds, used / core_used


async def _directly(model: Path, work: client.Work) -> float:
    """Tokens per second."""
    async with direct.running(EngineConfig(model=model, served_model_names=("m",), max_model_len=CONTEXT)) as engine:
        await direct.run(engine, client.fixed_work(NUM_USERS, NUM_USERS))
        seen = await direct.run(engine, work)
    return seen.num_output_tokens / seen.seconds


if __name__ == "__main__":
    main()
