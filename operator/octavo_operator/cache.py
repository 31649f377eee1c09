"""An exact copy of one kind's objects, for reading without asking the API server.

A list replaces the copy as a whole, a watch keeps it up to date, and what was deleted while no watch was there is gone
after the next list: an object is in the copy if and only if it was in the cluster at the version that the copy has
reached. (The indices of kopf 1.45 are not exact in that sense: they drop an object on its DELETED event only, and the
list after an expired watch compares nothing; and its watch ends for ever at the first 404, which an API server that has
just started may answer.) Of other kinds than ours only objects that carry our label come over the wire.

Used by observe.py (reading) and reconcile.py (telling of its own writes); changes are told by the key of the
InferenceService that they belong to. What is kept of an object is the caller's choice: `project`.

Versions are compared as numbers, which Kubernetes documents for objects of one kind:
https://kubernetes.io/docs/reference/using-api/api-concepts/#resource-versions
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Final, Generic, Protocol, TypeVar

from octavo_operator import metrics, names
from octavo_operator.errors import ApiError, NotFound
from octavo_operator.resources import Json, Key, Resource

HUNG_SECONDS: Final = 120.0  # a watch that has not turned for so long hangs, because each turn is limited to 40 s
UNREACHED_SECONDS: Final = 600.0  # no answer for so long: new credentials or a new CA may help, that is, a restart
FIRST_RETRY_SECONDS: Final = 0.1
LAST_RETRY_SECONDS: Final = 10.0

_logger = logging.getLogger(__name__)


class Cached(Protocol):
    """What the cache needs to know of the things it keeps."""

    @property
    def service(self) -> Key:
        """The InferenceService it belongs to, by its label."""

    @property
    def name(self) -> str:
        """Its own name; its namespace is that of the service."""

    @property
    def version(self) -> int:
        """Its resourceVersion."""


class ListWatch(Protocol):
    """The part of the client that a cache uses."""

    def pages(self, resource: Resource, namespace: str | None, selector: str) -> AsyncIterator[Json]:
        """List, page by page."""

    def watch(
        self, resource: Resource, namespace: str | None, selector: str, resource_version: str
    ) -> AsyncGenerator[tuple[str, Json], None]:
        """Yield changes."""


T = TypeVar("T", bound=Cached)


class Cache(Generic[T]):
    """The objects of one kind, in one namespace or in all, that a label selector matches."""

    def __init__(
        self,
        api: ListWatch,
        resource: Resource,
        namespace: str | None,
        *,
        project: Callable[[Json], T],
        on_change: Callable[[Key], None],
        selector: str = names.SERVICE_LABEL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.resource = resource
        self.namespace = namespace  # None: all
        self.synced = asyncio.Event()  # set for ever by the first complete list
        self._api = api
        self._project = project
        self._on_change = on_change
        self._selector = selector
        self._clock = clock
        self._objects: dict[Key, T] = {}  # by their own namespace and name
        self._of_service: dict[Key, dict[str, T]] = {}  # the same objects; service -> name -> object
        self._version = 0  # what happened up to here is in the copy; 0: a list is needed
        self._turned_at = self._reached_at = clock()

    def of(self, service: Key) -> tuple[T, ...]:
        """The objects that belong to an InferenceService."""
        return tuple(self._of_service.get(service, {}).values())

    def __len__(self) -> int:
        return len(self._objects)

    def __iter__(self) -> Iterator[T]:
        return iter(self._objects.values())

    def put(self, body: Json) -> None:
        """Take in what one of our own writes has returned, because the watch may tell of it only later."""
        obj = self._project(body)
        if obj.version > self._version:  # else the watch is past it already, and knows better
            self._store(obj)

    @property
    def age(self) -> float:
        """Seconds since the API server was last heard."""
        return self._clock() - self._reached_at

    @property
    def trouble(self) -> str | None:
        """Why the process should be restarted, if it should."""
        where = f"the watch of {self.resource.plural} in {self.namespace or 'all namespaces'}"
        if (hung := self._clock() - self._turned_at) > HUNG_SECONDS:
            return f"{where} hangs since {hung:.0f} s"
        if self.age > UNREACHED_SECONDS:
            return f"{where} has not reached the API server for {self.age:.0f} s"
        return None

    async def run(self) -> None:
        """Keep the copy exact until cancelled; no error of the API server ends this."""
        delay = FIRST_RETRY_SECONDS
        while True:
            self._turned_at = self._clock()
            try:
                if not self._version:
                    await self._list()
                await self._watch()
                delay = FIRST_RETRY_SECONDS
                await asyncio.sleep(delay)  # so that a server that ends every watch at once is not asked in a frenzy
            except ApiError as error:
                if isinstance(error, NotFound):
                    self._reached()  # its CustomResourceDefinition is not there, which a restart would not change
                expired = error.status == 410  # 410 Gone: the server has forgotten what happened since our version
                if expired:
                    self._version = 0
                _logger.log(
                    logging.DEBUG if expired else logging.WARNING,
                    "Watching %s failed, again in %.1f s: %s",
                    self.resource.plural,
                    delay,
                    error,
                )
                await asyncio.sleep(max(delay, error.retry_after or 0.0))
                delay = min(delay * 2, LAST_RETRY_SECONDS)

    async def _list(self) -> None:
        """Replace the copy by what there is, and tell of all that differs; the first time there is nobody to tell."""
        listed: dict[Key, T] = {}
        version = 0
        async for page in self._api.pages(self.resource, self.namespace, self._selector):
            self._reached()
            version = int(page["metadata"]["resourceVersion"])
            for body in page["items"]:
                obj = self._project(body)
                listed[_own_key(obj)] = obj
        for gone in [obj for own_key, obj in self._objects.items() if own_key not in listed and obj.version <= version]:
            self._drop(gone)
        for obj in listed.values():
            self._store(obj)
        self._version = version
        self.synced.set()
        self._report()

    async def _watch(self) -> None:
        """Follow the changes until the server ends the watch."""
        stream = self._api.watch(self.resource, self.namespace, self._selector, str(self._version))
        async with contextlib.aclosing(stream):
            async for event, body in stream:
                self._reached()
                if event == "BOOKMARK":
                    self._version = int(body["metadata"]["resourceVersion"])
                    continue
                obj = self._project(body)
                if event == "DELETED":
                    self._drop(obj)
                else:
                    self._store(obj)
                self._version = obj.version
                self._report()
        self._reached()

    def _store(self, obj: T) -> None:
        known = self._objects.get(_own_key(obj))
        if known is not None:
            if known.version >= obj.version:
                return  # one of our own writes has told us of a later state
            self._forget(known)
        self._objects[_own_key(obj)] = obj
        self._of_service.setdefault(obj.service, {})[obj.name] = obj
        self._tell(obj)

    def _drop(self, obj: T) -> None:
        known = self._objects.get(_own_key(obj))
        if known is not None and known.version <= obj.version:  # else one of our own writes has made it anew
            self._forget(known)

    def _forget(self, known: T) -> None:
        del self._objects[_own_key(known)]
        siblings = self._of_service[known.service]
        del siblings[known.name]
        if not siblings:
            del self._of_service[known.service]
        self._tell(known)

    def _tell(self, obj: T) -> None:
        if self.synced.is_set():  # until then every service is due anyway, because the operator has just started
            self._on_change(obj.service)

    def _reached(self) -> None:
        self._turned_at = self._reached_at = self._clock()

    def _report(self) -> None:
        metrics.CACHED_OBJECTS.labels(kind=self.resource.kind, namespace=self.namespace or "").set(len(self))


def _own_key(obj: Cached) -> Key:
    return Key(obj.service.namespace, obj.name)
