"""Pods that end while they answer: a stream in flight survives a rollout, a `kubectl delete pod` and a node's drain.

All at once, so that they share their waits. What a pod's end is, is the same in the three (preStop, SIGTERM, drain);
how it comes about is not: a rollout whose new pod waits for the GPU of the old one, a deletion, and evictions that the
PodDisruptionBudget lets through one by one.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import TYPE_CHECKING, Any, Final

import openai
import pytest

from octavo_cluster import product, storage
from octavo_cluster.playground import http_client
from octavo_cluster.shell import wait_until
from octavo_cluster.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from subprocess import CompletedProcess

    import httpx

    from octavo_cluster.backend import Cluster
    from octavo_cluster.recipe import Image

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

Json = dict[str, Any]

PRE_STOP_SECONDS: Final = 5.0  # a pod that is to end serves on for so long before it is told
STARVED_SECONDS: Final = 12.0  # for so long the rollout has waited for a free GPU when the streams begin
PATIENCE_SECONDS: Final = 240.0  # on two busy cores
STREAMS: Final = {"rolled": 30.0, "deleted": 15.0, "drained": 15.0}  # seconds, by service; twice what is needed


@dataclass(frozen=True)
class Heard:
    """What a client got of a stream."""

    num_tokens: int
    finish_reason: str | None
    began: float  # its first token, time.time()
    ended: float  # its last


class Client:
    """A client that streams so many tokens from a service, beside the test."""

    def __init__(self, where: Workspace, service: str) -> None:
        self._where = where
        self._service = service
        self._rate = 0.0  # tokens a second
        self.begun = Event()  # the first token is there
        self.asked = 0

    def measure(self) -> None:
        """See how fast the tokens come."""
        heard = self._listen(64)
        self._rate = 64 / (heard.ended - heard.began)
        self.begun.clear()

    def stream(self, seconds: float) -> Heard:
        """Ask for as many tokens as take about so long, and listen to the end."""
        self.asked = int(self._rate * seconds)
        return self._listen(self.asked)

    def _listen(self, num_tokens: int) -> Heard:
        with (
            self._where.cluster.reach(self._where.name, self._service) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client,
        ):
            usage, reason, began = None, None, 0.0
            stream = client.completions.create(
                model=self._service,
                prompt="The octopus is",
                max_tokens=num_tokens,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            for chunk in stream:
                self.begun.set()
                began = began or time.time()
                usage = chunk.usage or usage
                reason = next((each.finish_reason for each in chunk.choices if each.finish_reason), reason)
        assert usage is not None
        return Heard(usage.completion_tokens, reason, began, time.time())


@dataclass(frozen=True)
class Story:
    """What became of the three services."""

    where: Workspace
    api: Api
    heard: dict[str, Heard]  # by service
    asked: dict[str, int]  # tokens
    told: dict[str, float]  # when the pod that was answering was told to end
    rollout: Json  # status.rollout of the service whose GPU was taken, while it rolled out
    drain: CompletedProcess[str]
    fewest_ready: int  # pods of the drained service


class Api:
    """The cluster's API server, asked directly: to start kubectl takes seconds on a busy machine."""

    def __init__(self, http: httpx.Client, namespace: str) -> None:
        self._http = http
        self._namespace = namespace

    def pods(self, service: str) -> list[Json]:
        """The engine's pods of a service."""
        path = f"/api/v1/namespaces/{self._namespace}/pods"
        answer = self._http.get(path, params={"labelSelector": f"serving.octavo.dev/service={service}"})
        pods: list[Json] = answer.raise_for_status().json()["items"]
        return pods

    def names(self, service: str) -> set[str]:
        """The names of these pods."""
        return {pod["metadata"]["name"] for pod in self.pods(service)}

    def delete(self, pod: str) -> None:
        """Delete a pod, as `kubectl delete pod` does."""
        self._http.delete(f"/api/v1/namespaces/{self._namespace}/pods/{pod}").raise_for_status()

    def ready(self, service: str) -> int:
        """How many pods of a service are ready."""
        path = f"/apis/apps/v1/namespaces/{self._namespace}/deployments/{service}"
        return int(self._http.get(path).raise_for_status().json()["status"].get("readyReplicas", 0))

    def rollout(self, service: str) -> Json:
        """status.rollout."""
        path = f"/apis/serving.octavo.dev/v1alpha1/namespaces/{self._namespace}/inferenceservices/{service}"
        found: Json = self._http.get(path).raise_for_status().json()["status"]["rollout"]
        return found


class Watch:
    """What is seen from outside while the pods end."""

    def __init__(self, where: Workspace, api: Api) -> None:
        self._where = where
        self._api = api
        self._over = Event()
        self._cordoned = True  # the drain does that first
        self.told: dict[str, float] = {}
        self.rollout: Json = {}
        self.fewest_ready = 2

    def run(self) -> None:
        """Look until `end`."""
        while not self._over.wait(0.1):
            self._look()

    def end(self) -> None:
        """Let `run` end."""
        self._over.set()

    def _look(self) -> None:
        for service in STREAMS:
            if service not in self.told and any("deletionTimestamp" in p["metadata"] for p in self._api.pods(service)):
                self.told[service] = time.time()
        if "drained" in self.told:
            if self._cordoned:  # from here on there is a node for the successors
                self._where.cluster.kubectl("uncordon", self._where.cluster.node)
                self._cordoned = False
            self.fewest_ready = min(self.fewest_ready, self._api.ready("drained"))
        rollout = self._api.rollout("rolled")
        if rollout["strategy"] == "replace":
            self.rollout = rollout


