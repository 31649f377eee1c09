"""The API process' one piece of state: the engine behind it, what runs, and where it is in its life.

    Starting -> Downloading -> Loading ... (the engine's own phases) -> Ready -> Draining
                                                                    `-> Failed

run.py drives it (`run`, `drain`, `close`); the routes read it (`readiness`, `problem`) and generate through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from octavo_engine import transport
from octavo_engine.client import EngineClient
from octavo_engine.errors import EngineDead, GenerationFailed, NotServing, RequestInvalid
from octavo_engine.generation import LanguageModel, TextModel
from octavo_engine.logs import HTTP_REQUEST_ID
from octavo_engine.server.metrics import FinishedReason, Metrics
from octavo_engine.store.pull import pull
from octavo_engine.structured.checker import GrammarChecker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

    from octavo_engine.answer import TextDelta
    from octavo_engine.client import Spawn
    from octavo_engine.config import ServerConfig
    from octavo_engine.errors import RejectionReason
    from octavo_engine.generation import GenerationRequest
    from octavo_engine.store.local import Location
    from octavo_engine.store.pull import Hub
    from octavo_engine.structured.checker import Wanted

    Admit = Callable[[int], None]  # raises NotServing

RETRY_SECONDS: Final = 5  # what clients are told when another moment, or another replica, will do
_DRAIN_POLL_SECONDS: Final = 0.1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Readiness:
    """Should new requests come here, and if not, why."""

    phase: str  # CamelCase; "Ready" is the only one that takes requests
    done: int = 0  # bytes, while something is fetched or loaded
    total: int = 0  # bytes; 0 where it is not known
    reason: str = ""


class Service:
    """One served model.

    Args:
        config: of this process and its engine.
        location: where the model's file is, or comes from.
        hub: how to reach the hub if it must be pulled.
        spawn: starts the engine process; a test puts a fake engine behind it.
    """

    def __init__(self, config: ServerConfig, location: Location, hub: Hub, spawn: Spawn = transport.spawn) -> None:
        self.config = config
        self.metrics = Metrics(config.engine.served_model_names[0], old_names=config.old_metrics)
        self.draining = False
        self.on_close: list[Callable[[], None]] = []  # for what takes part in this service's life
        self.location = location
        self._hub = hub
        self._spawn = spawn
        self._starting = Readiness("Starting", reason="the server is starting")
        self._client: EngineClient | None = None
        self._model: LanguageModel | None = None
        self._grammars = GrammarChecker(config.engine.tokenizer or location.path)
        self.num_in_flight = 0
        self.num_admitted = 0  # requests for generation among them
        self._idle = asyncio.Event()

    async def run(self) -> None:
        """Bring the model up and keep it up; never returns.

        Raises:
            UserError: the model cannot be served.
            EngineDead: the engine process ended.
        """
        if self.location.is_missing and self.location.source is not None:
            _log.info("pulling %s", self.location.source.text)
            await pull(
                self.location.source,
                self.location.path,
                hub=self._hub,
                sha256=self.location.sha256,
                on_progress=self._on_download,
            )
        process, sock = self._spawn(self.config.engine)
        self._client = await EngineClient.start(process, sock, self.metrics)
        text = await asyncio.to_thread(
            TextModel.load,
            self.config.engine.tokenizer or self.location.path,
            self.location.modelfile,
            self.config.chat_template,
        )
        facts = await self._client.ready()
        self.metrics.on_ready(facts)
        self._model = LanguageModel(self._client, facts, text)
        _log.info(
            "ready: %s on %s in %s, context %d tokens, %d KV blocks of %d",
            ", ".join(self.config.engine.served_model_names),
            facts.device,
            facts.dtype,
            facts.max_model_len,
            facts.num_blocks,
            facts.block_size,
        )
        raise EngineDead(await self._client.died())

    @property
    def problem(self) -> str | None:
        """Why a restart would help, or None."""
        return self._client.problem if self._client is not None else None

    @property
    def readiness(self) -> Readiness:
        """Should new requests come here."""
        if self.draining:
            return Readiness("Draining", reason=f"the server is shutting down; {self.num_in_flight} requests still run")
        if problem := self.problem:
            return Readiness("Failed", reason=problem)
        if self._model is not None:
            return Readiness("Ready")
        if self._client is not None:
            loading = self._client.loading
            return Readiness(loading.phase, loading.done, loading.total, "the model is being loaded")
        return self._starting

    def loaded_model(self) -> LanguageModel:
        """Return the model.

        Raises:
            NotServing: it takes no requests now.
        """
        if self._model is None or self.problem is not None:
            reason: RejectionReason = "unhealthy" if self.problem is not None else "loading"
            raise NotServing(self.readiness.reason, reason=reason, retry_after=RETRY_SECONDS)
        return self._model

    def model_named(self, name: str) -> LanguageModel:
        """Return the model that a request names.

        Raises:
            NotServing: it takes no requests now.
            RequestInvalid: it is not served here.
        """
        model = self.loaded_model()
        names = self.config.engine.served_model_names
        if name not in names:
            message = f"the model {name[:100]!r} is not served here; served: {', '.join(names)}"
            raise RequestInvalid(message, param="model", code="model_not_found", status=404)
        return model

    @contextlib.contextmanager
    def in_flight(self) -> Iterator[None]:
        """Have the drain wait for an HTTP request, from its first byte to the last one of its response."""
        self.num_in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_in_flight -= 1
            if not self.num_in_flight:
                self._idle.set()

    @contextlib.contextmanager
    def admission(self) -> Iterator[Admit]:
        """Let a request for generation in, before anything is done for it, and count it until its response has ended.

        Yields what lets in further ones that came with it, several prompts in one body; all of them or none.

        Raises:
            NotServing: the queue is full. This, and any other that comes from inside, is counted.
        """
        num_admitted = 0

        def admit(count: int) -> None:
            nonlocal num_admitted
            self._refuse_overflow(count)
            num_admitted += count
            self.num_admitted += count

        try:
            admit(1)
            yield admit
        except NotServing as refusal:
            self.metrics.on_rejected(refusal.reason)
            raise
        finally:
            self.num_admitted -= num_admitted

    def refusal_while_draining(self) -> NotServing:
        """What new requests are told, and counted as, while the server shuts down."""
        self.metrics.on_rejected("draining")
        return NotServing(self.readiness.reason, reason="draining", retry_after=RETRY_SECONDS)

    def _refuse_overflow(self, count: int) -> None:
        # While nothing waits in the engine, all its seats can be taken; otherwise as many are as it has memory for.
        stats = self._client.stats if self._client is not None else None
        num_seats = stats.num_running if stats and stats.num_waiting else self.config.engine.max_num_seqs
        limit = self.config.queue_limit
        if self.num_admitted + count > num_seats + limit:
            raise NotServing(
                f"the queue is full: {max(0, self.num_admitted - num_seats)} requests wait already, and "
                f"--max-num-queued-reqs is {limit}. Try again later",
                reason="queue_full",
                retry_after=RETRY_SECONDS,
            )

    def check_num_prompts(self, count: int, param: str) -> None:
        """Refuse more prompts in one request than could ever be let in.

        Raises:
            RequestInvalid: there are; names `param`.
        """
        most = self.config.engine.max_num_seqs + self.config.queue_limit
        if count > most:
            raise RequestInvalid(
                f"there are {count} prompts, and at most {most} can run and wait here; send several requests",
                param=param,
            )

    async def grammar(self, wanted: Wanted | None) -> str | None:
        """Return what the engine takes for what an answer shall keep to; None: nothing.

        Raises:
            RequestInvalid: it cannot be kept to, or costs too much.
        """
        return None if wanted is None else await self._grammars.check(wanted)

    async def generate(self, model: LanguageModel, request: GenerationRequest) -> AsyncGenerator[TextDelta, None]:
        """As LanguageModel.generate, counted and logged."""
        clock = asyncio.get_running_loop().time
        started = clock()
        num_tokens = dict.fromkeys(range(request.num_choices), 0)
        num_living = request.num_choices
        reason: FinishedReason = "abort"
        try:
            async with contextlib.aclosing(model.generate(request)) as deltas:
                async for delta in deltas:
                    num_tokens[delta.choice] = delta.num_tokens
                    if delta.finish_reason is not None:
                        num_living -= 1
                        reason = reason if num_living else delta.finish_reason
                    yield delta
        except (GenerationFailed, EngineDead):
            reason = "error"
            raise
        finally:
            seconds = clock() - started
            self.metrics.on_finished(reason, seconds)
            _log.info(
                "%s: %s after %.2f s, %d prompt + %d generated tokens (X-Request-Id %s)",
                request.request_id,
                reason,
                seconds,
                len(request.prompt_token_ids),
                sum(num_tokens.values()),
                HTTP_REQUEST_ID.get(),
            )

    async def embed(self, model: LanguageModel, request_id: str, prompt: Sequence[int]) -> Sequence[float]:
        """As LanguageModel.embed, counted and logged."""
        clock = asyncio.get_running_loop().time
        started = clock()
        reason: FinishedReason = "abort"
        try:
            embedding = await model.embed(request_id, prompt)
            reason = "stop"
        except (GenerationFailed, EngineDead):
            reason = "error"
            raise
        finally:
            seconds = clock() - started
            self.metrics.on_finished(reason, seconds)
            _log.info(
                "%s: %s after %.2f s, %d tokens embedded (X-Request-Id %s)",
                request_id,
                reason,
                seconds,
                len(prompt),
                HTTP_REQUEST_ID.get(),
            )
        return embedding

    async def drain(self) -> None:
        """Take no more requests and wait for those that run, up to the shutdown timeout."""
        self.draining = True
        timeout = self.config.shutdown_timeout
        _log.info("shutting down: %d requests may take up to %g s", self.num_in_flight, timeout)
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout
        while self.num_in_flight and self.problem is None and clock() < deadline:
            with contextlib.suppress(TimeoutError):  # waking up is for looking at the engine and the clock
                async with asyncio.timeout(_DRAIN_POLL_SECONDS):
                    await self._idle.wait()
        if self.num_in_flight:
            _log.warning("dropping %d requests: %s", self.num_in_flight, self.problem or "the shutdown timeout is over")

    async def close(self) -> None:
        """End the engine process; requests that still run are told so."""
        await self._grammars.close()
        if self._client is not None:
            await self._client.close()
        for close in self.on_close:
            await asyncio.to_thread(close)

    def _on_download(self, done: int, total: int | None) -> None:
        before, percent = self._starting, _percent(done, total)
        self._starting = Readiness("Downloading", done, total or 0, "the model is being downloaded")
        if percent // 10 > _percent(before.done, before.total) // 10:
            _log.info("pulled %d %% of %.0f MB", percent, (total or 0) / 1e6)


def _percent(done: int, total: int | None) -> int:
    return math.floor(100 * done / total) if total else 0
