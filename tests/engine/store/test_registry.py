"""Models in a registry: Debian's docker-registry on this machine, and what of the protocol it does not ask for."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from octavo_engine.cli import main
from octavo_engine.errors import (
    ModelfileInvalid,
    ModelInvalid,
    ModelNotFound,
    ModelUnsupported,
    SourceForbidden,
    SourceUnreachable,
)
from octavo_engine.modelfile import Modelfile
from octavo_engine.store import local
from octavo_engine.store.artifacts import push
from octavo_engine.store.pull import pull
from octavo_engine.store.registry import MANIFEST, Registry
from octavo_engine.store.remote import Hub
from octavo_engine.store.source import RegistrySource, parse_source
from octavo_engine.store.transfer import Limits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.engine.conftest import WriteGGUF

Layer = tuple[str, bytes, dict[str, str]]  # type, content, annotations
MODEL = b"GGUF" + bytes(range(256)) * 1000
OLLAMA = "application/vnd.ollama.image."
OCI = "application/vnd.oci.image."
DIGEST = f"sha256:{'0' * 64}"


async def bring(text: str, store: Path) -> local.Location:
    source = parse_source(text)
    await pull(source, store / source.path, hub=Hub(), store=store, limits=Limits(delays=(0.0,)))
    return local.locate(text, store)


def source_of(text: str) -> RegistrySource:
    source = parse_source(text)
    assert isinstance(source, RegistrySource)
    return source


def upload(registry: str, repository: str, content: bytes) -> str:
    """Put a blob there, as any client does."""
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    begun = httpx.post(f"http://{registry}/v2/{repository}/blobs/uploads/")
    url = httpx.URL(begun.headers["Location"]).copy_merge_params({"digest": digest})
    httpx.put(url, content=content, headers={"Content-Type": "application/octet-stream"}).raise_for_status()
    return digest


def publish(registry: str, repository: str, layers: list[Layer], tag: str = "latest") -> str:
    """Put an artifact there; return the manifest's digest."""
    described: list[dict[str, Any]] = [
        {
            "mediaType": kind,
            "digest": upload(registry, repository, content),
            "size": len(content),
            "annotations": annotations,
        }
        for kind, content, annotations in layers
    ]
    config = {"mediaType": f"{OCI}config.v1+json", "digest": upload(registry, repository, b"{}"), "size": 2}
    manifest = {"schemaVersion": 2, "mediaType": f"{OCI}manifest.v1+json", "config": config, "layers": described}
    return put_manifest(registry, repository, manifest, "latest")


