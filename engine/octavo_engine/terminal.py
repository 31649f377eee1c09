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
from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeVar

from octavo_engine import transport
from octavo_engine.client import EngineClient
from octavo_engine.errors import ConfigError, GenerationFailed, OctavoError, RequestInvalid, UserError
from octavo_engine.generation import GenerationRequest, LanguageModel
from octavo_engine.parameters import check, from_text, max_tokens_of, sampling_params, stop_strings
from octavo_engine.text.model import TextModel

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Mapping
    from typing import Any, Self

    from octavo_engine.client import Spawn
    from octavo_engine.config import EngineConfig
    from octavo_engine.modelfile import Modelfile
    from octavo_engine.text.message import Parts
    from octavo_engine.text.template import Message

# ruff: noqa: T201 - printing is what this is for

_QUOTES: Final = '"""'
_SET_SYSTEM: Final = "/set system "
_DIM: Final = "\x1b[2m"
_PLAIN: Final = "\x1b[0m"
_HELP: Final = """\
/set parameter NAME VALUE   such as temperature 0.2 or num_predict 100
/set system TEXT            the system message
/set think, /set nothink    whether the model thinks before it answers, if it can
/show                       what is set, as a Modelfile; of that alone: /show parameters, system, template, license
/clear                      start anew
/bye                        leave
\"\"\"                         begins a text of several lines, and ends it"""

# What /show tells of.
_SHOWN: Final[Mapping[str, Callable[[Modelfile], str]]] = {
    "modelfile": lambda modelfile: modelfile.render(),
    "parameters": lambda modelfile: "\n".join(f"{name:20}  {value}" for name, value in modelfile.parameter_lines()),
    "system": lambda modelfile: modelfile.system,
    "template": lambda modelfile: modelfile.template,
    "license": lambda modelfile: "\n\n".join(modelfile.licenses),
}

_T = TypeVar("_T")


class Chat:
    """An engine and a conversation with it. Use as a context manager: leaving ends the engine.

    Args:
        config: of the engine.
        modelfile: parameters, system message, template and how the conversation begins.
        spawn: starts the engine process.
    """

    def __init__(self, config: EngineConfig, modelfile: Modelfile, spawn: Spawn = transport.spawn) -> None:
        self.modelfile = modelfile  # may be changed between answers
        self._messages: list[Message] = []
        self._thinking: dict[str, Any] = {}  # arguments for the chat template
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

    def set_thinking(self, *, wanted: bool) -> None:
        """Have the model think before its next answers, or not.

        Raises:
            RequestInvalid: it is wanted, and the model cannot.
        """
        self._thinking = self._model.text.thinking(wanted)

    def ask(self, text: str) -> Generator[Parts, None, None]:
        """Add a message to the conversation and yield the answer to it, piece by piece.

        Closing the iterator stops the answer; what has come so far stays in the conversation.

        Raises:
            RequestInvalid: the conversation is longer than the context; the message is taken back.
        """
        self._messages.append({"role": "user", "content": text})
        pieces: queue.SimpleQueue[Parts | BaseException | None] = queue.SimpleQueue()
        answering = asyncio.run_coroutine_threadsafe(self._answer(pieces), self._loop)
        thought = answer = ""
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                thought += piece.thought
                answer += piece.text
                yield piece
        except RequestInvalid:
            self._messages.pop()
            raise
        finally:
            answering.cancel()
            if thought or answer:
                thoughts = {"reasoning_content": thought} if thought else {}
                self._messages.append({"role": "assistant", "content": answer} | thoughts)

    def clear(self) -> None:
        """Forget the conversation."""
        self._messages = []

    async def _load(self) -> LanguageModel:
        text = await asyncio.to_thread(TextModel.load, self._config.tokenizer or self._config.model, self.modelfile)
        return LanguageModel(self._client, await self._client.ready(), text, self._config.own_adapter)

    async def _answer(self, pieces: queue.SimpleQueue[Parts | BaseException | None]) -> None:
        try:
            system, parameters = self.modelfile.system, self.modelfile.parameters
            opening: list[Message] = [{"role": "system", "content": system}] if system else []
            prompt = await self._model.text.encode_chat([*opening, *self._messages], arguments=self._thinking)
            message_format = self._model.text.message_format(prompt)
            max_tokens = max_tokens_of(parameters, len(prompt), self._model.facts.max_model_len)
            request = GenerationRequest(
                request_id=uuid.uuid4().hex,
                prompt_token_ids=prompt,
                sampling=sampling_params(parameters, max_tokens),
                stop=stop_strings(parameters),
                shown_ids=self._model.text.shown_ids(message_format),
            )
            parser = message_format.parser()
            async with contextlib.aclosing(self._model.generate(request)) as deltas:
                async for delta in deltas:
                    pieces.put(parser.push(delta.text, is_last=delta.finish_reason is not None))
            pieces.put(None)
        except OctavoError as error:
            pieces.put(error)

    def _await(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def converse(chat: Chat) -> None:
    """Talk until /bye or the end of the input."""
    print("/? for help, /bye or Ctrl-D leaves, Ctrl-C stops an answer", file=sys.stderr)
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # gives input() line editing and history
    while True:
        try:
            line = _read_message()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line in {"/bye", "/exit"}:
            return
        try:
            if line.startswith("/"):
                _obey(chat, line)
            elif line:
                print_answer(chat, line)
        except KeyboardInterrupt:
            print()
        except (UserError, GenerationFailed) as error:
            print(f"{error}\n/clear starts anew", file=sys.stderr)


def _obey(chat: Chat, line: str) -> None:
    """Do what a line that begins with / says.

    Raises:
        UserError: the command is wrong.
    """
    match line.split(maxsplit=3):
        case ["/clear"]:
            chat.clear()
        case ["/show"]:
            print(chat.modelfile.render(), end="")
        case ["/show", what] if what in _SHOWN:
            print(_SHOWN[what](chat.modelfile).rstrip("\n"))
        case ["/?" | "/help"]:
            print(_HELP, file=sys.stderr)
        case ["/set", "parameter", name, value]:
            added = check(name, from_text(name, value))
            chat.modelfile = replace(chat.modelfile, parameters=chat.modelfile.parameters | added)
        case ["/set", "think" | "nothink" as wanted]:
            chat.set_thinking(wanted=wanted == "think")
        case ["/set", "system", _, *_]:
            chat.modelfile = replace(chat.modelfile, system=line.split(maxsplit=2)[-1])
        case _:
            raise ConfigError(f"{line[:50]!r} is not a command; /? tells which there are")


def _read_message() -> str:
    """Read a line, or several where a message, or what is set, stands between triple quotes."""
    line = input(">>> ").strip()
    command = _SET_SYSTEM if line.startswith(_SET_SYSTEM) else ""
    text = line.removeprefix(command).lstrip()
    if not text.startswith(_QUOTES):
        return line
    text = text.removeprefix(_QUOTES)
    while not text.endswith(_QUOTES):
        text += "\n" + input("... ")
    return command + text.removesuffix(_QUOTES).strip()


def print_answer(chat: Chat, prompt: str) -> None:
    """Print the answer as it comes; on a terminal what the model thinks too."""
    shows_thoughts, after_thought = sys.stdout.isatty(), ""
    with contextlib.closing(chat.ask(prompt)) as pieces:
        for piece in pieces:
            if piece.thought and shows_thoughts:
                print(f"{_DIM}{piece.thought}{_PLAIN}", end="", flush=True)
                after_thought = "\n\n"
            if piece.text:
                print(after_thought + piece.text, end="", flush=True)
                after_thought = ""
    print()
