"""From the pieces of text that a request generates to the body of its response, or to server-sent events.

Called by routes.py, for all endpoints alike: the format is a Reply's (replies.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi.responses import JSONResponse, Response, StreamingResponse

from octavo_engine.errors import OctavoError
from octavo_engine.server.disconnect import CLIENT_GONE, unless_gone
from octavo_engine.server.envelope import describe
from octavo_engine.server.openai.replies import Choice, Usage
from octavo_engine.text.message import MessageFormat, Parts

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence

    from starlette.requests import Request

    from octavo_engine.answer import TextDelta, TextLogprobs
    from octavo_engine.server.openai.protocol import ChatCompletionRequest, CompletionRequest
    from octavo_engine.server.openai.replies import Reply


async def answer(
    request: Request,
    body: ChatCompletionRequest | CompletionRequest,
    streams: Sequence[AsyncGenerator[TextDelta, None]],
    reply: Reply,
    num_prompt_tokens: int,
    *,
    message_format: MessageFormat = MessageFormat(),  # noqa: B008 - it is frozen
) -> Response:
    """Respond to a request.

    Args:
        request: the HTTP request, to see its client leave.
        body: what was asked for.
        streams: the answers to each prompt; `n` choices each.
        reply: the format.
        num_prompt_tokens: of all prompts together.
        message_format: what the texts may hold besides text.
    """
    answers = _Answers(streams, reply, num_prompt_tokens, body, message_format)
    if body.stream:
        return StreamingResponse(
            answers.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
    whole = await unless_gone(request, answers.whole())
    return Response(status_code=CLIENT_GONE) if whole is None else JSONResponse(whole)


class _Answers:
    """The choices of one request, as one body or as a stream of them."""

    def __init__(
        self,
        streams: Sequence[AsyncGenerator[TextDelta, None]],
        reply: Reply,
        num_prompt_tokens: int,
        body: ChatCompletionRequest | CompletionRequest,
        message_format: MessageFormat,
    ) -> None:
        num_choices = body.n or 1
        self._deltas = streams[0] if len(streams) == 1 else _merged(streams, num_choices)
        self._reply = reply
        self._num_prompt_tokens = num_prompt_tokens
        self._num_choices = num_choices
        self._indices = range(len(streams) * num_choices)
        self._has_logprobs = body.num_logprobs is not None
        self._tells_prompts = body.num_prompt_logprobs is not None
        self._include_usage = body.include_usage
        self._continuous_usage = body.continuous_usage
        self._last: dict[int, TextDelta] = {}  # by choice
        self._prompts: dict[int, list[TextLogprobs]] = {}  # by prompt
        self._waiting = set(self._indices)  # choices of which a stream has told nothing
        self._parsers = {index: message_format.parser() for index in self._indices}

    async def whole(self) -> dict[str, Any]:
        """The body of a response in one piece."""
        pieces: dict[int, list[TextDelta]] = {index: [] for index in self._indices}
        async with contextlib.aclosing(self._deltas) as deltas:
            async for delta in deltas:
                pieces[delta.choice].append(delta)
                self._take(delta)
        choices = [
            Choice(
                index,
                self._parsers[index].push("".join(delta.text for delta in pieces[index]), is_last=True),
                [entry for delta in pieces[index] for entry in delta.logprobs] if self._has_logprobs else None,
                self._finish_reason(self._last[index]),
                self._prompt_of(index),
            )
            for index in self._indices
        ]
        return self._reply.whole(choices, self._usage())

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events. A failure after the 200 is an event with the envelope, and there is no [DONE] then."""
        try:
            if not self._tells_prompts:  # else they begin when their prompts are computed
                for index in sorted(self._waiting):
                    for chunk in self._begin(index):
                        yield self._event(chunk)
            async with contextlib.aclosing(self._deltas) as deltas:
                async for delta in deltas:
                    for chunk in self._chunks(delta):
                        yield self._event(chunk)
        except OctavoError as error:
            yield _event(describe(error)[1])
            return
        if self._include_usage:
            yield _event(self._reply.usage(self._usage()))
        yield b"data: [DONE]\n\n"

    def _begin(self, index: int) -> list[dict[str, Any]]:
        self._waiting.remove(index)
        logprobs = () if self._has_logprobs else None
        return self._reply.opening(Choice(index, Parts(), logprobs, prompt_logprobs=self._prompt_of(index)))

    def _chunks(self, delta: TextDelta) -> Iterator[dict[str, Any]]:
        """What a stream tells of a piece."""
        self._take(delta)
        is_last = delta.finish_reason is not None
        if delta.choice in self._waiting and (delta.num_tokens or is_last):
            yield from self._begin(delta.choice)
        parts = self._parsers[delta.choice].push(delta.text, is_last=is_last)
        if parts or delta.logprobs:
            logprobs = delta.logprobs if self._has_logprobs else None
            yield self._reply.piece(Choice(delta.choice, parts, logprobs))
        if is_last:
            yield self._reply.closing(Choice(delta.choice, Parts(), finish_reason=self._finish_reason(delta)))

    def _take(self, delta: TextDelta) -> None:
        """Remember what is needed of it later."""
        self._last[delta.choice] = delta
        if delta.prompt_logprobs:
            self._prompts.setdefault(delta.choice // self._num_choices, []).extend(delta.prompt_logprobs)

    def _prompt_of(self, index: int) -> list[TextLogprobs] | None:
        return self._prompts.get(index // self._num_choices, []) if self._tells_prompts else None

    def _finish_reason(self, last: TextDelta) -> str | None:
        called = self._parsers[last.choice].num_calls and last.finish_reason == "stop"
        return "tool_calls" if called else last.finish_reason

    def _event(self, chunk: dict[str, Any]) -> bytes:
        return _event(chunk | {"usage": self._usage().body()} if self._continuous_usage else chunk)

    def _usage(self) -> Usage:
        """Of what has come so far."""
        cached = {index // self._num_choices: delta.num_cached_tokens for index, delta in self._last.items()}
        return Usage(
            self._num_prompt_tokens,
            sum(delta.num_tokens for delta in self._last.values()),
            sum(cached.values()),  # each prompt once
        )


async def _merged(
    streams: Sequence[AsyncGenerator[TextDelta, None]], num_choices: int
) -> AsyncGenerator[TextDelta, None]:
    """The pieces of several prompts' answers as they come, with the choices numbered through."""
    news: asyncio.Queue[TextDelta | Exception | None] = asyncio.Queue(maxsize=1)

    async def read(place: int) -> None:
        end: Exception | None = None
        try:
            async with contextlib.aclosing(streams[place]) as stream:
                async for delta in stream:
                    await news.put(replace(delta, choice=place * num_choices + delta.choice))
        except Exception as error:  # noqa: BLE001 - raised again where the pieces are read
            end = error
        await news.put(end)

    reading = [asyncio.create_task(read(place)) for place in range(len(streams))]
    num_living = len(reading)
    try:
        while num_living:
            item = await news.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_living -= 1
            else:
                yield item
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
