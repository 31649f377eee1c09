"""`python -m octavo_bench.fairness`: what a long prompt does to the first tokens of short ones, through a real server.

Short prompts come one after the other, at random moments: first alone, then while one prompt of 7,000 tokens after the
other is prefilled. The bound: the slowest first token in a hundred may take twice what it takes on an idle server, and
one step. A step is what a long prompt that is alone takes for as many tokens as one step computes at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import statistics
from typing import TYPE_CHECKING, Final

from octavo_bench import peers
from octavo_bench.client import Job, Seen, ask, random_prompt
from octavo_bench.engines import MODEL_NAME, octavo, serving
from octavo_bench.results import percentile

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

# ruff: noqa: T201 - printing is what this is for

_NUM_SHORT: Final = 200
_SHORT_TOKENS: Final = 100
_LONG_TOKENS: Final = 7000
_CONTEXT: Final = 8192
_STEP_TOKENS: Final = 512  # the default of --max-num-batched-tokens
_MAX_PAUSE_SECONDS: Final = 0.5  # longer than a step, so that requests come at any moment of one
_rng: Final = random.Random("fairness")  # noqa: S311 - prompts and pauses, not secrets


def main() -> None:
    """Measure and print."""
    asyncio.run(_measure())


async def _measure() -> None:
    with serving(octavo(peers.weights(), context=_CONTEXT)) as server:
        await _shorts(server.url, 10)
        idle = await _shorts(server.url, _NUM_SHORT)
        long_alone = await _first_token(server.url, _LONG_TOKENS)
        async with _long_prompts(server.url) as long_seconds:
            loaded = await _shorts(server.url, _NUM_SHORT)
    _print("100 tokens, idle", idle)
    _print("100 tokens, beside 7,000", loaded)
    print(f"7,000 tokens: {long_alone:.2f} s alone, {statistics.mean(long_seconds):.2f} s beside the short ones")
    step = long_alone / math.ceil(_LONG_TOKENS / _STEP_TOKENS)
    bound = 2 * percentile(idle, 99) + step
    slowest = percentile(loaded, 99)
    print(f"a step of {_STEP_TOKENS} tokens: {step:.3f} s")
    print(f"p99 {slowest:.3f} s, bound {bound:.3f} s: {slowest / bound:.2f} of it")


def _print(what: str, seconds: Sequence[float]) -> None:
    print(f"{what:26} p50 {percentile(seconds, 50):.3f} s, p99 {percentile(seconds, 99):.3f} s, {len(seconds)} samples")


async def _shorts(url: str, count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        await asyncio.sleep(_rng.uniform(0, _MAX_PAUSE_SECONDS))
        seconds.append(await _first_token(url, _SHORT_TOKENS))
    return seconds


async def _first_token(url: str, num_tokens: int) -> float:
    seen = Seen()
    await ask(url, MODEL_NAME, Job(random_prompt(_rng, num_tokens), 2), seen)
    return seen.first_token_seconds[0]


@contextlib.asynccontextmanager
async def _long_prompts(url: str) -> AsyncIterator[list[float]]:
    """One long prompt after the other; the seconds to the first token of each that was answered."""
    seconds: list[float] = []

    async def ask_on() -> None:
        while True:
            seconds.append(await _first_token(url, _LONG_TOKENS))

    asking = asyncio.create_task(ask_on())
    try:
        yield seconds
    finally:
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking


if __name__ == "__main__":
    main()
