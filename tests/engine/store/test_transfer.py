from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from octavo_engine.errors import ModelInvalid, ModelNotFound, SourceForbidden, SourceUnreachable, StorageFull
from octavo_engine.store.progress import ProgressLine
from octavo_engine.store.source import parse_source

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.engine.store.conftest import ModelServer

    Fetch = Callable[..., list[int]]

PART = 300_000


def leftovers(target: Path) -> set[str]:
    return {path.name for path in target.parent.iterdir()} - {target.name}


def spans(server: ModelServer) -> set[tuple[int, int]]:
    """First and last byte of each range that was asked for; the server may see late what was given up."""
    return {(int(begin), int(end)) for begin, end in (text.split("-") for text in server.fetched_ranges())}


def test_a_file_comes_whole_and_leaves_nothing_beside_it(fetch: Fetch, target: Path, content: bytes) -> None:
    told = fetch(target)
    assert target.read_bytes() == content
    assert leftovers(target) == set()
    assert told[-1] == len(content)
    assert told == sorted(told)


def test_a_long_file_comes_in_parts_at_once(fetch: Fetch, server: ModelServer, target: Path, content: bytes) -> None:
    told = fetch(target, part_bytes=PART)
    assert target.read_bytes() == content
    assert sorted(server.fetched_ranges(), key=lambda text: int(text.split("-")[0])) == [
        "0-299999", "300000-599999", "600000-899999", "900000-1024003"
    ]  # fmt: skip
    assert told[-1] == len(content)


def test_a_broken_connection_is_resumed_where_it_broke(
    fetch: Fetch, server: ModelServer, target: Path, content: bytes, sha256: str
) -> None:
    server.break_after = [300_000, 300_000]
    fetch(target, sha256=sha256)
    assert target.read_bytes() == content
    assert server.fetched_ranges() == ["0-1024003", "300000-1024003", "600000-1024003"]
    assert {headers.get("If-Range") for _, headers in server.requests} == {None, '"v1"'}


@pytest.mark.parametrize("part_bytes", [2**30, PART], ids=["in one part", "in parts"])
def test_another_command_goes_on_where_the_last_one_gave_up(
    fetch: Fetch, server: ModelServer, target: Path, content: bytes, part_bytes: int
) -> None:
    server.break_after = [100_000] + [0] * 40
    with pytest.raises(SourceUnreachable, match="goes on from there"):
        fetch(target, num_retries=2, part_bytes=part_bytes)
    assert not target.exists()
    done = json.loads(target.with_name("model.gguf.partial.json").read_bytes())["done"]
    assert sum(done) == 100_000 or len(done) > 1  # of several parts the first that breaks ends the others' attempts
    server.break_after, server.requests = [], []
    fetch(target, part_bytes=part_bytes)
    assert target.read_bytes() == content
    assert "bytes=0-0" not in [headers.get("Range") for _, headers in server.requests]
    assert sum(end - begin + 1 for begin, end in spans(server)) == len(content) - sum(done)


def test_a_server_that_stalls_is_asked_again(fetch: Fetch, server: ModelServer, target: Path, content: bytes) -> None:
    server.stall_after = [300_000]
    fetch(target, stall_seconds=0.2)
    assert target.read_bytes() == content
    assert server.fetched_ranges() == ["0-1024003", "300000-1024003"]


def test_a_file_that_changed_in_between_is_fetched_from_its_beginning(
    fetch: Fetch, server: ModelServer, target: Path
) -> None:
    server.break_after = [300_000, 0]
    with pytest.raises(SourceUnreachable):
        fetch(target, num_retries=0)
    server.break_after = []
    server.content, server.etag = b"GGUF" + b"new" * 50_000, '"v2"'
    fetch(target)
    assert target.read_bytes() == server.content


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_etag_nothing_is_resumed(
    fetch: Fetch, server: ModelServer, target: Path, content: bytes, etag: str | None
) -> None:
    server.etag, server.break_after = etag, [300_000]
    fetch(target)
    assert target.read_bytes() == content
    assert server.fetched_ranges() == []


