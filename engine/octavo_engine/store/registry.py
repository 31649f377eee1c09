"""A client of registries: manifests and blobs by OCI's distribution protocol, which Ollama's registry speaks too.

Called by artifacts.py, which knows what the layers mean. Reference: OCI distribution specification 1.1; Docker's token
authentication. Passwords are those of `docker login` (~/.docker/config.json); a registry on this machine is spoken to
without TLS, as Docker does.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx

from octavo_engine.errors import ModelInvalid, ModelNotFound, SourceForbidden, SourceUnreachable
from octavo_engine.store.source import OLLAMA

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from octavo_engine.store.source import RegistrySource

    Manifest = dict[str, Any]

MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
_MANIFESTS: Final = (
    MANIFEST,
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_MAX_MANIFEST_BYTES: Final = 4 * 2**20  # OCI's own limit
_LOOPBACK: Final = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")
_CHALLENGE: Final = re.compile(r'(\w+)="([^"]*)"')
_UPLOAD_BYTES: Final = 2**20


class Registry:
    """One repository of a registry.

    Args:
        source: what is fetched or pushed.
        client: of HTTP.
        docker_config: `docker login`'s file, whether it is there or not.
    """

    def __init__(self, source: RegistrySource, client: httpx.AsyncClient, docker_config: Path | None = None) -> None:
        self._source = source
        self._client = client
        scheme = "http" if _LOOPBACK.fullmatch(source.host) else "https"
        self._base = f"{scheme}://{source.host}/v2/{source.repository}"
        self._password = _password(source.host, docker_config or Path("~/.docker/config.json").expanduser())
        self.headers: dict[str, str] = {"Authorization": self._password} if self._password else {}

    async def manifest(self) -> Manifest:
        """Return the manifest; of several platforms' the one for Linux on x86-64, or the first.

        Raises:
            ModelNotFound, SourceForbidden, SourceUnreachable, ModelInvalid: the registry does not give it.
        """
        manifest = await self._manifest(self._source.reference)
        if "manifests" not in manifest:
            return manifest
        entries = manifest["manifests"]
        mine = [
            entry for entry in entries if entry.get("platform", {}).get("architecture") in {"amd64", "unknown", None}
        ]
        if not entries:
            raise ModelInvalid(f"{self._source.text}: its index names no manifest")
        return await self._manifest((mine or entries)[0]["digest"])

    def blob_url(self, digest: str) -> str:
        """Return the address of a blob."""
        return f"{self._base}/blobs/{digest}"

    async def blob(self, digest: str) -> bytes:
        """Return a small blob, checked."""
        content = (await self._get(self.blob_url(digest))).content
        if f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
            raise ModelInvalid(f"{self._source.text}: what arrived as {digest} is something else")
        return content

    async def has_blob(self, digest: str) -> bool:
        """Whether the registry has it."""
        response = await self._request("HEAD", self.blob_url(digest), action="pull,push")
        return response.status_code == 200

    async def upload(self, digest: str, content: AsyncIterator[bytes], num_bytes: int) -> None:
        """Upload a blob in one piece (specification: "Pushing a blob monolithically", POST then PUT)."""
        begun = await self._request("POST", f"{self._base}/blobs/uploads/", action="pull,push")
        self._refuse_unless(begun, 202)
        place = httpx.URL(begun.headers["Location"])
        place = place if place.is_absolute_url else httpx.URL(self._base).join(place)
        headers = {"Content-Length": str(num_bytes), "Content-Type": "application/octet-stream"}
        done = await self._client.put(
            place.copy_merge_params({"digest": digest}), headers=self.headers | headers, content=content
        )
        self._refuse_unless(done, 201)

    async def put_manifest(self, manifest: Manifest) -> None:
        """Upload the manifest, by which the registry shows the model."""
        url = f"{self._base}/manifests/{self._source.reference}"
        body = json.dumps(manifest).encode()
        response = await self._request(
            "PUT", url, action="pull,push", headers={"Content-Type": manifest["mediaType"]}, content=body
        )
        self._refuse_unless(response, 201)

    async def _manifest(self, reference: str) -> Manifest:
        response = await self._get(f"{self._base}/manifests/{reference}", {"Accept": ", ".join(_MANIFESTS)})
        body = response.content
        if len(body) > _MAX_MANIFEST_BYTES:
            raise ModelInvalid(f"{self._source.text}: its manifest has {len(body)} bytes")
        if reference.startswith("sha256:") and f"sha256:{hashlib.sha256(body).hexdigest()}" != reference:
            raise ModelInvalid(f"{self._source.text}: the manifest that arrived is not {reference}")
        with suppress(ValueError):
            manifest = json.loads(body)
            if isinstance(manifest, dict):
                return manifest
        raise ModelInvalid(f"{self._source.text}: its manifest is not a JSON object")

    async def _get(self, url: str, headers: Mapping[str, str] | None = None) -> httpx.Response:
        response = await self._request("GET", url, headers=headers)
        self._refuse_unless(response, 200)
        return response

    async def _request(
        self,
        method: str,
        url: str,
        *,
        action: str = "pull",
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> httpx.Response:
        """Send a request; where the registry wants a token first, get one and send it again."""
        for _ in range(2):
            try:
                response = await self._client.request(
                    method, url, headers=self.headers | dict(headers or {}), content=content
                )
            except httpx.HTTPError as error:
                cause = str(error) or type(error).__name__
                raise SourceUnreachable(f"{self._source.text}: {self._source.host} does not answer: {cause}") from error
            challenge = response.headers.get("WWW-Authenticate", "")
            if response.status_code != 401 or not challenge.lower().startswith("bearer"):
                break
            await self._authenticate(dict(_CHALLENGE.findall(challenge)), action)
        return response

    async def _authenticate(self, challenge: Mapping[str, str], action: str) -> None:
        """Get a token, as the challenge says (Docker's token authentication)."""
        if "realm" not in challenge:
            raise SourceForbidden(f"{self._source.text}: the registry does not say where it gives tokens")
        scope = challenge.get("scope") or f"repository:{self._source.repository}:{action}"
        asked = {"service": challenge.get("service", ""), "scope": scope}
        # The password goes to no plain-HTTP realm but this machine's own.
        realm = httpx.URL(challenge["realm"])
        is_safe = realm.scheme == "https" or _LOOPBACK.fullmatch(realm.netloc.decode()) is not None
        password = {"Authorization": self._password} if self._password and is_safe else {}
        try:
            response = await self._client.get(realm, params=asked, headers=password)
            told = response.json() if response.status_code == 200 else {}
        except (httpx.HTTPError, ValueError) as error:
            raise SourceUnreachable(f"{self._source.text}: {realm.host} gives no token: {error}") from error
        token = told.get("token") or told.get("access_token")
        if not token:
            raise SourceForbidden(self._way_in(f"{realm.host} answers {response.status_code} and gives no token"))
        self.headers = {"Authorization": f"Bearer {token}"}

    def _refuse_unless(self, response: httpx.Response, status: int) -> None:
        if response.status_code == status:
            return
        told = f"the registry answers {response.status_code}"
        with suppress(ValueError, LookupError, TypeError):
            told += f" ({str(response.json()['errors'][0]['message'])[:200]})"
        match response.status_code:
            case 401 | 403:
                raise SourceForbidden(self._way_in(told))
            case 404:
                raise ModelNotFound(f"{self._source.text} is not there: {told}")
            case _:
                raise SourceUnreachable(f"{self._source.text}: {told}")

    def _way_in(self, told: str) -> str:
        if self._source.host == OLLAMA:
            way_out = "check the name; private models and pushes there need a key that only Ollama's own client has"
        elif self._password:
            way_out = f"the password that `docker login {self._source.host}` has stored does not give access"
        else:
            way_out = f"check the name; if it is private, `docker login {self._source.host}` first"
        return f"{self._source.text}: {told}; {way_out}"


async def chunks(path: Path) -> AsyncIterator[bytes]:
    """Yield the bytes of a file to upload."""
    with path.open("rb") as file:
        while data := file.read(_UPLOAD_BYTES):
            yield data


def _password(host: str, docker_config: Path) -> str | None:
    """The Authorization header for a host that `docker login` knows the password of."""
    with suppress(OSError, ValueError, LookupError, TypeError, binascii.Error):
        encoded: str = json.loads(docker_config.read_text(encoding="utf-8"))["auths"][host]["auth"]
        base64.b64decode(encoded, validate=True)
        return f"Basic {encoded}"
    return None
