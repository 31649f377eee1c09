"""The bodies of OpenAI's replies: one for each endpoint, whole and in chunks. Knows nothing of HTTP or the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from octavo_engine.text.message import Parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo_engine.answer import TextLogprobs, TokenText
    from octavo_engine.text.tool_calls import CallPiece

_LOWEST_LOGPROB: Final = -9999.0  # OpenAI's way to write what JSON cannot: minus infinity


@dataclass(frozen=True, slots=True)
class Usage:
    """How many tokens a request took."""

    num_prompt_tokens: int
    num_completion_tokens: int  # of all choices
    num_cached_tokens: int  # of the prompt, found in the prefix cache

    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer, or a piece of it."""

    index: int
    parts: Parts
    logprobs: Sequence[TextLogprobs] | None = None  # None: they were not asked for
    finish_reason: str | None = None  # None: it goes on
    prompt_logprobs: Sequence[TextLogprobs] | None = None  # of all tokens of its prompt; the same


class Reply(Protocol):
    """What the routes need of an endpoint's format."""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The answers in one piece."""

    def opening(self, choice: Choice) -> list[dict[str, Any]]:
        """The chunks before the first text of a choice."""

    def piece(self, choice: Choice) -> dict[str, Any]:
        """A chunk of text."""

    def closing(self, choice: Choice) -> dict[str, Any]:
        """The chunk after the last text of a choice."""

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The chunk that stream_options.include_usage asks for."""


class ChatReply:
    """chat.completion and chat.completion.chunk.

    Args:
        request_id, created, model: as they are in every chunk.
        as_ids: logprobs name tokens by their ids.
    """

    def __init__(self, request_id: str, created: int, model: str, *, as_ids: bool = False) -> None:
        self._as_ids = as_ids
        self._head = {"id": request_id, "object": "chat.completion", "created": created, "model": model}
        self._chunk_head = self._head | {"object": "chat.completion.chunk"}

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The answers in one piece."""
        bodies = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "refusal": None} | _message(choice.parts),
                "logprobs": _chat_logprobs(choice.logprobs, as_ids=self._as_ids),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        told = choices[0].prompt_logprobs
        prompt = {} if told is None else {"prompt_logprobs": _prompt_logprobs(told)}
        return self._head | {"choices": bodies, "usage": usage.body()} | prompt

    def opening(self, choice: Choice) -> list[dict[str, Any]]:
        """The role, without text."""
        return [self._chunk(Choice(choice.index, Parts()), {"role": "assistant", "content": ""})]

    def piece(self, choice: Choice) -> dict[str, Any]:
        """A chunk of a message."""
        parts = choice.parts
        delta: dict[str, Any] = {"content": parts.text} if parts.text or not parts else {}
        if parts.thought:
            delta["reasoning_content"] = parts.thought
        if parts.calls:
            delta["tool_calls"] = [_call_piece(piece) for piece in parts.calls]
        return self._chunk(choice, delta)

    def closing(self, choice: Choice) -> dict[str, Any]:
        """The chunk after the last text of a choice."""
        return self._chunk(choice, {})

    def usage(self, usage: Usage) -> dict[str, Any]:
        """A chunk without choices."""
        return self._chunk_head | {"choices": [], "usage": usage.body()}

    def _chunk(self, choice: Choice, delta: dict[str, Any]) -> dict[str, Any]:
        body = {
            "index": choice.index,
            "delta": delta,
            "logprobs": _chat_logprobs(choice.logprobs, as_ids=self._as_ids),
            "finish_reason": choice.finish_reason,
        }
        return self._chunk_head | {"choices": [body]}


class CompletionReply:
    """text_completion, whole and in chunks.

    Args:
        request_id, created, model: as they are in every chunk.
        as_ids: logprobs name tokens by their ids.
        echoes: by choice, the prompt that its text, and its logprobs, shall begin with; empty: none shall.
        tells_prompts: vLLM's prompt_logprobs are asked for.
    """

    def __init__(
        self,
        request_id: str,
        created: int,
        model: str,
        *,
        as_ids: bool = False,
        echoes: Sequence[str] = (),
        tells_prompts: bool = False,
    ) -> None:
        self._as_ids = as_ids
        self._echoes = echoes
        self._tells_prompts = tells_prompts
        self._head = {"id": request_id, "object": "text_completion", "created": created, "model": model}

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The answers in one piece."""
        bodies = [self._choice(choice, is_begun=False) for choice in choices]
        if self._tells_prompts:
            for body, choice in zip(bodies, choices, strict=True):
                body["prompt_logprobs"] = _prompt_logprobs(choice.prompt_logprobs or ())
        return self._head | {"choices": bodies, "usage": usage.body()}

    def opening(self, choice: Choice) -> list[dict[str, Any]]:
        """The prompt, where it is asked for."""
        return [self._head | {"choices": [self._choice(choice, is_begun=False)]}] if self._echoes else []

    def piece(self, choice: Choice) -> dict[str, Any]:
        """A chunk of text."""
        return self._head | {"choices": [self._choice(choice)]}

    def closing(self, choice: Choice) -> dict[str, Any]:
        """The chunk after the last text of a choice."""
        return self._head | {"choices": [self._choice(choice)]}

    def usage(self, usage: Usage) -> dict[str, Any]:
        """A chunk without choices."""
        return self._head | {"choices": [], "usage": usage.body()}

    def _choice(self, choice: Choice, *, is_begun: bool = True) -> dict[str, Any]:
        """`choice` as a body; if it has not begun, with the prompt where that is asked for."""
        echo = self._echoes[choice.index] if self._echoes else ""
        logprobs, text = choice.logprobs, choice.parts.text
        if not is_begun:
            text = echo + text
            logprobs = logprobs if logprobs is None or not echo else [*(choice.prompt_logprobs or ()), *logprobs]
        return {
            "index": choice.index,
            "text": text,
            "logprobs": _completion_logprobs(logprobs, as_ids=self._as_ids, begin=len(echo)),
            "finish_reason": choice.finish_reason,
        }