def put_manifest(registry: str, repository: str, manifest: dict[str, Any], tag: str) -> str:
    body = json.dumps(manifest).encode()
    headers = {"Content-Type": manifest["mediaType"]}
    httpx.put(f"http://{registry}/v2/{repository}/manifests/{tag}", content=body, headers=headers).raise_for_status()
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def archive(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


MODELFILE = Modelfile(
    source="x",
    template="{{ .System }}: {{ .Prompt }}",
    system="Be brief.",
    parameters={"temperature": 0.5, "stop": ("<end>", "\n")},
    messages=(("user", "Hi"), ("assistant", "Hello")),
    licenses=("MIT", "and another"),
)
CONFIG = {"model_family": "llama", "model_type": "1M", "file_type": "Q4_1"}


async def test_what_is_pushed_is_pulled_as_it_was(registry: str, tmp_path: Path) -> None:
    weights = tmp_path / "weights.gguf"
    weights.write_bytes(MODEL)
    text = f"ollama://{registry}/team/model:v1"
    told: list[int] = []
    async with httpx.AsyncClient() as client:
        for _ in range(2):  # the second time all is there
            await push(
                source_of(text),
                weights,
                MODELFILE,
                CONFIG,
                client=client,
                on_progress=lambda done, _: told.append(done),
            )
    assert told == [len(MODEL), len(MODEL), len(MODEL)]
    location = await bring(text, tmp_path / "store")
    assert location.model.read_bytes() == MODEL
    assert location.modelfile is not None
    assert location.modelfile.over(Modelfile(source="x")) == MODELFILE
    assert location.modelfile.source == text
    assert location.name == f"{registry}/team/model:v1"
    async with httpx.AsyncClient(base_url=f"http://{registry}/v2/team/model/") as client:
        manifest = (await client.get("manifests/v1", headers={"Accept": MANIFEST})).json()
        about = (await client.get(f"blobs/{manifest['config']['digest']}")).json()
    assert manifest["layers"][0]["mediaType"] == f"{OLLAMA}model"
    assert about == (
        CONFIG
        | {"model_format": "gguf", "model_families": ["llama"], "architecture": "amd64", "os": "linux"}
        | {"rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in manifest["layers"]]}}
    )


def test_the_command_line_pushes_a_model_under_the_name_of_its_place(
    registry: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_tiny_gguf: WriteGGUF,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokens = ["ĠĠ", "Ġ", *map(chr, range(0x21, 0x7F))]
    tokenizer = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": [1] * 96, "merges": ["Ġ Ġ"]}
    weights = write_tiny_gguf(metadata={f"tokenizer.ggml.{name}": value for name, value in tokenizer.items()})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = local.default_root(os.environ)
    store.mkdir(parents=True)
    shutil.copy(weights, store / "tiny.gguf")
    name = f"{registry}/team/tiny:v2"
    main(["cp", "tiny", name])
    main(["push", name])
    assert f"pushed to ollama://{name}" in capsys.readouterr().out
    main(["pull", f"ollama://{name}", "--output", str(tmp_path / "pulled.gguf")])
    assert (tmp_path / "pulled.gguf").read_bytes() == weights.read_bytes()
    with pytest.raises(SystemExit):
        main(["push", f"{registry}/team/other"])
    assert "octavo cp" in capsys.readouterr().err


async def test_a_model_to_a_file_has_its_modelfile_beside_it(registry: str, tmp_path: Path) -> None:
    publish(registry, "team/file", [(f"{OLLAMA}model", MODEL, {}), (f"{OLLAMA}system", b"Be kind.", {})])
    target = tmp_path / "model.gguf"
    await pull(parse_source(f"ollama://{registry}/team/file"), target, hub=Hub())
    location = local.locate(str(target), tmp_path / "store")
    assert target.read_bytes() == MODEL
    assert location.modelfile is not None
    assert (location.modelfile.system, location.modelfile.source) == ("Be kind.", str(target))


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (
            [(f"{OLLAMA}template", b"{{ .X | nonsense }}", {})],
            ModelfileInvalid,
            "line 2: TEMPLATE line 1: the field .X",
        ),
        ([(f"{OLLAMA}params", b'{"mirostat": 2}', {})], ModelfileInvalid, "mirostat 2 is not supported"),
        ([(f"{OLLAMA}params", b"[1]", {})], ModelInvalid, "cannot be read"),
        ([(f"{OLLAMA}adapter", b"lora", {})], ModelUnsupported, "layer of kind adapter: adapters are not fetched"),
    ],
)
async def test_what_a_model_of_ollamas_has_that_the_engine_lacks_is_told(
    registry: str, tmp_path: Path, layers: list[Layer], error: type[Exception], message: str
) -> None:
    publish(registry, "team/lacking", [(f"{OLLAMA}model", MODEL, {}), *layers])
    with pytest.raises(error, match=message):
        await bring(f"ollama://{registry}/team/lacking", tmp_path)
    assert local.list_models(tmp_path) == []


async def test_an_artifact_of_named_files_comes_as_a_folder(registry: str, tmp_path: Path) -> None:
    title = "org.opencontainers.image.title"
    layers: list[Layer] = [
        ("application/json", b"{}", {title: "config.json"}),
        ("application/octet-stream", b"weights", {"org.cncf.model.filepath": "some/model.safetensors"}),
        ("text/markdown", b"# Tiny", {title: "README.md"}),
    ]
    digest = publish(registry, "team/artifact", layers)
    for text in (f"oci://{registry}/team/artifact", f"oci://{registry}/team/artifact@{digest}"):
        location = await bring(text, tmp_path)
        files = {path.name: path.read_bytes() for path in location.model.iterdir()}
        assert files == {"config.json": b"{}", "model.safetensors": b"weights"}
    assert len({model.name for model in local.list_models(tmp_path)}) == 2


@pytest.mark.parametrize("pack", [gzip.compress, bytes], ids=["gzip", "plain"])
async def test_an_image_is_looked_through_for_a_model(
    registry: str, tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    kind = f"{OCI}layer.v1.tar" + ("+gzip" if pack is gzip.compress else "")
    layers: list[Layer] = [
        (kind, pack(archive({"etc/passwd": b"root"})), {}),
        (kind, pack(archive({"models/m.gguf": MODEL})), {}),
    ]
    digest = publish(registry, "team/image", layers)
    index = {"mediaType": f"{OCI}index.v1+json", "schemaVersion": 2, "manifests": []}
    for architecture, of in (("arm64", publish(registry, "team/image", layers[:1])), ("amd64", digest)):
        entry = {"mediaType": f"{OCI}manifest.v1+json", "digest": of, "size": 1}
        index["manifests"].append(entry | {"platform": {"architecture": architecture, "os": "linux"}})  # type: ignore[attr-defined]  # it is the list above
    put_manifest(registry, "team/image", index, "all")
    location = await bring(f"oci://{registry}/team/image:all", tmp_path)
    assert location.model.name == "m.gguf"
    assert location.model.read_bytes() == MODEL
    assert len(list((tmp_path / "blobs").iterdir())) == 1
    assert list((tmp_path / "partial").iterdir()) == []


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        ((f"{OCI}layer.v1.tar+gzip", b"no archive", {}), ModelInvalid, "no archive that can be read"),
        ((f"{OCI}layer.v1.tar+zstd", b"x", {}), ModelUnsupported, "compressed by zstd"),
        ((f"{OCI}layer.v1.tar", archive({"a.txt": b"x"}), {}), ModelInvalid, "there are no weights in it"),
        (("application/wasm", b"x", {}), ModelUnsupported, "none of its layers.*application/wasm"),
    ],
)
async def test_what_is_no_model_is_told(
    registry: str, tmp_path: Path, layer: Layer, error: type[Exception], message: str
) -> None:
    publish(registry, "team/none", [layer])
    with pytest.raises(error, match=message):
        await bring(f"oci://{registry}/team/none", tmp_path)
    assert local.list_models(tmp_path) == []


