"""The API process' end of the border: starts requests in the engine, hands out their tokens, knows if it is alive.

Used by the server and by the terminal chat. Speaks messages.py through transport.py. Knows nothing of text or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from octavo_engine import liveness
from octavo_engine.errors import EngineDead, EngineRefused, PeerGone
from octavo_engine.messages import (
    AbortRequest,
    AddRequest,
    EngineFacts,
    Loading,
    Refused,
    RequestUpdate,
    Shutdown,
    StepOutputs,
)
from octavo_engine.transport import ClientChannel

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncGenerator, Callable, Sequence

    from octavo_engine.config import EngineConfig
    from octavo_engine.messages import FinishReason, SchedulerStats, ToEngine
    from octavo_engine.plan import SamplingParams

    Spawn = Callable[[EngineConfig], tuple["EngineProcess", socket.socket]]  # transport.spawn, or a fake in tests

_EXIT_SECONDS: Final = 5.0  # how long the engine gets to end by itself

_log = logging.getLogger(__name__)


class EngineProcess(Protocol):
    """What the client needs of the engine's subprocess.Popen."""

    pid: int

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code; subprocess.TimeoutExpired when it does not end in time."""

    def kill(self) -> None:
        """End it now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """Where the time of a request went, in seconds, and what it was for."""

    queue_seconds: float  # from being sent to the engine to its first step
    prefill_seconds: float  # from there to its first tokens
    decode_seconds: float  # from there to its last ones
    num_prompt_tokens: int
    num_tokens: int  # generated
    max_tokens: int  # asked for


class EngineObserver(Protocol):
    """Who wants to know what the engine does (metrics.py). Called in the order of the engine's messages."""

    def on_first_tokens(self, *, seconds: float, num_prompt_tokens: int, num_tokens: int) -> None:
        """A request got its first tokens, so many seconds after it was sent to the engine."""

    def on_next_tokens(self, *, seconds: float, num_tokens: int) -> None:
        """A request got further tokens, so many seconds after its last ones."""

    def on_answered(self, answered: Answered) -> None:
        """A request that got tokens will get no more: it is done, or was given up."""

    def on_step(self, stats: SchedulerStats, *, num_tokens: int) -> None:
        """A step that computed so many tokens ended, or an idle moment (0)."""


class _Stream:
    """The updates of one request that its reader has not taken yet, merged into one."""

    def __init__(self, request: AddRequest, now: float) -> None:
        self.request = request
        self._sent = now  # monotonic seconds, as the following
        self._first_update = now
        self.last_update = now  # at first, when the request was sent
        self.begun: float | None = None  # when its first step began
        self.num_tokens = 0
        self._tokens: list[int] = []
        self._finish_reason: FinishReason | None = None
        self._error: str | None = None
        self._failure: str | None = None  # how the engine process ended
        self._news = asyncio.Event()

    def put(self, update: RequestUpdate, now: float) -> None:
        self._tokens += update.token_ids
        self._finish_reason = update.finish_reason
        self._error = update.error
        if not self.num_tokens:
            self._first_update = now
        self.num_tokens += len(update.token_ids)
        self.last_update = now
        self._news.set()

    def answered(self) -> Answered | None:
        """Where its time went, if it got any tokens."""
        if self.begun is None or not self.num_tokens:
            return None
        return Answered(
            queue_seconds=max(0.0, self.begun - self._sent),
            prefill_seconds=self._first_update - self.begun,
            decode_seconds=self.last_update - self._first_update,
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_tokens=self.num_tokens,
            max_tokens=self.request.sampling.max_tokens,
        )

    def fail(self, reason: str) -> None:
        self._failure = reason
        self._news.set()

    async def take(self) -> RequestUpdate:
        await self._news.wait()
        self._news.clear()
        if self._failure is not None and self._finish_reason is None:
            raise EngineDead(self._failure)
        tokens, self._tokens = tuple(self._tokens), []
        return RequestUpdate(
            request_id=self.request.request_id,
            token_ids=tokens,
            finish_reason=self._finish_reason,
            error=self._error,
        )


