"""The one client of the API server: JSON in, JSON out, errors of errors.py.

Used by cache.py (list, watch), reconcile.py (get, apply, delete), events.py (create) and election.py (leases). Login,
TLS and proxies come from the `kubernetes` distribution's asyncio half; its typed models are left alone, because they
would triple the operator's memory and know nothing that we need. Knows nothing of what is in the objects.

Writes are server-side apply (https://kubernetes.io/docs/reference/using-api/server-side-apply/): the operator owns the
fields it sends, and no others. All writes pass `_write`: together they are kept under a rate, so that no fault of ours
floods the server, and none is sent after `write_until`, so that an operator that has lost its lease writes nothing.
"""

import asyncio
import contextlib
import json
import math
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final, Self
from urllib.parse import urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from kubernetes.aio import config as kubernetes_config
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.rest import RESTClientObject

from octavo_operator import metrics, names
from octavo_operator.errors import ApiError, ApiUnavailable, Conflict, Forbidden, NotFound, NotLeading, Refused
from octavo_operator.queue import TokenBucket
from octavo_operator.resources import CHILDREN, EVENT, INFERENCE_SERVICE, LEASE, Json, Resource

REQUEST_SECONDS: Final = 15.0  # a request that is no watch
WATCH_SECONDS: Final = 30  # the server ends a watch after so long: what keeps silent longer is dead ...
WATCH_GRACE_SECONDS: Final = 10.0  # ... and is cut off by us so much later
READ_BUFFER: Final = 2**21  # bytes; an event of a watch is one line, as long as its object
LIST_PAGE: Final = 500  # objects in one answer to a list
WRITES_PER_SECOND: Final = 100.0
WRITE_BURST: Final = 200.0

_APPLY_PATCH: Final = "application/apply-patch+yaml"
_MERGE_PATCH: Final = "application/merge-patch+json"
_JSON: Final = "application/json"


