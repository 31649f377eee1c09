"""Compiles the grammars of requests beside the step loop, which goes on with the others. Used by core.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from octavo_engine.errors import RequestInvalid
from octavo_engine.messages import AbortRequest, AddRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from octavo_engine.grammar import Grammar
    from octavo_engine.messages import ToEngine
    from octavo_engine.structured.compiler import Compiler


class PendingGrammars:
    """The requests whose grammar is being compiled.

    Args:
        load: makes the compiler; called in the thread that compiles, for the first grammar.
    """

    def __init__(self, load: Callable[[], Compiler]) -> None:
        self._load = load
        self._compiler: Compiler | None = None  # the thread's
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._pending: dict[str, tuple[AddRequest, Future[Grammar | RequestInvalid]]] = {}

    def __bool__(self) -> bool:
        return bool(self._pending)

    def hold_back(self, messages: Iterable[ToEngine]) -> list[ToEngine]:
        """Return the messages without requests that have a grammar, and take those up."""
        others: list[ToEngine] = []
        for message in messages:
            if isinstance(message, AddRequest) and message.sampling.grammar is not None:
                future = self._thread.submit(self._compile, message.sampling.grammar)
                self._pending[message.request_id] = (message, future)
            elif isinstance(message, AbortRequest) and message.request_id in self._pending:
                # One choice cannot be stopped before there is any text of it.
                self._pending.pop(message.request_id)[1].cancel()
            else:
                others.append(message)
        return others

    def compiled(self) -> list[tuple[AddRequest, Grammar | RequestInvalid]]:
        """Return the requests whose grammar is ready, or why there is none."""
        done = [request_id for request_id, (_, future) in self._pending.items() if future.done()]
        return [
            (request, future.result()) for request, future in (self._pending.pop(request_id) for request_id in done)
        ]

    def _compile(self, grammar: str) -> Grammar | RequestInvalid:
        try:
            if self._compiler is None:
                self._compiler = self._load()
            return self._compiler.compile(grammar)
        except RequestInvalid as error:
            return error
        except BaseException as error:  # noqa: BLE001 - whatever it is, a panic of the library included, it ends one
            return RequestInvalid(f"the grammar cannot be compiled: {type(error).__name__}: {error}")
