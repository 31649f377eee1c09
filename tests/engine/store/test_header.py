"""The header of a model that is somewhere else, fetched without the rest."""

from __future__ import annotations

import http.server
import re
import threading
from typing import TYPE_CHECKING, Any, ClassVar

import gguf
import numpy as np
import pytest

from octavo_engine.errors import ModelInvalid, ModelNotFound, SourceUnreachable
from octavo_engine.store import header
from octavo_engine.store.remote import Hub
from octavo_engine.store.source import parse_source
from octavo_engine.weights.gguf import read_header

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WEIGHT_BYTES = 64 * 2**20


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one file, in ranges or not."""

    file: ClassVar[Path]
    ranges: ClassVar[bool]
    status: ClassVar[int]
    requests: ClassVar[list[str]]

    def log_message(self, *_arguments: object) -> None:
        """Be silent."""

    def do_GET(self) -> None:
        """Answer."""
        wanted = self.headers["Range"]
        self.requests.append(wanted)
        if self.status != 200:
            self.send_response(self.status)
            self.end_headers()
            return
        total = self.file.stat().st_size
        match = re.fullmatch(r"bytes=0-(\d+)", wanted)
        assert match is not None
        length = min(int(match[1]) + 1, total) if self.ranges else total
        self.send_response(206 if self.ranges else 200)
        self.send_header("Content-Length", str(length))
        if self.ranges:
            self.send_header("Content-Range", f"bytes 0-{length - 1}/{total}")
        self.end_headers()
        try:
            with self.file.open("rb") as file:
                while length > 0 and (data := file.read(min(length, 2**16))):
                    self.wfile.write(data)
                    length -= len(data)
        except ConnectionError:
            self.close_connection = True  # the client has read enough


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """The address of the file that the test puts into Server.file."""
    Server.file, Server.ranges, Server.status, Server.requests = tmp_path / "model.gguf", True, 200, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/model.gguf"
        server.shutdown()
        thread.join()


def write_model(path: Path, *, num_tokens: int) -> None:
    """A header with a vocabulary, and weights of which the disk holds none."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token {number}" for number in range(num_tokens)])
    writer.add_tensor_info("weights", (2**14, 2**10), np.dtype(np.float32), WEIGHT_BYTES)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + WEIGHT_BYTES)


async def fetch(url: str, folder: Path) -> Any:
    folder.mkdir()  # noqa: ASYNC240 - a test may block
    return read_header(await header.fetch_headers(parse_source(url), folder, hub=Hub()))


@pytest.mark.parametrize("ranges", [True, False], ids=["a server with ranges", "a server without"])
async def test_a_header_is_read_without_the_weights(url: str, tmp_path: Path, *, ranges: bool) -> None:
    write_model(Server.file, num_tokens=10)
    Server.ranges = ranges
    fetched, local = await fetch(url, tmp_path / "fetched"), read_header(Server.file)
    assert fetched.metadata == local.metadata
    assert {name: tensor.offset for name, tensor in fetched.tensors.items()} == {
        "weights": local.tensors["weights"].offset
    }
    assert len(Server.requests) == 1


async def test_a_header_longer_than_the_first_attempt_is_fetched_in_a_second(url: str, tmp_path: Path) -> None:
    write_model(Server.file, num_tokens=150_000)
    fetched = await fetch(url, tmp_path / "fetched")
    assert fetched.metadata == read_header(Server.file).metadata
    assert Server.requests == ["bytes=0-2097151", "bytes=0-8388607"]


async def test_what_is_fetched_takes_no_more_room_than_the_header(url: str, tmp_path: Path) -> None:
    write_model(Server.file, num_tokens=10)
    await fetch(url, tmp_path / "fetched")
    (path,) = (tmp_path / "fetched").iterdir()
    assert path.stat().st_size > WEIGHT_BYTES
    assert path.stat().st_blocks * 512 <= 2**21 + 2**16


async def test_a_file_that_is_no_model_is_refused_after_the_first_bytes(url: str, tmp_path: Path) -> None:
    Server.file.write_bytes(b"<html>" + bytes(10 * 2**20))
    with pytest.raises(ModelInvalid, match="not a GGUF file"):
        await fetch(url, tmp_path / "fetched")
    assert len(Server.requests) == 1


async def test_a_corrupt_header_is_refused_with_the_place(url: str, tmp_path: Path) -> None:
    write_model(Server.file, num_tokens=10)
    data = bytearray(Server.file.read_bytes()[: 2**12])
    data[16] = 200  # so many metadata entries are not there
    Server.file.write_bytes(data)
    with pytest.raises(ModelInvalid, match=r"model\.gguf: metadata"):
        await fetch(url, tmp_path / "fetched")


@pytest.mark.parametrize(("status", "error"), [(404, ModelNotFound), (503, SourceUnreachable)])
async def test_a_server_that_does_not_give_the_file_is_told(
    url: str, tmp_path: Path, status: int, error: type[Exception]
) -> None:
    Server.status = status
    with pytest.raises(error, match=str(status)):
        await fetch(url, tmp_path / "fetched")
