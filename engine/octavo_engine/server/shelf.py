"""A server of many models: those of the store, each in an engine process of its own, loaded when one is asked for.

A model is unloaded when nobody has used it for its `keep_alive`, or when another one needs its memory: then the least
recently used goes first, and one that answers requests never goes. Who asks for a model that is being loaded waits.

The memory budget is what the machine and the control groups leave (planning.py): the plans of all loaded models fit
into it together, whether their engines have touched their memory yet or not. On a GPU the engine itself says what fits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from octavo_engine import resources, transport
from octavo_engine.errors import EngineDead, ModelDoesNotFit, RequestInvalid, UserError
from octavo_engine.planning import plan_for_cpu, read_model
from octavo_engine.server.front import Front, Readiness, Served
from octavo_engine.server.metrics import Metrics, render_together
from octavo_engine.server.service import Service
from octavo_engine.server.shelf_session import ShelfSession
from octavo_engine.store import derived
from octavo_engine.store.local import list_models, locate, stored_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from octavo_engine.client import Spawn
    from octavo_engine.config import EngineConfig, ServerConfig
    from octavo_engine.store.local import Location
    from octavo_engine.store.remote import Hub

    # Bytes that a model needs, and that there are for all together; the engines run in processes of these ids.
    Measure = Callable[[EngineConfig, tuple[int, ...]], tuple[int, int]]

KEEP_ALIVE_SECONDS: Final = 300.0  # Ollama's
_MAX_TIMER_SECONDS: Final = 3600.0

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class ShelvedModel:
    """A model that is loaded or being loaded. Only the shelf changes it."""

    name: str
    service: Service
    num_users: int = 0  # requests that use it or wait for it
    last_used: float = 0.0  # on the event loop's clock, like the next
    expires: float = math.inf  # when it is unloaded unless somebody uses it
    keep_alive: float = KEEP_ALIVE_SECONDS  # that the last request which told it told
    num_bytes: int = 0  # that it was planned to need
    is_retired: bool = False  # it goes when its last user has gone
    running: asyncio.Task[None] | None = None  # service.run
    loading: asyncio.Task[None] | None = field(default=None)  # what who asks for it waits for

    @property
    def is_loaded(self) -> bool:
        """Whether it answers."""
        return self.service.is_ready.is_set()


class Shelf(Front):
    """All models of a store.

    Args:
        config: of this process; its engine options hold for each model, but for the model and its name.
        store: whose models are served.
        hub: for the services; nothing is pulled because somebody asks for it.
        spawn: starts an engine process; a test puts a fake engine behind it.
        measure: the memory that a model needs and that there is; a test has its own.
    """

    def __init__(
        self,
        config: ServerConfig,
        store: Path,
        hub: Hub,
        *,
        spawn: Spawn = transport.spawn,
        measure: Measure | None = None,
    ) -> None:
        super().__init__(config, Metrics(""))
        self.store = store
        self.hub = hub
        self._spawn = spawn
        self._measure = measure or _measure
        self._models: dict[str, ShelvedModel] = {}
        self._one_at_a_time = asyncio.Lock()  # what is being loaded has not taken all its memory yet
        self._changed = asyncio.Event()  # for `run`: a model is idle, or its time is another one
        self._closing: set[asyncio.Task[None]] = set()
        self._freed = asyncio.Event()  # for `_make_room`: the same

    async def run(self) -> None:
        """Unload what nobody has used for long enough; never returns."""
        _log.info("ready: serving the models in %s, each loaded when it is asked for", self.store)
        clock = asyncio.get_running_loop().time
        while True:
            self._changed.clear()
            idle = [model for model in self._models.values() if model.is_loaded and not model.num_users]
            for model in idle:
                if model.expires <= clock():
                    await self._unload(model)
            pending = [model.expires - clock() for model in idle if model.name in self._models]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(pending, default=_MAX_TIMER_SECONDS))):
                    await self._changed.wait()

    @asynccontextmanager
    async def session(self) -> AsyncIterator[ShelfSession]:
        """Return what a request needs; the models that it used may go when it has ended."""
        session = ShelfSession(self)
        try:
            yield session
        finally:
            session.release()

    @property
    def problem(self) -> str | None:
        """None: an engine that died or is stuck is started anew when its model is asked for."""
        return None

    @property
    def readiness(self) -> Readiness:
        """Should new requests come here."""
        if self.draining:
            return Readiness("Draining", reason=f"the server is shutting down; {self.num_in_flight} requests still run")
        return Readiness("Ready")

    @property
    def num_seats(self) -> int:
        """Of all loaded models, and of one more."""
        loaded = [model.service.num_seats for model in self._models.values() if model.is_loaded]
        return sum(loaded) + self.config.engine.max_num_seqs

    def render_metrics(self) -> bytes:
        """Return the metrics of the process and of each loaded model."""
        metrics = [self.metrics, *(model.service.metrics for model in self._models.values())]
        return render_together(metrics, old_names=self.config.old_metrics)

    async def close(self) -> None:
        """End all engine processes."""
        for model in list(self._models.values()):
            if model.loading is not None:
                model.loading.cancel()
            await self._unload(model)
        await asyncio.gather(*self._closing)
        await self.close_others()

    def find(self, name: str) -> Location:
        """Return where a model of the store is. Paths are no names: clients have no business in the file system.

        Raises:
            RequestInvalid: there is none of this name.
        """
        try:
            location = locate(name, self.store, names_only=True)
        except UserError as error:
            raise RequestInvalid(str(error), param="model", code="model_not_found", status=404) from error
        if location.is_missing:
            message = f"model {name[:100]!r} not found, try pulling it first"
            raise RequestInvalid(message, param="model", code="model_not_found", status=404)
        is_made = derived.load(name, self.store) is not None
        return location if is_made else replace(location, name=stored_name(location.path, self.store))

    async def acquire(self, name: str) -> ShelvedModel:
        """Return a loaded model with one more user; load it if need be.

        Raises:
            RequestInvalid: there is none, or it cannot be loaded.
        """
        location = await asyncio.to_thread(self.find, name)
        model = self._models.get(location.name)
        if model is not None and model.is_loaded and (problem := model.service.problem) is not None:
            _log.warning("%s is started anew: %s", model.name, problem)
            await self._unload(model)
            model = None
        if model is None:
            engine = replace(self.config.engine, served_model_names=(location.name,))
            service = Service(replace(self.config, engine=engine), location, self.hub, self._spawn)
            model = self._models[location.name] = ShelvedModel(location.name, service)
            model.loading = asyncio.create_task(self._load(model))
        assert model.loading is not None
        model.num_users += 1
        try:
            await asyncio.shield(model.loading)
        except UserError as error:
            self.release(model)
            raise RequestInvalid(f"{model.name} cannot be loaded: {error}", param="model", status=500) from error
        except BaseException:
            self.release(model)
            raise
        return model

    def release(self, model: ShelvedModel, keep_alive: float | None = None) -> None:
        """Take back one user of the model, which shall stay for `keep_alive` seconds after its last one.

        None: as long as was said before, as Ollama has it.
        """
        now = asyncio.get_running_loop().time()
        model.num_users -= 1
        model.keep_alive = model.keep_alive if keep_alive is None else keep_alive
        model.last_used, model.expires = now, now + model.keep_alive
        self._unload_if_retired(model)
        self._tell()

    async def expire(self, name: str) -> bool:
        """Unload a model as soon as nobody uses it; False: it is not loaded."""
        location = await asyncio.to_thread(self.find, name)
        model = self._models.get(location.name)
        if model is None:
            return False
        model.keep_alive = model.expires = 0.0
        self._tell()
        return True

    async def retire(self, name: str) -> None:
        """Let nobody use the model any more as it is now: its name is to mean another one, or none."""
        with contextlib.suppress(RequestInvalid):
            location = await asyncio.to_thread(self.find, name)
            if (model := self._models.pop(location.name, None)) is not None:
                model.is_retired = True
                self._unload_if_retired(model)

    async def served(self) -> list[Served]:
        """Return all models of the store, with what is known of the loaded ones."""
        loaded = {model.name: model for model in await self.loaded()}
        names = [model.name for model in await asyncio.to_thread(list_models, self.store)]
        found = []
        for name in names:
            with contextlib.suppress(RequestInvalid):  # it has just gone, or what it was made of has
                location = await asyncio.to_thread(self.find, name)
                found.append(loaded.get(location.name) or Served(location.name, location))
        return found

    async def loaded(self) -> list[Served]:
        """Return the models in memory."""
        now = asyncio.get_running_loop().time()
        found = []
        for model in self._models.values():
            if model.is_loaded and model.service.problem is None:
                (served,) = await model.service.loaded()
                found.append(replace(served, expires_in=max(0.0, model.expires - now)))
        return found

    async def _load(self, model: ShelvedModel) -> None:
        """Load a model; make room for it by unloading others.

        Raises:
            UserError: it cannot be loaded, not even alone.
            EngineDead: the engine process ended.
        """
        try:
            async with self._one_at_a_time:
                while True:
                    try:
                        await self._start(model)
                    except UserError as error:
                        if error.reason != ModelDoesNotFit.__name__ or not await self._make_room(model):
                            raise
                    else:
                        return
        except BaseException:
            await self._unload(model)
            raise

    async def _start(self, model: ShelvedModel) -> None:
        await self._refuse_unless_room(model)
        model.running = asyncio.create_task(model.service.run())
        ready = asyncio.create_task(model.service.is_ready.wait())
        try:
            await asyncio.wait((model.running, ready), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if model.is_loaded:
            model.running.add_done_callback(lambda task: self._on_end(model, task))
            return
        try:
            model.running.result()  # which raises
        finally:
            await model.service.close()
            model.service = Service(model.service.config, model.service.location, self.hub, self._spawn)

    async def _refuse_unless_room(self, model: ShelvedModel) -> None:
        """Compare what the model will need with what the others leave; the first one is the engine's own to judge.

        Raises:
            ModelDoesNotFit: there is not enough.
            UserError: what else is wrong with the model.
        """
        others = [other for other in self._models.values() if other is not model and other.is_loaded]
        pids = tuple(pid for other in others if (pid := other.service.engine_pid) is not None)
        engine = model.service.location.configure(model.service.config.engine)
        model.num_bytes, there_are = await asyncio.to_thread(self._measure, engine, pids)
        left = there_are - sum(other.num_bytes for other in others)
        if others and model.num_bytes > left:
            raise ModelDoesNotFit(
                f"it needs {model.num_bytes / 2**20:,.0f} MiB, and the other models leave {left / 2**20:,.0f} MiB"
            )

    async def _make_room(self, model: ShelvedModel) -> bool:
        """Unload another model, the least recently used first; wait for one that is in use. False: there is none."""
        while others := [other for other in self._models.values() if other is not model and other.is_loaded]:
            if idle := [other for other in others if not other.num_users]:
                victim = min(idle, key=lambda other: other.last_used)
                _log.info("%s makes room for %s", victim.name, model.name)
                await self._unload(victim)
                return True
            self._freed.clear()
            await self._freed.wait()
        return False

    def _on_end(self, model: ShelvedModel, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and isinstance(error := task.exception(), EngineDead):
            _log.error("the engine of %s ended: %s", model.name, error)
            self._unload_soon(model)

    def _unload_if_retired(self, model: ShelvedModel) -> None:
        if model.is_retired and not model.num_users:
            self._unload_soon(model)

    def _unload_soon(self, model: ShelvedModel) -> None:
        closing = asyncio.create_task(self._unload(model))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _unload(self, model: ShelvedModel) -> None:
        if self._models.get(model.name) is model:
            del self._models[model.name]
            if model.is_loaded:
                _log.info("unloading %s", model.name)
        if model.running is not None:
            model.running.cancel()
        await model.service.close()
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._freed.set()


def _measure(engine: EngineConfig, pids: tuple[int, ...]) -> tuple[int, int]:
    """What a model's plan needs on this machine's processors; on a GPU nothing is known but to the engine."""
    if engine.device == "cuda" or (engine.device == "auto" and resources.has_nvidia_driver()):
        return 0, 0
    memory = plan_for_cpu(read_model(engine.model), engine, processes=(os.getpid(), *pids)).memory
    needed = memory.process_bytes + memory.margin_bytes + memory.weight_bytes + memory.work_bytes + memory.kv_bytes
    return needed, memory.available_bytes