def starve(where: Workspace, api: Api) -> None:
    """Begin a rollout, and wait until its new pod has waited for a GPU for a while."""
    where.patch("rolled", {"engine": {"maxNumSeqs": 8}})

    def missing() -> str | None:
        conditions = [each for pod in api.pods("rolled") for each in pod["status"].get("conditions", ())]
        waits = [each for each in conditions if each["type"] == "PodScheduled" and each["status"] == "False"]
        since = min((datetime.fromisoformat(each["lastTransitionTime"]) for each in waits), default=None)
        seconds = 0.0 if since is None else (datetime.now(UTC) - since).total_seconds()
        return None if seconds >= STARVED_SECONDS else f"waits for {seconds:.0f} s"

    wait_until(missing, what="a pod that waits for a GPU", seconds=60, poll=0.5)


def drain(where: Workspace) -> CompletedProcess[str]:
    """Drain the node of the pods of one service."""
    chosen = "--pod-selector=serving.octavo.dev/service=drained"
    options = ("--ignore-daemonsets", "--delete-emptydir-data", "--timeout=180s")
    return where.cluster.kubectl("drain", where.cluster.node, chosen, *options)


@contextmanager
def unfolding(cluster: Cluster, engine: Image, name: str, streams: dict[str, float]) -> Iterator[Story]:
    """In a namespace of its own, three services that answer, each for about so long, while their pods end."""
    where = Workspace(cluster, name, engine)
    product.make_namespace(cluster, name)
    storage.pretend_gpus(cluster, 1)
    where.put_model("models")
    drains = {"rollout": {"drainSeconds": 240}}
    on_gpu = {"accelerator": {"type": "nvidia", "count": 1}, "engine": {"device": "cpu"}}
    where.apply_all({"rolled": {**on_gpu, **drains}, "deleted": drains, "drained": {"replicas": 2, **drains}})
    for service in STREAMS:
        where.await_ready(service)
    with (
        TemporaryDirectory() as folder,
        http_client(cluster.kubeconfig, Path(folder)) as http,
        ThreadPoolExecutor() as pool,
    ):
        api = Api(http, name)
        clients = {service: Client(where, service) for service in streams}
        wait([pool.submit(client.measure) for client in clients.values()])  # at once, as they will stream
        watch = Watch(where, api)
        watching = pool.submit(watch.run)
        try:
            starve(where, api)
            (answering,) = api.names("deleted")
            heard = {service: pool.submit(clients[service].stream, seconds) for service, seconds in streams.items()}
            for client in clients.values():
                assert client.begun.wait(60)
            api.delete(answering)
            draining = pool.submit(drain, where)
            wait([draining], timeout=PATIENCE_SECONDS)
            wait(heard.values(), timeout=PATIENCE_SECONDS)
        finally:
            watch.end()  # else the pool would wait for it for ever
        watching.result()
        cluster.kubectl("uncordon", cluster.node)
        yield Story(
            where=where,
            api=api,
            heard={service: listening.result(0) for service, listening in heard.items()},
            asked={service: client.asked for service, client in clients.items()},
            told=watch.told,
            rollout=watch.rollout,
            drain=draining.result(0),
            fewest_ready=watch.fewest_ready,
        )
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="module")
def story(operator_installed: Cluster, product_images: tuple[Image, Image]) -> Iterator[Story]:
    """The three services, with streams that are as short as they may be."""
    with unfolding(operator_installed, product_images[1], "e2e-rollouts", STREAMS) as told:
        yield told


def assert_finished(story: Story, service: str) -> None:
    """The client got all that it had asked for, and the pod had been told to end long before."""
    heard = story.heard[service]
    assert (heard.num_tokens, heard.finish_reason) == (story.asked[service], "length")
    if service != "drained":  # of its two pods the other one may have gone first
        assert heard.ended > story.told[service] + PRE_STOP_SECONDS, "the stream was too short to show anything"


@pytest.mark.parametrize("service", STREAMS)
def test_a_stream_in_flight_is_finished_by_a_pod_that_is_told_to_end(story: Story, service: str) -> None:
    assert_finished(story, service)


@pytest.mark.long
def test_a_stream_of_a_minute_survives_a_rollout_a_deletion_and_a_drain(
    operator_installed: Cluster, product_images: tuple[Image, Image]
) -> None:
    with unfolding(operator_installed, product_images[1], "e2e-rollouts-long", dict.fromkeys(STREAMS, 60.0)) as story:
        for service in STREAMS:
            assert_finished(story, service)


def test_a_rollout_whose_new_pod_waits_for_the_gpu_of_the_old_one_ends_that_first(story: Story) -> None:
    assert story.rollout == {"strategy": "replace", "message": "no GPUs are free for one more pod"}
    story.where.await_ready("rolled")

    def missing() -> str | None:
        status = (story.where.get("inferenceservice", "rolled") or {}).get("status", {})
        return None if status["rollout"]["strategy"] == "surge" else json.dumps(status["rollout"])

    wait_until(missing, what="the usual order again", seconds=30)


def test_a_drain_takes_one_pod_at_a_time_and_the_service_goes_on(story: Story) -> None:
    assert "would violate the pod's disruption budget" in story.drain.stderr
    assert story.fewest_ready == 1
    story.where.await_ready("drained")


def test_a_suspended_service_has_no_pod_and_one_that_is_resumed_serves(story: Story) -> None:
    story.where.await_ready("deleted")
    story.where.patch("deleted", {"replicas": 0})
    story.where.await_condition("deleted", lambda condition: condition["reason"] == "Suspended", "Suspended")
    wait_until(lambda: ", ".join(story.api.names("deleted")) or None, what="its pod's end", seconds=60, poll=0.5)
    story.where.kubectl("scale", "inferenceservice", "deleted", "--replicas=1")
    story.where.await_ready("deleted")
