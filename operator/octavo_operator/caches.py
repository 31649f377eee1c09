"""The copies of all that the operator watches: services, pods, children, and children of kinds that a cluster may lack.

Used by reconcile.py, which reads `observed`, tells of its own writes by `learn` and keeps `run` going. A kind of
resources.OPTIONAL is followed while the API server serves it: its CustomResourceDefinition may be installed long after
the operator, or removed. Whenever that changes, every InferenceService is looked at again.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from octavo_operator import metrics
from octavo_operator.cache import Cache
from octavo_operator.errors import ApiError
from octavo_operator.kube import Kube
from octavo_operator.observe import Child, Observed, Pod
from octavo_operator.resources import CHILDREN, INFERENCE_SERVICE, OPTIONAL, POD, Json, Key, Resource

DISCOVERY_SECONDS: Final = 10.0  # between two looks whether an optional kind is served
SETTLE_SECONDS: Final = 10.0  # an optional kind that cannot be listed for so long does not hold up the others
RETRY_SECONDS: Final = 1.0

Clock = Callable[[], float]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Known:
    """That there is an InferenceService, at some version; all else is read when it is looked at."""

    service: Key
    version: int

    @property
    def name(self) -> str:
        """Its name."""
        return self.service.name

    @classmethod
    def from_json(cls, body: Json) -> "Known":
        """What is kept of one."""
        metadata = body["metadata"]
        return cls(Key(metadata["namespace"], metadata["name"]), int(metadata["resourceVersion"]))


class OptionalKind:
    """A kind that the API server serves now and then, and its caches while it does."""

    def __init__(
        self,
        kube: Kube,
        resource: Resource,
        make_caches: Callable[[], list[Cache[Child]]],
        on_change: Callable[[], None],
    ) -> None:
        self.resource = resource
        self.caches: list[Cache[Child]] = []  # filled ones; none while the kind is not served
        self.settled = asyncio.Event()  # set when it was found out for the first time
        self._kube = kube
        self._make_caches = make_caches
        self._on_change = on_change

    async def run(self) -> None:
        """Follow the kind, whenever it comes and goes, until cancelled."""
        while True:
            await self._until(served=True)
            _logger.info("The API server serves %s.", self.resource.plural)
            await self._follow()
            _logger.info("The API server does not serve %s any more.", self.resource.plural)

    async def _follow(self) -> None:
        caches = self._make_caches()
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(cache.run()) for cache in caches]
            gone = tasks.create_task(self._until(served=False))
            filled = tasks.create_task(_wait_filled(caches))
            await asyncio.wait([gone, filled], timeout=SETTLE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not filled.done():
                self.settled.set()
                await asyncio.wait([gone, filled], return_when=asyncio.FIRST_COMPLETED)
            if filled.done():
                self.caches = caches
                for cache in caches:
                    _show_age(cache)
                self.settled.set()
                self._on_change()
                await gone
                self.caches = []
                self._on_change()
            for task in (*running, filled):
                task.cancel()
        for cache in caches:
            _hide(cache)

    async def _until(self, *, served: bool) -> None:
        while await self._is_served() != served:
            self.settled.set()
            await asyncio.sleep(DISCOVERY_SECONDS)

    async def _is_served(self) -> bool:
        while True:
            try:
                return await self._kube.is_served(self.resource)
            except ApiError as error:
                _logger.warning("Whether %s are served is unknown: %s", self.resource.plural, error)
                await asyncio.sleep(max(RETRY_SECONDS, error.retry_after or 0.0))


async def _wait_filled(caches: Sequence[Cache[Any]]) -> None:
    for cache in caches:
        await cache.synced.wait()


class Caches:
    """All copies of one operator process."""

    def __init__(
        self,
        kube: Kube,
        namespaces: Sequence[str],
        *,
        on_change: Callable[[Key], None],
        on_kind: Callable[[], None],
        clock: Clock = time.monotonic,
    ) -> None:
        """Make the caches; nothing is asked before `run`.

        Args:
            kube: the client.
            namespaces: those to watch; none: all.
            on_change: told which InferenceService has something new, and of all of them once they are known.
            on_kind: told that an optional kind has come or gone.
            clock: seconds.
        """
        self._kube = kube
        self._scopes: Sequence[str | None] = namespaces or (None,)
        self._on_change = on_change
        self._clock = clock
        self._services = [
            Cache(
                kube, INFERENCE_SERVICE, scope, project=Known.from_json, on_change=on_change, selector="", clock=clock
            )
            for scope in self._scopes
        ]
        always = [resource for kind, resource in CHILDREN.items() if kind not in OPTIONAL]
        self._children = [cache for resource in always for cache in self._of_kind(resource)]
        self._pods = [
            Cache(kube, POD, scope, project=Pod.from_json, on_change=on_change, clock=clock) for scope in self._scopes
        ]
        self._optional = [
            OptionalKind(kube, resource, partial(self._of_kind, resource), on_kind) for resource in OPTIONAL.values()
        ]
        for cache in self._all:
            _show_age(cache)

    def _of_kind(self, resource: Resource) -> list[Cache[Child]]:
        return [
            Cache(
                self._kube,
                resource,
                scope,
                project=partial(Child.from_json, resource.kind),
                on_change=self._on_change,
                clock=self._clock,
            )
            for scope in self._scopes
        ]

    def __len__(self) -> int:
        return sum(len(cache) for cache in self._all)

    @property
    def _all(self) -> list[Cache[Any]]:
        return [
            *self._services,
            *self._children,
            *self._pods,
            *(cache for kind in self._optional for cache in kind.caches),
        ]

    @property
    def offered(self) -> frozenset[str]:
        """The optional kinds that there are."""
        return frozenset(kind.resource.kind for kind in self._optional if kind.caches)

    @property
    def troubles(self) -> list[str]:
        """Why the process should be restarted; empty while all is well."""
        return [trouble for cache in self._all if (trouble := cache.trouble) is not None]

    def services(self) -> list[Key]:
        """All InferenceServices."""
        return [known.service for cache in self._services for known in cache]

    def pods(self) -> list[Pod]:
        """All pods of the engine, of every InferenceService."""
        return [pod for cache in self._pods for pod in cache]

    def observed(self, key: Key) -> Observed:
        """What there is of an InferenceService, as far as it carries our label."""
        of_service = [cache for cache in self._all if cache.namespace in {None, key.namespace}]
        found = [each for cache in of_service for each in cache.of(key)]
        pods = sorted((each for each in found if isinstance(each, Pod)), key=lambda pod: pod.name)
        children = {(each.kind, each.name): each for each in found if isinstance(each, Child)}
        return Observed(children=children, pods=tuple(pods))

    def learn(self, body: Json) -> None:
        """Take in what one of our own writes to a child has returned."""
        for cache in self._all:
            if cache.resource.kind == body["kind"] and cache.namespace in {None, body["metadata"]["namespace"]}:
                cache.put(body)

    async def run(self, filled: asyncio.Event) -> None:
        """Keep the copies exact until cancelled; `filled` is set once all of them are complete."""
        async with asyncio.TaskGroup() as tasks:
            for cache in self._all:
                tasks.create_task(cache.run(), name=f"watch {cache.resource.plural} in {cache.namespace or 'all'}")
            for kind in self._optional:
                tasks.create_task(kind.run(), name=f"look for {kind.resource.plural}")
            await _wait_filled([*self._services, *self._children, *self._pods])
            for kind in self._optional:
                await kind.settled.wait()
            for key in self.services():
                self._on_change(key)
            filled.set()


def _show_age(cache: Cache[Any]) -> None:
    labels = {"kind": cache.resource.kind, "namespace": cache.namespace or ""}
    metrics.WATCH_AGE_SECONDS.labels(**labels).set_function(partial(getattr, cache, "age"))


def _hide(cache: Cache[Any]) -> None:
    """Take what was told of a cache out of the metrics: nobody watches any more, and that is as it should be."""
    for metric in (metrics.WATCH_AGE_SECONDS, metrics.CACHED_OBJECTS):
        metric.remove(cache.resource.kind, cache.namespace or "")
