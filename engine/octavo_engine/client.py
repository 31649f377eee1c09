"""The API process' end of the border: starts requests in the engine, hands out their tokens, knows if it is alive.

Used by the server and by the terminal chat. Speaks messages.py through transport.py. Knows nothing of text or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import time
from typing import TYPE_CHECKING, Final, Protocol

from octavo_engine import liveness
from octavo_engine.errors import EngineDead, EngineRefused, ModelNotFound, PeerGone, RequestInvalid
from octavo_engine.messages import (
    AbortRequest,
    AdapterLoaded,
    AddRequest,
    EngineFacts,
    LoadAdapter,
    Loading,
    Refused,
    Shutdown,
    StepOutputs,
    UnloadAdapter,
)
from octavo_engine.process import how_it_ended
from octavo_engine.stream import Answered, UpdateStream
from octavo_engine.transport import ClientChannel

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncGenerator, Callable, Sequence
    from pathlib import Path

    from octavo_engine.config import EngineConfig
    from octavo_engine.messages import RequestUpdate, SchedulerStats, ToEngine
    from octavo_engine.plan import SamplingParams

    Started = tuple["EngineProcess", socket.socket]  # and this side's end of the socket between both
    Spawn = Callable[[EngineConfig], Started]  # transport.spawn, or a fake in tests

_EXIT_SECONDS: Final = 5.0  # how long the engine gets to end by itself

_log = logging.getLogger(__name__)


class EngineProcess(Protocol):
    """What the client needs of the engine's subprocess.Popen."""

    pid: int

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code; subprocess.TimeoutExpired when it does not end in time."""

    def kill(self) -> None:
        """End it now."""


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
        self._streams: dict[str, UpdateStream] = {}
        self._outbox: asyncio.Queue[ToEngine] = asyncio.Queue()
        self._last_message = time.monotonic()
        self._progress = liveness.Progress(process.pid, device=None)  # another one once the engine is ready
        self._rank_pids: tuple[int, ...] = ()
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[EngineFacts] = loop.create_future()
        self._death: asyncio.Future[str] = loop.create_future()
        self._last_words: Refused | None = None
        self._adapters: dict[int, asyncio.Future[AdapterLoaded]] = {}  # that are being loaded
        self._retired: set[int] = set()  # adapters that no further request may name
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
    def pid(self) -> int:
        """The process id of the engine."""
        return self._process.pid

    @property
    def problem(self) -> str | None:
        """Why the engine cannot be counted on, or None."""
        if self._death.done():
            return self._death.result()
        problem = self._progress.problem
        if problem is not None and self.stats is not None:
            problem += f". {self.stats.num_running} requests run, {self.stats.num_waiting} wait"
        return problem

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        num_choices: int = 1,
        priority: int = 0,
        *,
        adapter: int = 0,
    ) -> AsyncGenerator[RequestUpdate, None]:
        """Run a request; yield its new tokens as they come, of each choice the last time with `finish_reason`.

        A reader slower than the engine gets several steps' tokens at once. Leaving early, by aclose() or by being
        cancelled, aborts the request.

        Raises:
            EngineDead: the engine process ended before the request did.
            RequestInvalid: its adapter has just been unloaded.
        """
        if adapter in self._retired:
            raise RequestInvalid(
                "this LoRA adapter has been unloaded", param="model", code="model_not_found", status=404
            )
        if self._death.done():
            raise EngineDead(self._death.result())
        request = AddRequest(
            request_id=request_id,
            prompt_token_ids=tuple(prompt_token_ids),
            sampling=sampling,
            num_choices=num_choices,
            priority=priority,
            adapter=adapter,
        )
        stream = self._streams[request_id] = UpdateStream(request, time.monotonic())
        self._outbox.put_nowait(request)
        try:
            while not stream.is_finished:
                for update in await stream.take():
                    yield update
        finally:
            del self._streams[request_id]
            if self._observer is not None and (answered := stream.answered()) is not None:
                self._observer.on_answered(answered)
            if not stream.is_finished:
                self._outbox.put_nowait(AbortRequest(request_id=request_id))
            if adapter in self._retired:
                self._unload_if_unused(adapter)

    def stop_choice(self, request_id: str, choice: int) -> None:
        """End one choice of a request that `generate` runs; there will be no more updates of it."""
        self._streams[request_id].drop(choice)
        self._outbox.put_nowait(AbortRequest(request_id=request_id, choice=choice))

    async def load_adapter(self, adapter: int, path: Path) -> None:
        """Load a LoRA adapter, which `generate` may name from then on.

        Args:
            adapter: its number, above those of all before.
            path: of its folder or file.

        Raises:
            RequestInvalid: it cannot be loaded.
            EngineDead: the engine process ended.
        """
        if self._death.done():
            raise EngineDead(self._death.result())
        loaded = self._adapters[adapter] = asyncio.get_running_loop().create_future()
        self._outbox.put_nowait(LoadAdapter(adapter=adapter, path=str(path)))
        try:
            await asyncio.wait((loaded, self._death), return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._adapters[adapter]
        if not loaded.done():
            raise EngineDead(self._death.result())
        answer = loaded.result()
        if answer.error is not None:
            status = 404 if answer.reason == ModelNotFound.__name__ else 400
            raise RequestInvalid(answer.error, param="lora_path", status=status)

    def unload_adapter(self, adapter: int) -> None:
        """Let no further request name an adapter; the engine forgets it once those that run have ended."""
        self._retired.add(adapter)
        self._unload_if_unused(adapter)

    def adapters_in_use(self) -> tuple[set[int], set[int]]:
        """Adapters of requests that run, and of those that wait for their first step."""
        running = {stream.request.adapter for stream in self._streams.values() if stream.begun is not None}
        waiting = {stream.request.adapter for stream in self._streams.values() if stream.begun is None}
        return running, waiting

    def _unload_if_unused(self, adapter: int) -> None:
        if all(stream.request.adapter != adapter for stream in self._streams.values()):
            self._outbox.put_nowait(UnloadAdapter(adapter=adapter))

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
            self._progress.look(liveness.look_at(self._process.pid, *self._rank_pids))

    async def _receive(self) -> None:
        try:
            while True:
                message = await self._channel.receive()
                self._last_message = time.monotonic()
                self._progress.heard()
                match message:
                    case StepOutputs():
                        self._on_step(message)
                    case Loading():
                        self.loading = message
                    case EngineFacts():
                        self.facts = message
                        self._rank_pids = message.rank_pids
                        self._progress = liveness.Progress(self._process.pid, message.device)
                        self._ready.set_result(message)
                    case Refused():
                        self._last_words = message
                    case AdapterLoaded():
                        if (loaded := self._adapters.get(message.adapter)) is not None:
                            loaded.set_result(message)
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

    def _observe(self, stream: UpdateStream, update: RequestUpdate) -> None:
        if self._observer is None or not update.token_ids:
            return
        now, num_tokens = self._last_message, len(update.token_ids)
        before = stream.last_tokens.get(update.choice)
        if before is None:
            # The prompt counts once, however many choices it has.
            num_prompt_tokens = 0 if stream.last_tokens else len(stream.request.prompt_token_ids)
            self._observer.on_first_tokens(
                seconds=now - stream.sent, num_prompt_tokens=num_prompt_tokens, num_tokens=num_tokens
            )
        else:
            self._observer.on_next_tokens(seconds=now - before, num_tokens=num_tokens)

    async def _on_end(self) -> None:
        try:
            exit_code = await asyncio.to_thread(self._process.wait, _EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            exit_code = await asyncio.to_thread(self._process.wait)
        words = self._last_words
        cause = f": {words.message}" if words is not None else ""
        self._fail_all(f"the engine process (pid {self._process.pid}) ended {how_it_ended(exit_code)}{cause}")

    def _fail_all(self, reason: str) -> None:
        if not self._death.done():
            self._death.set_result(reason)
        for stream in self._streams.values():
            stream.fail(reason)
