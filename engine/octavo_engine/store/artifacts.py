"""Models in registries: what the layers of Ollama's manifests and of OCI artifacts and images mean, both directions.

Ollama: a layer for each part of a Modelfile, by media type. OCI: files named by annotations (ORAS, ModelPack), Docker's
GGUF layers, and layers of images, which are archives with the files in them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from octavo_engine.errors import ModelfileInvalid, ModelInvalid, ModelUnsupported, RequestInvalid
from octavo_engine.modelfile import Modelfile, parse_modelfile
from octavo_engine.parameters import check_all
from octavo_engine.store.blobs import digest_of
from octavo_engine.store.registry import MANIFEST, Registry, chunks
from octavo_engine.store.remote import MODEL_SUFFIXES, Listing, RemoteFile

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    import httpx

    from octavo_engine.store.remote import Progress
    from octavo_engine.store.source import RegistrySource

MODEL_FILE: Final = PurePosixPath("model.gguf")  # what a model's only file is called in its place
_OLLAMA: Final = "application/vnd.ollama.image."
_CONFIG: Final = "application/vnd.docker.container.image.v1+json"
_TITLES: Final = ("org.opencontainers.image.title", "org.cncf.model.filepath")
_UNREAD: Final = frozenset({"projector", "json", "prompt"})  # a model answers text without them
_LACKING: Final = {
    "adapter": "adapters are not fetched from registries; make the model by a Modelfile with ADAPTER and a path",
    "tensor": "it is stored tensor by tensor, which this engine does not read; take its GGUF or safetensors files",
    "embed": "embeddings in a Modelfile are not supported",
    "draft": "guesses are set for a whole server: octavo serve --speculative-config",
}


async def list_artifact(source: RegistrySource, client: httpx.AsyncClient) -> Listing:
    """Return the files of a model in a registry.

    Raises:
        ModelNotFound, SourceForbidden, SourceUnreachable, ModelInvalid: the registry does not give it.
        ModelUnsupported: it is a model that this engine cannot run, or no model.
        ModelfileInvalid: it has a template or parameters that this engine cannot translate.
    """
    registry = Registry(source, client)
    manifest = await registry.manifest()
    layers = manifest.get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) and "digest" in layer for layer in layers):
        raise ModelInvalid(f"{source.text}: its manifest has no layers")
    if source.is_ollama:
        return await _ollama_model(source, registry, layers)
    files = [file for layer in layers if (file := _oci_file(source, registry, layer)) is not None]
    if not files:
        kinds = ", ".join(sorted({str(layer.get("mediaType")) for layer in layers})) or "none"
        raise ModelUnsupported(f"{source.text}: none of its layers holds model files; their types: {kinds}")
    return Listing(files=tuple(files))


async def _ollama_model(source: RegistrySource, registry: Registry, layers: list[Mapping[str, Any]]) -> Listing:
    model: RemoteFile | None = None
    texts: dict[str, str] = {}
    licenses: list[str] = []
    for layer in layers:
        kind = str(layer.get("mediaType", "")).removeprefix(_OLLAMA)
        if kind in _LACKING:
            raise ModelUnsupported(f"{source.text}: it has a layer of kind {kind}: {_LACKING[kind]}")
        if kind == "model":
            model = _file(source, registry, layer, MODEL_FILE)
        elif kind == "license":
            licenses.append((await registry.blob(layer["digest"])).decode(errors="replace"))
        elif kind not in _UNREAD:
            texts[kind] = (await registry.blob(layer["digest"])).decode()
    if model is None:
        raise ModelUnsupported(f"{source.text}: it has no GGUF layer; Octavo runs no models of Ollama's cloud")
    try:
        modelfile = Modelfile(
            source=f"./{MODEL_FILE}",
            template=texts.get("template", ""),
            system=texts.get("system", ""),
            parameters=check_all(json.loads(texts.get("params", "{}"))),
            messages=tuple((one["role"], one["content"]) for one in json.loads(texts.get("messages", "[]"))),
            licenses=tuple(licenses),
        )
        text = modelfile.render()
        parse_modelfile(text)  # which checks the template
    except (ModelfileInvalid, RequestInvalid) as error:
        raise ModelfileInvalid(f"{source.text}: {error}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelInvalid(f"{source.text}: its parameters or messages cannot be read: {error}") from error
    return Listing(files=(model,), modelfile=text)


def _oci_file(source: RegistrySource, registry: Registry, layer: Mapping[str, Any]) -> RemoteFile | None:
    """The file, or archive of files, that a layer is; None: it is nothing of a model."""
    kind = str(layer.get("mediaType", ""))
    annotations = layer.get("annotations") or {}
    title = next((PurePosixPath(annotations[name]).name for name in _TITLES if name in annotations), "")
    if "gguf" in kind:
        return _file(source, registry, layer, PurePosixPath(title) if title.endswith(".gguf") else MODEL_FILE)
    if kind.endswith("zstd"):
        raise ModelUnsupported(f"{source.text}: it has a layer compressed by zstd; build the image with gzip or none")
    if title.endswith(MODEL_SUFFIXES) and not kind.endswith((".tar", ".tar+gzip", ".tar.gzip")):
        return _file(source, registry, layer, PurePosixPath(title))
    if "tar" in kind:
        return _file(source, registry, layer, PurePosixPath(layer["digest"].replace(":", "-")), is_archive=True)
    return None


def _file(
    source: RegistrySource,
    registry: Registry,
    layer: Mapping[str, Any],
    name: PurePosixPath,
    *,
    is_archive: bool = False,
) -> RemoteFile:
    digest = str(layer["digest"])
    if not digest.startswith("sha256:"):
        raise ModelInvalid(f"{source.text}: {digest[:50]} is no SHA-256")
    size = layer.get("size")
    return RemoteFile(
        name=name,
        url=registry.blob_url(digest),
        what=source.text,
        headers=registry.headers,
        num_bytes=size if isinstance(size, int) else None,
        sha256=digest.removeprefix("sha256:"),
        is_archive=is_archive,
    )


async def push(
    source: RegistrySource,
    model: Path,
    modelfile: Modelfile,
    config: Mapping[str, str],
    *,
    client: httpx.AsyncClient,
    on_progress: Progress = lambda _done, _total: None,
) -> None:
    """Upload a model as Ollama's clients know it; what the registry has is not sent again.

    Args:
        source: where to; an ollama:// source.
        model: the GGUF file.
        modelfile: what the other layers say.
        config: what Ollama tells of a model beside its layers: model_family, model_type, file_type.
        client: of HTTP.
        on_progress: is told how much of the file has gone.

    Raises:
        SourceForbidden, SourceUnreachable, ModelNotFound: the registry does not take it.
    """
    registry = Registry(source, client)
    num_bytes, sha256 = await asyncio.to_thread(lambda: (model.stat().st_size, digest_of(model)))
    digest = f"sha256:{sha256}"
    layers: list[dict[str, Any]] = [{"mediaType": f"{_OLLAMA}model", "digest": digest, "size": num_bytes}]
    if not await registry.has_blob(digest):
        await registry.upload(digest, _told(chunks(model), num_bytes, on_progress), num_bytes)
    on_progress(num_bytes, num_bytes)
    texts = [("template", modelfile.template), ("system", modelfile.system)]
    texts += [("license", text) for text in modelfile.licenses]
    texts += [("params", json.dumps(modelfile.parameters))] if modelfile.parameters else []
    messages = [{"role": role, "content": content} for role, content in modelfile.messages]
    texts += [("messages", json.dumps(messages))] if messages else []
    for kind, text in texts:
        if text:
            layers.append(await _upload(registry, _OLLAMA + kind, text.encode()))
    about = {
        "model_format": "gguf",
        "model_families": [config["model_family"]],
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
    } | dict(config)
    described = await _upload(registry, _CONFIG, json.dumps(about).encode())
    await registry.put_manifest({"schemaVersion": 2, "mediaType": MANIFEST, "config": described, "layers": layers})


async def _upload(registry: Registry, kind: str, content: bytes) -> dict[str, Any]:
    sha256 = hashlib.sha256(content).hexdigest()
    layer = {"mediaType": kind, "digest": f"sha256:{sha256}", "size": len(content)}

    async def once() -> AsyncIterator[bytes]:
        yield content

    if not await registry.has_blob(f"sha256:{sha256}"):
        await registry.upload(f"sha256:{sha256}", once(), len(content))
    return layer


async def _told(content: AsyncIterator[bytes], total: int, on_progress: Progress) -> AsyncIterator[bytes]:
    done = 0
    async for data in content:
        yield data
        done += len(data)
        on_progress(done, total)
