"""Fetch one file over HTTP: in parallel ranges, resumed after a break or a kill, checked before anybody sees it whole.

While it comes, PARTIAL holds its bytes at their places and PARTIAL.json, the journal, how far each part of it is; the
journal is written after the bytes that it tells of. Called by pull.py, which holds the lock and then gives the file its
place.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import httpx
import msgspec

from octavo_engine.errors import ModelInvalid, ModelNotFound, SourceForbidden, SourceUnreachable, StorageFull

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from octavo_engine.store.remote import Progress, RemoteFile

_NUM_CONNECTIONS: Final = 4
_JOURNAL_BYTES: Final = 8 * 2**20  # after so many new bytes of a part the journal is written
_MAGIC: Final = b"GGUF"
_RETRIED_STATUSES: Final = frozenset({408, 429, 500, 502, 503, 504})
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How to deal with servers."""

    stall_seconds: float = 60.0  # a server that sends nothing for so long is asked again
    delays: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further attempt that brings no byte
    part_bytes: int = 64 * 2**20  # longer files come in parts of so many bytes, several at a time

    @property
    def timeout(self) -> httpx.Timeout:
        """Of requests."""
        return httpx.Timeout(10.0, read=self.stall_seconds)


LIMITS: Final = Limits()


class Broken(Exception):
    """The transfer ended early; what has arrived is kept and the next attempt goes on from there."""


class _Changed(Broken):
    """The server has another file by now: what has arrived is of no use."""


class _Journal(msgspec.Struct):
    """What of a file has arrived."""

    etag: str  # the server's name for this version of the file; empty: it has none that ranges can be asked by
    sha256: str  # as the server told it; empty: it did not
    num_bytes: int  # of the whole
    part_bytes: int  # of each part but the last
    done: list[int]  # bytes of each part, from its beginning

    def begin(self, part: int) -> int:
        """Where the part begins in the file."""
        return part * self.part_bytes

    def length(self, part: int) -> int:
        """How many bytes it has."""
        return min(self.part_bytes, self.num_bytes - self.begin(part))


async def fetch(
    file: RemoteFile,
    partial: Path,
    client: httpx.AsyncClient,
    *,
    limits: Limits = LIMITS,
    on_progress: Progress = lambda _done, _total: None,
) -> str:
    """Fetch `file` to `partial` and check it; return its SHA-256. Cancelling keeps what has arrived for the next time.

    It is checked against what is known beforehand, or else against the digest that the hub sends (X-Linked-ETag, or an
    ETag that is a SHA-256: huggingface_hub's convention). What is wrong is deleted.

    Args:
        file: what to fetch.
        partial: where to.
        client: of HTTP.
        limits: of patience.
        on_progress: is told how far it is.

    Raises:
        ModelNotFound: the server has no such file.
        ModelInvalid: what the server sent is not a GGUF file, or not the file it announced.
        SourceForbidden: the server wants a token, or does not accept the one it got.
        SourceUnreachable: the server did not answer, or broke off too often.
        StorageFull: the file does not fit where it should go, as can be told beforehand.
        OSError: it turned out not to fit.
    """
    transfer = _Transfer(file, partial, client, limits, on_progress)
    await transfer.run()
    return await asyncio.to_thread(transfer.check)


def discard(partial: Path) -> None:
    """Delete what has arrived of a file."""
    partial.unlink(missing_ok=True)
    _journal_of(partial).unlink(missing_ok=True)


