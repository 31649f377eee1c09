"""What a server is, whatever models it has: what runs, who is let in, how it ends.

service.py is a server of one model, shelf.py one of many. run.py drives either (`run`, `drain`, `close`); the routes
read it and generate through what `session` gives them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from octavo_engine.errors import NotServing, RequestInvalid

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from octavo_engine.answer import TextDelta
    from octavo_engine.config import ServerConfig
    from octavo_engine.generation import GenerationRequest, LanguageModel
    from octavo_engine.server.adapters import Adapters
    from octavo_engine.server.metrics import Metrics
    from octavo_engine.server.shelf import Shelf
    from octavo_engine.store.local import Location
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


@dataclass(frozen=True, slots=True)
class Served:
    """A model that can be asked for."""

    name: str
    location: Location
    max_model_len: int | None = None  # None: it is not loaded
    is_on_cpu: bool = True
    expires_in: float | None = None  # seconds until it is unloaded; None: it is not loaded, or stays
    parent: str | None = None  # the model that a LoRA adapter makes it of; None: it is no adapter's


class Session(Protocol):
    """What a request needs of a server, for as long as the request lasts."""

    @property
    def config(self) -> ServerConfig:
        """Of the server; its engine options hold for each model."""

    @property
    def metrics(self) -> Metrics:
        """Of the model that was named."""

    async def model_named(self, name: str | None, keep_alive: float | None = None) -> LanguageModel:
        """Return the model that a request names, which stays loaded until the session ends. None: the only one.

        Args:
            name: of the model.
            keep_alive: seconds for which it stays loaded after that; None: the usual time.

        Raises:
            NotServing: it takes no requests now.
            RequestInvalid: it is not served here, or cannot be loaded.
        """

    async def grammar(self, wanted: Wanted | None) -> str | None:
        """Return what the engine of the model takes for what an answer shall keep to; None: nothing.

        Raises:
            RequestInvalid: it cannot be kept to, or costs too much.
        """

    def generate(self, model: LanguageModel, request: GenerationRequest) -> AsyncGenerator[TextDelta, None]:
        """As LanguageModel.generate, counted and logged."""

    async def embed(self, model: LanguageModel, request_id: str, prompt: Sequence[int]) -> Sequence[float]:
        """As LanguageModel.embed, counted and logged."""

    def check_num_prompts(self, count: int, param: str) -> None:
        """Refuse more prompts in one request than could ever be let in.

        Raises:
            RequestInvalid: there are; names `param`.
        """

    async def served(self) -> Sequence[Served]:
        """Return the models that can be asked for.

        Raises:
            NotServing: that cannot be told yet.
        """

    async def loaded(self) -> Sequence[Served]:
        """Return those that are in memory. Raises as `served`."""

    async def unload(self, name: str) -> bool:
        """Unload a model that nobody uses as soon as may be; False: it stays, or is not loaded."""

    @property
    def shelf(self) -> Shelf | None:
        """The server of many models that it is of; None: it is of a server of one."""

    @property
    def adapters(self) -> Adapters | None:
        """The LoRA adapters that are served beside the model; None: the server was not started to take any.

        Raises:
            NotServing: that cannot be told yet.
        """


class Front(ABC):
    """The server as a whole.

    Attributes:
        config: of this process and its engines.
        metrics: of what is not one model's business.
        draining: no more requests are taken.
        num_in_flight: HTTP requests.
        num_admitted: requests for generation among them.
    """

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self.config = config
        self.metrics = metrics
        self.draining = False
        self.num_in_flight = 0
        self.num_admitted = 0
        self.on_close: list[Callable[[], None]] = []  # for what takes part in this server's life
        self._idle = asyncio.Event()

    @abstractmethod
    async def run(self) -> None:
        """Serve; never returns.

        Raises:
            UserError: the model cannot be served.
            EngineDead: the engine process ended.
        """

    @abstractmethod
    def session(self) -> AbstractAsyncContextManager[Session]:
        """Return what a request needs of the server."""

    @property
    @abstractmethod
    def problem(self) -> str | None:
        """Why a restart would help, or None."""

    @property
    @abstractmethod
    def readiness(self) -> Readiness:
        """Should new requests come here."""

    @property
    @abstractmethod
    def num_seats(self) -> int:
        """How many requests for generation can run."""

    @abstractmethod
    def render_metrics(self) -> bytes:
        """Return all metrics in Prometheus' text format."""

    @abstractmethod
    async def close(self) -> None:
        """End the engine processes; requests that still run are told so."""

    async def close_others(self) -> None:
        """End what takes part in this server's life."""
        for close in self.on_close:
            await asyncio.to_thread(close)

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

    def refusal_while_draining(self) -> NotServing:
        """What new requests are told, and counted as, while the server shuts down."""
        self.metrics.on_rejected("draining")
        return NotServing(self.readiness.reason, reason="draining", retry_after=RETRY_SECONDS)

    def _refuse_overflow(self, count: int) -> None:
        num_seats, limit = self.num_seats, self.config.queue_limit
        if self.num_admitted + count > num_seats + limit:
            raise NotServing(
                f"the queue is full: {max(0, self.num_admitted - num_seats)} requests wait already, and "
                f"--max-num-queued-reqs is {limit}. Try again later",
                reason="queue_full",
                retry_after=RETRY_SECONDS,
            )

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
