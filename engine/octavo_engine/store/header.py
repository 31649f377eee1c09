"""The header of a model file that is somewhere else: what `octavo plan` and `octavo pull` look at before any download.

The first bytes of the file are put into a file of the full size that holds nothing else (a sparse one, so that it takes
no room), and the reader of local files does the rest. Where its header turns out to be longer, more bytes are fetched.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import httpx

from octavo_engine.errors import ModelInvalid, SourceUnreachable
from octavo_engine.store.pull import TIMEOUT, Broken, content_length, content_range, headers_for, refuse_unless_content
from octavo_engine.weights.gguf import read_header

if TYPE_CHECKING:
    from pathlib import Path

    from octavo_engine.store.pull import Hub
    from octavo_engine.store.source import Source

_FIRST_BYTES: Final = 2 * 2**20  # a vocabulary of 49,152 tokens takes 1.7 MB
_MAX_BYTES: Final = 128 * 2**20  # no header is as long: the largest vocabularies take 16 MB
_MAGIC: Final = b"GGUF"
_GROWTH: Final = 4  # each further attempt fetches so many times more


async def fetch_header(source: Source, folder: Path, *, hub: Hub) -> Path:
    """Bring the header of a model file into `folder`; return a file that only its header can be read from.

    Raises:
        ModelNotFound, SourceForbidden, SourceUnreachable: the server does not give the file.
        ModelInvalid, ModelUnsupported: the file has no header that can be read.
    """
    path = folder / source.path.name
    async with httpx.AsyncClient(timeout=TIMEOUT, follow_redirects=True) as client:
        wanted = _FIRST_BYTES
        while True:
            try:
                num_bytes, total = await _fetch_first(client, source, hub, path, wanted)
            except (httpx.TransportError, Broken) as error:
                raise SourceUnreachable(f"{source.text} cannot be fetched: {error or type(error).__name__}") from error
            whole = num_bytes >= min(total, _MAX_BYTES)
            try:
                header = await asyncio.to_thread(read_header, path)
            except ModelInvalid:
                if whole:
                    raise
            else:
                # Zeros after the end of what was fetched may read as entries: what counts is where the data begin.
                if whole or all(tensor.offset <= num_bytes for tensor in header.tensors.values()):
                    return path
            wanted *= _GROWTH


async def _fetch_first(client: httpx.AsyncClient, source: Source, hub: Hub, path: Path, wanted: int) -> tuple[int, int]:
    """Write the first bytes of the file to `path`, which gets the size of the whole; return how many, and that size."""
    headers = headers_for(source, hub) | {"Range": f"bytes=0-{wanted - 1}"}
    async with client.stream("GET", source.url(hub.endpoint), headers=headers) as response:
        refuse_unless_content(response, source)
        total = content_range(response)[1] if response.status_code == 206 else content_length(response)
        if total is None:
            raise SourceUnreachable(f"{source.text}: the server does not tell how long the file is")
        data = bytearray()
        async for chunk in response.aiter_raw():  # a server without ranges sends all of it: leave when it is enough
            data += chunk
            if len(data) >= wanted:
                break
    if data[: len(_MAGIC)] != _MAGIC:
        raise ModelInvalid(f"{source.text}: what the server sent is not a GGUF file")
    num_bytes = min(len(data), wanted)
    await asyncio.to_thread(_write_sparse, path, bytes(data[:num_bytes]), total)
    return num_bytes, total


def _write_sparse(path: Path, data: bytes, total: int) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.truncate(total)
