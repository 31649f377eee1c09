"""The headers of a model that is somewhere else: what `octavo plan` and `octavo pull` look at before any download.

The first bytes of each weight file are put into a file of the full size that holds nothing else (a sparse one, so that
it takes no room), and the readers of local files do the rest. Where a header turns out to be longer, more bytes are
fetched. The other files of a folder are small and come whole.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import httpx

from octavo_engine.errors import ModelInvalid, SourceUnreachable
from octavo_engine.store.local import MODELFILE, model_in
from octavo_engine.store.pull import is_folder, list_files
from octavo_engine.store.transfer import LIMITS, Broken, content_length, content_range, refuse_unless_content
from octavo_engine.weights.gguf import read_part
from octavo_engine.weights.safetensors import read_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from octavo_engine.store.remote import Hub, RemoteFile
    from octavo_engine.store.source import Source

_FIRST_BYTES: Final = 2 * 2**20  # a vocabulary of 49,152 tokens takes 1.7 MB
_MAX_BYTES: Final = 128 * 2**20  # no header is as long: the largest vocabularies take 16 MB
_GROWTH: Final = 4  # each further attempt fetches so many times more
_MAGIC: Final = b"GGUF"


async def fetch_headers(source: Source, folder: Path, *, hub: Hub) -> Path:
    """Bring the headers of a model into `folder`; return a file or folder that only its headers can be read from.

    Raises:
        ModelNotFound, SourceForbidden, SourceUnreachable: the server does not give the files.
        ModelInvalid, ModelUnsupported: a file has no header that can be read.
    """
    async with httpx.AsyncClient(timeout=LIMITS.timeout, follow_redirects=True) as client:
        listing = await list_files(source, hub, client)
        if any(file.is_archive for file in listing.files):
            raise SourceUnreachable(f"{source.text} is an archive, of which no header can be had: pull it first")
        for file in listing.files:
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                await _fetch_header(client, file, path)
            except (httpx.TransportError, Broken) as error:
                raise SourceUnreachable(f"{source.text} cannot be fetched: {error or type(error).__name__}") from error
    if listing.modelfile:
        (folder / MODELFILE).write_text(listing.modelfile, encoding="utf-8", newline="")
    return model_in(folder) if is_folder(source, listing) else folder / listing.files[0].name


async def _fetch_header(client: httpx.AsyncClient, file: RemoteFile, path: Path) -> None:
    wanted = _FIRST_BYTES
    while True:
        num_bytes, total = await _fetch_first(client, file, path, wanted)
        whole = num_bytes >= min(total, _MAX_BYTES)
        try:
            if whole or await asyncio.to_thread(_is_readable, path, num_bytes):
                return
        except ModelInvalid:
            if whole:
                raise
        wanted *= _GROWTH


def _is_readable(path: Path, num_bytes: int) -> bool:
    """Whether the header is within the first bytes: zeros after them may read as entries of it.

    Raises:
        ModelInvalid: it is not, or is wrong.
    """
    if path.suffix == ".gguf":
        return all(tensor.offset <= num_bytes for tensor in read_part(path).tensors.values())
    if path.suffix == ".safetensors":
        read_tensors(path)
        return True
    return False  # it has no header: all of it is wanted


async def _fetch_first(client: httpx.AsyncClient, file: RemoteFile, path: Path, wanted: int) -> tuple[int, int]:
    """Write the first bytes of the file to `path`, which gets the size of the whole; return how many, and that size."""
    headers = dict(file.headers) | {"Accept-Encoding": "identity", "Range": f"bytes=0-{wanted - 1}"}
    async with client.stream("GET", file.url, headers=headers) as response:
        refuse_unless_content(response, file.what)
        total = content_range(response)[1] if response.status_code == 206 else content_length(response)
        if total is None:
            raise SourceUnreachable(f"{file.what}: the server does not tell how long {file.name} is")
        data = bytearray()
        async for chunk in response.aiter_raw():  # a server without ranges sends all of it: leave when it is enough
            data += chunk
            if len(data) >= wanted:
                break
    if file.name.suffix == ".gguf" and data[: len(_MAGIC)] != _MAGIC:
        raise ModelInvalid(f"{file.what}: what the server sent is not a GGUF file")
    num_bytes = min(len(data), wanted)
    await asyncio.to_thread(_write_sparse, path, bytes(data[:num_bytes]), total)
    return num_bytes, total


def _write_sparse(path: Path, data: bytes, total: int) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.truncate(total)
