"""What is registered with kopf, and how kopf is told to behave."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import kopf
import pytest
from kopf._cogs.structs.ephemera import AnyMemo, Memo
from kopf._core.engines.indexing import OperatorIndexers
from kopf._core.engines.probing import health_reporter
from kubernetes.aio.client import Configuration

from octavo_operator import handlers
from octavo_operator.cache import HUNG_SECONDS
from octavo_operator.handlers import Backoffs
from octavo_operator.kube import Kube
from octavo_operator.reconcile import Reconciler
from octavo_operator.settings import Settings


@asynccontextmanager
async def reconciler_at(clock: list[float]) -> AsyncIterator[tuple[Kube, Reconciler]]:
    async with Kube(Configuration(host="http://127.0.0.1:1")) as kube:
        yield kube, Reconciler(kube, Settings(engine_image="e"), clock=lambda: clock[0])


async def test_nothing_is_registered_that_would_leave_traces_in_an_object() -> None:
    async with reconciler_at([0.0]) as (kube, reconciler):
        registry = handlers.registry(kube, reconciler)
    # These are what kopf adds finalizers and annotations for.
    assert list(registry._changing.get_all_handlers()) == []
    assert list(registry._spawning.get_all_handlers()) == []
    assert list(registry._watching.get_all_handlers()) == []  # a watch of kopf's ends at the first 404


@pytest.mark.parametrize(("silent_for", "status"), [(0.0, 200), (HUNG_SECONDS + 1, 500)])
async def test_the_health_endpoint_fails_when_a_watch_hangs(
    silent_for: float, status: int, unused_tcp_port: int
) -> None:
    clock = [0.0]
    async with reconciler_at(clock) as (kube, reconciler):
        clock[0] = silent_for
        ready = asyncio.Event()
        endpoint = f"http://127.0.0.1:{unused_tcp_port}/healthz"
        reporter = asyncio.create_task(
            health_reporter(
                endpoint,
                memo=AnyMemo(Memo()),
                indices=OperatorIndexers().indices,
                registry=handlers.registry(kube, reconciler),
                settings=handlers.settings(),
                ready_flag=ready,
            )
        )
        async with asyncio.timeout(10):
            await ready.wait()
            async with aiohttp.ClientSession() as session, session.get(endpoint) as answer:
                assert answer.status == status
        reporter.cancel()
        await asyncio.gather(reporter, return_exceptions=True)


def test_kopf_never_gives_up_on_the_api_server() -> None:
    backoffs = Backoffs()
    for _ in range(2):
        delays = list(itertools.islice(backoffs, 1000))
        assert delays == sorted(delays)
        assert (delays[0], delays[-1]) == (0.1, 10.0)


def test_kopf_is_told_to_leave_the_cluster_alone() -> None:
    settings = handlers.settings()
    assert isinstance(settings, kopf.OperatorSettings)
    assert (settings.posting.enabled, settings.peering.standalone, settings.scanning.disabled) == (False, True, True)
