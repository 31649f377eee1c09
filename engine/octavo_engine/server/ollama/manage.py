"""Ollama's routes that change which models there are: create, copy, delete, pull, push, blobs.

They work on the store of a server of many models; a server of one model refuses them by name. What takes long is told
line by line, as Ollama does; a failure after the first line is a line with the error.
"""

import asyncio
import contextlib
import hashlib
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect, Request

from octavo_engine.errors import OctavoError, RequestInvalid, UserError
from octavo_engine.models.adapter import read_adapter
from octavo_engine.planning import read_model
from octavo_engine.server.content_type import AnyContentType
from octavo_engine.server.dependencies import CurrentService
from octavo_engine.server.envelope import describe as describe_error
from octavo_engine.server.ollama.answers import line
from octavo_engine.server.ollama.describe import describe
from octavo_engine.server.ollama.protocol import CopyRequest, CreateRequest, ModelRequest, TransferRequest
from octavo_engine.server.shelf import Shelf
from octavo_engine.store import derived
from octavo_engine.store.artifacts import MODEL_FILE
from octavo_engine.store.blobs import ADAPTERS, Blobs
from octavo_engine.store.local import MODELFILE, locate, remove, remove_unused_adapters
from octavo_engine.store.pull import pull
from octavo_engine.store.remote import Progress
from octavo_engine.store.source import parse_source
from octavo_engine.store.upload import destination, upload

UPLOADS: Final = "/api/blobs/"  # bodies of any size
_TELL_SECONDS: Final = 0.2  # between two lines of progress
_FILE_NAME: Final = re.compile(r"\w[\w.+ -]{0,200}", re.ASCII)
_DIGEST: Final = re.compile(r"sha256[:-](?P<sha256>[0-9a-f]{64})")

router = APIRouter(prefix="/api", tags=["ollama"], route_class=AnyContentType)


async def _shelf(request: Request, service: CurrentService) -> Shelf:
    if service.shelf is None:
        raise RequestInvalid(
            f"{request.url.path[:100]} is not supported by this server of one model: start `octavo serve` without a "
            "model, or use the command line",
            status=501,
        )
    return service.shelf


CurrentShelf = Annotated[Shelf, Depends(_shelf)]


@router.post("/pull")
async def pull_model(body: TransferRequest, shelf: CurrentShelf) -> Response:
    """Bring a model into the store."""
    with _refusals():
        location = await asyncio.to_thread(locate, body.which, shelf.store, names_only=True)

    async def work(on_progress: Progress) -> None:
        if location.source is not None and location.is_missing:
            await pull(
                location.source,
                location.path,
                hub=shelf.hub,
                store=location.store,
                sha256=location.sha256,
                on_progress=on_progress,
            )

    first = {"status": f"pulling {location.source.text}"} if location.source is not None else {"status": "using it"}
    return await _respond(body.stream is not False, work, first, f"pulling {location.name}")


@router.post("/push")
async def push_model(body: TransferRequest, shelf: CurrentShelf) -> Response:
    """Send a model to the registry that its name tells."""
    location = await asyncio.to_thread(shelf.find, body.which)
    with _refusals():
        source = destination(body.which, location)
        details = (await asyncio.to_thread(describe, location.model)).details

    async def work(on_progress: Progress) -> None:
        await upload(source, location, details, on_progress=on_progress)

    return await _respond(body.stream is not False, work, {"status": "retrieving manifest"}, f"pushing {location.name}")


@router.post("/create")
async def create_model(body: CreateRequest, shelf: CurrentShelf) -> Response:
    """Make a model of another one, or of uploaded files."""
    with _refusals():
        derived.path_of(body.which, shelf.store)
    modelfile = body.modelfile()
    base = await asyncio.to_thread(shelf.find, body.base) if body.base is not None else None
    files = {} if base is not None else _uploaded_model(body.files or {}, Blobs(shelf.store))
    if base is not None and body.adapters:
        uploaded = _uploaded(body.adapters, "adapters", Blobs(shelf.store))
        with _refusals():
            path = await asyncio.to_thread(_place_adapter, uploaded, base.model, shelf.store)
            modelfile = replace(modelfile, adapter=str(path))

    async def work(_on_progress: Progress) -> None:
        await shelf.retire(body.which)
        if base is not None:
            await asyncio.to_thread(derived.save, body.which, modelfile.over(base.own_modelfile()), shelf.store)
        else:
            await asyncio.to_thread(_place, body.which, files, modelfile.render(), shelf.store)

    return await _respond(body.stream is not False, work, {"status": "writing manifest"}, "")


@router.post("/copy")
async def copy_model(body: CopyRequest, shelf: CurrentShelf) -> Response:
    """Give a model a second name."""
    location = await asyncio.to_thread(shelf.find, body.source)
    with _refusals():
        await asyncio.to_thread(derived.save, body.destination, location.own_modelfile(), shelf.store)
    return Response()


@router.delete("/delete")
async def delete_model(body: ModelRequest, shelf: CurrentShelf) -> Response:
    """Delete a model from the store."""
    await asyncio.to_thread(shelf.find, body.which)
    await shelf.retire(body.which)
    with _refusals():
        await asyncio.to_thread(remove, body.which, shelf.store)
    return Response()


