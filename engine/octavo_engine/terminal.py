"""`octavo run`: one answer for a prompt, or a conversation, on the terminal; the engine runs in a process of its own.

The event loop has a thread of its own, so that the main thread can sit in input() and take Ctrl-C while the engine is
listened to.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import queue
import sys
import threading
import uuid
from typing import TYPE_CHECKING, TypeVar

from octavo_engine import transport
from octavo_engine.client import EngineClient
from octavo_engine.errors import OctavoError, RequestInvalid, UserError
from octavo_engine.generation import GenerationRequest, LanguageModel, TextModel
from octavo_engine.plan import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator
    from typing import Any, Self

    from octavo_engine.client import Spawn
    from octavo_engine.config import EngineConfig
    from octavo_engine.text.template import Message

# ruff: noqa: T201 - printing is what this is for

_T = TypeVar("_T")


class Chat:
    """An engine and a conversation with it. Use as a context manager: leaving ends the engine."""

    def __init__(
        self, config: EngineConfig, *, temperature: float, system: str | None, spawn: Spawn = transport.spawn
    ) -> None:
        self._temperature = temperature
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="event-loop", daemon=True)
        self._config = config
        self._spawn = spawn
        self._client: EngineClient
        self._model: LanguageModel

    def __enter__(self) -> Self:
        """Start the engine and wait until it can answer."""
        process, sock = self._spawn(self._config)  # by the main thread: transport.spawn tells why
        self._thread.start()
        self._client = self._await(EngineClient.start(process, sock))
        try:
            self._model = self._await(self._load())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        """End the engine."""
        self._await(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def ask(self, text: str) -> Generator[str, None, None]:
        """Add a message to the conversation and yield the answer to it, piece by piece.

        Closing the iterator stops the answer; what has come so far stays in the conversation.

        Raises:
            RequestInvalid: the conversation is longer than the context; the message is taken back.
        """
        self._messages.append({"role": "user", "content": text})
        pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        answering = asyncio.run_coroutine_threadsafe(self._answer(pieces), self._loop)
        answer = ""
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                answer += piece
                yield piece
        except RequestInvalid:
            self._messages.pop()
            raise
        finally:
            answering.cancel()
            if answer:
                self._messages.append({"role": "assistant", "content": answer})

    def clear(self) -> None:
        """Forget the conversation."""
        self._messages = list(self._opening)

    async def _load(self) -> LanguageModel:
        text = await asyncio.to_thread(TextModel.load, self._config.tokenizer or self._config.model)
        return LanguageModel(self._client, await self._client.ready(), text)

    async def _answer(self, pieces: queue.SimpleQueue[str | BaseException | None]) -> None:
        try:
            prompt = await self._model.encode_chat(self._messages)
            max_tokens = self._model.resolve_max_tokens(len(prompt), None, "max_tokens")
            request = GenerationRequest(
                request_id=uuid.uuid4().hex,
                prompt_token_ids=prompt,
                sampling=SamplingParams(max_tokens=max_tokens, temperature=self._temperature),
            )
            async with contextlib.aclosing(self._model.generate(request)) as deltas:
                async for delta in deltas:
                    pieces.put(delta.text)
            pieces.put(None)
        except OctavoError as error:
            pieces.put(error)

    def _await(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def converse(chat: Chat) -> None:
    """Talk until /bye or the end of the input."""
    print("/clear starts anew, /bye or Ctrl-D leaves, Ctrl-C stops an answer", file=sys.stderr)
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # gives input() line editing and history
    while True:
        try:
            line = input(">>> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        match line:
            case "":
                continue
            case "/bye":
                return
            case "/clear":
                chat.clear()
            case _:
                try:
                    print_answer(chat, line)
                except KeyboardInterrupt:
                    print()
                except UserError as error:
                    print(f"{error}\n/clear starts anew", file=sys.stderr)


def print_answer(chat: Chat, prompt: str) -> None:
    """Print the answer as it comes."""
    with contextlib.closing(chat.ask(prompt)) as pieces:
        for piece in pieces:
            print(piece, end="", flush=True)
    print()
