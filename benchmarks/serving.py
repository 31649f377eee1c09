"""Load a server with OpenAI's API from many users at once and print what they saw.

    python benchmarks/serving.py --url http://127.0.0.1:8000/v1 --users 1 8 32

Each user sends one streamed completion after the other. Prompts are random token ids, and the same number of tokens
goes in and out of each (`ignore_eos`, where the server knows it), so that runs and servers can be compared. Before each
measurement every user sends one short request that does not count.

Prints one line for each number of users: output tokens per second over all users, time to the first token, and time
between tokens, each as median and 99th percentile. Works with any server that streams /v1/completions with usage; its
tokens are counted by the server's own usage.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field

import httpx

# ruff: noqa: INP001 - a program, and no module of a package
# ruff: noqa: T201 - printing is what this is for

_TOKEN_IDS = range(1000, 30000)  # ordinary tokens in any vocabulary


@dataclass
class Seen:
    """What the users of one measurement saw."""

    num_output_tokens: int = 0
    first_token_seconds: list[float] = field(default_factory=list)
    inter_token_seconds: list[float] = field(default_factory=list)  # mean of each request


@dataclass(frozen=True)
class Load:
    """What each request asks for."""

    model: str
    num_prompt_tokens: int
    max_tokens: int
    ignore_eos: bool

    def body(self, rng: random.Random) -> dict[str, object]:
        """Return a request with a prompt of its own, so that no prefix cache helps."""
        return {
            "model": self.model,
            "prompt": rng.choices(_TOKEN_IDS, k=self.num_prompt_tokens),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        } | ({"ignore_eos": True} if self.ignore_eos else {})


async def ask(client: httpx.AsyncClient, body: dict[str, object], seen: Seen) -> None:
    """Send one request and note what came.

    Raises:
        RuntimeError: the server did not answer with a whole stream.
    """
    started = time.perf_counter()
    first = last = 0.0
    num_tokens = 0
    async with client.stream("POST", "completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            raise RuntimeError(f"{response.status_code}: {response.text[:500]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(str(event["error"])[:500])
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
            if event["choices"] and event["choices"][0]["text"]:
                last = time.perf_counter()
                first = first or last
    if not num_tokens:
        raise RuntimeError("the stream ended without usage")
    seen.num_output_tokens += num_tokens
    seen.first_token_seconds.append(first - started)
    if num_tokens > 1:
        seen.inter_token_seconds.append((last - first) / (num_tokens - 1))


async def measure(client: httpx.AsyncClient, load: Load, num_users: int, num_requests: int) -> tuple[Seen, float]:
    """Let so many users send so many requests each; return what they saw and how long it took, in seconds."""
    rng = random.Random(num_users)  # noqa: S311 - prompts, not secrets
    warm_up = Load(load.model, load.num_prompt_tokens, 2, load.ignore_eos)
    await asyncio.gather(*(ask(client, warm_up.body(rng), Seen()) for _ in range(num_users)))
    seen = Seen()

    async def user() -> None:
        for _ in range(num_requests):
            await ask(client, load.body(rng), seen)

    started = time.perf_counter()
    await asyncio.gather(*(user() for _ in range(num_users)))
    return seen, time.perf_counter() - started


def percentiles(seconds: list[float]) -> str:
    """Median and 99th percentile in milliseconds."""
    if not seconds:
        return f"{'-':>8} {'-':>8}"
    ordered = sorted(seconds)
    high = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    return f"{1e3 * statistics.median(ordered):8.1f} {1e3 * high:8.1f}"


async def main() -> None:
    """Measure for each number of users and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="the API's address, with its /v1")
    parser.add_argument("--model", help="default: the first one that the server lists")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=2, help="of each user (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=112, help="default: %(default)s")
    parser.add_argument("--output-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--no-ignore-eos", action="store_true", help="for servers that do not know the field")
    options = parser.parse_args()
    timeout = httpx.Timeout(600)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=options.url, timeout=timeout, limits=limits) as client:
        model = options.model or (await client.get("models")).raise_for_status().json()["data"][0]["id"]
        load = Load(model, options.prompt_tokens, options.output_tokens, not options.no_ignore_eos)
        shape = f"{load.num_prompt_tokens} tokens in, {load.max_tokens} out"
        print(f"{model}: {shape}, {options.requests} requests a user")
        print("users  tokens/s  TTFT p50      p99   ITL p50      p99  (ms)")
        for num_users in options.users:
            seen, seconds = await measure(client, load, num_users, options.requests)
            rate = seen.num_output_tokens / seconds
            times = f"{percentiles(seen.first_token_seconds)}  {percentiles(seen.inter_token_seconds)}"
            print(f"{num_users:5}  {rate:8.1f}  {times}", flush=True)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (RuntimeError, httpx.HTTPError) as error:
        sys.exit(f"serving.py: {error or type(error).__name__}")