@router.head("/blobs/{digest}")
async def has_blob(digest: str, shelf: CurrentShelf) -> Response:
    """Whether a file is there."""
    return Response(status_code=200 if Blobs(shelf.store).path(_sha256(digest)).exists() else 404)


@router.post("/blobs/{digest}")
async def upload_blob(digest: str, request: Request, shelf: CurrentShelf) -> Response:
    """Take a file that a model will be made of."""
    expected, blobs = _sha256(digest), Blobs(shelf.store)
    partial = blobs.partial(f"upload-{secrets.token_hex(8)}")
    actual = hashlib.sha256()
    try:
        with partial.open("wb") as file:
            async for chunk in request.stream():
                actual.update(chunk)
                file.write(chunk)
        if actual.hexdigest() != expected:
            raise RequestInvalid(f"the body's digest is sha256:{actual.hexdigest()}", param="digest")
        blobs.adopt(partial, expected)
    except OSError as error:
        raise RequestInvalid(f"the file cannot be kept: {error.strerror}", status=507) from error
    except ClientDisconnect:
        return Response(status_code=499)  # which nobody reads
    finally:
        partial.unlink(missing_ok=True)
    return Response(status_code=201)


async def _respond(
    is_streamed: bool,  # noqa: FBT001 - the body's field
    work: Callable[[Progress], Awaitable[None]],
    first: dict[str, str],
    status: str,
) -> Response:
    """Do the work; tell of it line by line, or at its end."""
    if is_streamed:
        return StreamingResponse(_lines(work, first, status), media_type="application/x-ndjson")
    with _refusals():
        await work(lambda _done, _total: None)
    return JSONResponse({"status": "success"})


async def _lines(
    work: Callable[[Progress], Awaitable[None]], first: dict[str, str], status: str
) -> AsyncIterator[bytes]:
    progress: dict[str, Any] = {}

    def on_progress(done: int, total: int | None) -> None:
        progress.update({"completed": done} if total is None else {"completed": done, "total": total})

    yield line(first)
    task = asyncio.ensure_future(work(on_progress))
    told: dict[str, Any] = {}
    try:
        while not task.done():
            await asyncio.wait([task], timeout=_TELL_SECONDS)
            if progress and progress != told:
                told = dict(progress)
                yield line({"status": status} | told)
        with _refusals():
            task.result()
        yield line({"status": "success"})
    except OctavoError as error:
        yield line({"error": describe_error(error)[1]["error"]["message"]})
    finally:  # a client that leaves ends the work; what has arrived is kept
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn what is wrong with the user's input into what a response tells."""
    try:
        yield
    except UserError as error:
        raise _as_request_invalid(error) from error
    except OSError as error:
        raise RequestInvalid(f"the store cannot be written: {error.strerror}", status=507) from error


def _as_request_invalid(error: UserError) -> RequestInvalid:
    if isinstance(error, RequestInvalid):
        return error
    status = {"ModelNotFound": 404, "SourceForbidden": 401, "SourceUnreachable": 502, "StorageFull": 507}
    return RequestInvalid(str(error), param="model", status=status.get(error.reason, 400))


def _sha256(digest: str) -> str:
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise RequestInvalid(f"{digest[:80]!r} is not of the form sha256:DIGEST", param="digest")
    return match["sha256"]


def _uploaded(files: dict[str, str], field: str, blobs: Blobs) -> dict[PurePosixPath, str]:
    """The digests of uploaded files by their names in one folder."""
    found = {}
    for name, digest in files.items():
        sha256 = _sha256(digest)
        path = PurePosixPath(name.replace("\\", "/"))
        if not _FILE_NAME.fullmatch(path.name) or path.name == MODELFILE:
            raise RequestInvalid(f"{path.name[:50]!r} cannot be the name of a model's file", param=field)
        if not blobs.path(sha256).exists():
            raise RequestInvalid(
                f"there is no blob {digest}: upload it to {UPLOADS}{digest}", param=f"{field}.{name[:50]}"
            )
        found[PurePosixPath(path.name)] = sha256
    return found


def _uploaded_model(files: dict[str, str], blobs: Blobs) -> dict[PurePosixPath, str]:
    found = _uploaded(files, "files", blobs)
    models = [path for path in found if path.suffix == ".gguf"]
    if not models and PurePosixPath("config.json") not in found:
        raise RequestInvalid("files hold neither a .gguf file nor config.json", param="files")
    return {MODEL_FILE: found[models[0]]} if len(models) == 1 else found


def _place_adapter(files: dict[PurePosixPath, str], model: Path, store: Path) -> Path:
    """Put uploaded files into a folder and return the adapter that they are, if it is one for the model."""
    name = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
    place = store / ADAPTERS / name
    Blobs(store).link_folder(place, files, {})
    ggufs = [path for path in files if path.suffix == ".gguf"]
    adapter = place / ggufs[0] if len(files) == len(ggufs) == 1 else place
    try:
        read_adapter(adapter, read_model(model).spec)
    except UserError as error:
        remove_unused_adapters(store)
        raise RequestInvalid(str(error), param="adapters") from error
    return adapter


def _place(name: str, files: dict[PurePosixPath, str], modelfile: str, store: Path) -> None:
    place = store / parse_source(f"ollama://{name}").path
    Blobs(store).link_folder(place, files, {MODELFILE: modelfile}, replace=True)
