"""How far a pull or a load is: asked of web servers on the loopback, told in steps."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from aiohttp import web

from octavo_cluster.playground import Playground, eventually
from octavo_operator import loading, names
from octavo_operator.loading import Loads, percent_of
from octavo_operator.observe import Observed, Pod
from octavo_operator.resources import Key

Json = dict[str, Any]
RUNNING: Json = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}


@pytest.mark.parametrize(
    ("answer", "percent"),
    [
        (b'{"phase": "Loading", "done": 0, "total": 100}', 0),
        (b'{"phase": "Loading", "done": 99, "total": 100, "reason": ""}', 90),
        (b'{"phase": "Downloading", "done": 100, "total": 100}', 100),
        (b'{"phase": "Starting", "done": 0, "total": 0}', None),  # it is not known how much there is
        (b'{"phase": "Loading", "done": 3, "total": 2}', None),
        (b'{"phase": "Loading", "done": "3", "total": "4"}', None),
        (b'["done", "total"]', None),
        (b"<html>", None),
        (b"\xff", None),
        (b"[" * loading.ANSWER_BYTES, None),
        (b"", None),
    ],
)
def test_an_answer_is_a_percentage_in_steps_of_ten_or_nothing(answer: bytes, percent: int | None) -> None:
    assert percent_of(answer) == percent


def pod(name: str = "p", ip: str = "127.0.0.1", *, ready: str = "False", **containers: Json) -> Pod:
    statuses = [{"name": each, "ready": False, "state": state} for each, state in containers.items()]
    return Pod.from_json(
        {
            "metadata": {"name": name, "namespace": "models", "resourceVersion": "1", "labels": names.labels("llama")},
            "status": {
                "podIP": ip,
                "conditions": [{"type": "Ready", "status": ready}],
                "containerStatuses": statuses,
            },
        }
    )


class Server:
    """What answers /ready in a pod."""

    def __init__(self) -> None:
        self.answer: Json = {}
        self.port = 0
        self.asked = 0

    async def ready(self, _: web.Request) -> web.Response:
        """Answer as an engine that loads."""
        self.asked += 1
        return web.json_response(self.answer, status=503)


@asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    server = Server()
    app = web.Application()
    app.router.add_get("/ready", server.ready)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.port = runner.addresses[0][1]
    yield server
    await runner.cleanup()


async def until(holds: Any) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - polls what several tasks change
            await asyncio.sleep(0.01)


async def test_a_pod_that_loads_is_asked_again_and_again_and_its_service_is_looked_at_when_it_comes_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "ROUND_SECONDS", 0.01)
    changes: list[Key] = []
    pods = [pod(engine=RUNNING)]
    async with serving() as server, asyncio.TaskGroup() as tasks:
        server.answer = {"done": 42, "total": 100}
        loads = Loads(lambda: pods, changes.append, port=server.port)

        def told() -> int | None:
            (seen,) = loads.added_to(Observed(children={}, pods=tuple(pods))).pods
            return seen.percent

        running = tasks.create_task(loads.run())
        await until(lambda: told() == 40)
        server.answer = {"done": 49, "total": 100}
        rounds = server.asked + 3
        await until(lambda: server.asked >= rounds)
        assert changes == [Key("models", "llama")]  # no news
        server.answer = {"done": 50, "total": 100}
        await until(lambda: told() == 50)
        server.answer = {"phase": "Ready"}  # nothing to say; it has not gone back
        rounds = server.asked + 3
        await until(lambda: server.asked >= rounds)
        assert told() == 50
        pods[:] = [pod(ready="True", engine=RUNNING)]
        await until(lambda: told() is None)
        running.cancel()
    assert changes == [Key("models", "llama")] * 2


@pytest.mark.parametrize(
    "silent",
    [
        pod(ip="", engine=RUNNING),
        pod(ready="True", engine=RUNNING),
        pod(engine={"waiting": {"reason": "PodInitializing"}}),
        pod(mesh=RUNNING),
    ],
)
def test_only_what_pulls_or_loads_is_asked(silent: Pod) -> None:
    assert silent.loads_in is None


def test_a_pod_first_pulls_and_then_loads() -> None:
    assert pod(pull=RUNNING).loads_in == names.PULL_CONTAINER
    assert pod(engine=RUNNING).loads_in == names.ENGINE_CONTAINER


@contextmanager
def engine_at(address: str, answer: Json) -> Iterator[None]:
    """Something that answers /ready where the engine of a pod with this address would."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer((address, names.HTTP_PORT), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.apiserver
def test_the_status_and_an_event_say_how_far_a_load_is(playground: Playground) -> None:
    answer = {"phase": "Loading", "done": 61, "total": 100}
    state = {"name": "engine", "image": "e", "imageID": "", "ready": False, "restartCount": 0, "state": RUNNING}
    address = "127.88.0.7"  # on the loopback, and nobody else's
    with engine_at(address, answer), playground.operator():
        playground.apply(replicas=1)
        playground.await_ready("Unknown", "Starting")
        playground.play_deployment_controller(replicas=1, ready=0)
        scheduled = [{"type": "PodScheduled", "status": "True"}]
        status = {"phase": "Running", "conditions": scheduled, "containerStatuses": [state]}
        playground.play_pod("llama-1-a", {**status, "podIP": address, "podIPs": [{"ip": address}]})
        said = "1 of 1 pods load the model: 60 %"
        eventually(lambda: playground.condition()["message"] == said, said, lambda: playground.condition()["message"])
        answer["done"] = 75
        said = "1 of 1 pods load the model: 70 %"
        eventually(lambda: playground.condition()["message"] == said, said, lambda: playground.condition()["message"])

        def events() -> list[str]:
            found = json.loads(playground.kubectl("get", "events", "--output=json"))["items"]
            return [each["message"] for each in found if each["reason"] == "Loading"]

        eventually(lambda: said in events(), "an event", lambda: str(events()))
