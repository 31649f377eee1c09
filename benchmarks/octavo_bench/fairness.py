"""`python -m octavo_bench.fairness`: what a long prompt does to the first tokens of short ones, through a real server.

Short prompts come one after the other, at random moments: first alone, then while one prompt of 7,000 tokens after the
other is prefilled. The bound: the slowest first token in a hundred may take twice what it takes on an idle server, and
one step: the longest that a long prompt by itself takes. On a CPU each of its steps has as much work, so that is the
mean of them all but the last: what it takes alone by the number of its steps, which the server counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
from typing import TYPE_CHECKING, Final
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

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
_STEPS_METRIC: Final = "vllm:iteration_tokens_total_count"
_MAX_PAUSE_SECONDS: Final = 0.5  # longer than a step, so that requests come at any moment of one
_rng: Final = random.Random("fairness")  # noqa: S311 - prompts and pauses, not secrets


def main() -> None:
    """Measure and print."""
    asyncio.run(_measure())


async def _measure() -> None:
    with serving(octavo(peers.weights(), context=_CONTEXT)) as server:
        await _shorts(server.url, 10)
        idle = await _shorts(server.url, _NUM_SHORT)
        _print("100 tokens, idle", idle)
        num_steps = _num_steps(server.url)
        long_alone = await _first_token(server.url, _LONG_TOKENS)
        step = long_alone / (_num_steps(server.url) - num_steps - 2)  # the last of the prompt, and one more token
        print(f"7,000 tokens alone: {long_alone:.2f} s, a step {step:.3f} s", flush=True)
        async with _long_prompts(server.url) as long_seconds:
            loaded = await _shorts(server.url, _NUM_SHORT)
    _print("100 tokens, beside 7,000", loaded)
    print(f"7,000 tokens: {statistics.mean(long_seconds):.2f} s beside the short ones, {len(long_seconds)} samples")
    bound = 2 * percentile(idle, 99) + step
    slowest = percentile(loaded, 99)
    print(f"p99 {slowest:.3f} s, bound {bound:.3f} s: {slowest / bound:.2f} of it")


def _print(what: str, seconds: Sequence[float]) -> None:
    figures = f"p50 {percentile(seconds, 50):.3f} s, p99 {percentile(seconds, 99):.3f} s, {len(seconds)} samples"
    print(f"{what:26} {figures}", flush=True)


def _num_steps(url: str) -> int:
    """Steps since the server's start."""
    with urlopen(f"{url}/metrics") as answer:  # noqa: S310 - the server that was started here
        families = text_string_to_metric_families(answer.read().decode())
    return int(next(s.value for family in families for s in family.samples if s.name == _STEPS_METRIC))


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
