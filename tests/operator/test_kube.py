"""The client against an HTTP server on loopback that records what it is sent and answers from a script."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio.client import Configuration

from octavo_operator.errors import ApiError, ApiUnavailable, Conflict, Forbidden, NotFound, NotLeading, Refused
from octavo_operator.kube import Kube, load_configuration, proxy_for
from octavo_operator.resources import AUTOSCALER, DEPLOYMENT, INFERENCE_SERVICE, LEASE, POD, SERVICE, Resource

Json = dict[str, Any]


@dataclass
class Server:
    """Answers each request with the next of `answers`."""

    answers: list[web.Response] = field(default_factory=list)
    requests: list[tuple[str, str, dict[str, str], str, Any]] = field(default_factory=list)
    authorization: list[str | None] = field(default_factory=list)
    url: str = ""
    silent: bool = False

    async def answer(self, request: web.Request) -> web.Response:
        """Record and answer one request."""
        body = await request.text()
        content_type = request.headers.get("Content-Type", "")
        self.requests.append(
            (request.method, request.path, dict(request.query), content_type, json.loads(body) if body else None)
        )
        self.authorization.append(request.headers.get("Authorization"))
        if self.silent:
            await asyncio.Event().wait()
        return self.answers.pop(0)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.answer)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    server.url = f"http://{host}:{port}"
    yield server
    await runner.cleanup()


@pytest.fixture
async def kube(server: Server) -> AsyncIterator[Kube]:
    configuration = Configuration(host=server.url, api_key={"BearerToken": "Bearer secret"})
    async with Kube(configuration) as kube:
        yield kube


def ok(body: Json) -> web.Response:
    return web.json_response(body)


def failure(code: int, message: str = "no", **more: Any) -> web.Response:
    return web.json_response({"kind": "Status", "code": code, "message": message, **more}, status=code)


MANIFEST: Json = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "llama", "namespace": "ns"}}


@pytest.mark.parametrize(
    ("resource", "arguments", "path"),
    [
        (POD, (), "/api/v1/pods"),
        (POD, ("ns",), "/api/v1/namespaces/ns/pods"),
        (DEPLOYMENT, ("ns", "a"), "/apis/apps/v1/namespaces/ns/deployments/a"),
        (
            INFERENCE_SERVICE,
            ("ns", "a", "status"),
            "/apis/serving.octavo.dev/v1alpha1/namespaces/ns/inferenceservices/a/status",
        ),
    ],
)
def test_every_object_has_its_path(resource: Resource, arguments: tuple[str, ...], path: str) -> None:
    assert resource.path(*arguments) == path


async def test_an_object_is_read_with_our_token(server: Server, kube: Kube) -> None:
    server.answers = [ok(MANIFEST)]
    assert await kube.get(DEPLOYMENT, "ns", "llama") == MANIFEST
    assert server.requests[0][:2] == ("GET", "/apis/apps/v1/namespaces/ns/deployments/llama")
    assert server.authorization == ["Bearer secret"]


async def test_new_credentials_are_used_at_once(server: Server, kube: Kube) -> None:
    server.answers = [ok(MANIFEST)]
    kube.renew(Configuration(host=server.url, api_key={"BearerToken": "Bearer new"}))
    await kube.get(DEPLOYMENT, "ns", "llama")
    assert server.authorization == ["Bearer new"]


async def test_apply_is_server_side_apply_in_our_name(server: Server, kube: Kube) -> None:
    server.answers = [ok(MANIFEST), ok(MANIFEST), ok(MANIFEST)]
    await kube.apply(MANIFEST)
    await kube.apply(MANIFEST, manager="other", force=False)
    status = {"apiVersion": "serving.octavo.dev/v1alpha1", "kind": "InferenceService", "metadata": MANIFEST["metadata"]}
    await kube.apply_status(status)
    path = "/apis/apps/v1/namespaces/ns/deployments/llama"
    strict = {"fieldValidation": "Strict"}
    assert server.requests == [
        (
            "PATCH",
            path,
            {"fieldManager": "octavo", "force": "true", **strict},
            "application/apply-patch+yaml",
            MANIFEST,
        ),
        (
            "PATCH",
            path,
            {"fieldManager": "other", "force": "false", **strict},
            "application/apply-patch+yaml",
            MANIFEST,
        ),
        (
            "PATCH",
            INFERENCE_SERVICE.path("ns", "llama", "status"),
            {"fieldManager": "octavo", "force": "true", **strict},
            "application/apply-patch+yaml",
            status,
        ),
    ]


async def test_the_time_is_the_servers_whatever_ours_says(server: Server, kube: Kube) -> None:
    assert abs(kube.now() - datetime.now(UTC)) < timedelta(seconds=60)
    server.answers = [web.json_response(MANIFEST, headers={"Date": "Wed, 21 Oct 2015 07:28:00 GMT"})]
    await kube.get(DEPLOYMENT, "ns", "llama")
    assert timedelta(0) <= kube.now() - datetime(2015, 10, 21, 7, 28, tzinfo=UTC) < timedelta(seconds=60)


async def test_after_write_until_nothing_is_written_but_a_lease_and_all_is_read(server: Server, kube: Kube) -> None:
    kube.write_until = time.monotonic()
    service = Resource("v1", "Service", "services")
    for write in (
        kube.apply(MANIFEST),
        kube.apply_status(MANIFEST),
        kube.merge(service, "ns", "a", {}),
        kube.create(service, "ns", {}),
        kube.delete(service, "ns", "a", uid="u"),
    ):
        with pytest.raises(NotLeading, match="another operator may lead by now"):
            await write
    assert server.requests == []
    lease = {"metadata": {"namespace": "ns", "name": "octavo"}}
    read = {"metadata": {**lease["metadata"], "resourceVersion": "1"}}
    server.answers = [ok(MANIFEST), ok(lease), ok(read)]
    await kube.get(DEPLOYMENT, "ns", "llama")
    await kube.write_lease(lease)
    await kube.write_lease(read)
    assert [request[:2] for request in server.requests[1:]] == [
        ("POST", LEASE.path("ns")),
        ("PUT", LEASE.path("ns", "octavo")),
    ]


async def test_a_write_that_is_not_answered_by_write_until_is_broken_off(server: Server, kube: Kube) -> None:
    server.silent = True
    kube.write_until = time.monotonic() + 0.2
    with pytest.raises(NotLeading):
        await kube.apply(MANIFEST)
    assert len(server.requests) == 1


async def test_merge_and_create_send_what_they_are_given(server: Server, kube: Kube) -> None:
    server.answers = [ok(MANIFEST), ok(MANIFEST)]
    await kube.merge(DEPLOYMENT, "ns", "llama", {"spec": {}})
    await kube.create(AUTOSCALER, "ns", {"a": 1})
    query = {"fieldManager": "octavo", "fieldValidation": "Strict"}
    assert server.requests == [
        ("PATCH", DEPLOYMENT.path("ns", "llama"), query, "application/merge-patch+json", {"spec": {}}),
        ("POST", AUTOSCALER.path("ns"), {}, "application/json", {"a": 1}),
    ]


async def test_only_the_very_object_is_deleted_and_one_that_is_gone_is_no_error(server: Server, kube: Kube) -> None:
    server.answers = [ok({}), failure(404)]
    await kube.delete(SERVICE, "ns", "llama", uid="u")
    await kube.delete(SERVICE, "ns", "llama", uid="u")
    method, path, _, _, options = server.requests[0]
    assert (method, path) == ("DELETE", "/api/v1/namespaces/ns/services/llama")
    assert options == {"preconditions": {"uid": "u"}, "propagationPolicy": "Background"}


async def test_a_list_is_read_page_by_page(server: Server, kube: Kube) -> None:
    pages: list[Json] = [
        {"metadata": {"resourceVersion": "7", "continue": "more"}, "items": [1]},
        {"metadata": {"resourceVersion": "7"}, "items": [2]},
    ]
    server.answers = [ok(page) for page in pages]
    assert [page async for page in kube.pages(POD, None, "a=b")] == pages
    assert [request[2] for request in server.requests] == [
        {"labelSelector": "a=b", "limit": "500"},
        {"labelSelector": "a=b", "limit": "500", "continue": "more"},
    ]


def lines(*events: Json) -> web.Response:
    return web.Response(text="".join(f"{json.dumps(event)}\n" for event in events), content_type="application/json")


async def test_a_watch_yields_what_the_server_sends_until_it_ends_it(server: Server, kube: Kube) -> None:
    server.answers = [
        lines({"type": "ADDED", "object": {"a": 1}}, {"type": "BOOKMARK", "object": {"b": "x" * 300_000}})
    ]
    events = [event async for event in kube.watch(POD, "ns", "a=b", "7")]
    assert [event for event, _ in events] == ["ADDED", "BOOKMARK"]
    assert events[0][1] == {"a": 1}
    method, path, query, _, _ = server.requests[0]
    assert (method, path) == ("GET", "/api/v1/namespaces/ns/pods")
    assert query == {
        "watch": "true",
        "allowWatchBookmarks": "true",
        "labelSelector": "a=b",
        "resourceVersion": "7",
        "timeoutSeconds": "30",
    }


@pytest.mark.parametrize("by_status", [True, False])
async def test_a_watch_whose_version_is_too_old_says_410(server: Server, kube: Kube, *, by_status: bool) -> None:
    gone = {"kind": "Status", "code": 410, "message": "too old resource version"}
    server.answers = [
        failure(410, "too old resource version") if by_status else lines({"type": "ERROR", "object": gone})
    ]
    with pytest.raises(ApiError, match="too old resource version") as error:
        _ = [event async for event in kube.watch(POD, None, "", "7")]
    assert error.value.status == 410


async def test_a_watch_that_breaks_off_in_a_line_is_retryable(server: Server, kube: Kube) -> None:
    server.answers = [web.Response(text='{"type": "ADDED", "obj', content_type="application/json")]
    with pytest.raises(ApiUnavailable, match="the watch of pods broke"):
        _ = [event async for event in kube.watch(POD, None, "", "7")]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (400, Refused),
        (401, Refused),
        (403, Forbidden),
        (404, NotFound),
        (409, Conflict),
        (410, Refused),
        (422, Refused),
        (429, ApiUnavailable),
        (500, ApiUnavailable),
        (503, ApiUnavailable),
    ],
)
async def test_every_status_code_is_the_error_of_its_retry(
    server: Server, kube: Kube, code: int, kind: type[ApiError]
) -> None:
    server.answers = [failure(code, "what the server says")]
    with pytest.raises(ApiError, match="what the server says") as error:
        await kube.get(POD, "ns", "a")
    assert (type(error.value), error.value.status, error.value.retry_after) == (kind, code, None)


async def test_the_server_may_ask_for_a_pause(server: Server, kube: Kube) -> None:
    server.answers = [
        web.json_response({"message": "slow"}, status=429, headers={"Retry-After": "7"}),
        failure(429, details={"retryAfterSeconds": 3}),
        web.Response(text="<html>bad gateway</html>", status=502, headers={"Retry-After": "Wed, 21 Oct 2015"}),
    ]
    pauses = []
    for _ in range(3):
        with pytest.raises(ApiUnavailable) as error:
            await kube.get(POD, "ns", "a")
        pauses.append(error.value.retry_after)
    assert pauses == [7.0, 3.0, None]
    assert str(error.value) == "<html>bad gateway</html>"


async def test_a_server_that_is_not_there_is_retryable_and_named(unused_tcp_port: int) -> None:
    async with Kube(Configuration(host=f"http://127.0.0.1:{unused_tcp_port}")) as kube:
        with pytest.raises(ApiUnavailable, match="GET /api/v1/namespaces/ns/pods/a: ") as error:
            await kube.get(POD, "ns", "a")
    assert error.value.status is None


async def test_an_answer_that_is_no_json_is_retryable(server: Server, kube: Kube) -> None:
    server.answers = [web.Response(text="hello", content_type="text/plain")]
    with pytest.raises(ApiUnavailable):
        await kube.get(POD, "ns", "a")


@pytest.mark.parametrize(
    ("answer", "served"),
    [
        (ok({"resources": [{"name": "inferenceservices"}, {"name": "inferenceservices/status"}]}), True),
        (ok({"resources": []}), False),
        (failure(404), False),
    ],
)
async def test_the_server_is_asked_whether_it_knows_the_kind(
    server: Server, kube: Kube, answer: web.Response, *, served: bool
) -> None:
    server.answers = [answer]
    assert await kube.is_served(INFERENCE_SERVICE) is served
    assert server.requests[0][1] == "/apis/serving.octavo.dev/v1alpha1"


async def test_outside_a_pod_and_without_a_kubeconfig_there_is_no_cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with pytest.raises(ApiUnavailable, match="not in a pod, and KUBECONFIG gives none"):
        await load_configuration()


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("https://api.example:6443", "http://proxy.example:3128"),
        ("http://127.0.0.1:8001", None),
        ("https://10.96.0.1:443", None),
        ("https://kubernetes.default.svc", None),
    ],
)
def test_the_environment_names_the_proxy_to_the_api_server(
    url: str, proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "10.96.0.1,.svc")
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    assert proxy_for(url) == proxy
