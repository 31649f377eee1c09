from __future__ import annotations

import asyncio
import hashlib
import http.server
import threading
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest

from octavo_engine.errors import ModelInvalid, ModelNotFound, SourceForbidden, SourceUnreachable, StorageFull
from octavo_engine.store import local
from octavo_engine.store.progress import ProgressLine
from octavo_engine.store.pull import Hub, pull
from octavo_engine.store.source import HUB, Source, parse_source

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = b"GGUF" + bytes(range(256)) * 4000  # about a megabyte
SHA256 = hashlib.sha256(MODEL).hexdigest()
PATH = "/org/repo/resolve/main/model.gguf"
SOURCE = parse_source("hf://org/repo:model.gguf")


@dataclass
class ModelServer:
    """A web server with one file, which behaves as the test says, and remembers what it was asked."""

    content: bytes = MODEL
    etag: str | None = '"v1"'
    linked_etag: str | None = None  # the hub's digest, on a redirect as the hub sends it
    break_after: list[int] = field(default_factory=list)  # bytes after which each next response breaks off
    statuses: list[int] = field(default_factory=list)  # what the next responses are, before any 200
    token: str | None = None
    ranges: bool = True
    announce: bool = True  # send Content-Length
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    port: int = 0


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET as the server's state says."""

    server: ModelHTTPServer

    def log_message(self, *_arguments: object) -> None:
        """Be silent."""

    def do_GET(self) -> None:
        """Answer."""
        state = self.server.state
        state.requests.append((self.path, dict(self.headers.items())))
        if state.statuses:
            self.simple(state.statuses.pop(0))
        elif state.token is not None and self.headers.get("Authorization") != f"Bearer {state.token}":
            self.simple(401)
        elif self.path not in {PATH, "/blob"}:
            self.simple(404)
        elif state.linked_etag is not None and self.path == PATH:
            self.simple(302, {"Location": "/blob", "X-Linked-ETag": f'"{state.linked_etag}"'})
        else:
            self.file(state)

    def simple(self, status: int, headers: dict[str, str] | None = None) -> None:
        """Answer without a body."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def file(self, state: ModelServer) -> None:
        """Answer with the file, or what of it was asked for."""
        wanted, total = self.headers.get("Range"), len(state.content)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and state.ranges else 0
        if self.headers.get("If-Range", state.etag) != state.etag:
            start = 0
        if start and start >= total:
            self.simple(416, {"Content-Range": f"bytes */{total}"})
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if state.announce:
            self.send_header("Content-Length", str(total - start))
        if state.etag is not None:
            self.send_header("ETag", state.etag)
        self.end_headers()
        end = start + state.break_after.pop(0) if state.break_after else total
        self.wfile.write(state.content[start:end])
        self.close_connection = True


class ModelHTTPServer(http.server.ThreadingHTTPServer):
    """Knows how to behave."""

    def __init__(self, state: ModelServer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.state = state


@pytest.fixture
def server() -> Iterator[ModelServer]:
    state = ModelServer()
    with ModelHTTPServer(state) as listening:
        state.port = listening.server_port
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        listening.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "models" / "model.gguf"


def fetch(
    server: ModelServer,
    target: Path,
    *,
    source: Source = SOURCE,
    token: str | None = None,
    sha256: str | None = None,
    num_retries: int = 3,
    num_pulls: int = 1,
) -> list[int]:
    """Pull without waiting between attempts; return the progress told."""
    told: list[int] = []
    hub = Hub(endpoint=f"http://127.0.0.1:{server.port}", token=token)

    async def all_pulls() -> None:
        pulls = (
            pull(
                source,
                target,
                hub=hub,
                sha256=sha256,
                on_progress=lambda done, _total: told.append(done),
                retry_delays=[0.0] * num_retries,
            )
            for _ in range(num_pulls)
        )
        await asyncio.gather(*pulls)

    asyncio.run(all_pulls())
    return told


def leftovers(target: Path) -> set[str]:
    return {path.name for path in target.parent.iterdir()} - {target.name}


def test_a_file_comes_whole_and_leaves_nothing_beside_it(server: ModelServer, target: Path) -> None:
    told = fetch(server, target)
    assert target.read_bytes() == MODEL
    assert leftovers(target) == set()
    assert told[-1] == len(MODEL)
    assert told == sorted(told)


def test_a_broken_connection_is_resumed_where_it_broke(server: ModelServer, target: Path) -> None:
    server.break_after = [300_000, 300_000]
    fetch(server, target, sha256=SHA256)
    assert target.read_bytes() == MODEL
    ranges = [headers.get("Range") for _, headers in server.requests]
    assert ranges == [None, "bytes=300000-", "bytes=600000-"]
    assert [headers.get("If-Range") for _, headers in server.requests] == [None, '"v1"', '"v1"']


def test_another_command_goes_on_where_the_last_one_gave_up(server: ModelServer, target: Path) -> None:
    server.break_after = [300_000, 0]
    with pytest.raises(SourceUnreachable, match="goes on from there"):
        fetch(server, target, num_retries=0)
    assert not target.exists()
    fetch(server, target)
    assert target.read_bytes() == MODEL
    assert server.requests[-1][1]["Range"] == "bytes=300000-"


def test_a_file_that_changed_in_between_is_fetched_from_its_beginning(server: ModelServer, target: Path) -> None:
    server.break_after = [300_000, 0]
    with pytest.raises(SourceUnreachable):
        fetch(server, target, num_retries=0)
    server.content, server.etag = b"GGUF" + b"new" * 50_000, '"v2"'
    fetch(server, target)
    assert target.read_bytes() == server.content


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_etag_nothing_is_resumed(server: ModelServer, target: Path, etag: str | None) -> None:
    server.etag, server.break_after = etag, [300_000]
    fetch(server, target)
    assert target.read_bytes() == MODEL
    assert not any("Range" in headers for _, headers in server.requests)


def test_a_server_without_ranges_is_asked_for_the_whole_again(server: ModelServer, target: Path) -> None:
    server.ranges, server.break_after = False, [300_000]
    fetch(server, target, sha256=SHA256)
    assert target.read_bytes() == MODEL


def test_a_part_that_is_whole_already_only_takes_its_place(server: ModelServer, target: Path) -> None:
    target.parent.mkdir()
    target.with_name("model.gguf.partial").write_bytes(MODEL)
    target.with_name("model.gguf.etag").write_text('"v1"')
    fetch(server, target, sha256=SHA256)
    assert target.read_bytes() == MODEL
    assert leftovers(target) == set()


def test_a_part_that_is_longer_than_the_file_is_dropped(server: ModelServer, target: Path) -> None:
    target.parent.mkdir()
    target.with_name("model.gguf.partial").write_bytes(MODEL + b"more")
    target.with_name("model.gguf.etag").write_text('"v1"')
    fetch(server, target, sha256=SHA256)
    assert target.read_bytes() == MODEL


def test_the_hubs_digest_is_held_against_the_file(server: ModelServer, target: Path) -> None:
    server.linked_etag = SHA256
    fetch(server, target)
    assert target.read_bytes() == MODEL
    target.unlink()
    server.linked_etag = "0" * 64
    with pytest.raises(ModelInvalid, match=f"is {SHA256}, expected 0000"):
        fetch(server, target)
    assert not target.exists()
    assert leftovers(target) == {"model.gguf.etag"}


def test_the_digest_of_the_catalogue_is_held_against_the_file(server: ModelServer, target: Path) -> None:
    with pytest.raises(ModelInvalid, match="expected 1111"):
        fetch(server, target, sha256="1" * 64)


def test_busy_servers_are_asked_again(server: ModelServer, target: Path) -> None:
    server.statuses = [503, 429]
    fetch(server, target)
    assert target.read_bytes() == MODEL


def test_a_server_that_stays_busy_is_given_up(server: ModelServer, target: Path) -> None:
    server.statuses = [503] * 10
    with pytest.raises(SourceUnreachable, match=r"hf://org/repo:model.gguf.*answers 503"):
        fetch(server, target, num_retries=2)
    assert len(server.requests) == 3


def test_a_server_that_is_not_there_is_unreachable(target: Path) -> None:
    with pytest.raises(SourceUnreachable, match=r"127\.0\.0\.1"):
        fetch(ModelServer(port=1), target, num_retries=0)


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (404, ModelNotFound, f"hf://org/repo:model.gguf is not there: .*404.*{PATH}"),
        (401, SourceForbidden, "set HF_TOKEN"),
        (403, SourceForbidden, "set HF_TOKEN"),
        (418, SourceUnreachable, "418"),
    ],
)
def test_a_refusal_says_what_and_what_to_do(
    server: ModelServer, target: Path, status: int, error: type[Exception], message: str
) -> None:
    server.statuses = [status]
    with pytest.raises(error, match=message):
        fetch(server, target)
    assert len(server.requests) == 1


def test_the_token_is_sent_to_the_hub_and_to_nobody_else(server: ModelServer, target: Path) -> None:
    server.token = "right"  # noqa: S105 - of a server that lives for this test
    fetch(server, target, token="right")  # noqa: S106 - the same
    assert target.read_bytes() == MODEL
    with pytest.raises(SourceForbidden, match="the token in HF_TOKEN does not give access"):
        fetch(server, target.with_name("b.gguf"), token="wrong")  # noqa: S106 - the same
    web = parse_source(f"http://127.0.0.1:{server.port}{PATH}")
    with pytest.raises(SourceForbidden):
        fetch(server, target.with_name("c.gguf"), source=web, token="right")  # noqa: S106 - the same
    assert "Authorization" not in server.requests[-1][1]


@pytest.mark.parametrize("content", [b"<html>log in</html>", b"GG", b""])
def test_what_is_not_a_gguf_file_is_refused(server: ModelServer, target: Path, content: bytes) -> None:
    server.content = content
    with pytest.raises(ModelInvalid):
        fetch(server, target)
    assert not target.exists()


def test_a_file_that_does_not_fit_is_refused_before_it_comes(server: ModelServer, target: Path) -> None:
    server.content = HugeContent(MODEL)
    with pytest.raises(StorageFull, match=r"needs .* GB more, and .* has .* GB free"):
        fetch(server, target)


class HugeContent(bytes):
    """Claims to be a hundred petabytes."""

    __slots__ = ()

    def __len__(self) -> int:
        return 10**17


def test_two_pulls_of_one_file_fetch_it_once(server: ModelServer, target: Path) -> None:
    fetch(server, target, num_pulls=2)
    assert target.read_bytes() == MODEL
    assert len(server.requests) == 1
    assert leftovers(target) == set()


def test_without_an_announced_length_the_whole_is_what_comes(server: ModelServer, target: Path) -> None:
    server.announce = False
    fetch(server, target, sha256=SHA256)
    assert target.read_bytes() == MODEL


@pytest.mark.parametrize(
    ("text", "path", "url"),
    [
        ("hf://o/r:f.gguf", "hf/o/r/main/f.gguf", f"{HUB}/o/r/resolve/main/f.gguf"),
        ("hf://o/r@v1.0:d/f.gguf", "hf/o/r/v1.0/d/f.gguf", f"{HUB}/o/r/resolve/v1.0/d/f.gguf"),
        ("hf://o/r@refs/pr/1:f.gguf", "hf/o/r/refs--pr--1/f.gguf", f"{HUB}/o/r/resolve/refs%2Fpr%2F1/f.gguf"),
        ("https://h:8080/a/f.gguf?sig=1", "https/h_8080/a/f.gguf", "https://h:8080/a/f.gguf?sig=1"),
        ("http://u:p@h/f.gguf", "http/h/f.gguf", "http://u:p@h/f.gguf"),
    ],
)
def test_a_source_has_a_place_in_the_store_and_an_address(text: str, path: str, url: str) -> None:
    source = parse_source(text)
    assert source.path == PurePosixPath(path)
    assert source.url(HUB) == url


@pytest.mark.parametrize(
    "text",
    [
        "hf://org/repo",
        "hf://repo:f.gguf",
        "hf://org/repo:f.safetensors",
        "hf://org/repo:../../f.gguf",
        "https://host/",
        "https://host/model.bin",
        "https://host/a/../../f.gguf",
        "https://host/%2e%2e/f.gguf",
        "s3://bucket/f.gguf",
    ],
)
def test_a_source_that_names_no_file_is_refused(text: str) -> None:
    with pytest.raises(ModelNotFound):
        parse_source(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with two models."""
    root = tmp_path / "store"
    for place in (local.CATALOGUE["smollm2"].file, "hf/org/repo/main/other.gguf"):
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"GGUF")
    return root