class _Transfer:
    """One file on its way."""

    def __init__(
        self, file: RemoteFile, partial: Path, client: httpx.AsyncClient, limits: Limits, on_progress: Progress
    ) -> None:
        self._file = file
        self._partial = partial
        self._client = client
        self._on_progress = on_progress
        self._limits = limits
        self._headers = dict(file.headers) | {"Accept-Encoding": "identity"}
        self._sha256 = file.sha256 or ""  # or as the server tells it
        self._num_received = 0  # in all attempts
        self._journal = self._read_journal()

    async def run(self) -> None:
        """Fetch until the partial file is whole; give up after so many attempts in a row without a byte."""
        delays, num_failures = self._limits.delays, 0
        while True:
            before = self._num_received
            try:
                self._journal = self._journal or await self._ask()
                if self._journal is not None:
                    await self._fetch_parts(self._journal)
            except (httpx.TransportError, Broken) as error:
                if isinstance(error, _Changed):
                    self._forget()
                num_failures = 0 if self._num_received > before and self._journal else num_failures + 1
                if num_failures > len(delays):
                    cause = str(error) or type(error).__name__
                    raise SourceUnreachable(
                        f"{self._file.what} cannot be fetched from {httpx.URL(self._file.url).host}: {cause}; "
                        "what has arrived is kept, and the same command goes on from there"
                    ) from error
            else:
                return
            await asyncio.sleep(delays[max(num_failures - 1, 0)] if delays else 0.0)

    def check(self) -> str:
        """Return the SHA-256 of the file; delete it if it is not what it should be.

        Raises:
            ModelInvalid: it is not.
        """
        with self._partial.open("rb") as file:
            is_gguf = file.read(len(_MAGIC)) == _MAGIC
            file.seek(0)
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if self._file.name.suffix == ".gguf" and not is_gguf:
            problem = "what the server sent is not a GGUF file"
        elif self._sha256 and actual != self._sha256:
            problem = f"the SHA-256 of what arrived is {actual}, expected {self._sha256}"
        elif self._file.git_sha1 is not None and self._file.git_sha1 != _git_sha1(self._partial):
            problem = f"what arrived is not what git has as {self._file.git_sha1}"
        else:
            _journal_of(self._partial).unlink(missing_ok=True)
            return actual
        self._forget()
        raise ModelInvalid(f"{self._file.what}: {problem}")

    async def _ask(self) -> _Journal | None:
        """Find out how long the file is. None: it has come whole, from a server that sends it in one piece only."""
        headers = self._headers | {"Range": "bytes=0-0"}
        async with self._client.stream("GET", self._file.url, headers=headers) as response:
            self._refuse_unless_content(response, also=416)
            first = response.history[0] if response.history else response
            self._sha256 = (
                self._sha256 or _digest(first.headers.get("X-Linked-ETag")) or _digest(response.headers.get("ETag"))
            )
            if response.status_code == 200:
                await self._receive_whole(response)
                return None
            await response.aread()  # so that the connection can be used again
            num_bytes = content_range(response)[1]
            etag = response.headers.get("ETag", "")
            etag = "" if etag.startswith("W/") else etag  # If-Range takes strong validators only
        if response.status_code == 206 and num_bytes and (etag or self._sha256):
            self._refuse_unless(num_bytes)
            num_parts = -(-num_bytes // self._limits.part_bytes)
            discard(self._partial)
            self._partial.touch()
            journal = _Journal(etag, self._sha256, num_bytes, self._limits.part_bytes, [0] * num_parts)
            self._write_journal(journal)
            return journal
        async with self._client.stream("GET", self._file.url, headers=self._headers) as response:
            self._refuse_unless_content(response)
            await self._receive_whole(response)
            return None

    async def _receive_whole(self, response: httpx.Response) -> None:
        """Take the file as it comes; after a break it has to come again."""
        total, done = content_length(response), 0
        if total is not None:
            self._refuse_unless(total)
        with self._partial.open("wb", buffering=0) as file:
            async for chunk in response.aiter_raw():
                self._refuse_unless_gguf(chunk, done)
                _write(file.fileno(), chunk, done)
                done += len(chunk)
                self._num_received += len(chunk)
                self._on_progress(done, total)
            os.fsync(file.fileno())
        if total is not None and done != total:
            raise Broken(f"the server broke off at {done} of {total} bytes")

    async def _fetch_parts(self, journal: _Journal) -> None:
        self._refuse_unless_room(journal.num_bytes - sum(journal.done))
        missing = [part for part, done in enumerate(journal.done) if done < journal.length(part)]
        with self._partial.open("r+b", buffering=0) as file:
            parts = iter(missing)
            workers = [
                asyncio.create_task(self._work(journal, parts, file.fileno()))
                for _ in range(min(_NUM_CONNECTIONS, len(missing)))
            ]
            try:
                await asyncio.gather(*workers)
                os.fsync(file.fileno())
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
                self._write_journal(journal)
        self._on_progress(journal.num_bytes, journal.num_bytes)

    async def _work(self, journal: _Journal, parts: Iterator[int], fd: int) -> None:
        for part in parts:
            await self._fetch_part(journal, part, fd)

    async def _fetch_part(self, journal: _Journal, part: int, fd: int) -> None:
        place, end = journal.begin(part) + journal.done[part], journal.begin(part) + journal.length(part)
        headers = self._headers | {"Range": f"bytes={place}-{end - 1}"}
        if journal.etag:
            headers["If-Range"] = journal.etag
        async with self._client.stream("GET", self._file.url, headers=headers) as response:
            self._refuse_unless_content(response, also=416)
            if response.status_code != 206 or content_range(response) != (place, journal.num_bytes):
                raise _Changed(
                    "the file changed while it was fetched, or the server does not send what it is asked for"
                )
            journaled = place
            async for chunk in response.aiter_raw():
                if place + len(chunk) > end:
                    raise _Changed("the server sends more than it was asked for")
                self._refuse_unless_gguf(chunk, place)
                _write(fd, chunk, place)
                place += len(chunk)
                journal.done[part] += len(chunk)
                self._num_received += len(chunk)
                self._on_progress(sum(journal.done), journal.num_bytes)
                if place - journaled >= _JOURNAL_BYTES:
                    self._write_journal(journal)
                    journaled = place
        if place != end:
            raise Broken(f"the server broke off at {place} of {journal.num_bytes} bytes")

    def _read_journal(self) -> _Journal | None:
        """What an earlier process has left, if it can be gone on with."""
        try:
            journal = msgspec.json.decode(_journal_of(self._partial).read_bytes(), type=_Journal)
        except (OSError, msgspec.DecodeError):
            return None
        is_same = (self._file.sha256 or journal.sha256) == journal.sha256 and bool(journal.etag or journal.sha256)
        self._sha256 = journal.sha256
        return journal if is_same and self._partial.exists() else None

    def _write_journal(self, journal: _Journal) -> None:
        path = _journal_of(self._partial)
        written = path.with_name(f"{path.name}.new")
        written.write_bytes(msgspec.json.encode(journal))
        written.replace(path)

    def _forget(self) -> None:
        discard(self._partial)
        self._journal = None

    def _refuse_unless_content(self, response: httpx.Response, *, also: int = 200) -> None:
        if response.status_code != also:
            refuse_unless_content(response, self._file.what)

    def _refuse_unless_gguf(self, chunk: bytes, place: int) -> None:
        if place == 0 and self._file.name.suffix == ".gguf" and chunk[:4] != _MAGIC[: len(chunk)]:
            raise ModelInvalid(f"{self._file.what}: what the server sent is not a GGUF file")

    def _refuse_unless(self, num_bytes: int) -> None:
        expected = self._file.num_bytes
        if expected is not None and num_bytes != expected:
            raise ModelInvalid(f"{self._file.what}: {self._file.name} has {num_bytes} bytes, expected {expected}")
        self._refuse_unless_room(num_bytes)

    def _refuse_unless_room(self, num_bytes: int) -> None:
        free = shutil.disk_usage(self._partial.parent).free
        if num_bytes > free:
            raise StorageFull(
                f"{self._file.what} needs {num_bytes / 1e9:.2f} GB more, "
                f"and {self._partial.parent} has {free / 1e9:.2f} GB free"
            )


def refuse_unless_content(response: httpx.Response, what: str) -> None:
    """Look at the status of the answer to a request for a file of the source `what`.

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
        raise SourceForbidden(f"{what}: {told}; {way_out}")
    address = asked.url.copy_with(query=None, userinfo=b"")  # which may hold a signature or a password
    if status in {404, 410}:
        raise ModelNotFound(f"{what} is not there: {told} for {address}")
    raise SourceUnreachable(f"{what}: {told} for {address}")


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


def _write(fd: int, data: bytes, place: int) -> None:
    """Write all of it: the kernel may take less at once, and then tell that there is no room."""
    view = memoryview(data)
    while view:
        num_bytes = os.pwrite(fd, view, place)
        view, place = view[num_bytes:], place + num_bytes


def _journal_of(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _digest(etag: str | None) -> str:
    text = (etag or "").strip('"')
    return text if _SHA256.fullmatch(text) else ""


def _git_sha1(path: Path) -> str:
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