async def test_what_the_registry_does_not_have_or_that_is_not_there_is_told(registry: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"team/none:v9 is not there.*manifest unknown"):
        await bring(f"ollama://{registry}/team/none:v9", tmp_path)
    with pytest.raises(SourceUnreachable, match=r"127\.0\.0\.1:1 does not answer"):
        await bring("oci://127.0.0.1:1/a/b", tmp_path)


SOURCE = source_of("oci://registry.example/team/model")


def tokens(granted: str, asked: list[httpx.Request]) -> httpx.MockTransport:
    """A registry that sends clients to another server for a token."""

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        if request.url.host == "auth.example":
            return httpx.Response(200, json={"token": granted})
        if request.headers.get("Authorization") == "Bearer good":
            return httpx.Response(200, json={"layers": []})
        challenge = 'Bearer realm="https://auth.example/token",service="registry.example",scope="repository:x:pull"'
        return httpx.Response(401, headers={"WWW-Authenticate": challenge})

    return httpx.MockTransport(answer)


async def test_a_token_is_fetched_where_the_registry_sends_for_it_with_dockers_password(tmp_path: Path) -> None:
    password = base64.b64encode(b"me:secret").decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"registry.example": {"auth": password}}}))
    asked: list[httpx.Request] = []
    async with httpx.AsyncClient(transport=tokens("good", asked)) as client:
        registry = Registry(SOURCE, client, tmp_path / "config.json")
        assert await registry.manifest() == {"layers": []}
        assert registry.headers == {"Authorization": "Bearer good"}
    assert dict(asked[1].url.params) == {"service": "registry.example", "scope": "repository:x:pull"}
    assert asked[1].headers["Authorization"] == f"Basic {password}"


async def test_a_token_that_gives_no_access_is_told_with_the_way_in(tmp_path: Path) -> None:
    async with httpx.AsyncClient(transport=tokens("bad", [])) as client:
        with pytest.raises(SourceForbidden, match=r"`docker login registry\.example` first"):
            await Registry(SOURCE, client, tmp_path / "none.json").manifest()


async def test_a_blob_that_is_another_one_is_refused() -> None:
    transport = httpx.MockTransport(lambda _request: httpx.Response(200, content=b"something else"))
    async with httpx.AsyncClient(transport=transport) as client:
        with pytest.raises(ModelInvalid, match=f"what arrived as {DIGEST} is something else"):
            await Registry(SOURCE, client).blob(DIGEST)