async def load_configuration() -> Configuration:
    """Find the API server and our credentials: the pod's service account if there is one, else KUBECONFIG.

    Raises:
        ApiUnavailable: There is neither.
    """
    configuration = Configuration()
    try:
        if os.environ.get("KUBERNETES_SERVICE_HOST"):
            kubernetes_config.load_incluster_config(configuration)  # type: ignore[no-untyped-call] # not typed there
        else:
            await kubernetes_config.load_kube_config(  # type: ignore[no-untyped-call] # not typed there
                client_configuration=configuration, persist_config=False
            )
    except kubernetes_config.ConfigException as error:
        raise ApiUnavailable(f"no cluster to work in: not in a pod, and KUBECONFIG gives none: {error}") from error
    if configuration.proxy is None:
        configuration.proxy = proxy_for(configuration.host)
    return configuration


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for an address: HTTPS_PROXY and the like, but for what NO_PROXY names."""
    parts = urlsplit(url)
    if proxy_bypass(parts.netloc):
        return None
    return getproxies().get(parts.scheme)


class _Body(aiohttp.BytesPayload):
    """A body that is not sent after a moment of time.monotonic(): and so, as the headers wait for it, nothing is."""

    def __init__(self, body: Json, content_type: str, until: float) -> None:
        super().__init__(json.dumps(body).encode(), content_type=content_type)
        self._until = until

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        """Write it if there is time; called when the connection is there, right before the bytes go out."""
        if time.monotonic() >= self._until:
            raise NotLeading("too late")
        await super().write_with_length(writer, content_length)


class Kube:
    """A connection to the API server. An asynchronous context manager; safe for any number of tasks of one loop."""

    def __init__(self, configuration: Configuration) -> None:
        self._configuration = configuration
        context = RESTClientObject(configuration).ssl_context
        # Without trust_env: else every request would read ~/.netrc and look for a proxy, each in a thread, which is a
        # tenth of the operator's work. Without a limit: every watch keeps a connection.
        connector = aiohttp.TCPConnector(ssl=context, limit=0)
        self._session = aiohttp.ClientSession(connector=connector, read_bufsize=READ_BUFFER, trust_env=False)
        self._bucket = TokenBucket(rate=WRITES_PER_SECOND, burst=WRITE_BURST, now=time.monotonic())
        self._heard = ("", 0.0)  # the Date of the last answer, and time.monotonic() at it
        self.write_until = math.inf  # seconds of time.monotonic(); election.py moves it

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    def renew(self, configuration: Configuration) -> None:
        """Take over new credentials for the same API server."""
        self._configuration = configuration

    def now(self) -> datetime:
        """The time on the API server's clock, near which the scheduler's is; the clock of our own node may be wrong."""
        date, at = self._heard
        try:
            return parsedate_to_datetime(date) + timedelta(seconds=time.monotonic() - at)
        except ValueError:  # there was no answer yet
            return datetime.now(UTC)

    async def get(self, resource: Resource, namespace: str, name: str) -> Json:
        """Read one object as it is now, not from a cache.

        Raises:
            NotFound: There is no such object.
        """
        return await self._request("GET", resource.path(namespace, name))

    async def is_served(self, resource: Resource) -> bool:
        """Whether the API server knows the kind."""
        try:
            group = await self._request("GET", Resource(resource.api_version, resource.kind, "").path())
        except NotFound:
            return False
        return any(served["name"] == resource.plural for served in group["resources"])

    async def pages(self, resource: Resource, namespace: str | None, selector: str) -> AsyncIterator[Json]:
        """List the objects that the label selector matches, some hundred at a time, all as of one moment."""
        query = {"labelSelector": selector, "limit": str(LIST_PAGE)}
        while True:
            page = await self._request("GET", resource.path(namespace), query=query)
            yield page
            token = page["metadata"].get("continue")
            if not token:
                return
            query["continue"] = token

    async def events_of_pod(self, namespace: str, pod: str) -> list[Json]:
        """What is told of a pod: events.k8s.io/v1 Events, in no order."""
        query = {"fieldSelector": f"regarding.kind=Pod,regarding.name={pod}", "limit": str(LIST_PAGE)}
        found: list[Json] = (await self._request("GET", EVENT.path(namespace), query=query))["items"]
        return found

    async def watch(
        self, resource: Resource, namespace: str | None, selector: str, resource_version: str
    ) -> AsyncGenerator[tuple[str, Json], None]:
        """Yield (type, object) for what changes after `resource_version`, until the server ends the watch.

        Bookmarks are among them: they carry no more than a newer version to go on from.

        Raises:
            ApiError: The watch broke; with status 410 the version is too old, and only a list helps.
        """
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "labelSelector": selector,
            "resourceVersion": resource_version,
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        seconds = WATCH_SECONDS + WATCH_GRACE_SECONDS
        response = await self._send("GET", resource.path(namespace), query=query, seconds=seconds)
        async with response:
            try:
                await _check(response)
                async for line in response.content:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        raise _error(event["object"].get("code", 500), event["object"])
                    yield event["type"], event["object"]
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                raise ApiUnavailable(
                    f"the watch of {resource.plural} broke: {str(error) or type(error).__name__}"
                ) from error

    async def apply(self, manifest: Json, *, manager: str = names.FIELD_MANAGER, force: bool = True) -> Json:
        """Server-side apply an object; return what is stored now.

        A `metadata.uid` in the manifest makes sure that no other object than that one is changed.

        Raises:
            Conflict: The uid is another one now, or (without `force`) another manager owns a field at another value.
        """
        return await self._apply(manifest, manager=manager, force=force)

    async def apply_status(self, manifest: Json) -> Json:
        """Server-side apply the status of an object."""
        return await self._apply(manifest, manager=names.FIELD_MANAGER, force=True, subresource="status")

    async def merge(self, resource: Resource, namespace: str, name: str, change: Json) -> Json:
        """Merge a change into an object: maps member by member, lists as a whole (RFC 7386); return what is stored."""
        query = {"fieldManager": names.FIELD_MANAGER, "fieldValidation": "Strict"}
        path = resource.path(namespace, name)
        return await self._write("merge", resource, "PATCH", path, query=query, body=change, content_type=_MERGE_PATCH)

    async def delete(self, resource: Resource, namespace: str, name: str, *, uid: str) -> None:
        """Delete the object with this uid; nothing happens if it is gone already.

        Raises:
            Conflict: The name belongs to another object now.
        """
        options = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        with contextlib.suppress(NotFound):
            await self._write("delete", resource, "DELETE", resource.path(namespace, name), body=options)

    async def create(self, resource: Resource, namespace: str, manifest: Json) -> Json:
        """Create an object."""
        return await self._write("create", resource, "POST", resource.path(namespace), body=manifest)

    async def write_lease(self, lease: Json) -> Json:
        """Create a Lease, or replace the version of it that is named; neither rate nor `write_until` holds it up.

        Raises:
            Conflict: Somebody else was first.
        """
        namespace, name = lease["metadata"]["namespace"], lease["metadata"]["name"]
        if "resourceVersion" in lease["metadata"]:
            return await self._request("PUT", LEASE.path(namespace, name), body=lease)
        return await self._request("POST", LEASE.path(namespace), body=lease)

    async def _apply(self, manifest: Json, *, manager: str, force: bool, subresource: str | None = None) -> Json:
        resource = CHILDREN.get(manifest["kind"], INFERENCE_SERVICE)
        path = resource.path(manifest["metadata"]["namespace"], manifest["metadata"]["name"], subresource)
        query = {"fieldManager": manager, "force": "true" if force else "false", "fieldValidation": "Strict"}
        verb = "apply-status" if subresource else "apply"
        return await self._write(verb, resource, "PATCH", path, query=query, body=manifest, content_type=_APPLY_PATCH)

    async def _write(
        self,
        verb: str,
        resource: Resource,
        method: str,
        path: str,
        *,
        body: Json,
        query: dict[str, str] | None = None,
        content_type: str = _JSON,
    ) -> Json:
        """Wait until one more write keeps the rate, and send it.

        Raises:
            NotLeading: `write_until` is over.
        """
        await asyncio.sleep(self._bucket.reserve(time.monotonic()))
        metrics.API_WRITES.labels(verb=verb, kind=resource.kind).inc()
        return await self._request(
            method, path, query=query, body=body, content_type=content_type, until=self.write_until
        )

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: Json | None = None,
        content_type: str = _JSON,
        until: float = math.inf,
    ) -> Json:
        """Send a request that is no watch and return the object that answers it; after `until` nothing is sent."""
        response = await self._send(
            method, path, query=query or {}, body=body, content_type=content_type, seconds=REQUEST_SECONDS, until=until
        )
        async with response:
            try:
                await _check(response)
                answer: Json = await response.json()
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                raise ApiUnavailable(f"{method} {path}: {str(error) or type(error).__name__}") from error
            return answer

    async def _send(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str],
        seconds: float,
        body: Json | None = None,
        content_type: str = _JSON,
        until: float = math.inf,
    ) -> aiohttp.ClientResponse:
        url = f"{self._configuration.host}{path}?{urlencode(query)}"
        headers = {"User-Agent": "octavo-operator", "Accept": _JSON}
        try:
            # The pod's token is rotated by the kubelet; this reads it anew every minute.
            token = await self._configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
            if token:
                headers["Authorization"] = token
            # Also what is on its way ends in time. aiohttp takes a total of 0 for none at all.
            total = max(min(seconds, until - time.monotonic()), 0.001)
            response = await self._session.request(
                method,
                url,
                data=None if body is None else _Body(body, content_type, until),
                headers=headers,
                proxy=self._configuration.proxy,
                proxy_headers=self._configuration.proxy_headers,
                server_hostname=self._configuration.tls_server_name,
                timeout=aiohttp.ClientTimeout(total=total),
            )
        except (aiohttp.ClientError, TimeoutError, OSError, kubernetes_config.ConfigException) as error:
            if time.monotonic() >= until:
                raise NotLeading(f"{method} {path}: given up, because another operator may lead by now") from error
            metrics.API_REQUESTS.labels(method=method, code=metrics.NO_ANSWER).inc()
            raise ApiUnavailable(f"{method} {path}: {str(error) or type(error).__name__}") from error
        metrics.API_REQUESTS.labels(method=method, code=response.status).inc()
        self._heard = response.headers.get("Date", ""), time.monotonic()
        return response


async def _check(response: aiohttp.ClientResponse) -> None:
    """Raise what an answer of 400 or more means."""
    if response.status < 400:
        return
    text = await response.text()
    try:
        status = json.loads(text)
    except ValueError:
        status = {"message": text[:256]}
    raise _error(response.status, status, response.headers.get("Retry-After"))


def _error(code: int, status: Json, retry_after: str | None = None) -> ApiError:
    """Find the error of our tree for a Status object (k8s.io/apimachinery/pkg/apis/meta/v1)."""
    message = str(status.get("message") or f"HTTP {code}")
    details = status.get("details") or {}
    classes: dict[int, type[ApiError]] = {403: Forbidden, 404: NotFound, 409: Conflict, 429: ApiUnavailable}
    error = classes.get(code, ApiUnavailable if code >= 500 else Refused)
    if any(cause.get("field") == "metadata.uid" for cause in details.get("causes") or ()):
        error = Conflict  # 422 by its code: another object has the name now
    elif code == 500 and message.startswith("failed to create typed patch object"):
        error = Refused  # how server-side apply refuses a field that this server does not know
    seconds = str(retry_after or details.get("retryAfterSeconds") or "")
    return error(message, status=code, retry_after=float(seconds) if seconds.isdecimal() else None)