def test_a_model_is_found_by_short_name_by_place_and_by_path(root: Path) -> None:
    smollm2 = root / local.CATALOGUE["smollm2"].file
    assert local.locate("smollm2", root).path == smollm2
    assert local.locate("smollm2", root).name == "smollm2"
    assert local.locate(smollm2.stem, root).path == smollm2
    assert local.locate(str(smollm2), root / "elsewhere").path == smollm2
    assert local.locate("hf/org/repo/main/other", root).name == "other"
    assert local.locate("hf://org/repo:other.gguf", root).is_missing is False


def test_a_folder_with_a_config_is_a_model_of_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    (folder / "config.json").touch()
    location = local.locate(str(folder), tmp_path)
    assert (location.name, location.path, location.is_missing) == ("tiny-llama", folder, False)


def test_what_has_a_source_may_be_missing_and_then_has_a_place_to_go(tmp_path: Path) -> None:
    for model in ("smollm2", "hf://org/repo:other.gguf"):
        location = local.locate(model, tmp_path)
        assert location.is_missing
        assert location.source is not None
        assert location.path.is_relative_to(tmp_path)


def test_a_model_that_is_not_there_is_told_with_what_is(root: Path) -> None:
    with pytest.raises(ModelNotFound, match="known names: hf/org/repo/main/other, smollm2"):
        local.locate("gpt", root)
    with pytest.raises(ModelNotFound, match=r"mistyped.gguf is not there; in .*: SmolLM2.*\.gguf"):
        local.locate(str(root / "mistyped.gguf"), root)
    with pytest.raises(ModelNotFound, match=r"is a folder without config\.json; give one file: SmolLM2"):
        local.locate(str(root), root)
    with pytest.raises(ModelNotFound, match="there is no folder"):
        local.locate(str(root / "no" / "folder.gguf"), root)


