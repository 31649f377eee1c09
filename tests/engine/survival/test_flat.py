"""What requests cost does not grow with how many there have been: neither memory nor time."""

from __future__ import annotations

import asyncio
import json
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.engine.conftest import ServedModel

MAX_GROWTH = 1.02
NUM_WINDOWS = 3
MAX_GROWTH_OF_WINDOW = 1.005  # of 300 requests: about a kilobyte for each
SMALL_CACHE = ("--kv-cache-memory-bytes", "1048576", "--max-model-len", "256")  # soon all of it has been touched


def resident_kib(pid: int) -> int:
    """The resident set of a process (proc(5))."""
    match = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])


class Users:
    """Users of a server who ask for little, each on a connection that is kept; some ask wrongly, and some leave."""

    def __init__(self, served: ServedModel, num_users: int) -> None:
        self._num_users = num_users
        self._host, port = served.url.removeprefix("http://").split(":")
        self._port = int(port)
        self._served = served
        self._numbers: Iterator[int] = iter(())
        self._num_asked = 0

    async def ask(self, num_requests: int) -> float:
        """Make so many requests; return how many were answered in a second."""
        self._numbers = iter(range(self._num_asked, self._num_asked + num_requests))
        self._num_asked += num_requests
        started = time.monotonic()
        await asyncio.gather(*(self._user() for _ in range(self._num_users)))
        return num_requests / (time.monotonic() - started)

    def resident(self) -> dict[str, int]:
        """KiB of each process."""
        pids = {"API process": self._served.process.pid, "engine process": self._served.engine_pid}
        return {name: resident_kib(pid) for name, pid in pids.items()}

    async def _user(self) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            for number in self._numbers:
                leaves, asks_wrongly = number % 50 == 0, number % 10 == 1
                body = {
                    "model": "another" if asks_wrongly else "tiny",
                    "prompt": f"{number} is a number",
                    "temperature": 0,
                    "max_tokens": 200 if leaves else 4,
                    "ignore_eos": True,
                    "stream": bool(number % 2),
                }
                content = json.dumps(body).encode()
                head = "POST /v1/completions HTTP/1.1\r\nHost: octavo\r\nContent-Type: application/json\r\n"
                writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
                if leaves:
                    writer.transport.abort()
                    reader, writer = await asyncio.open_connection(self._host, self._port)
                    continue
                status, told = await self._response(reader)
                assert status == (404 if asks_wrongly else 200), told
                assert ("error" in told) == asks_wrongly, told
        finally:
            writer.close()

    async def _response(self, reader: asyncio.StreamReader) -> tuple[int, str]:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = re.search(r"content-length: (\d+)", head)
        if length is not None:
            content = await reader.readexactly(int(length[1]))
        else:
            content = b""
            while size := int(await reader.readuntil(b"\r\n"), 16):
                content += await reader.readexactly(size)
                await reader.readexactly(2)
            await reader.readexactly(2)
        return int(head.split()[1]), content.decode()


@pytest.mark.timeout(600)
async def test_the_api_process_does_not_grow_with_every_request(start: Callable[..., ServedModel]) -> None:
    """What leaks grows in every window. The engine process is judged by the campaign below: its heap settles late."""
    with start(*SMALL_CACHE) as served:
        users = Users(served, num_users=8)
        await users.ask(500)
        sizes = [users.resident()["API process"]]
        for _ in range(NUM_WINDOWS):
            await users.ask(300)
            sizes.append(users.resident()["API process"])
    assert min(after / before for before, after in pairwise(sizes)) < MAX_GROWTH_OF_WINDOW, sizes


@pytest.mark.long
@pytest.mark.timeout(3600)
async def test_memory_and_throughput_are_flat_over_20_000_requests(start: Callable[..., ServedModel]) -> None:
    with start(*SMALL_CACHE) as served:
        users = Users(served, num_users=16)
        for thousand in range(1, 4):
            await users.ask(1000)  # steps of all sizes: the engine's heap is then as large as they need it
            print(f"{thousand},000 requests to begin with: {users.resident()}", flush=True)  # noqa: T201
        before, rates = users.resident(), [await users.ask(1000)]
        for thousand in range(2, 21):
            rates.append(await users.ask(1000))
            resident = ", ".join(f"{name} {kib / 1024:.1f} MiB" for name, kib in users.resident().items())
            print(f"{thousand},000 requests: {rates[-1]:.0f} requests/s, {resident}", flush=True)  # noqa: T201
        after = users.resident()
    for name, kib in before.items():
        print(f"{name}: {after[name] / kib - 1:+.2%} over 20,000 requests")  # noqa: T201
    print(f"throughput of the last thousand over the first: {rates[-1] / rates[0]:.2f}")  # noqa: T201
    assert all(after[name] <= MAX_GROWTH * before[name] for name in before)
    assert rates[-1] > 0.9 * rates[0]
