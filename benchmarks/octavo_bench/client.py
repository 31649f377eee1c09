"""The one load generator: closed-loop users against any server that streams OpenAI's /v1/completions with usage.

Each user sends its next request when the last one has ended, on a connection of its own, so that no engine gains or
loses by keep-alive. HTTP is spoken by hand over asyncio's streams: a client library took more processor time than some
of the engines' servers, and there are few cores to share. The client measures its own share of a core; a table in
which it is large measures the client.

What is counted: tokens by the server's own usage, never the number that was asked for. Time to the first token is the
time to the first chunk with text. A gap is the time between two chunks with text of one request.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

_TOKEN_IDS = range(1000, 30000)  # ordinary tokens in any vocabulary
_TIMEOUT_SECONDS = 900.0  # for one request; a slow engine is measured and not cut off


class RequestFailed(Exception):
    """A server did not answer as it should; the message says which one and what it said."""


@dataclass(frozen=True)
class Job:
    """One request to send."""

    prompt: Sequence[int]  # token ids
    num_output_tokens: int
    fields: Mapping[str, Any] = field(default_factory=dict)  # of the body, beside the usual ones or in their place


@dataclass(frozen=True)
class Work:
    """One cell of the table."""

    name: str
    num_users: int
    jobs: Sequence[Job]


@dataclass
class Seen:
    """What the users of one cell saw."""

    num_requests: int = 0
    num_output_tokens: int = 0  # by usage
    num_chunks: int = 0  # with text
    seconds: float = 0.0  # from the first request to the end of the last one
    client_cpu_seconds: float = 0.0
    first_token_seconds: list[float] = field(default_factory=list)
    gap_seconds: list[float] = field(default_factory=list)


def fixed_work(num_users: int, num_requests: int, num_prompt_tokens: int = 112, num_output_tokens: int = 64) -> Work:
    """Requests of one shape. No two prompts share a prefix, and every engine gets the same ones."""
    rng = random.Random(f"fixed {num_users}")  # noqa: S311 - prompts, not secrets
    jobs = [Job(random_prompt(rng, num_prompt_tokens), num_output_tokens) for _ in range(num_requests)]
    return Work(f"{num_users} user{'s' * (num_users > 1)}", num_users, jobs)


def spread_work(num_users: int, num_requests: int) -> Work:
    """Short prompts of 24 to 50 tokens and answers uniform in 32..256 tokens: where static batches waste most."""
    rng = random.Random("spread")  # noqa: S311 - prompts, not secrets
    jobs = [Job(random_prompt(rng, rng.randint(24, 50)), rng.randint(32, 256)) for _ in range(num_requests)]
    return Work("spread", num_users, jobs)


def nano_vllm_work(num_requests: int = 256, shortest: int = 100, longest: int = 1024) -> Work:
    """The work of nano-vllm's public benchmark (its bench.py): all at once, lengths in and out uniform.

    By default the very tokens that it draws from seed 0: 142,827 in, 133,966 out. At temperature 0.6 it tells of 1,434
    tokens/s with Qwen3-0.6B on a GeForce RTX 4070 for laptops, where vLLM has 1,362 (its README).
    """
    rng = random.Random(0)  # noqa: S311 - prompts, not secrets
    prompts = [[rng.randint(0, 10_000) for _ in range(rng.randint(shortest, longest))] for _ in range(num_requests)]
    jobs = [Job(prompt, rng.randint(shortest, longest)) for prompt in prompts]
    return Work(f"{num_requests} at once, {shortest} to {longest} in and out", num_requests, jobs)


def random_prompt(rng: random.Random, length: int) -> list[int]:
    """Token ids that no other prompt begins with."""
    return rng.choices(_TOKEN_IDS, k=length)


async def run(url: str, model: str, work: Work) -> Seen:
    """Let the users do the work; a short request of each user comes first and does not count.

    Raises:
        RequestFailed: a request got no whole answer.
    """
    rng = random.Random("warm-up")  # noqa: S311 - prompts, not secrets
    warm_up = [Job(random_prompt(rng, 16), 4) for _ in range(work.num_users)]
    await asyncio.gather(*(ask(url, model, job, Seen()) for job in warm_up))
    seen, jobs = Seen(), iter(work.jobs)

    async def user() -> None:
        for job in jobs:  # shared: whoever is free takes the next one
            await ask(url, model, job, seen)

    cpu, started = time.process_time(), time.perf_counter()
    await asyncio.gather(*(user() for _ in range(work.num_users)))
    seen.seconds = time.perf_counter() - started
    seen.client_cpu_seconds = time.process_time() - cpu
    return seen


async def ask(url: str, model: str, job: Job, seen: Seen) -> None:
    """Send one request and note what came.

    Raises:
        RequestFailed: it got no whole answer.
    """
    body = {
        "model": model,
        "prompt": job.prompt,
        "max_tokens": job.num_output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **job.fields,
    }
    started = time.perf_counter()
    last, num_tokens = 0.0, 0
    async with asyncio.timeout(_TIMEOUT_SECONDS):
        async for line in stream_lines(f"{url}/v1/completions", body):
            if not line.startswith(b"data: {"):
                continue
            event = _json(line[6:], url)
            if "error" in event:
                raise RequestFailed(f"{url}: {str(event['error'])[:500]}")
            if usage := event.get("usage"):
                num_tokens = usage["completion_tokens"]
            if event.get("choices") and event["choices"][0]["text"]:
                now = time.perf_counter()
                if last:
                    seen.gap_seconds.append(now - last)
                else:
                    seen.first_token_seconds.append(now - started)
                last = now
                seen.num_chunks += 1
    if num_tokens != job.num_output_tokens:
        raise RequestFailed(f"{url}: the stream ended with {num_tokens} tokens and not {job.num_output_tokens}")
    seen.num_output_tokens += num_tokens
    seen.num_requests += 1


async def post(url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Send one request and return its whole JSON answer.

    Raises:
        RequestFailed: the server did not answer with 200 and JSON.
    """
    return _json(b"\n".join([line async for line in stream_lines(url, body)]), url)


def _json(text: bytes, url: str) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise RequestFailed(f"{url}: {error}: {text[:200]!r}") from error
    return value


async def stream_lines(url: str, body: Mapping[str, Any]) -> AsyncIterator[bytes]:
    """POST on a fresh connection; yield the lines of the answer's body as they come.

    Raises:
        RequestFailed: the status is not 200, or the connection broke.
    """
    address = urlsplit(url)
    payload = json.dumps(body).encode()
    head = (
        f"POST {address.path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    try:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            writer.write(head.encode() + payload)
            status, headers = await _read_head(reader)
            chunks = _chunks(reader, headers)
            if status != 200:
                text = b"".join([chunk async for chunk in chunks])
                raise RequestFailed(f"{url}: {status}: {text[:500].decode(errors='replace')}")
            rest = b""
            async for chunk in chunks:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield line
            yield rest
        finally:
            writer.close()
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        raise RequestFailed(f"{url}: {type(error).__name__}: {error}") from error


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    return int(status.split()[1]), headers


async def _chunks(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    """The body, piece by piece (RFC 9112 sections 6 and 7)."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readline()).split(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while data := await reader.read(65536):
            yield data
