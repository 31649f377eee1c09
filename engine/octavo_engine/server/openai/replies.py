"""The bodies of OpenAI's replies: one for each endpoint, whole and in chunks. Knows nothing of HTTP or the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Usage:
    """How many tokens a request took."""

    num_prompt_tokens: int
    num_completion_tokens: int

    def body(self) -> dict[str, int]:
        """As OpenAI writes it."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
        }


class Reply(Protocol):
    """What the routes need of an endpoint's format."""

    def whole(self, text: str, finish_reason: str, usage: Usage) -> dict[str, Any]:
        """The answer in one piece."""

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before the first text."""

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk of text."""

    def closing(self, finish_reason: str) -> dict[str, Any]:
        """The chunk after the last text."""

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The chunk that stream_options.include_usage asks for."""


class ChatReply:
    """chat.completion and chat.completion.chunk."""

    def __init__(self, request_id: str, created: int, model: str) -> None:
        self._head = {"id": request_id, "object": "chat.completion", "created": created, "model": model}
        self._chunk_head = self._head | {"object": "chat.completion.chunk"}

    def whole(self, text: str, finish_reason: str, usage: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return self._head | {"choices": [choice], "usage": usage.body()}

    def opening(self) -> list[dict[str, Any]]:
        """The role, without text."""
        return [self._chunk({"role": "assistant", "content": ""}, None)]

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk of text."""
        return self._chunk({"content": text}, None)

    def closing(self, finish_reason: str) -> dict[str, Any]:
        """The chunk after the last text."""
        return self._chunk({}, finish_reason)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """A chunk without choices."""
        return self._chunk_head | {"choices": [], "usage": usage.body()}

    def _chunk(self, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._chunk_head | {"choices": [choice]}


class CompletionReply:
    """text_completion, whole and in chunks."""

    def __init__(self, request_id: str, created: int, model: str) -> None:
        self._head = {"id": request_id, "object": "text_completion", "created": created, "model": model}

    def whole(self, text: str, finish_reason: str, usage: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        return self._body(text, finish_reason) | {"usage": usage.body()}

    def opening(self) -> list[dict[str, Any]]:
        """Nothing comes before the text."""
        return []

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk of text."""
        return self._body(text, None)

    def closing(self, finish_reason: str) -> dict[str, Any]:
        """The chunk after the last text."""
        return self._body("", finish_reason)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """A chunk without choices."""
        return self._head | {"choices": [], "usage": usage.body()}

    def _body(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
        return self._head | {"choices": [choice]}
