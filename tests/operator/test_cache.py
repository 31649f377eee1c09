"""The cache against a scripted API; test_cache_apiserver.py has the same against a real one."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field

from octavo_operator.cache import HUNG_SECONDS, UNREACHED_SECONDS, Cache
from octavo_operator.errors import ApiError, ApiUnavailable, Refused
from octavo_operator.resources import SERVICE, Json, Key, Resource

A = Key("ns", "a")
B = Key("ns", "b")


@dataclass(frozen=True)
class Thing:
    """The least that a cache can hold."""

    service: Key
    name: str
    version: int


def thing(body: Json) -> Thing:
    return Thing(Key("ns", body["service"]), body["name"], body["version"])


def body(name: str, version: int, service: str = "a") -> Json:
    return {"name": name, "version": version, "service": service}


def page(version: int, *items: Json) -> Json:
    return {"metadata": {"resourceVersion": str(version)}, "items": list(items)}


def bookmark(version: int) -> tuple[str, Json]:
    return "BOOKMARK", {"metadata": {"resourceVersion": str(version)}}


@dataclass
class Clock:
    """A clock that a test sets."""

    now: float = 0.0

    def __call__(self) -> float:
        """Return the time, in seconds."""
        return self.now


@dataclass
class ScriptedApi:
    """Answers each list with the next entry of `lists` and each watch with the next of `watches`, then hangs."""

    lists: list[list[Json | ApiError]]
    watches: list[list[tuple[str, Json] | ApiError]] = field(default_factory=list)
    watched_from: list[str] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)  # set at each list
    finished: asyncio.Event = field(default_factory=asyncio.Event)

    async def pages(self, resource: Resource, namespace: str | None, selector: str) -> AsyncIterator[Json]:
        """List what the script says."""
        self.asked.set()
        assert (resource, namespace, selector) == (SERVICE, None, "serving.octavo.dev/service")
        for answer in self.lists.pop(0):
            if isinstance(answer, ApiError):
                raise answer
            yield answer

    async def watch(
        self, resource: Resource, namespace: str | None, selector: str, resource_version: str
    ) -> AsyncGenerator[tuple[str, Json], None]:
        """Watch what the script says."""
        assert (resource, namespace, selector) == (SERVICE, None, "serving.octavo.dev/service")
        self.watched_from.append(resource_version)
        if not self.watches:
            self.finished.set()
            await asyncio.Event().wait()
        for answer in self.watches.pop(0):
            if isinstance(answer, ApiError):
                raise answer
            yield answer


async def play(
    api: ScriptedApi,
    changes: list[Key] | None = None,
    prepare: Callable[[Cache[Thing]], object] = len,
) -> Cache[Thing]:
    """Run a cache until the script is at its end."""
    told = changes if changes is not None else []
    cache = Cache(api, SERVICE, None, project=thing, on_change=told.append)
    prepare(cache)
    task = asyncio.create_task(cache.run())
    async with asyncio.timeout(10):
        await api.finished.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return cache


def held(cache: Cache[Thing], *services: Key) -> dict[str, int]:
    return {obj.name: obj.version for service in services or (A, B) for obj in cache.of(service)}


async def test_a_list_of_several_pages_is_taken_as_a_whole() -> None:
    cache = await play(ScriptedApi([[page(9, body("x", 3)), page(9, body("y", 4, service="b"))]]))
    assert held(cache, A) == {"x": 3}
    assert held(cache, B) == {"y": 4}
    assert len(cache) == 2
    assert cache.synced.is_set()


async def test_a_list_that_breaks_off_changes_nothing() -> None:
    api = ScriptedApi([[page(9, body("x", 3)), ApiUnavailable("gone")], [page(9, body("x", 3), body("y", 4))]])
    changes: list[Key] = []
    cache = await play(api, changes)
    assert held(cache) == {"x": 3, "y": 4}
    assert changes == []  # at the start every service is due anyway


async def test_a_watch_goes_on_from_the_list_and_keeps_the_copy_up_to_date() -> None:
    api = ScriptedApi(
        [[page(9, body("x", 3), body("y", 4))]],
        [[("MODIFIED", body("x", 10)), ("ADDED", body("z", 11)), ("DELETED", body("y", 12))]],
    )
    changes: list[Key] = []
    cache = await play(api, changes)
    assert held(cache) == {"x": 10, "z": 11}
    assert api.watched_from == ["9", "12"]
    assert changes == [A, A, A, A]  # an object that is replaced is told as gone and as come


async def test_a_watch_that_ends_or_breaks_is_resumed_from_the_last_version_without_a_list() -> None:
    api = ScriptedApi(
        [[page(9)]],
        [[("ADDED", body("x", 10))], [bookmark(20)], [ApiUnavailable("reset")], [("ADDED", body("y", 21))]],
    )
    cache = await play(api)
    assert held(cache) == {"x": 10, "y": 21}
    assert api.watched_from == ["9", "10", "20", "20", "21"]


async def test_what_was_deleted_while_no_watch_was_there_is_gone_after_the_next_list() -> None:
    api = ScriptedApi(
        [[page(9, body("x", 3), body("y", 4, service="b"))], [page(50, body("x", 3))]],
        [[Refused("too old resource version", status=410)]],
    )
    changes: list[Key] = []
    cache = await play(api, changes)
    assert held(cache) == {"x": 3}
    assert cache.of(B) == ()
    assert changes == [B]  # the second list tells only of what differs
    assert api.watched_from == ["9", "50"]


async def test_an_object_that_changes_hands_leaves_its_old_service() -> None:
    api = ScriptedApi([[page(9, body("x", 3))]], [[("MODIFIED", body("x", 10, service="b"))]])
    changes: list[Key] = []
    cache = await play(api, changes)
    assert held(cache, A) == {}
    assert held(cache, B) == {"x": 10}
    assert set(changes) == {A, B}


async def test_our_own_write_is_known_at_once_and_no_older_event_undoes_it() -> None:
    api = ScriptedApi(
        [[page(9, body("x", 3))]],
        [[("MODIFIED", body("x", 4)), ("DELETED", body("y", 8)), ("MODIFIED", body("x", 21))]],
    )

    def write(cache: Cache[Thing]) -> None:
        cache.put(body("x", 20))
        cache.put(body("y", 15))

    cache = await play(api, prepare=write)
    assert held(cache) == {"x": 21, "y": 15}


async def test_our_own_write_that_the_watch_has_passed_is_not_taken_back_in() -> None:
    cache = await play(ScriptedApi([[page(9, body("x", 3))]], [[("DELETED", body("x", 12))]]))
    cache.put(body("x", 11))  # the answer to a write that came in later than the news of the deletion
    assert held(cache) == {}


async def test_a_server_that_refuses_everything_is_asked_again_until_it_answers() -> None:
    down: list[Json | ApiError] = [ApiUnavailable("connection refused")]
    api = ScriptedApi([down, list(down), [page(9, body("x", 3))]])
    assert held(await play(api)) == {"x": 3}


async def test_the_age_tells_how_long_the_server_was_silent_and_when_a_watch_hangs() -> None:
    clock = Clock()
    api = ScriptedApi([[page(9)]])
    told: list[Key] = []
    cache = Cache(api, SERVICE, None, project=thing, on_change=told.append, clock=clock)
    task = asyncio.create_task(cache.run())
    async with asyncio.timeout(10):
        await api.finished.wait()
    clock.now = 30.0
    assert (cache.age, cache.trouble) == (30.0, None)
    clock.now = HUNG_SECONDS + 1
    assert (cache.age, cache.trouble) == (121.0, "the watch of services in all namespaces hangs since 121 s")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_watch_that_turns_in_vain_is_in_trouble_only_after_minutes() -> None:
    clock = Clock()
    api = ScriptedApi([[ApiUnavailable("connection refused")] for _ in range(100)])
    told: list[Key] = []
    cache = Cache(api, SERVICE, None, project=thing, on_change=told.append, clock=clock)
    task = asyncio.create_task(cache.run())
    for at, trouble in (
        (UNREACHED_SECONDS - 1, None),
        (UNREACHED_SECONDS + 1, "the watch of services in all namespaces has not reached the API server for 601 s"),
    ):
        clock.now = at
        api.asked.clear()
        async with asyncio.timeout(10):
            await api.asked.wait()
        assert cache.trouble == trouble
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
