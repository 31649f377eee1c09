"""A real control group of one processor and little memory: 64 users are served there, and too little is refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.model, pytest.mark.timeout(400)]

MIB: Final = 2**20
ROOT: Final = Path("/sys/fs/cgroup")
NUM_USERS: Final = 64
PERIOD_MICROSECONDS: Final = 100_000


class ControlGroup:
    """A control group of this test's own, of either version. Making it needs root; failing to is an error."""

    def __init__(self, name: str, *, memory_bytes: int, processors: float) -> None:
        quota = int(processors * PERIOD_MICROSECONDS)
        if (ROOT / "cgroup.controllers").is_file():
            group = self._below(ROOT, "", name)
            self._groups = [group]
            limits = {group / "memory.max": memory_bytes, group / "cpu.max": f"{quota} {PERIOD_MICROSECONDS}"}
            self._events, self._usage = group / "memory.events", group / "memory.peak"
        else:
            memory, cpu = (self._below(ROOT / kind, kind, name) for kind in ("memory", "cpu"))
            self._groups = [memory, cpu]
            limits = {
                memory / "memory.limit_in_bytes": memory_bytes,
                cpu / "cpu.cfs_period_us": PERIOD_MICROSECONDS,
                cpu / "cpu.cfs_quota_us": quota,
            }
            self._events, self._usage = memory / "memory.oom_control", memory / "memory.max_usage_in_bytes"
        for group in self._groups:
            group.mkdir()
        for file, limit in limits.items():
            file.write_text(str(limit))

    @staticmethod
    def _below(mount: Path, controller: str, name: str) -> Path:
        """A group in the one that this process is in, where the mount shows it; else at the mount's root."""
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(",") and (mount / path.lstrip("/")).is_dir():
                return mount / path.lstrip("/") / name
        return mount / name

    def command(self, *command: str) -> list[str]:
        """The command that runs `command` in the group from its first instruction on."""
        enter = " && ".join(f"echo $$ > {group / 'cgroup.procs'}" for group in self._groups)
        return ["sh", "-c", f'{enter} && exec "$@"', "sh", *command]

    @property
    def num_killed(self) -> int:
        """Processes that the kernel has killed for want of memory."""
        events = dict(line.split() for line in self._events.read_text().splitlines())
        return int(events["oom_kill"])

    @property
    def peak_bytes(self) -> int:
        """The most memory that was charged to the group, with the page cache that its processes read."""
        return int(self._usage.read_text())

    def remove(self) -> None:
        """Take it away once its processes have ended."""
        deadline = time.monotonic() + 10
        for group in self._groups:
            while group.exists():
                try:
                    group.rmdir()
                except OSError:  # a process that was killed is still being reaped
                    assert time.monotonic() < deadline, f"{group} has processes: {(group / 'cgroup.procs').read_text()}"
                    time.sleep(0.05)


@pytest.fixture
def limited() -> Iterator[Callable[[int], ControlGroup]]:
    """Makes a group of one processor and so many bytes, which goes with the test."""
    with contextlib.ExitStack() as stack:

        def make(memory_bytes: int) -> ControlGroup:
            group = ControlGroup(f"octavo-test-{os.getpid()}", memory_bytes=memory_bytes, processors=1)
            stack.callback(group.remove)
            return group

        yield make


def serve_command(model: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "octavo_engine", "serve", str(model), "--host", "127.0.0.1", "--port", "0", *options]


async def test_in_a_container_of_one_processor_and_one_gibibyte_64_users_are_served(
    limited: Callable[[int], ControlGroup], smollm2_path: Path, tmp_path: Path
) -> None:
    group = limited(1024 * MIB)
    log = tmp_path / "log"
    with log.open("wb") as file:
        server = await asyncio.create_subprocess_exec(
            *group.command(*serve_command(smollm2_path)), stdout=file, stderr=file
        )
    try:
        url = await started(server, log)
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)) as http:
            await ready(server, http, log)
            answers = await asyncio.gather(*(ask(http, user) for user in range(NUM_USERS)))
            assert (await http.get("/health")).status_code == 200
    finally:
        if server.returncode is None:
            server.terminate()
        await asyncio.wait_for(server.wait(), 60)
    assert len(answers) == NUM_USERS
    assert group.num_killed == 0
    assert 0 < group.peak_bytes <= 1024 * MIB
    told = log.read_text()
    assert "available" in told
    assert "KV cache" in told
    assert server.returncode == 0, told


async def ready(server: asyncio.subprocess.Process, http: httpx.AsyncClient, log: Path) -> None:
    """Wait until the model is loaded."""
    while True:
        with contextlib.suppress(httpx.TransportError):
            if (await http.get("/ready")).status_code == 200:
                return
        assert server.returncode is None, await asyncio.to_thread(log.read_text)
        await asyncio.sleep(0.1)


async def ask(http: httpx.AsyncClient, user: int) -> str:
    """A short conversation of one user."""
    body = {
        "model": "SmolLM2-135M-Instruct.Q4_1",
        "messages": [{"role": "user", "content": f"I am user {user}. What is the capital of France?"}],
        "max_tokens": 8,
    }
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


async def started(server: asyncio.subprocess.Process, log: Path) -> str:
    """Wait until the server has told its address."""
    while True:
        text = await asyncio.to_thread(log.read_text)
        _, found, rest = text.partition("listening on ")
        if found and "\n" in rest:
            return rest.split()[0]
        assert server.returncode is None, text
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("mebibytes", [128, 300])
def test_what_does_not_fit_is_refused_with_the_arithmetic_and_not_killed(
    limited: Callable[[int], ControlGroup], smollm2_path: Path, tmp_path: Path, mebibytes: int
) -> None:
    group = limited(mebibytes * MIB)
    log = tmp_path / "termination-log"
    command = group.command(*serve_command(smollm2_path, "--termination-log", str(log)))
    refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert refused.returncode == 1, refused.stderr
    assert group.num_killed == 0
    told = json.loads(log.read_bytes())
    assert told["reason"] == "ModelDoesNotFit"
    assert "MiB available - 352 MiB processes" in told["message"]
    assert told["message"] in refused.stderr
    assert told["facts"]["availableBytes"] <= mebibytes * MIB
    assert told["facts"]["parameters"] == 134_515_008
