"""What requests cost does not grow with how many there have been: neither memory nor time."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.engine.survival.conftest import NAN_TOKEN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.engine.conftest import Serve, ServedModel

MAX_GROWTH = 1.02
MAX_COST = 1.1  # on a machine that is as busy at the end as at the beginning
NUM_WINDOWS = 3
WINDOW = 300  # requests
MAX_KIB_A_REQUEST = 1
SMALL_CACHE = ("--max-model-len", "256", "--kv-cache-memory-bytes")  # soon all of it has been touched
RULES = (
    {"temperature": 0},
    {"temperature": 1},
    {"temperature": 1, "top_p": 0.9, "frequency_penalty": 0.5},
    {"temperature": 1, "top_k": 20, "n": 2, "min_tokens": 2},
    {"temperature": 0, "logprobs": 3},
)


def resident_kib(pid: int) -> int:
    """The resident set of a process (proc(5))."""
    match = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])


def processor_seconds(pid: int) -> float:
    """What a process has computed so far (proc(5)); other programs disturb it less than the time on the wall."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Users:
    """Users of a server who ask for little, each on a connection that is kept; some ask wrongly, and some leave."""

    def __init__(self, served: ServedModel, num_users: int) -> None:
        self._num_users = num_users
        self._host, port = served.url.removeprefix("http://").split(":")
        self._port = int(port)
        self._pids = {"API process": served.process.pid, "engine process": served.engine_pid}
        self._numbers: Iterator[int] = iter(())
        self._num_asked = 0

    async def ask(self, num_requests: int) -> tuple[float, float]:
        """Make so many requests; return seconds on the wall and of both processes' processor time."""
        self._numbers = iter(range(self._num_asked, self._num_asked + num_requests))
        self._num_asked += num_requests
        started, computed = time.monotonic(), self._processor_seconds()
        await asyncio.gather(*(self._user() for _ in range(self._num_users)))
        return time.monotonic() - started, self._processor_seconds() - computed

    def resident(self) -> dict[str, int]:
        """KiB of each process."""
        return {name: resident_kib(pid) for name, pid in self._pids.items()}

    def _processor_seconds(self) -> float:
        return sum(map(processor_seconds, self._pids.values()))

    async def _user(self) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            for number in self._numbers:
                leaves, asks_wrongly = number % 50 == 0, number % 10 == 1
                body = {
                    "model": "another" if asks_wrongly else "tiny",
                    "prompt": f"{number} is a number",
                    "max_tokens": 200 if leaves else 4,
                    "ignore_eos": True,
                    "stream": bool(number % 2),
                    "logit_bias": {str(NAN_TOKEN): -100},
                    **RULES[number % len(RULES)],
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
async def test_neither_process_grows_with_every_request(start: Callable[..., ServedModel]) -> None:
    """What leaks grows in every window."""
    with start(*SMALL_CACHE, "1048576") as served:
        users = Users(served, num_users=8)
        await users.ask(500)
        sizes = [users.resident()]
        for _ in range(NUM_WINDOWS):
            await users.ask(WINDOW)
            sizes.append(users.resident())
    for name in sizes[0]:
        least = min(after[name] - before[name] for before, after in pairwise(sizes))
        assert least < MAX_KIB_A_REQUEST * WINDOW, (name, sizes)


@pytest.mark.long
@pytest.mark.timeout(7200)
async def test_memory_and_throughput_are_flat_over_20_000_requests(start: Callable[..., ServedModel]) -> None:
    with start(*SMALL_CACHE, "1048576") as served:
        await flat(served, num_windows=20, window=1000)


@pytest.mark.long
@pytest.mark.model
@pytest.mark.timeout(7200)
async def test_memory_and_throughput_are_flat_with_the_real_model(
    serve: Serve, smollm2_path: Path, tmp_path: Path
) -> None:
    with serve(smollm2_path, tmp_path / "log", "--served-model-name", "tiny", *SMALL_CACHE, "16777216") as served:
        await flat(served, num_windows=20, window=100)


async def flat(served: ServedModel, *, num_windows: int, window: int) -> None:
    """Assert that memory and throughput stay, after three windows to begin with, as they are."""
    users = Users(served, num_users=16)
    for _ in range(3):
        await users.ask(window)  # steps of all sizes: the engine's heap is then as large as they need it
        print(f"{window} requests to begin with: {users.resident()}", flush=True)  # noqa: T201
    before = users.resident()
    costs = []
    for number in range(1, num_windows + 1):
        seconds, computed = await users.ask(window)
        costs.append(computed / window)
        resident = ", ".join(f"{name} {kib / 1024:.1f} MiB" for name, kib in users.resident().items())
        speed = f"{window / seconds:.0f} requests/s, {costs[-1] * 1e3:.1f} ms of processor time a request"
        print(f"{number * window} requests: {speed}, {resident}", flush=True)  # noqa: T201
    after = users.resident()
    for name, kib in before.items():
        print(f"{name}: {after[name] / kib - 1:+.2%} over {num_windows * window} requests")  # noqa: T201
    print(f"processor time of a request, the last window over the first: {costs[-1] / costs[0]:.2f}")  # noqa: T201
    assert all(after[name] <= MAX_GROWTH * before[name] for name in before)
    assert costs[-1] < MAX_COST * costs[0]