def _message(parts: Parts) -> dict[str, Any]:
    """What is in a whole message. Without text there is none where there is something else."""
    message: dict[str, Any] = {"content": parts.text if parts.text or not parts else None}
    if parts.thought:
        message["reasoning_content"] = parts.thought
    if parts.calls:
        message["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in parts.calls
        ]
    return message


def _call_piece(piece: CallPiece) -> dict[str, Any]:
    if not piece.name:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    return {
        "index": piece.index,
        "id": piece.call_id,
        "type": "function",
        "function": {"name": piece.name, "arguments": piece.arguments},
    }


def _chat_logprobs(logprobs: Sequence[TextLogprobs] | None, *, as_ids: bool) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    content = [
        _chat_token(entry.token, as_ids=as_ids)
        | {"top_logprobs": [_chat_token(token, as_ids=as_ids) for token in entry.top]}
        for entry in logprobs
    ]
    return {"content": content, "refusal": None}


def _chat_token(token: TokenText, *, as_ids: bool) -> dict[str, Any]:
    return {
        "token": _id_name(token) if as_ids else token.text.decode(errors="replace"),
        "logprob": max(token.logprob, _LOWEST_LOGPROB),
        "bytes": list(token.text),
    }


def _completion_logprobs(
    logprobs: Sequence[TextLogprobs] | None, *, as_ids: bool, begin: int = 0
) -> dict[str, Any] | None:
    """`begin` is where the answer begins in the text: after its prompt, if that is there."""
    if logprobs is None:
        return None
    name = _id_name if as_ids else _name
    return {
        "tokens": [name(entry.token) for entry in logprobs],
        "token_logprobs": [None if entry.is_first else max(entry.token.logprob, _LOWEST_LOGPROB) for entry in logprobs],
        # The token itself is there too, whether it is among the most likely or not.
        "top_logprobs": [
            None
            if entry.is_first
            else {name(token): max(token.logprob, _LOWEST_LOGPROB) for token in (*entry.top, entry.token)}
            for entry in logprobs
        ],
        "text_offset": [max(0, begin + entry.offset) for entry in logprobs],
    }


def _prompt_logprobs(logprobs: Sequence[TextLogprobs]) -> list[dict[str, Any] | None]:
    """As vLLM writes them: by token id, null for the first token. The token itself is there in any case."""
    return [
        None
        if entry.is_first
        else {
            str(token.token_id): {
                "logprob": max(token.logprob, _LOWEST_LOGPROB),
                "rank": rank,
                "decoded_token": token.text.decode(errors="replace"),
            }
            for rank, token in (*enumerate(entry.top, 1), (entry.rank, entry.token))
        }
        for entry in logprobs
    ]


def _id_name(token: TokenText) -> str:
    """A token as vLLM's return_tokens_as_token_ids writes it."""
    return f"token_id:{token.token_id}"


def _name(token: TokenText) -> str:
    """A token as a key: half a character by its bytes, as OpenAI writes them, so that no two are the same."""
    try:
        return token.text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.text)
