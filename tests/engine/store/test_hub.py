"""The hub's protocol, by a server that the hub's own client takes for one."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

import pytest
from huggingface_hub import hf_hub_download

from octavo_engine.errors import ModelInvalid, ModelNotFound, ModelUnsupported, SourceUnreachable
from octavo_engine.store import local
from octavo_engine.store.hub import choose
from octavo_engine.store.pull import pull
from octavo_engine.store.remote import Hub
from octavo_engine.store.source import parse_source
from octavo_engine.store.transfer import Limits

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "tiny"}',
    "model-00001-of-00002.safetensors": b"first weights" * 1000,
    "model-00002-of-00002.safetensors": b"second weights" * 1000,
    "tokenizer.json": b"{}",
    "README.md": b"# Tiny",
    "onnx/model.onnx": b"other weights",
}
GGUFS = {
    "tiny-Q4_K_M-00001-of-00002.gguf": b"GGUF one",
    "tiny-Q4_K_M-00002-of-00002.gguf": b"GGUF two",
    "tiny-Q8_0.gguf": b"GGUF eight",
}

ADAPTER = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": b"few weights" * 100,
    "checkpoint-9/adapter_model.safetensors": b"old weights",
    "tokenizer.json": b"{}",
}


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf", ".onnx"))


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class HubServer(http.server.BaseHTTPRequestHandler):
    """The hub's endpoints for repositories `org/NAME`: what is in one, and its files; large ones are elsewhere."""

    repositories: ClassVar[dict[str, dict[str, bytes]]]
    damaged: ClassVar[bytes | None]  # is sent instead of every small file
    requests: ClassVar[list[str]]

    def log_message(self, *_arguments: object) -> None:
        """Be silent."""

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer."""
        path = urlsplit(self.path).path
        self.requests.append(f"{self.command} {path}")
        match path.split("/")[1:]:
            case ["api", "models", "org", name, "revision", revision] if name in self.repositories:
                self.describe(name, revision)
            case ["org", name, "resolve", _revision, *parts] if "/".join(parts) in self.repositories.get(name, {}):
                self.file("/".join(parts), self.repositories[name]["/".join(parts)])
            case ["large", sha256]:
                contents = [content for files in self.repositories.values() for content in files.values()]
                self.answer(200, next(one for one in contents if hashlib.sha256(one).hexdigest() == sha256))
            case _:
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def describe(self, name: str, revision: str) -> None:
        """What is in a repository."""
        if revision not in {"main", COMMIT}:
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        siblings: list[dict[str, Any]] = []
        for file, content in self.repositories[name].items():
            entry: dict[str, Any] = {"rfilename": file, "size": len(content), "blobId": git_sha1(content)}
            if is_large(file):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        body = {"_id": "1", "id": f"org/{name}", "modelId": f"org/{name}", "sha": COMMIT, "private": False}
        body |= {"tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
        self.answer(200, json.dumps(body).encode())

    def file(self, name: str, content: bytes) -> None:
        """A file, or where it is."""
        sha256 = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": COMMIT}
        port = self.headers["Host"].partition(":")[2]
        if is_large(name):
            headers |= {
                "X-Linked-ETag": f'"{sha256}"',
                "X-Linked-Size": str(len(content)),
                "Location": f"http://localhost:{port}/large/{sha256}",  # another host, as the hub's CDN is
            }
            self.answer(302, b"", headers)
        else:
            headers["ETag"] = f'"{git_sha1(content)}"'
            self.answer(200, content if self.damaged is None else self.damaged, headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Answer."""
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    HubServer.repositories = {"tiny": dict(FILES), "tiny-GGUF": dict(GGUFS), "tiny-lora": dict(ADAPTER)}
    HubServer.damaged, HubServer.requests = None, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubServer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Hub(endpoint=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()


async def bring(text: str, store: Path, hub: Hub) -> local.Location:
    source = parse_source(text)
    limits = Limits(delays=(0.0,))
    await pull(source, store / source.path, hub=hub, store=store, limits=limits)
    return local.locate(text, store)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_hubs_own_client_takes_it_for_a_hub(hub: Hub, tmp_path: Path) -> None:
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        file = hf_hub_download("org/tiny", name, endpoint=hub.endpoint, cache_dir=tmp_path, token=False)
        assert Path(file).read_bytes() == FILES[name]


async def test_a_repository_of_safetensors_comes_as_a_folder_of_what_a_model_needs(hub: Hub, tmp_path: Path) -> None:
    location = await bring("hf://org/tiny", tmp_path, hub)
    assert location.model == tmp_path / "hf/org/tiny@main"
    wanted = set(FILES) - {"README.md", "onnx/model.onnx"}
    assert contents(location.model) == {name: FILES[name] for name in wanted}
    assert [model.name for model in local.list_models(tmp_path)] == ["org/tiny"]


async def test_of_a_repository_with_an_adapter_its_two_files_come(hub: Hub, tmp_path: Path) -> None:
    await pull(parse_source("hf://org/tiny-lora"), tmp_path / "sql", hub=hub)
    two = ("adapter_config.json", "adapter_model.safetensors")
    assert {path.name: path.read_bytes() for path in (tmp_path / "sql").glob("adapter*")} == {
        name: ADAPTER[name] for name in two
    }
    assert not (tmp_path / "sql" / "tokenizer.json").exists()
    assert choose([*two, "config.json"], "", "it") == [*two, "config.json"]  # a model with an adapter beside it


async def test_patterns_say_what_comes(hub: Hub, tmp_path: Path) -> None:
    location = await bring("hf://org/tiny:*.json,*-00001-*", tmp_path, hub)
    assert set(contents(location.path)) == {"config.json", "tokenizer.json", "model-00001-of-00002.safetensors"}


async def test_a_quantisation_comes_with_all_its_parts(hub: Hub, tmp_path: Path) -> None:
    location = await bring("hf://org/tiny-GGUF:q4_k_m", tmp_path, hub)
    assert location.model.name == "tiny-Q4_K_M-00001-of-00002.gguf"
    assert contents(location.path) == {name: content for name, content in GGUFS.items() if "Q4" in name}


async def test_a_part_that_is_named_brings_the_others(hub: Hub, tmp_path: Path) -> None:
    location = await bring("hf://org/tiny-GGUF:tiny-Q4_K_M-00001-of-00002.gguf", tmp_path, hub)
    assert set(contents(location.path.parent)) == {name for name in GGUFS if "Q4" in name}


async def test_what_is_here_is_not_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    await bring("hf://org/tiny", tmp_path, hub)
    HubServer.requests.clear()
    await bring("hf://org/tiny", tmp_path, hub)
    assert HubServer.requests == []


async def test_a_small_file_is_checked_against_what_git_has(hub: Hub, tmp_path: Path) -> None:
    HubServer.damaged = b'{"model_type": "tony"}'
    with pytest.raises(ModelInvalid, match="is not what git has"):
        await bring("hf://org/tiny", tmp_path, hub)
    assert local.list_models(tmp_path) == []
    HubServer.damaged = None
    await bring("hf://org/tiny", tmp_path, hub)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("hf://org/none", ModelNotFound, "no such repository.*set HF_TOKEN"),
        ("hf://org/tiny@v9", ModelNotFound, "no such repository or revision"),
        ("hf://org/tiny:Q4_0", ModelNotFound, "neither config.json with safetensors files nor GGUF"),
        ("hf://org/tiny-GGUF:Q2_K", ModelNotFound, "there is no Q2_K in the repository; there is Q4_K_M, Q8_0"),
        ("hf://org/tiny:*.bin", ModelNotFound, "no file of the repository fits"),
    ],
)
async def test_what_is_not_there_is_told(
    hub: Hub, tmp_path: Path, text: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        await bring(text, tmp_path, hub)


async def test_a_hub_that_does_not_answer_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(SourceUnreachable, match=r"the hub at http://127\.0\.0\.1:1 does not tell"):
        await bring("hf://org/tiny", tmp_path, Hub(endpoint="http://127.0.0.1:1"))


def test_of_several_models_that_in_ollamas_choice_is_taken_or_else_one_must_be_named() -> None:
    assert choose(["m-Q8_0.gguf", "m-Q4_K_M.gguf", "mmproj-m-f16.gguf"], "", "it") == ["m-Q4_K_M.gguf"]
    assert choose(["m-Q8_0.gguf", "mmproj-m-f16.gguf"], "", "it") == ["m-Q8_0.gguf"]
    with pytest.raises(ModelUnsupported, match=r"say which.*there is Q3_K_L, Q8_0"):
        choose(["m-Q8_0.gguf", "m.Q3_K_L.gguf"], "", "it")


def test_of_two_copies_of_the_same_weights_one_comes() -> None:
    names = ["config.json", "consolidated.safetensors", "model.safetensors"]
    assert choose(names, "", "it") == ["config.json", "model.safetensors"]
    assert choose(names[:2], "", "it") == names[:2]