def test_with_a_digest_parts_need_no_etag(
    fetch: Fetch, server: ModelServer, target: Path, content: bytes, sha256: str
) -> None:
    server.etag, server.break_after = None, [300_000]
    fetch(target, sha256=sha256)
    assert target.read_bytes() == content
    assert server.fetched_ranges() == ["0-1024003", "300000-1024003"]


def test_a_server_without_ranges_is_asked_for_the_whole_again(
    fetch: Fetch, server: ModelServer, target: Path, content: bytes, sha256: str
) -> None:
    server.ranges, server.break_after = False, [300_000]
    fetch(target, sha256=sha256)
    assert target.read_bytes() == content


LIES: dict[str, Callable[[int, int, bytes], tuple[int, int, bytes]]] = {
    "another range": lambda begin, end, content: (begin + 1, end, content[1:]),
    "more than asked for": lambda begin, end, content: (
        (begin, end, content) if begin else (begin, end + 9, content * 2)
    ),
    "another length": lambda begin, end, _content: (begin, end + 10**6, b""),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_about_ranges_is_given_up(fetch: Fetch, server: ModelServer, target: Path, lie: str) -> None:
    server.lie = LIES[lie]
    with pytest.raises(SourceUnreachable):
        fetch(target, num_retries=2, part_bytes=PART)
    assert not target.exists()


def test_a_server_that_sends_other_bytes_is_found_out(
    fetch: Fetch, server: ModelServer, target: Path, sha256: str
) -> None:
    server.lie = lambda begin, end, content: (begin, end, content[:-1] + b"x")
    with pytest.raises(ModelInvalid, match=f"expected {sha256}"):
        fetch(target, part_bytes=PART, sha256=sha256)
    assert leftovers(target) == set()


def test_the_hubs_digest_is_held_against_the_file(
    fetch: Fetch, server: ModelServer, target: Path, content: bytes, sha256: str
) -> None:
    server.linked_etag = sha256
    fetch(target)
    assert target.read_bytes() == content
    target.unlink()
    server.linked_etag = "0" * 64
    with pytest.raises(ModelInvalid, match=f"is {sha256}, expected 0000"):
        fetch(target)
    assert not target.exists()
    assert leftovers(target) == set()


def test_the_digest_of_the_catalogue_is_held_against_the_file(fetch: Fetch, target: Path) -> None:
    with pytest.raises(ModelInvalid, match="expected 1111"):
        fetch(target, sha256="1" * 64)


def test_busy_servers_are_asked_again(fetch: Fetch, server: ModelServer, target: Path, content: bytes) -> None:
    server.statuses = [503, 429]
    fetch(target)
    assert target.read_bytes() == content


def test_a_server_that_stays_busy_is_given_up(fetch: Fetch, server: ModelServer, target: Path) -> None:
    server.statuses = [503] * 10
    with pytest.raises(SourceUnreachable, match=r"hf://org/repo:model.gguf.*answers 503"):
        fetch(target, num_retries=2)
    assert len(server.requests) == 3


def test_a_server_that_is_not_there_is_unreachable(fetch: Fetch, server: ModelServer, target: Path) -> None:
    server.port = 1
    with pytest.raises(SourceUnreachable, match=r"127\.0\.0\.1"):
        fetch(target, num_retries=0)


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (404, ModelNotFound, "hf://org/repo:model.gguf is not there: .*404.*/org/repo/resolve/main/model.gguf"),
        (401, SourceForbidden, "set HF_TOKEN"),
        (403, SourceForbidden, "set HF_TOKEN"),
        (418, SourceUnreachable, "418"),
    ],
)
def test_a_refusal_says_what_and_what_to_do(
    fetch: Fetch, server: ModelServer, target: Path, *, status: int, error: type[Exception], message: str
) -> None:
    server.statuses = [status]
    with pytest.raises(error, match=message):
        fetch(target)
    assert len(server.requests) == 1


