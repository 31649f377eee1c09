"""From the pieces of text that a request generates to Ollama's answer: one object, or a line for each piece.

Called by routes.py. Where the two endpoints differ, as_response and as_message say how.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from octavo_engine.errors import OctavoError
from octavo_engine.generation import GenerationRequest
from octavo_engine.parameters import max_tokens_of, sampling_params, stop_strings
from octavo_engine.server.envelope import describe
from octavo_engine.text.message import MessageFormat

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

    from octavo_engine.answer import TextDelta, TextLogprobs, TokenText
    from octavo_engine.generation import LanguageModel
    from octavo_engine.server.ollama.protocol import ChatRequest, GenerateRequest
    from octavo_engine.text.message import Parts
    from octavo_engine.text.tool_calls import CallPiece


@dataclass(frozen=True, slots=True)
class Said:
    """What an answer says, or a piece of it."""

    thought: str = ""
    text: str = ""
    calls: tuple[dict[str, Any], ...] = ()  # each whole
    logprobs: Sequence[TextLogprobs] = field(default=())

    def __bool__(self) -> bool:
        return bool(self.thought or self.text or self.calls or self.logprobs)


def as_response(said: Said) -> dict[str, Any]:
    """What /api/generate answers."""
    return {"response": said.text} | ({"thinking": said.thought} if said.thought else {})


def as_message(said: Said) -> dict[str, Any]:
    """What /api/chat answers."""
    message: dict[str, Any] = {"role": "assistant", "content": said.text}
    message |= {"thinking": said.thought} if said.thought else {}
    return {"message": message | ({"tool_calls": list(said.calls)} if said.calls else {})}


class Answer:
    """The answer to one request.

    Args:
        body: of the request.
        write: puts what is said where the endpoint has it.

    Attributes:
        is_streamed: whether it is asked for in lines.
    """

    def __init__(self, body: GenerateRequest | ChatRequest, write: Callable[[Said], dict[str, Any]]) -> None:
        self.is_streamed = body.stream is not False
        self._body = body
        self._write = write
        self._started = time.monotonic_ns()
        self._begun = self._started
        self._num_prompt_tokens = 0
        self._parser = MessageFormat().parser()
        self._calls = _WholeCalls()

    def begin(
        self, prompt: list[int], model: LanguageModel, message_format: MessageFormat, grammar: str | None
    ) -> GenerationRequest:
        """Return what to generate, now that the model is there. What took time until now was not the model's work.

        Args:
            prompt: of the request.
            model: that answers.
            message_format: what the text may hold.
            grammar: what the engine takes for what the answer shall keep to.

        Raises:
            RequestInvalid: the options do not go with this prompt or model.
        """
        self._begun = time.monotonic_ns()
        self._num_prompt_tokens = len(prompt)
        self._parser = replace(message_format, tells_thoughts=self._body.think is not False).parser()
        parameters = model.text.parameters | self._body.parameters
        max_tokens = max_tokens_of(parameters, len(prompt), model.facts.max_model_len)
        return GenerationRequest(
            request_id=f"ollama-{uuid.uuid4().hex}",
            prompt_token_ids=prompt,
            sampling=replace(sampling_params(parameters, max_tokens, self._body.num_logprobs), grammar=grammar),
            stop=stop_strings(parameters),
            shown_ids=model.text.shown_ids(message_format),
        )

    def loaded(self, done_reason: Literal["load", "unload"]) -> dict[str, Any]:
        """The answer to a request that asks for nothing but the model in memory, or out of it."""
        return self._object(Said()) | {"done": True, "done_reason": done_reason}

    async def whole(self, deltas: AsyncGenerator[TextDelta, None]) -> dict[str, Any]:
        """The body of a response in one piece."""
        thought = text = ""
        calls: list[dict[str, Any]] = []
        logprobs: list[TextLogprobs] = []
        ending: dict[str, Any] = {}
        async for said, ending in self._pieces(deltas):  # noqa: B007 - the last one is what counts
            thought += said.thought
            text += said.text
            calls += said.calls
            logprobs += said.logprobs
        return self._object(Said(thought, text, tuple(calls), logprobs)) | ending

    async def lines(self, deltas: AsyncGenerator[TextDelta, None]) -> AsyncIterator[bytes]:
        """Lines of JSON. A failure after the 200 is a line with the error."""
        try:
            async for said, ending in self._pieces(deltas):
                if said:
                    yield line(self._object(said) | {"done": False})
                if ending:
                    yield line(self._object(Said()) | ending)
        except OctavoError as error:
            yield line({"error": describe(error)[1]["error"]["message"]})

    async def _pieces(self, deltas: AsyncGenerator[TextDelta, None]) -> AsyncIterator[tuple[Said, dict[str, Any]]]:
        """Yield each piece with what the answer ends with, which is empty until the last one."""
        first = 0
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                first = first or time.monotonic_ns()
                is_last = delta.finish_reason is not None
                parts = self._parser.push(delta.text, is_last=is_last)
                text, calls = self._calls.take(parts, is_last=is_last)
                yield Said(parts.thought, text, calls, delta.logprobs), self._ending(delta, first) if is_last else {}

    def _object(self, said: Said) -> dict[str, Any]:
        body = {"model": self._body.model, "created_at": told(datetime.now(UTC))} | self._write(said)
        if self._body.num_logprobs is not None and said.logprobs:
            body["logprobs"] = [
                _token(entry.token) | {"top_logprobs": [_token(token) for token in entry.top]}
                for entry in said.logprobs
            ]
        return body

    def _ending(self, last: TextDelta, first: int) -> dict[str, Any]:
        now = time.monotonic_ns()
        return {
            "done": True,
            "done_reason": last.finish_reason,
            "total_duration": now - self._started,
            "load_duration": self._begun - self._started,
            "prompt_eval_count": self._num_prompt_tokens,
            "prompt_eval_duration": first - self._begun,
            "eval_count": last.num_tokens,
            "eval_duration": now - first,
        }


class _WholeCalls:
    """Puts calls together, each of which Ollama's clients get in one piece. What has no whole arguments is text."""

    def __init__(self) -> None:
        self._call: CallPiece | None = None  # that is being made
        self._arguments: list[str] = []

    def take(self, parts: Parts, *, is_last: bool) -> tuple[str, tuple[dict[str, Any], ...]]:
        """Take the next piece; return its text, and the calls that are whole now."""
        text, calls = parts.text, []
        for piece in (*parts.calls, None):
            if piece is None or piece.name:
                if piece is None and not is_last:
                    break
                broken, whole = self._ended()
                text += broken
                calls += whole
                self._call = piece
            if piece is not None:
                self._arguments.append(piece.arguments)
        return text, tuple(calls)

    def _ended(self) -> tuple[str, list[dict[str, Any]]]:
        """The call that was being made, as text or as a call."""
        if self._call is None:
            return "", []
        source = "".join(self._arguments)
        self._arguments.clear()
        arguments: object = None
        with contextlib.suppress(ValueError, RecursionError):
            arguments = msgspec.json.decode(source)
        if not isinstance(arguments, dict):
            return f'{{"name": "{self._call.name}", "arguments": {source}', []
        function = {"index": self._call.index, "name": self._call.name, "arguments": arguments}
        return "", [{"id": f"call_{self._call.call_id}", "function": function}]


def told(time_of: datetime) -> str:
    """A time as Ollama writes it."""
    return time_of.isoformat().replace("+00:00", "Z")


def line(body: dict[str, Any]) -> bytes:
    """One line of a stream."""
    return msgspec.json.encode(body) + b"\n"


def _token(token: TokenText) -> dict[str, Any]:
    logprob = max(token.logprob, -9999.0)  # JSON has no minus infinity
    return {"token": token.text.decode(errors="replace"), "logprob": logprob, "bytes": list(token.text)}
