"""Several operators and one Lease on a real API server: who writes, also when one is stopped or killed."""

import asyncio
import signal
import threading
import time
from pathlib import Path
from typing import Any, Final, Protocol

import httpx
import pytest
from aiohttp import web
from tests.operator.conftest import grant_lease

from octavo_cluster.apiserver import ApiServer
from octavo_cluster.fault_proxy import READ_ONLY, FaultProxy, Forward
from octavo_cluster.playground import USER, OperatorProcess, Playground, eventually
from octavo_operator import names
from octavo_operator.election import WRITE_SECONDS

pytestmark = pytest.mark.apiserver

GROUP: Final = "octavo-contenders"
TAKEOVER_SECONDS: Final = 20.0
HANDOVER_SECONDS: Final = 5.0
SERVICES: Final = 8  # as many as an operator works on at once
BEFORE_HELD: Final = 20  # writes


class Contender(Protocol):
    """Makes an operator that contends for the lease `octavo`; each number is another user."""

    def __call__(self, number: int, kubeconfig: Path | None = None) -> OperatorProcess:
        """By default on a connection of its own."""


def user(number: int) -> str:
    """The user that a contender is, so that its writes can be told from the others'."""
    return f"octavo-contender-{number}"


@pytest.fixture
def contender(playground: Playground, octavo_server: ApiServer) -> Contender:
    """What it takes to contend."""
    subject = {"kind": "Group", "name": GROUP}
    octavo_server.kubectl.apply(
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": GROUP},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": USER},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", **subject}],
        }
    )
    grant_lease(playground, "octavo", subject)

    def make(number: int, kubeconfig: Path | None = None) -> OperatorProcess:
        scope = f"--namespace={playground.namespace}", f"--lease={playground.namespace}/octavo"
        own = octavo_server.kubeconfig_for(user(number), group=GROUP)
        return playground.operator(*scope, kubeconfig=kubeconfig or own, number=number)

    return make


def leads(operator: OperatorProcess, playground: Playground) -> bool:
    return operator.metric(f'octavo_leader{{lease="{playground.namespace}/octavo"}}') == 1.0


def await_waiting(operator: OperatorProcess) -> None:
    """Wait until it has filled its caches and found that another leads; it is healthy all the same."""
    eventually(lambda: "waits for it" in operator.log.read_text(), "the one that waits")
    assert httpx.get(operator.health, timeout=5, trust_env=False).status_code == 200


def written(playground: Playground, number: int) -> list[dict[str, Any]]:
    """What a contender has written in the namespace but for the lease."""
    return [line for line in playground.audit(user(number)) if line["objectRef"]["resource"] != "leases"]


def services(count: int) -> dict[str, Any]:
    items = [
        {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": f"model-{number}"},
            "spec": {"model": {"source": "pvc://models/model.gguf"}},
        }
        for number in range(count)
    ]
    return {"apiVersion": "v1", "kind": "List", "items": items}


def test_one_that_ends_is_followed_at_once_and_one_that_is_killed_within_20_seconds(
    playground: Playground, contender: Contender
) -> None:
    with contender(0) as first, contender(1) as second:
        eventually(lambda: leads(first, playground) or leads(second, playground), "a leader")
        if leads(second, playground):
            first, second = second, first  # noqa: PLW2901 - both are ended by the block
        await_waiting(second)
        playground.apply()
        playground.await_ready("Unknown", "Starting")
        assert sorted(map(bool, (written(playground, 0), written(playground, 1)))) == [False, True]

        ended = time.monotonic()
        first.stop()
        eventually(lambda: leads(second, playground), "the next leader", seconds=HANDOVER_SECONDS)
        playground.apply("gemma")
        playground.await_ready("Unknown", "Starting", name="gemma")
        assert time.monotonic() - ended < TAKEOVER_SECONDS

        with contender(2) as third:
            await_waiting(third)
            ended = time.monotonic()
            second.kill()
            playground.kubectl("delete", "service", "llama")
            eventually(lambda: playground.get("service") is not None, "the lost Service", seconds=TAKEOVER_SECONDS)
            assert time.monotonic() - ended < TAKEOVER_SECONDS


class Held:
    """The answers to writes are held back at a moment: so whoever waits for them writes on when he has them."""

    def __init__(self) -> None:
        self.writes = 0
        self.holding = 0
        self.released = threading.Event()

    async def __call__(self, request: web.Request, forward: Forward) -> web.StreamResponse:
        """Pass on, and after some writes hold the answers."""
        if request.method in READ_ONLY or "leases" in request.path:
            return await forward(request)
        self.writes += 1
        if self.writes > BEFORE_HELD:
            self.holding += 1
            while not self.released.is_set():  # noqa: ASYNC110 - an event of another thread
                await asyncio.sleep(0.01)
            self.holding -= 1
        return await forward(request)


def test_a_leader_that_was_stopped_writes_nothing_when_it_goes_on_under_another(
    playground: Playground, contender: Contender, tmp_path: Path
) -> None:
    """It is stopped while its writes are on their way; they arrive, and when it goes on it would make the next ones."""
    held = Held()
    (tmp_path / "proxy").mkdir()
    with (
        FaultProxy(playground.server.kubeconfig_for(user(0), group=GROUP), tmp_path / "proxy") as proxy,
        contender(0, proxy.kubeconfig) as first,
    ):
        eventually(lambda: leads(first, playground), "the first leader")
        proxy.fault = held
        with contender(1) as second:
            await_waiting(second)
            playground.kubectl("create", "--filename=-", document=services(SERVICES))
            eventually(lambda: held.holding == SERVICES, "the leader in the middle of its work")
            stopped = time.monotonic()
            first.process.send_signal(signal.SIGSTOP)
            try:
                eventually(lambda: leads(second, playground), "the second leader", seconds=TAKEOVER_SECONDS)
                assert time.monotonic() - stopped > WRITE_SECONDS
                for number in range(SERVICES):
                    playground.await_ready("Unknown", "Starting", name=f"model-{number}")
                held.released.set()
                eventually(lambda: held.holding == 0, "what was on its way going on")
            finally:
                goes_on = time.monotonic()
                first.process.send_signal(signal.SIGCONT)
            playground.kubectl("delete", "service", "model-1")
            eventually(lambda: playground.get("service", "model-1") is not None, "the lost Service")
            eventually(lambda: "waits for it" in first.log.read_text(), "the first one waiting")
            assert not leads(first, playground)
            assert "another operator may lead by now" in first.log.read_text()
            assert [each for each in proxy.asked_since(goes_on) if each.writes] == []

            second.stop()
            eventually(lambda: leads(first, playground), "the first leader again", seconds=HANDOVER_SECONDS)
            playground.kubectl("delete", "service", "model-2")
            eventually(lambda: playground.get("service", "model-2") is not None, "the lost Service")
