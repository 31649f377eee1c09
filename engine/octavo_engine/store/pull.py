"""Fetch a model file over HTTP: resumed after a break, checked, and in its place only when it is whole.

While it is fetched, FILE.gguf.partial holds the bytes so far and FILE.gguf.etag the server's name for this version of
the file; the latter is also the lock that keeps two pulls of one file (replicas on a shared volume) from mixing. Called
by the command line and by the server; knows nothing about where the progress is shown.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import re
import shutil
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import httpx

from octavo_engine.errors import ModelInvalid, ModelNotFound, SourceForbidden, SourceUnreachable, StorageFull
from octavo_engine.store.source import HUB, Source

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all where the server tells

_MAGIC: Final = b"GGUF"
TIMEOUT: Final = httpx.Timeout(10.0, read=60.0)
_RETRY_DELAYS: Final = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further attempt that brings no byte
_RETRIED_STATUSES: Final = frozenset({408, 429, 500, 502, 503, 504})
_LOCK_POLL_SECONDS: Final = 0.5
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Hub:
    """How to reach the Hugging Face hub."""

    endpoint: str = HUB
    token: str | None = None  # for gated and private repositories; sent to the hub only


class Broken(Exception):
    """The transfer ended early; what has arrived is kept and the next attempt goes on from there."""


async def pull(
    source: Source,
    target: Path,
    *,
    hub: Hub,
    sha256: str | None = None,
    on_progress: Progress = lambda _done, _total: None,
    retry_delays: Sequence[float] = _RETRY_DELAYS,
) -> None:
    """Fetch `source` to `target`; nothing is fetched when `target` is there already.

    The file is checked against `sha256`, or else against the digest that the hub sends (X-Linked-ETag, or an ETag that
    is a SHA-256: huggingface_hub's convention). Cancelling keeps what has arrived for the next time.

    Raises:
        ModelNotFound: the server has no such file.
        ModelInvalid: what the server sent is not a GGUF file, or not the file it announced.
        SourceForbidden: the server wants a token, or does not accept the one it got.
        SourceUnreachable: the server did not answer, or broke off too often.
        StorageFull: the file does not fit where it should go.
    """
    await asyncio.to_thread(target.parent.mkdir, parents=True, exist_ok=True)
    async with _locked(target.with_name(f"{target.name}.etag")) as etag_file:
        if await asyncio.to_thread(target.is_file):  # the pull that held the lock has brought it
            etag_file.unlink()
            return
        transfer = _Transfer(source, target, hub, etag_file, on_progress)
        async with httpx.AsyncClient(timeout=TIMEOUT, follow_redirects=True) as client:
            await transfer.run(client, retry_delays)
        await transfer.check(sha256)
        await asyncio.to_thread(transfer.partial.replace, target)
        etag_file.unlink()


class _Transfer:
    """One file on its way."""

    def __init__(self, source: Source, target: Path, hub: Hub, etag_file: Path, on_progress: Progress) -> None:
        self._source = source
        self._url = source.url(hub.endpoint)
        self._name = source.text
        self._headers = headers_for(source, hub)
        self._etag_file = etag_file
        self._on_progress = on_progress
        self._total: int | None = None
        self._sha256: str | None = None  # as the server tells it
        self.partial = target.with_name(f"{target.name}.partial")

    async def run(self, client: httpx.AsyncClient, retry_delays: Sequence[float]) -> None:
        """Fetch until the partial file is whole; give up after so many attempts in a row without a byte."""
        num_failures = 0
        while True:
            before = self._num_bytes()
            try:
                return await self._attempt(client)
            except (httpx.TransportError, Broken) as error:
                num_failures = 0 if self._num_bytes() > before else num_failures + 1
                if num_failures > len(retry_delays):
                    cause = str(error) or type(error).__name__
                    raise SourceUnreachable(
                        f"{self._name} cannot be fetched from {httpx.URL(self._url).host}: {cause}; "
                        "what has arrived is kept, and the same command goes on from there"
                    ) from error
            await asyncio.sleep(retry_delays[max(num_failures - 1, 0)] if retry_delays else 0.0)

    async def _attempt(self, client: httpx.AsyncClient) -> None:
        done, etag = self._num_bytes(), self._etag_file.read_text()
        headers = dict(self._headers)
        if done and etag:
            headers |= {"Range": f"bytes={done}-", "If-Range": etag}
        async with client.stream("GET", self._url, headers=headers) as response:
            if response.status_code == 416:  # nothing after `done`: all of it is here, or it is another file's
                if done and content_range(response)[1] == done:
                    return
                self.partial.unlink()
                raise Broken("the part that had arrived is longer than the file")
            refuse_unless_content(response, self._source)
            if response.status_code == 206:
                start, self._total = content_range(response)
                if start != done:
                    self.partial.unlink()
                    raise Broken("the server resumed at another place")
            else:
                done, self._total = 0, content_length(response)
            first = response.history[0] if response.history else response
            self._sha256 = _digest(first.headers.get("X-Linked-ETag")) or _digest(response.headers.get("ETag"))
            self._refuse_unless_room(done)
            etag = response.headers.get("ETag", "")
            self._etag_file.write_text("" if etag.startswith("W/") else etag)  # If-Range takes strong validators only
            await self._receive(response, done)

    async def _receive(self, response: httpx.Response, done: int) -> None:
        with self.partial.open("r+b" if done else "wb") as file:
            file.seek(done)
            try:
                async for chunk in response.aiter_raw():
                    if done == 0 and chunk[:4] != _MAGIC[: len(chunk)]:
                        raise ModelInvalid(f"{self._name}: what the server sent is not a GGUF file")
                    file.write(chunk)
                    done += len(chunk)
                    self._on_progress(done, self._total)
            except OSError as error:
                if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                    raise StorageFull(f"{self._name}: no space left in {self.partial.parent}") from error
                raise
            file.flush()
            os.fsync(file.fileno())
        if self._total is not None and done != self._total:
            raise Broken(f"the server broke off at {done} of {self._total} bytes")

    async def check(self, sha256: str | None) -> None:
        """Look at what the file is, and at its digest where one is known; a wrong file is deleted.

        Raises:
            ModelInvalid: it is wrong.
        """
        expected = sha256 or self._sha256
        actual = await asyncio.to_thread(_sha256_of, self.partial) if expected is not None else None
        if not await asyncio.to_thread(_is_gguf, self.partial):
            problem = "what the server sent is not a GGUF file"
        elif actual != expected:
            problem = f"the SHA-256 of what arrived is {actual}, expected {expected}"
        else:
            return
        self.partial.unlink()
        raise ModelInvalid(f"{self._name}: {problem}")

    def _num_bytes(self) -> int:
        return self.partial.stat().st_size if self.partial.exists() else 0

    def _refuse_unless_room(self, done: int) -> None:
        free = shutil.disk_usage(self.partial.parent).free + (self._num_bytes() - done)
        if self._total is not None and self._total - done > free:
            raise StorageFull(
                f"{self._name} needs {(self._total - done) / 1e9:.2f} GB more, "
                f"and {self.partial.parent} has {free / 1e9:.2f} GB free"
            )


def headers_for(source: Source, hub: Hub) -> dict[str, str]:
    """The request headers to fetch `source` with: the hub's token goes to the hub only."""
    headers = {"Accept-Encoding": "identity"}
    if source.hub_path is not None and hub.token:
        headers["Authorization"] = f"Bearer {hub.token}"
    return headers


def refuse_unless_content(response: httpx.Response, source: Source) -> None:
    """Look at the status of the answer to a request for a file.

    Raises:
        Broken: another attempt may bring it.
        SourceForbidden, ModelNotFound, SourceUnreachable: it will not.
    """
    status = response.status_code
    asked = (response.history[0] if response.history else response).request  # not where a redirect has led, to a secret
    if status in {200, 206}:
        return
    if status in _RETRIED_STATUSES:
        raise Broken(f"the server answers {status}")
    detail = response.headers.get("X-Error-Message", "")[:200]  # the hub's own words
    told = f"the server answers {status}" + (f" ({detail})" if detail else "")
    if status in {401, 403}:
        way_out = (
            "the token in HF_TOKEN does not give access; accept the model's terms on its page, or use another token"
            if "Authorization" in asked.headers
            else "check the name; if the repository is gated or private, set HF_TOKEN"
        )
        raise SourceForbidden(f"{source.text}: {told}; {way_out}")
    if status in {404, 410}:
        raise ModelNotFound(f"{source.text} is not there: {told} for {asked.url}")
    raise SourceUnreachable(f"{source.text}: {told} for {asked.url}")


@asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[Path]:
    """Hold an advisory lock on `path`, which is created."""
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(_LOCK_POLL_SECONDS)
        await asyncio.to_thread(path.touch)  # whoever held the lock may have brought the file and removed this
        try:
            yield path
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def content_length(response: httpx.Response) -> int | None:
    """Return the length of the file that a whole response brings, where the server tells."""
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def content_range(response: httpx.Response) -> tuple[int | None, int | None]:
    """Return the first byte's place and the whole length (RFC 9110, section 14.4)."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
    if match is None:
        return None, None
    start, total = match.groups()
    return int(start) if start else None, int(total) if total != "*" else None


def _digest(etag: str | None) -> str | None:
    text = (etag or "").strip('"')
    return text if _SHA256.fullmatch(text) else None


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
