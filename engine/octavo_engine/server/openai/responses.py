"""POST /v1/responses: OpenAI's other way to ask for an answer, here without anything that is stored.

responses_protocol.py has the body. An answer is a list of items: what the model thought, its message, its calls. They
are made piece by piece, each piece with the events that a stream has for it; who does not stream gets the list.
"""

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any, Final, Literal

import msgspec
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.requests import Request

from octavo_engine.answer import TextDelta
from octavo_engine.errors import OctavoError
from octavo_engine.server.content_type import AnyContentType
from octavo_engine.server.dependencies import Admission, CurrentService
from octavo_engine.server.disconnect import CLIENT_GONE, unless_gone
from octavo_engine.server.envelope import describe
from octavo_engine.server.openai.responses_protocol import ResponsesRequest
from octavo_engine.server.openai.routes import begin_chat
from octavo_engine.text.message import MessageFormat, Parts

router = APIRouter(prefix="/v1", tags=["openai"], route_class=AnyContentType)

Event = dict[str, Any]
Kind = Literal["reasoning", "message"]

# What ids begin with, what else the item has, and what its part.
_KINDS: Final[dict[Kind, tuple[str, Event, Event]]] = {
    "reasoning": ("rs", {"summary": []}, {}),
    "message": ("msg", {"role": "assistant"}, {"annotations": [], "logprobs": []}),
}


