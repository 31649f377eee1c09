from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from octavo_bench import client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence


def event(text: str | None, num_tokens: int | None = None) -> bytes:
    choices = [] if text is None else [{"text": text}]
    usage = None if num_tokens is None else {"completion_tokens": num_tokens}
    return f"data: {json.dumps({'choices': choices, 'usage': usage})}\n\n".encode()


def chunked(*pieces: bytes) -> bytes:
    return b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in (*pieces, b""))


@contextlib.asynccontextmanager
async def server(
    *writes: bytes,
    head: str = "200 OK",
    header: str = "Transfer-Encoding: chunked",
    bodies: list[dict[str, Any]] | None = None,
) -> AsyncIterator[str]:
    """A server that answers every request with these bytes, in so many writes, and notes the requests' bodies."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(line for line in request.split("\r\n") if line.startswith("Content-Length:"))
        body = await reader.readexactly(int(length.split()[1]))
        if bodies is not None:
            bodies.append(json.loads(body))
        writer.write(f"HTTP/1.1 {head}\r\n{header}\r\n\r\n".encode())
        for data in writes:
            writer.write(data)
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


async def seen_of(url: str, num_output_tokens: int) -> client.Seen:
    seen = client.Seen()
    await client.ask(url, "m", client.Job([1, 2], num_output_tokens), seen)
    return seen


async def test_tokens_are_those_of_the_usage_and_gaps_those_between_chunks_with_text() -> None:
    body = chunked(event(""), event("a"), event(""), event("b"), event("c"), event(None, 5), b"data: [DONE]\n\n")
    async with server(body) as url:
        seen = await seen_of(url, 5)
    assert (seen.num_requests, seen.num_output_tokens, seen.num_chunks) == (1, 5, 3)
    assert len(seen.first_token_seconds) == 1
    assert len(seen.gap_seconds) == 2


async def test_a_job_may_have_fields_of_its_own() -> None:
    bodies: list[dict[str, Any]] = []
    async with server(chunked(event("a"), event(None, 1)), bodies=bodies) as url:
        await client.ask(url, "m", client.Job([1], 1, {"ignore_eos": False, "top_k": 5}), client.Seen())
    assert (bodies[0]["ignore_eos"], bodies[0]["top_k"], bodies[0]["prompt"]) == (False, 5, [1])


@pytest.mark.parametrize("cut", [1, 7, 30, 61])
async def test_events_may_be_cut_anywhere(cut: int) -> None:
    stream = event("ä") + event("b") + event(None, 2)
    async with server(chunked(*(stream[at : at + cut] for at in range(0, len(stream), cut)))) as url:
        assert (await seen_of(url, 2)).num_chunks == 2


async def test_a_body_may_end_with_the_connection() -> None:
    async with server(event("a"), event(None, 1), header="Connection: close") as url:
        assert (await seen_of(url, 1)).num_output_tokens == 1


@pytest.mark.parametrize(
    ("writes", "head", "message"),
    [
        ([chunked(b'{"error": "no such field"}')], "400 Bad Request", "400.*no such field"),
        ([chunked(b'data: {"error": {"message": "broken"}}\n\n')], "200 OK", "broken"),
        ([chunked(event("a"), event(None, 1))], "200 OK", "ended with 1 tokens and not 3"),
        ([b"20\r\ndata: {"], "200 OK", "IncompleteReadError"),
        ([chunked(b"data: {nonsense\n\n")], "200 OK", "nonsense"),
    ],
)
async def test_what_is_not_a_whole_answer_ends_the_measurement(
    writes: Sequence[bytes], head: str, message: str
) -> None:
    async with server(*writes, head=head) as url:
        with pytest.raises(client.RequestFailed, match=message):
            await seen_of(url, 3)


async def test_users_share_the_jobs_and_the_warm_up_does_not_count() -> None:
    work = client.Work("three", 2, [client.Job([1], 4)] * 3)
    async with server(chunked(event("a"), event(None, 4))) as url:
        seen = await client.run(url, "m", work)
    assert (seen.num_requests, seen.num_output_tokens) == (3, 12)
    assert seen.seconds > 0


def test_the_work_is_the_same_for_every_engine_and_no_two_prompts_begin_alike() -> None:
    work = client.fixed_work(8, 64)
    assert work == client.fixed_work(8, 64)
    assert len({tuple(job.prompt[:2]) for job in work.jobs}) == 64
    spread = client.spread_work(32, 128)
    assert {len(job.prompt) for job in spread.jobs} <= set(range(24, 51))
    assert {job.num_output_tokens for job in spread.jobs} <= set(range(32, 257))
