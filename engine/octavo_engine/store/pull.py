"""Bring a model here from where it is: find its files, fetch them, give them their place when all are whole.

Into a store the files become blobs and the place links to them (blobs.py). Elsewhere (`octavo pull --output`) TARGET is
the file, or the folder, itself, and TARGET.partial what is on its way. Called by the command line and by the server;
knows nothing about where the progress is shown.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import hashlib
import tarfile
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

import httpx

from octavo_engine.errors import ModelInvalid, SourceForbidden, StorageFull
from octavo_engine.store import transfer
from octavo_engine.store.blobs import Blobs, digest_of
from octavo_engine.store.bucket import list_bucket
from octavo_engine.store.hub import list_hub_files
from octavo_engine.store.local import MODELFILE
from octavo_engine.store.locks import locked
from octavo_engine.store.remote import MODEL_SUFFIXES, Hub, Listing, Progress, RemoteFile
from octavo_engine.store.source import BucketSource, HubSource, RegistrySource, Source, WebSource
from octavo_engine.store.transfer import LIMITS
from octavo_engine.weights.gguf import part_paths

if TYPE_CHECKING:
    from octavo_engine.store.transfer import Limits

_ORIGIN: Final = ".octavo-source"  # in a folder outside a store: what it was pulled from
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


async def pull(
    source: Source,
    target: Path,
    *,
    hub: Hub,
    store: Path | None = None,
    sha256: str | None = None,
    on_progress: Progress = lambda _done, _total: None,
    limits: Limits = LIMITS,
) -> None:
    """Fetch `source` to `target`; nothing is fetched when `target` is there already, or its blobs are.

    Cancelling, or killing, keeps what has arrived for the next time.

    Args:
        source: what to fetch.
        target: the file or folder, and in a store the place of either.
        hub: how to reach the hub.
        store: the store that `target` is a place in.
        sha256: of the file, where it is known beforehand.
        on_progress: is told the bytes so far and in all.
        limits: of patience with servers.

    Raises:
        UserError: it cannot be had: ModelNotFound, ModelInvalid, ModelUnsupported, SourceForbidden, SourceUnreachable,
            StorageFull.
    """
    if target.exists():  # noqa: ASYNC240 - one look at the disk
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        async with httpx.AsyncClient(timeout=limits.timeout, follow_redirects=True) as client:
            work = _Pull(source, hub, client, sha256=sha256, on_progress=on_progress, limits=limits)
            if store is None:
                await work.into_target(target)
            else:
                await work.into_store(target, Blobs(store))
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise StorageFull(f"{source.text}: no space left for {target}; what has arrived is kept") from error
        raise


def is_pulled(folder: Path, source: Source) -> bool:
    """Whether `folder`, which is no place in a store, was made by a pull of `source`."""
    with suppress(OSError, UnicodeDecodeError):
        return (folder / _ORIGIN).read_text(encoding="utf-8") == source.text
    return False


async def list_files(source: Source, hub: Hub, client: httpx.AsyncClient) -> Listing:
    """Return the files that a source means.

    Raises:
        UserError: as `pull`, without StorageFull.
    """
    match source:
        case HubSource():
            return await list_hub_files(source, hub)
        case WebSource():
            named = PurePosixPath(source.path.name)
            addresses = {named: source.url}
            if len(parts := part_paths(named)) > 1:
                first = httpx.URL(source.url)
                addresses = {part: str(first.join(part.name).copy_with(query=first.query)) for part in parts}
            return Listing(
                files=tuple(RemoteFile(name=name, url=addresses[name], what=source.text) for name in addresses)
            )
        case RegistrySource():
            from octavo_engine.store.artifacts import list_artifact  # noqa: PLC0415 - it brings numpy

            return await list_artifact(source, client)
        case BucketSource():
            return await list_bucket(source)
        case _:
            raise AssertionError(source)


def is_folder(source: Source, listing: Listing) -> bool:
    """Whether the model's place is a folder: it is unless the source names a file, whose parts lie beside it."""
    return source.path.name not in {file.name.name for file in listing.files}