@router.post("/responses")
async def create_response(
    body: ResponsesRequest, request: Request, service: CurrentService, _admit: Admission
) -> Response:
    """Answer a conversation, given as items."""
    response_id = f"resp_{uuid.uuid4().hex}"
    chat = await begin_chat(body.chat(), service, response_id)
    answer = _Answer(body, response_id, chat.message_format, chat.num_prompt_tokens)
    if body.stream:
        return StreamingResponse(
            answer.stream(chat.deltas), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
    whole = await unless_gone(request, answer.whole(chat.deltas))
    return Response(status_code=CLIENT_GONE) if whole is None else JSONResponse(whole)


class _Items:
    """The items of an answer while it is made. All of them are open until the answer ends."""

    def __init__(self) -> None:
        self._items: list[Event] = []
        self._places: dict[Kind, int] = {}
        self._calls: list[int] = []  # places, in order of the calls

    def take(self, parts: Parts) -> Iterator[Event]:
        """Add a piece; yield its events."""
        yield from self._write("reasoning", parts.thought)
        yield from self._write("message", parts.text)
        for call in parts.calls:
            if call.name:
                self._calls.append(len(self._items))
                item = {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": ""}
                yield self._begin("fc", item)
            place = self._calls[call.index]
            self._items[place]["arguments"] += call.arguments
            if call.arguments:
                yield self._event("response.function_call_arguments.delta", place, delta=call.arguments)

    def finish(self, status: str) -> Iterator[Event]:
        """End every item; yield the events."""
        for place, item in enumerate(self._items):
            if item["type"] == "function_call":
                yield self._event("response.function_call_arguments.done", place, arguments=item["arguments"])
            else:
                (part,) = item["content"]
                yield self._event(f"response.{part['type']}.done", place, content_index=0, text=part["text"]) | (
                    {"logprobs": []} if part["type"] == "output_text" else {}
                )
                yield self._event("response.content_part.done", place, content_index=0, part=part)
            item["status"] = status
            yield {"type": "response.output_item.done", "output_index": place, "item": item}

    def output(self) -> list[Event]:
        """All of them."""
        return self._items

    def _write(self, kind: Kind, text: str) -> Iterator[Event]:
        if not text:
            return
        part_type = "reasoning_text" if kind == "reasoning" else "output_text"
        if kind not in self._places:
            self._places[kind] = len(self._items)
            prefix, own, of_part = _KINDS[kind]
            yield self._begin(prefix, {"type": kind, "content": []} | own)
            part = {"type": part_type, "text": ""} | of_part
            yield self._event("response.content_part.added", self._places[kind], content_index=0, part=dict(part))
            self._items[self._places[kind]]["content"].append(part)
        place = self._places[kind]
        self._items[place]["content"][0]["text"] += text
        extra: Event = {} if kind == "reasoning" else {"logprobs": []}
        yield self._event(f"response.{part_type}.delta", place, content_index=0, delta=text) | extra

    def _begin(self, prefix: str, item: Event) -> Event:
        self._items.append({"id": f"{prefix}_{uuid.uuid4().hex}"} | item | {"status": "in_progress"})
        added = {name: list(value) if isinstance(value, list) else value for name, value in self._items[-1].items()}
        return {"type": "response.output_item.added", "output_index": len(self._items) - 1, "item": added}

    def _event(self, kind: str, place: int, **fields: Any) -> Event:
        return {"type": kind, "item_id": self._items[place]["id"], "output_index": place} | fields


class _Answer:
    """The answer to one request.

    Args:
        body: of the request.
        response_id: the response's.
        message_format: what the text may hold.
        num_prompt_tokens: of the prompt.
    """

    def __init__(
        self, body: ResponsesRequest, response_id: str, message_format: MessageFormat, num_prompt_tokens: int
    ) -> None:
        self._body = body
        self._id = response_id
        self._created = int(time.time())
        self._parser = message_format.parser()
        self._num_prompt_tokens = num_prompt_tokens
        self._num_thought_tokens = 0
        self._items = _Items()
        self._last: TextDelta | None = None

    async def whole(self, deltas: AsyncGenerator[TextDelta, None]) -> dict[str, Any]:
        """The body of a response in one piece."""
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                for _ in self._take(delta):
                    pass
        return self._response(self._status())

    async def stream(self, deltas: AsyncGenerator[TextDelta, None]) -> AsyncIterator[bytes]:
        """Server-sent events, numbered. A failure after the 200 is the event response.failed."""
        number = 0
        async with contextlib.aclosing(self._events(deltas)) as events:
            async for event in events:
                body = msgspec.json.encode(event | {"sequence_number": number})
                yield b"event: " + event["type"].encode() + b"\ndata: " + body + b"\n\n"
                number += 1

    async def _events(self, deltas: AsyncGenerator[TextDelta, None]) -> AsyncGenerator[Event, None]:
        for kind in ("created", "in_progress"):
            yield {"type": f"response.{kind}", "response": self._response("in_progress")}
        try:
            async with contextlib.aclosing(deltas):
                async for delta in deltas:
                    for event in self._take(delta):
                        yield event
        except OctavoError as error:
            problem = describe(error)[1]["error"]
            failed = {"error": {"code": "server_error", "message": problem["message"]}}
            yield {"type": "response.failed", "response": self._response("failed") | failed}
            return
        status = self._status()
        yield {"type": f"response.{status}", "response": self._response(status)}

    def _take(self, delta: TextDelta) -> Iterator[Event]:
        self._last = delta
        is_last = delta.finish_reason is not None
        parts = self._parser.push(delta.text, is_last=is_last)
        if parts.thought:
            self._num_thought_tokens = delta.num_tokens
        yield from self._items.take(parts)
        if is_last:
            yield from self._items.finish(self._status())

    def _status(self) -> str:
        return "incomplete" if self._last is not None and self._last.finish_reason == "length" else "completed"

    def _response(self, status: str) -> dict[str, Any]:
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "model": body.model,
            "output": [] if status == "in_progress" else self._items.output(),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning is not None else None, "summary": None},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": _as_json(body.text.format if body.text is not None else None) or {"type": "text"}},
            "tool_choice": _as_json(body.tool_choice) or "auto",
            "tools": [_as_json(tool) for tool in body.tools or ()],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        last = self._last
        num_tokens = last.num_tokens if last is not None else 0
        return {
            "input_tokens": self._num_prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": last.num_cached_tokens if last is not None else 0,
                "cache_write_tokens": 0,
            },
            "output_tokens": num_tokens,
            "output_tokens_details": {"reasoning_tokens": self._num_thought_tokens},
            "total_tokens": self._num_prompt_tokens + num_tokens,
        }


def _as_json(told: BaseModel | str | None) -> Any:
    """What a part of a body says, as it said it."""
    return told.model_dump(by_alias=True, exclude_unset=True) if isinstance(told, BaseModel) else told