def test_the_list_has_names_that_locate_understands(root: Path) -> None:
    models = local.list_models(root)
    assert [model.name for model in models] == ["hf/org/repo/main/other", "smollm2"]
    assert [local.locate(model.name, root).path for model in models] == [model.path for model in models]
    assert models[0].num_bytes == 4
    assert local.list_models(root / "empty") == []


def test_a_removed_model_takes_its_empty_folders_along_and_no_others(root: Path) -> None:
    local.remove("hf/org/repo/main/other", root)
    assert [path.name for path in root.iterdir()] == [local.CATALOGUE["smollm2"].file]
    with pytest.raises(ModelNotFound, match="octavo list"):
        local.remove("hf://org/repo:other.gguf", root)


def test_files_outside_the_store_are_never_removed(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "mine.gguf"
    outside.write_bytes(b"GGUF")
    for name in (str(outside), "../mine", "../mine.gguf"):
        with pytest.raises(ModelNotFound):
            local.remove(name, root)
    assert outside.exists()


def test_the_store_is_where_xdg_says(tmp_path: Path) -> None:
    assert local.default_root({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "octavo" / "models"
    assert local.default_root({"HOME": str(tmp_path)}) == tmp_path / ".cache" / "octavo" / "models"


@pytest.mark.model
def test_the_catalogue_has_the_digest_of_the_demo_model(smollm2_path: Path) -> None:
    with smollm2_path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == local.CATALOGUE["smollm2"].sha256


def test_progress_in_a_log_is_a_line_for_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    import sys  # noqa: PLC0415 - capsys has replaced sys.stderr by now

    progress = ProgressLine("m.gguf", sys.stderr)
    for done in range(0, 2_000_001, 1000):
        progress.show(done, 2_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[5].startswith("m.gguf:  50 % of 2 MB, ")