class _Pull:
    """One pull."""

    def __init__(
        self,
        source: Source,
        hub: Hub,
        client: httpx.AsyncClient,
        *,
        sha256: str | None,
        on_progress: Progress,
        limits: Limits,
    ) -> None:
        self._source = source
        self._hub = hub
        self._client = client
        self._sha256 = sha256
        self._on_progress = on_progress
        self._limits = limits
        self._done: dict[str, int] = {}  # bytes of each file by its name
        self._totals: dict[str, int | None] = {}

    async def into_store(self, place: Path, blobs: Blobs) -> None:
        """Make blobs of all files, then the place."""
        listing = await self._list()
        digests: dict[PurePosixPath, str] = {}
        for file in listing.files:
            digests |= await self._into_blobs(file, blobs)
        if is_folder(self._source, listing):
            texts = {MODELFILE: listing.modelfile} if listing.modelfile else {}
            blobs.link_folder(place, _flat(digests, self._source), texts)
        elif len(digests) == 1:
            blobs.link(place, *digests.values())
        else:  # by the first part the model is known to be there
            for name, digest in reversed(digests.items()):
                blobs.link(place.with_name(name.name), digest)

    async def into_target(self, target: Path) -> None:
        """Put the files where they are wanted."""
        async with locked(target.with_name(f"{target.name}.lock")):
            if target.exists():  # noqa: ASYNC240 - one look at the disk: the pull that held the lock has brought it
                return
            listing = await self._list()
            is_one_file = len(listing.files) == 1 and not listing.files[0].is_archive
            if is_one_file or not is_folder(self._source, listing):
                await self._files_beside(target, listing)
            else:
                await self._folder(target, listing)

    async def _files_beside(self, target: Path, listing: Listing) -> None:
        names = [target.name]
        if len(listing.files) > 1:
            names = [file.name.name for file in listing.files]
            if target.name != names[0]:
                raise ModelInvalid(f"{self._source.text} comes in parts, which are found by name: call it {names[0]}")
        if listing.modelfile:
            beside = target.with_name(f"{target.name}.{MODELFILE}")
            beside.write_text(listing.modelfile, encoding="utf-8", newline="")
        for file, name in reversed(list(zip(listing.files, names, strict=True))):
            partial = target.with_name(f"{name}.partial")
            await self._fetch(file, partial)
            partial.replace(target.with_name(name))

    async def _folder(self, target: Path, listing: Listing) -> None:
        folder = target.with_name(f"{target.name}.partial")
        for file in listing.files:
            path = folder / file.name
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.partial")
            await self._fetch(file, partial)
            if file.is_archive:
                for name, whole in await asyncio.to_thread(_unpack, partial, folder, self._source.text):
                    whole.replace(folder / name)
                partial.unlink()
            else:
                partial.replace(path)
        if listing.modelfile:
            (folder / MODELFILE).write_text(listing.modelfile, encoding="utf-8", newline="")
        (folder / _ORIGIN).write_text(self._source.text, encoding="utf-8", newline="")
        folder.rename(target)

    async def _into_blobs(self, file: RemoteFile, blobs: Blobs) -> dict[PurePosixPath, str]:
        """Fetch a file unless its blob is there; return its digest by its name, or those of an archive's files."""
        told = f"{file.what} {file.name}"  # not the address, of which a signature may be part
        key = f"sha256-{file.sha256}" if file.sha256 else f"file-{hashlib.sha256(told.encode()).hexdigest()}"
        partial = blobs.partial(key)
        async with locked(partial.with_name(f"{key}.lock")):
            if file.sha256 and not file.is_archive and (blob := blobs.path(file.sha256)).exists():
                self._show(file, blob.stat().st_size, blob.stat().st_size)
                return {file.name: file.sha256}
            digest = await self._fetch(file, partial)
            if not file.is_archive:
                blobs.adopt(partial, digest)
                return {file.name: digest}
            digests = {}
            for name, whole in await asyncio.to_thread(_unpack, partial, partial.parent, file.what):
                digests[name] = await asyncio.to_thread(digest_of, whole)
                blobs.adopt(whole, digests[name])
            partial.unlink()
            return digests

    async def _list(self) -> Listing:
        listing = await list_files(self._source, self._hub, self._client)
        for file in listing.files:
            self._totals[str(file.name)] = file.num_bytes
        if self._sha256 is not None:
            (file,) = listing.files
            listing = replace(listing, files=(replace(file, sha256=self._sha256),))
        return listing

    async def _fetch(self, file: RemoteFile, partial: Path) -> str:
        """As transfer.fetch; where a token or signature has run out in between, with a new one."""
        show = functools.partial(self._show, file)
        while True:
            before = self._done.get(str(file.name), 0)
            try:
                return await transfer.fetch(file, partial, self._client, limits=self._limits, on_progress=show)
            except SourceForbidden:
                if self._done.get(str(file.name), 0) <= before:
                    raise
            file = next(one for one in (await self._list()).files if one.name == file.name)

    def _show(self, file: RemoteFile, done: int, total: int | None) -> None:
        self._done[str(file.name)] = done
        self._totals[str(file.name)] = total
        totals = [one for one in self._totals.values() if one is not None]
        self._on_progress(sum(self._done.values()), sum(totals) if len(totals) == len(self._totals) else None)


def _unpack(archive: Path, folder: Path, what: str) -> list[tuple[PurePosixPath, Path]]:
    """Write the model files of a tar into `folder`, under names of no meaning; return the name and the file of each.

    Raises:
        ModelInvalid: it is no tar.
    """
    found = []
    try:
        with tarfile.open(archive) as files:
            for number, member in enumerate(files):
                name = PurePosixPath(member.name)
                content = files.extractfile(member) if member.isreg() and name.name.endswith(MODEL_SUFFIXES) else None
                if content is None:
                    continue
                whole = folder / f"{archive.name}.{number}"
                with whole.open("wb") as file:
                    while data := content.read(2**20):
                        file.write(data)
                found.append((PurePosixPath(name.name), whole))
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ModelInvalid(f"{what}: a layer is no archive that can be read: {error}") from error
    return found


def _flat(digests: dict[PurePosixPath, str], source: Source) -> dict[PurePosixPath, str]:
    if not any(name.suffix in {".gguf", ".safetensors"} for name in digests):
        raise ModelInvalid(f"{source.text}: there are no weights in it, neither .gguf nor .safetensors files")
    return digests
