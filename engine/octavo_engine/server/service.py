"""A server of one model: the engine behind it, and where it is in its life.

    Starting -> Downloading -> Loading ... (the engine's own phases) -> Ready -> Draining
                                                                    `-> Failed

With --profiles the model is served under further names, each with a system message, parameters and so on of its own.
shelf.py has one of these for each model that it has loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from octavo_engine import transport
from octavo_engine.client import EngineClient
from octavo_engine.errors import EngineDead, GenerationFailed, NotServing, RequestInvalid
from octavo_engine.generation import LanguageModel
from octavo_engine.logs import HTTP_REQUEST_ID
from octavo_engine.profiles import Profiles
from octavo_engine.server.adapters import Adapters
from octavo_engine.server.front import RETRY_SECONDS, Front, Readiness, Served
from octavo_engine.server.metrics import FinishedReason, Metrics
from octavo_engine.store.pull import pull
from octavo_engine.structured.checker import GrammarChecker
from octavo_engine.text.model import TextModel

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from octavo_engine.answer import TextDelta
    from octavo_engine.client import Spawn
    from octavo_engine.config import ServerConfig
    from octavo_engine.errors import RejectionReason
    from octavo_engine.generation import GenerationRequest
    from octavo_engine.modelfile import Modelfile
    from octavo_engine.store.local import Location
    from octavo_engine.store.remote import Hub
    from octavo_engine.structured.checker import Wanted

LATEST: Final = ":latest"  # the tag of a name without one

_log = logging.getLogger(__name__)


class Service(Front):
    """One served model, and the session of every request for it.

    Args:
        config: of this process and its engine.
        location: where the model's file is, or comes from.
        hub: how to reach the hub if it must be pulled.
        spawn: starts the engine process; a test puts a fake engine behind it.
    """

    def __init__(self, config: ServerConfig, location: Location, hub: Hub, spawn: Spawn = transport.spawn) -> None:
        engine = config.engine
        metrics = Metrics(
            engine.served_model_names[0],
            old_names=config.old_metrics,
            num_speculative_tokens=engine.num_speculative_tokens,
        )
        super().__init__(config, metrics)
        self.location = location
        self.is_ready = asyncio.Event()
        self._hub = hub
        self._spawn = spawn
        self._starting = Readiness("Starting", reason="the server is starting")
        self._client: EngineClient | None = None
        self._model: LanguageModel | None = None
        taken = (*config.engine.served_model_names, *(module.name for module in config.engine.lora_modules))
        self._profiles = Profiles(config.profiles, taken) if config.profiles else None
        self._of_profiles: dict[str, tuple[Modelfile, LanguageModel]] = {}  # what was made of them
        self._grammars: GrammarChecker | None = None
        self._adapters: Adapters | None = None

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
                store=self.location.store,
                sha256=self.location.sha256,
                on_progress=self._on_download,
            )
            self.location = self.location.found()
        engine = self.location.configure(self.config.engine)
        process, sock = self._spawn(engine)
        self._client = await EngineClient.start(process, sock, self.metrics)
        tokenizer = engine.tokenizer or self.location.model
        self._grammars = GrammarChecker(tokenizer)
        text = await asyncio.to_thread(TextModel.load, tokenizer, self.location.modelfile, self.config.chat_template)
        facts = await self._client.ready()
        self.metrics.on_ready(facts)
        if engine.enable_lora:
            bare = LanguageModel(self._client, facts, text)
            self._adapters = Adapters(self._client, bare, engine, self._names)
        self._model = LanguageModel(self._client, facts, text, engine.own_adapter)
        self.is_ready.set()
        _log.info(
            "ready: %s on %s in %s, context %d tokens, %d KV blocks of %d",
            ", ".join(self._names()),
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

    @property
    def engine_pid(self) -> int | None:
        """The process id of the engine; None: it is not there yet."""
        return self._client.pid if self._client is not None else None

    @property
    def num_seats(self) -> int:
        """While nothing waits in the engine, all its seats can be taken; else as many are as it has memory for."""
        stats = self._client.stats if self._client is not None else None
        return stats.num_running if stats and stats.num_waiting else self.config.engine.max_num_seqs

    @property
    def shelf(self) -> None:
        """None: it is a server of one model (Session)."""

    @property
    def adapters(self) -> Adapters | None:
        """The LoRA adapters that are served beside the model (Session)."""
        self.loaded_model()
        return self._adapters

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Service]:
        """Return itself: its model is always loaded. A file of profiles is as it is now."""
        if self._profiles is not None:
            await self._profiles.look_again()
        yield self

    async def served(self) -> list[Served]:
        """Return the model under each of its names (Session)."""
        facts = self.loaded_model().facts
        is_on_cpu = facts.device.startswith("cpu")
        adapters = self._adapters.names if self._adapters is not None else ()
        parent = self.config.engine.served_model_names[0]
        return [
            Served(
                name,
                self._location_of(name),
                facts.max_model_len,
                is_on_cpu,
                parent=parent if name in adapters else None,
            )
            for name in self._names()
        ]

    async def loaded(self) -> list[Served]:
        """Return the model, once (Session)."""
        return (await self.served())[:1]

    async def unload(self, name: str) -> bool:  # noqa: ARG002 - there is one, and it stays
        """Keep the model: a server of one model has it loaded as long as it lives (Session)."""
        return False

    async def model_named(self, name: str | None, keep_alive: float | None = None) -> LanguageModel:  # noqa: ARG002 - it stays
        """Return the model that a request names (Session); Ollama's clients write a name with its tag."""
        model, names = self.loaded_model(), self._names()
        if name is None:
            return model
        short = name.removesuffix(LATEST)
        if {name, short} & set(self.config.engine.served_model_names):
            return model
        if self._adapters is not None and (adapted := self._adapters.get(name) or self._adapters.get(short)):
            return adapted
        if self._profiles is not None and (modelfile := self._profiles.current().get(short)) is not None:
            return self._of_profile(short, modelfile, model)
        message = f"model {name[:100]!r} not found; served here: {', '.join(names)}"
        raise RequestInvalid(message, param="model", code="model_not_found", status=404)

    def _location_of(self, name: str) -> Location:
        """Where the model is, with what the adapter or the profile of this name makes of it."""
        if self._adapters is not None and (adapter := self._adapters.path_of(name)) is not None:
            return replace(self.location, modelfile=replace(self.location.own_modelfile(), adapter=str(adapter)))
        modelfile = self._profiles.current().get(name) if self._profiles is not None else None
        if modelfile is None:
            return self.location
        return replace(self.location, modelfile=modelfile.over(self.location.own_modelfile()))

    def _names(self) -> list[str]:
        adapters = self._adapters.names if self._adapters is not None else ()
        profiles = self._profiles.current() if self._profiles is not None else ()
        return [*self.config.engine.served_model_names, *adapters, *profiles]

    def _of_profile(self, name: str, modelfile: Modelfile, model: LanguageModel) -> LanguageModel:
        """Make it once for each state of the file: the template is compiled."""
        made = self._of_profiles.get(name)
        if made is None or made[0] is not modelfile:
            made = self._of_profiles[name] = (modelfile, model.with_modelfile(modelfile))
        return made[1]

    async def grammar(self, wanted: Wanted | None) -> str | None:
        """Return what the engine takes for what an answer shall keep to; None: nothing.

        Raises:
            RequestInvalid: it cannot be kept to, or costs too much.
        """
        if wanted is None:
            return None
        assert self._grammars is not None, "a model is loaded before anything is asked of it"
        return await self._grammars.check(wanted)

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

    def render_metrics(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        if self._adapters is not None:
            running, waiting = self._adapters.in_use()
            self.metrics.on_adapters(running=running, waiting=waiting, most=self._adapters.most)
        return self.metrics.render()

    async def close(self) -> None:
        """End the engine process; requests that still run are told so."""
        if self._grammars is not None:
            await self._grammars.close()
        if self._client is not None:
            await self._client.close()
        await self.close_others()

    def _on_download(self, done: int, total: int | None) -> None:
        before, percent = self._starting, _percent(done, total)
        self._starting = Readiness("Downloading", done, total or 0, "the model is being downloaded")
        if percent // 10 > _percent(before.done, before.total) // 10:
            _log.info("pulled %d %% of %.0f MB", percent, (total or 0) / 1e6)


def _percent(done: int, total: int | None) -> int:
    return math.floor(100 * done / total) if total else 0