class EngineClient:
    """One engine process, seen from the event loop that `start` ran in.

    Attributes:
        loading: the last word of an engine that is not ready yet.
        facts: set once the engine is ready.
        stats: the scheduler's last gauges.
    """

    def __init__(
        self,
        process: EngineProcess,
        channel: ClientChannel,
        observer: EngineObserver | None = None,
    ) -> None:
        self.loading = Loading(phase="Starting", done=0, total=0)
        self.facts: EngineFacts | None = None
        self.stats: SchedulerStats | None = None
        self._process = process
        self._channel = channel
        self._observer = observer
        self._streams: dict[str, _Stream] = {}
        self._outbox: asyncio.Queue[ToEngine] = asyncio.Queue()
        self._last_message = time.monotonic()
        self._progress: liveness.Progress | None = None  # set once the engine is ready
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[EngineFacts] = loop.create_future()
        self._death: asyncio.Future[str] = loop.create_future()
        self._last_words: Refused | None = None
        self._tasks = [asyncio.create_task(task) for task in (self._receive(), self._send(), self._watch())]

    @classmethod
    async def start(
        cls, process: EngineProcess, sock: socket.socket, observer: EngineObserver | None = None
    ) -> EngineClient:
        """Take over what transport.spawn returned."""
        return cls(process, await ClientChannel.open(sock), observer)

    async def ready(self) -> EngineFacts:
        """Wait until the engine can serve.

        Raises:
            EngineRefused: it cannot, by a fault of the user's.
            EngineDead: it ended without a word.
        """
        await asyncio.wait((self._ready, self._death), return_when=asyncio.FIRST_COMPLETED)
        if self._ready.done():
            return self._ready.result()
        if (words := self._last_words) is not None:
            raise EngineRefused(words.reason, words.message, words.facts)
        raise EngineDead(self._death.result())

    async def died(self) -> str:
        """Wait until the engine process ends and return how it did."""
        return await asyncio.shield(self._death)

    @property
    def problem(self) -> str | None:
        """Why the engine cannot be counted on, or None. Loading may pause for as long as the disk does."""
        if self._death.done():
            return self._death.result()
        problem = self._progress.problem if self._progress is not None else None
        if problem is not None and self.stats is not None:
            problem += f". {self.stats.num_running} requests run, {self.stats.num_waiting} wait"
        return problem

    async def generate(
        self, request_id: str, prompt_token_ids: Sequence[int], sampling: SamplingParams
    ) -> AsyncGenerator[RequestUpdate, None]:
        """Run a request; yield its new tokens as they come, the last time with `finish_reason`.

        A reader slower than the engine gets several steps' tokens at once. Leaving early, by aclose() or by being
        cancelled, aborts the request.

        Raises:
            EngineDead: the engine process ended before the request did.
        """
        if self._death.done():
            raise EngineDead(self._death.result())
        request = AddRequest(request_id=request_id, prompt_token_ids=tuple(prompt_token_ids), sampling=sampling)
        stream = self._streams[request_id] = _Stream(request, time.monotonic())
        self._outbox.put_nowait(request)
        finished = False
        try:
            while not finished:
                update = await stream.take()
                finished = update.finish_reason is not None
                yield update
        finally:
            del self._streams[request_id]
            if self._observer is not None and (answered := stream.answered()) is not None:
                self._observer.on_answered(answered)
            if not finished:
                self._outbox.put_nowait(AbortRequest(request_id=request_id))

    async def close(self) -> None:
        """End the engine process; what still runs there is dropped and told so."""
        self._fail_all("the server shut down before the request ended")
        if self.facts is None:  # it does not listen while it loads, and there is nothing to lose
            self._process.kill()
        self._outbox.put_nowait(Shutdown())
        try:
            await asyncio.to_thread(self._process.wait, _EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            _log.warning("the engine process (pid %d) does not end by itself: killing it", self._process.pid)
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()

    async def _send(self) -> None:
        # A queue, so that starting and aborting never wait for an engine that has stopped reading.
        with contextlib.suppress(PeerGone):
            while True:
                await self._channel.send(await self._outbox.get())

    async def _watch(self) -> None:
        while not self._death.done():
            await asyncio.sleep(liveness.LOOK_SECONDS)
            if self._progress is not None:
                self._progress.look(liveness.look_at(self._process.pid))

    async def _receive(self) -> None:
        try:
            while True:
                message = await self._channel.receive()
                self._last_message = time.monotonic()
                if self._progress is not None:
                    self._progress.heard()
                match message:
                    case StepOutputs():
                        self._on_step(message)
                    case Loading():
                        self.loading = message
                    case EngineFacts():
                        self.facts = message
                        self._progress = liveness.Progress(self._process.pid, message.device)
                        self._ready.set_result(message)
                    case Refused():
                        self._last_words = message
        except PeerGone:
            pass
        except Exception:  # noqa: BLE001 - whatever it is, this engine cannot be listened to any more
            _log.exception("the engine process sent what this process cannot read: ending it")
            self._process.kill()
        await self._on_end()

    def _on_step(self, message: StepOutputs) -> None:
        self.stats = message.stats
        for request_id in message.prefilled:
            begun = self._streams.get(request_id)
            if begun is not None and begun.begun is None:
                begun.begun = message.started
        for update in message.updates:
            stream = self._streams.get(update.request_id)
            if stream is None:  # aborted in the meantime
                continue
            self._observe(stream, update)
            stream.put(update, self._last_message)
        if self._observer is not None:
            self._observer.on_step(message.stats, num_tokens=message.num_tokens)

    def _observe(self, stream: _Stream, update: RequestUpdate) -> None:
        if self._observer is None or not update.token_ids:
            return
        seconds, num_tokens = self._last_message - stream.last_update, len(update.token_ids)
        if stream.num_tokens == 0:
            num_prompt_tokens = len(stream.request.prompt_token_ids)
            self._observer.on_first_tokens(seconds=seconds, num_prompt_tokens=num_prompt_tokens, num_tokens=num_tokens)
        else:
            self._observer.on_next_tokens(seconds=seconds, num_tokens=num_tokens)

    async def _on_end(self) -> None:
        try:
            exit_code = await asyncio.to_thread(self._process.wait, _EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            exit_code = await asyncio.to_thread(self._process.wait)
        words = self._last_words
        cause = f": {words.message}" if words is not None else ""
        self._fail_all(f"the engine process (pid {self._process.pid}) ended {_how(exit_code)}{cause}")

    def _fail_all(self, reason: str) -> None:
        if not self._death.done():
            self._death.set_result(reason)
        for stream in self._streams.values():
            stream.fail(reason)


def _how(exit_code: int) -> str:
    if exit_code >= 0:
        return f"with exit code {exit_code}"
    hint = " (often the kernel's answer to too little memory)" if exit_code == -signal.SIGKILL else ""
    return f"by signal {signal.Signals(-exit_code).name}{hint}"