def test_the_token_is_sent_to_the_hub_and_to_nobody_else(
    fetch: Fetch, server: ModelServer, target: Path, content: bytes
) -> None:
    server.token = "right"  # noqa: S105 - of a server that lives for this test
    fetch(target, token="right")  # noqa: S106 - the same
    assert target.read_bytes() == content
    with pytest.raises(SourceForbidden, match="the token in HF_TOKEN does not give access"):
        fetch(target.with_name("b.gguf"), token="wrong")  # noqa: S106 - the same
    web = parse_source(f"http://user:secret@127.0.0.1:{server.port}/org/repo/resolve/main/model.gguf?sig=secret")
    server.token = None
    with pytest.raises(ModelNotFound) as told:
        fetch(target.with_name("c.gguf"), source=web, token="right")  # noqa: S106 - the same
    assert "Bearer" not in str(server.requests[-1][1])
    assert str(told.value).count("secret") == str(told.value).count(web.text) * 2


@pytest.mark.parametrize("body", [b"<html>log in</html>", b"GG", b""])
def test_what_is_not_a_gguf_file_is_refused(fetch: Fetch, server: ModelServer, target: Path, body: bytes) -> None:
    server.content = body
    with pytest.raises(ModelInvalid):
        fetch(target)
    assert not target.exists()


def test_a_file_that_does_not_fit_is_refused_before_it_comes(
    fetch: Fetch, server: ModelServer, target: Path, content: bytes
) -> None:
    server.content = HugeContent(content)
    with pytest.raises(StorageFull, match=r"needs .* GB more, and .* has .* GB free"):
        fetch(target)


class HugeContent(bytes):
    """Claims to be a hundred petabytes."""

    __slots__ = ()

    def __len__(self) -> int:
        return 10**17


@pytest.mark.parametrize("in_store", [False, True], ids=["to a file", "into the store"])
def test_a_disk_that_fills_up_leaves_nothing_broken(
    fetch: Fetch, server: ModelServer, target: Path, content: bytes, *, in_store: bool
) -> None:
    store = target.parent if in_store else None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))  # the kernel lets no file grow beyond
    try:
        with pytest.raises(StorageFull, match="no space left"):
            fetch(target, store=store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not target.exists()
    fetch(target, store=store)
    assert target.read_bytes() == content
    assert int(server.fetched_ranges()[-1].split("-")[0]) > 0


def test_two_pulls_of_one_file_fetch_it_once(fetch: Fetch, server: ModelServer, target: Path, content: bytes) -> None:
    fetch(target, num_pulls=2)
    assert target.read_bytes() == content
    assert server.fetched_ranges() == ["0-1024003"]
    assert leftovers(target) == set()


def test_without_an_announced_length_the_whole_is_what_comes(
    fetch: Fetch, server: ModelServer, target: Path, content: bytes, sha256: str
) -> None:
    server.announce, server.ranges = False, False
    fetch(target, sha256=sha256)
    assert target.read_bytes() == content


PULL = """
import asyncio, pathlib, sys
from octavo_engine.store.pull import pull
from octavo_engine.store.remote import Hub
from octavo_engine.store.source import parse_source
from octavo_engine.store.transfer import Limits
endpoint, target = sys.argv[1:]
source, limits = parse_source("hf://org/repo:model.gguf"), Limits(part_bytes=300_000)
asyncio.run(pull(source, pathlib.Path(target), hub=Hub(endpoint), limits=limits))
"""


def test_a_killed_pull_leaves_no_file_and_the_next_one_goes_on(
    fetch: Fetch, server: ModelServer, target: Path, content: bytes, wait_until: Callable[..., None]
) -> None:
    server.stall_after = [150_000] * 4
    command = [sys.executable, "-c", PULL, f"http://127.0.0.1:{server.port}", str(target)]
    with subprocess.Popen(command) as process:
        partial = target.with_name("model.gguf.partial")
        wait_until(
            lambda: len(server.fetched_ranges()) == 4 and partial.exists() and partial.stat().st_size > 1_000_000
        )
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    server.requests.clear()
    fetch(target, part_bytes=PART)
    assert target.read_bytes() == content
    assert "bytes=0-0" not in [headers.get("Range") for _, headers in server.requests]
    assert leftovers(target) == set()


def test_progress_in_a_log_is_a_line_for_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressLine("m.gguf", sys.stderr)
    for done in range(0, 2_000_001, 1000):
        progress.show(done, 2_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[5].startswith("m.gguf:  50 % of 2 MB, ")
