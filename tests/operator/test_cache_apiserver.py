"""The cache and the client against a real API server, beside what `kubectl get` says."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest

from octavo_cluster.playground import PATIENCE, Playground
from octavo_operator import names
from octavo_operator.cache import Cache
from octavo_operator.errors import ApiError, Conflict, NotFound, Refused
from octavo_operator.kube import Kube, load_configuration
from octavo_operator.observe import Child
from octavo_operator.resources import INFERENCE_SERVICE, SERVICE, Key, Resource

pytestmark = pytest.mark.apiserver


@pytest.fixture
async def kube(playground: Playground, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Kube]:
    monkeypatch.setattr(
        "kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(playground.server.kubeconfig)
    )
    async with Kube(await load_configuration()) as kube:
        yield kube


def service(playground: Playground, name: str, of: str | None = "llama") -> dict[str, Any]:
    labels = {} if of is None else {names.SERVICE_LABEL: of}
    metadata = {"name": name, "namespace": playground.namespace, "labels": labels}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"ports": [{"port": 80}]}}


@asynccontextmanager
async def running(
    kube: Kube, playground: Playground, told: list[Key], resource: Resource = SERVICE
) -> AsyncIterator[Cache[Child]]:
    cache = Cache(
        kube,
        resource,
        playground.namespace,
        project=partial(Child.from_json, resource.kind),
        on_change=told.append,
    )
    task = asyncio.create_task(cache.run())
    async with asyncio.timeout(PATIENCE):
        await cache.synced.wait()
    yield cache
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():  # noqa: ASYNC110 - the cache has no event for its readers
            await asyncio.sleep(0.02)


async def test_the_copy_holds_what_carries_our_label_and_nothing_else(kube: Kube, playground: Playground) -> None:
    await kube.apply(service(playground, "before"))
    await kube.apply(service(playground, "foreign", of=None))
    told: list[Key] = []
    llama, gemma = Key(playground.namespace, "llama"), Key(playground.namespace, "gemma")
    async with running(kube, playground, told) as cache:
        assert [child.name for child in cache.of(llama)] == ["before"]
        await kube.apply(service(playground, "after"))
        await until(lambda: len(cache) == 2)
        playground.patch("service", {"metadata": {"labels": {names.SERVICE_LABEL: "gemma"}}}, "before")
        await until(lambda: [child.name for child in cache.of(gemma)] == ["before"])
        assert [child.name for child in cache.of(llama)] == ["after"]
        playground.patch("service", {"metadata": {"labels": {names.SERVICE_LABEL: None}}}, "before")
        await until(lambda: len(cache) == 1)
        told.clear()
        uid = playground.uid("service", "after")
        await kube.delete(SERVICE, playground.namespace, "after", uid=str(uid))
        await until(lambda: len(cache) == 0)
        assert told == [llama]
        assert playground.get("service", "foreign") is not None


async def test_a_watch_from_a_forgotten_version_lists_anew_and_misses_no_deletion(
    kube: Kube, playground: Playground
) -> None:
    """With the one kind whose first version the server cannot know: it is younger than the server."""
    labels = {names.SERVICE_LABEL: "llama"}
    for name in ("stays", "goes"):
        playground.apply(name)
        playground.patch("ois", {"metadata": {"labels": labels}}, name)
    told: list[Key] = []
    async with running(kube, playground, told, INFERENCE_SERVICE) as cache:
        assert len(cache) == 2
    with pytest.raises(ApiError) as error:
        _ = [event async for event in kube.watch(INFERENCE_SERVICE, playground.namespace, names.SERVICE_LABEL, "1")]
    assert error.value.status == 410
    playground.kubectl("delete", "ois", "goes")
    cache._version = 1
    told.clear()
    task = asyncio.create_task(cache.run())
    await until(lambda: len(cache) == 1)
    llama = Key(playground.namespace, "llama")
    assert told == [llama]
    assert [child.name for child in cache.of(llama)] == ["stays"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_our_own_write_is_in_the_copy_before_the_watch_tells(kube: Kube, playground: Playground) -> None:
    told: list[Key] = []
    async with running(kube, playground, told) as cache:
        stored = await kube.apply(service(playground, "own"))
        cache.put(stored)
        assert [child.uid for child in cache.of(Key(playground.namespace, "llama"))] == [stored["metadata"]["uid"]]


async def test_a_uid_keeps_us_from_touching_another_object(kube: Kube, playground: Playground) -> None:
    manifest = service(playground, "one")
    other = {**manifest, "metadata": {**manifest["metadata"], "uid": "11111111-2222-3333-4444-555555555555"}}
    with pytest.raises(Conflict):
        await kube.apply(other)
    assert playground.get("service", "one") is None
    await kube.apply(manifest)
    with pytest.raises(Conflict):
        await kube.apply(other)
    with pytest.raises(Conflict):
        await kube.delete(SERVICE, playground.namespace, "one", uid=other["metadata"]["uid"])
    assert playground.get("service", "one") is not None


async def test_an_unforced_apply_takes_no_field_from_another(kube: Kube, playground: Playground) -> None:
    await kube.apply(service(playground, "one"), manager="somebody")
    with pytest.raises(Conflict, match="somebody"):
        await kube.apply(service(playground, "one", of="gemma"), force=False)


async def test_what_the_server_does_not_know_is_refused_and_what_is_not_there_is_not_found(
    kube: Kube, playground: Playground
) -> None:
    manifest = service(playground, "one")
    with pytest.raises(Refused, match="nonsense"):
        await kube.apply({**manifest, "spec": {**manifest["spec"], "nonsense": 1}})
    with pytest.raises(NotFound):
        await kube.get(SERVICE, playground.namespace, "one")
