"""The whole engine as users start it: `octavo serve` with the real model, driven by the unchanged openai client."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

from octavo_engine.client import STUCK_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from openai.types.chat import ChatCompletionMessageParam

pytestmark = [pytest.mark.model, pytest.mark.timeout(400)]

START_SECONDS = 240.0  # a busy machine with two cores loads slowly
PARIS: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Poll until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.05)


class ServedModel:
    """`octavo serve` in processes of its own; leaving ends them."""

    def __init__(self, model: Path, log: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "octavo_engine", "serve", str(model)]
        command += ["--host", "127.0.0.1", "--port", "0", "--served-model-name", "smollm2", "smollm2-135m"]
        with log.open("w") as stderr:
            self.process = subprocess.Popen(command, stderr=stderr, stdin=subprocess.DEVNULL)
        self.url = ""

    def __enter__(self) -> Self:
        try:
            eventually(self._listens, START_SECONDS)
            eventually(lambda: self.get("/ready").status_code == 200 or self.process.poll() is not None, START_SECONDS)
            assert self.process.poll() is None, self.log.read_text()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.engine_pid, signal.SIGCONT)
            self.process.kill()
        self.process.wait()

    @property
    def engine_pid(self) -> int:
        """The engine process: the only child of the API process."""
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def get(self, path: str) -> httpx.Response:
        """GET, without keeping the connection."""
        return httpx.get(f"{self.url}{path}", timeout=30, headers={"Connection": "close"})

    def metric(self, name: str) -> float:
        """The value of a metric that has only the labels that all have."""
        match = re.search(rf"^{name}\{{[^}}]*\}} (\S+)$", self.get("/metrics").text, re.MULTILINE)
        assert match is not None, name
        return float(match[1])

    def sync_client(self) -> OpenAI:
        """The client, that does not try twice."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def async_client(self) -> AsyncOpenAI:
        """The same for asyncio."""
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def _listens(self) -> bool:
        match = re.search(r"listening on (http://\S+)", self.log.read_text())
        self.url = match[1] if match else ""
        assert self.process.poll() is None, self.log.read_text()
        return bool(self.url)


@pytest.fixture(scope="module")
def served(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    """One server for every test that leaves it as it was."""
    with ServedModel(smollm2_path, tmp_path_factory.mktemp("served") / "log") as served:
        yield served


def test_the_api_process_holds_no_torch_and_the_engine_is_another_process(served: ServedModel) -> None:
    api, engine = (Path(f"/proc/{pid}/maps").read_text() for pid in (served.process.pid, served.engine_pid))
    assert "libtorch" not in api
    assert "libtorch" in engine


def test_streamed_and_whole_answers_are_the_same_text(served: ServedModel) -> None:
    with served.sync_client() as client:
        whole = client.chat.completions.create(model="smollm2", messages=PARIS, temperature=0, max_tokens=40)
        stream = client.chat.completions.create(
            model="smollm2-135m",
            messages=PARIS,
            temperature=0,
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    assert "Paris" in (whole.choices[0].message.content or "")
    assert whole.choices[0].finish_reason == "stop"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_a_seed_gives_the_same_text_again(served: ServedModel) -> None:
    with served.sync_client() as client:
        texts = {
            client.completions.create(
                model="smollm2", prompt="Once upon a time", seed=seed, temperature=1, max_tokens=24
            )
            .choices[0]
            .text
            for seed in (1, 1, 2)
        }
    assert len(texts) == 2


async def test_eight_at_a_time_are_all_answered_in_one_running_batch(served: ServedModel) -> None:
    running: list[float] = []

    async def watch() -> None:
        while True:
            running.append(await asyncio.to_thread(served.metric, "vllm:num_requests_running"))
            await asyncio.sleep(0.05)

    async with served.async_client() as client:
        watching = asyncio.create_task(watch())
        requests = [
            client.completions.create(model="smollm2", prompt=f"{number} is a", max_tokens=48, temperature=0)
            for number in range(8)
        ]
        completions = await asyncio.gather(*requests)
        watching.cancel()
    assert all(completion.usage is not None and completion.usage.completion_tokens > 0 for completion in completions)
    assert max(running) > 1


async def test_clients_that_leave_free_the_engine(served: ServedModel) -> None:
    async with served.async_client() as client:
        stream = await client.chat.completions.create(
            model="smollm2", messages=PARIS, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(stream))
        whole = asyncio.create_task(
            client.completions.create(model="smollm2", prompt="Hi", max_tokens=4000, extra_body={"ignore_eos": True})
        )
        await asyncio.to_thread(eventually, lambda: served.metric("vllm:num_requests_running") == 2)
        await stream.close()
        whole.cancel()
        await asyncio.gather(whole, return_exceptions=True)
    await asyncio.to_thread(eventually, lambda: served.metric("vllm:num_requests_running") == 0)
    assert served.metric("vllm:kv_cache_usage_perc") == 0


def test_an_engine_that_hangs_is_unhealthy_with_a_reason_until_it_goes_on(served: ServedModel) -> None:
    os.kill(served.engine_pid, signal.SIGSTOP)
    stopped = time.monotonic()
    eventually(lambda: served.get("/health").status_code == 503, 2 * STUCK_SECONDS)
    assert time.monotonic() - stopped < STUCK_SECONDS + 3
    assert "silent" in served.get("/health").json()["reason"]
    assert served.get("/ready").status_code == 503
    os.kill(served.engine_pid, signal.SIGCONT)
    eventually(lambda: served.get("/health").status_code == 200)
    assert served.get("/ready").status_code == 200


async def test_sigterm_under_load_loses_no_request(smollm2_path: Path, tmp_path: Path) -> None:
    with ServedModel(smollm2_path, tmp_path / "log") as served:
        engine_pid = served.engine_pid
        async with served.async_client() as client:

            async def stream_one() -> int:
                stream = await client.completions.create(
                    model="smollm2", prompt="Hi", max_tokens=32, stream=True, extra_body={"ignore_eos": True}
                )
                return sum([1 async for chunk in stream if chunk.choices[0].finish_reason == "length"])

            streamed = [asyncio.create_task(stream_one()) for _ in range(4)]
            whole = [
                asyncio.create_task(
                    client.completions.create(
                        model="smollm2", prompt="Hi", max_tokens=32, extra_body={"ignore_eos": True}
                    )
                )
                for _ in range(4)
            ]
            await asyncio.to_thread(eventually, lambda: served.metric("vllm:num_requests_running") == 8)
            served.process.terminate()
            await asyncio.to_thread(eventually, lambda: served.get("/ready").json()["phase"] == "Draining")
            refused = await asyncio.to_thread(
                httpx.post, f"{served.url}/v1/completions", json={"model": "smollm2", "prompt": "Hi"}
            )
            assert (refused.status_code, "Retry-After" in refused.headers) == (503, True)
            assert await asyncio.gather(*streamed) == [1] * 4
            usages = [completion.usage for completion in await asyncio.gather(*whole)]
            assert [usage and usage.completion_tokens for usage in usages] == [32] * 4
        assert await asyncio.to_thread(served.process.wait, 30) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(engine_pid, 0)


def test_a_killed_engine_is_told_and_ends_the_server(smollm2_path: Path, tmp_path: Path) -> None:
    with ServedModel(smollm2_path, tmp_path / "log") as served:
        os.kill(served.engine_pid, signal.SIGKILL)
        eventually(lambda: served.get("/health").status_code == 503, 2)
        assert "SIGKILL" in served.get("/health").json()["reason"]
        assert served.process.wait(30) == 1
    assert "SIGKILL" in (tmp_path / "log").read_text()
