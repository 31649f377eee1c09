"""The engine's loop over a real socket, in a thread and as a real process; this file is also that process' program."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from octavo_engine import core
from octavo_engine.config import EngineConfig
from octavo_engine.errors import ModelInvalid, RankLost
from octavo_engine.messages import (
    AbortRequest,
    AddRequest,
    EngineFacts,
    Loading,
    Refused,
    RequestUpdate,
    Shutdown,
    StepOutputs,
)
from octavo_engine.plan import LoadedModel, RequestResult, SamplingParams, StepPlan, StepResult
from octavo_engine.transport import ClientChannel, EngineChannel, config_to_json, encode_frame, spawn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from octavo_engine.plan import Runner

CONFIG = EngineConfig(model=Path("fake.gguf"), served_model_names=("fake",))
FACTS = EngineFacts(
    max_model_len=400, block_size=4, num_blocks=100, dtype="int8", cache_dtype="float16", device="cpu", num_parameters=1
)
EOS = 100
VOCAB_SIZE = 1000
DEADLINE = 30.0  # seconds after which a test gives up


class CountingRunner:
    """Answers each token with its successor."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Count on from the newest token."""
        return StepResult(
            plan.step,
            tuple(
                RequestResult(token_id=r.token_ids[-1] + 1 + choice)
                for r in plan.requests
                if r.needs_token
                for choice in r.choices
            ),
        )


class HangingRunner:
    """Begins a step and does not come back."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.released = threading.Event()

    def execute(self, plan: StepPlan) -> StepResult:
        """Hang until released."""
        self.begun.set()
        self.released.wait()
        return CountingRunner().execute(plan)


class FailingRunner:
    """Fails as a whole, as torch does when it is out of memory."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Fail."""
        raise RuntimeError(f"out of memory in step {plan.step}")


def load_at_once(runner: Runner) -> core.LoadRunner:
    def load(_config: EngineConfig, on_progress: core.OnProgress) -> LoadedModel:
        on_progress("Loading", 1, 2)
        return LoadedModel(runner=runner, facts=FACTS, eos_token_ids=frozenset({EOS}), vocab_size=VOCAB_SIZE)

    return load


def load_for_ever(_config: EngineConfig, on_progress: core.OnProgress) -> LoadedModel:
    done = 0
    while True:
        on_progress("Loading", done, 2**62)
        done += 1


def add(request_id: str, prompt: tuple[int, ...], max_tokens: int = 3) -> AddRequest:
    return AddRequest(
        request_id=request_id, prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    )


class Engine:
    """A serving engine, seen from this side of its socket."""

    def __init__(self, client: ClientChannel) -> None:
        self.client = client

    async def next_updates(self) -> tuple[RequestUpdate, ...]:
        """The updates of the next message that has any."""
        while True:
            message = await self.client.receive()
            assert isinstance(message, StepOutputs), message
            if message.updates:
                return message.updates

    async def output(self, request_id: str) -> tuple[tuple[int, ...], str]:
        """All tokens of a request and why it ended."""
        tokens: tuple[int, ...] = ()
        while True:
            for update in await self.next_updates():
                if update.request_id == request_id:
                    tokens += update.token_ids
                    if update.finish_reason is not None:
                        return tokens, update.finish_reason


class EngineInThread(Engine):
    """One that runs in a thread of this process; `status` will be what its process would exit with."""

    def __init__(self, client: ClientChannel, status: asyncio.Task[int]) -> None:
        super().__init__(client)
        self.status = status


@contextlib.asynccontextmanager
async def engine(load: core.LoadRunner) -> AsyncIterator[EngineInThread]:
    """An engine that is loading."""
    ours, theirs = socket.socketpair()
    client = await ClientChannel.open(ours)
    with theirs:
        status = asyncio.create_task(asyncio.to_thread(core.run_engine, EngineChannel(theirs), CONFIG, load))
        try:
            async with asyncio.timeout(DEADLINE):
                yield EngineInThread(client, status)
        finally:
            await client.close()
            await status


@contextlib.asynccontextmanager
async def ready_engine(runner: Runner) -> AsyncIterator[EngineInThread]:
    """An engine that serves."""
    async with engine(load_at_once(runner)) as loading:
        assert await loading.client.receive() == Loading(phase="Loading", done=1, total=2)
        assert await loading.client.receive() == FACTS
        yield loading


async def test_an_idle_engine_gives_a_sign_of_life_again_and_again() -> None:
    async with ready_engine(CountingRunner()) as engine:
        for _ in range(2):
            async with asyncio.timeout(2 * core.IDLE_WAIT_SECONDS + DEADLINE / 2):
                message = await engine.client.receive()
            assert isinstance(message, StepOutputs)
            assert (message.updates, message.stats.num_running, message.stats.step) == ((), 0, 0)


async def test_a_request_gets_its_tokens_step_by_step() -> None:
    async with ready_engine(CountingRunner()) as engine:
        await engine.client.send(add("a", (7, 8)))
        assert [await engine.next_updates() for _ in range(3)] == [
            (RequestUpdate(request_id="a", token_ids=(9,)),),
            (RequestUpdate(request_id="a", token_ids=(10,)),),
            (RequestUpdate(request_id="a", token_ids=(11,), finish_reason="length"),),
        ]


async def test_the_models_eos_ends_a_request() -> None:
    async with ready_engine(CountingRunner()) as engine:
        sampling = SamplingParams(max_tokens=9)
        await engine.client.send(AddRequest(request_id="a", prompt_token_ids=(EOS - 3,), sampling=sampling))
        assert await engine.output("a") == ((EOS - 2, EOS - 1, EOS), "stop")


async def test_requests_that_come_within_a_step_join_the_next_one() -> None:
    runner = HangingRunner()
    async with ready_engine(runner) as engine:
        await engine.client.send(add("first", (1,)))
        assert await asyncio.to_thread(runner.begun.wait, DEADLINE)
        await engine.client.send(add("second", (10,)))
        await engine.client.send(add("third", (20,)))
        runner.released.set()
        assert [[update.request_id for update in await engine.next_updates()] for _ in range(4)] == [
            ["first"],
            ["first", "second", "third"],
            ["first", "second", "third"],
            ["second", "third"],
        ]


async def test_a_request_that_cannot_fit_is_refused_alone() -> None:
    async with ready_engine(CountingRunner()) as engine:
        await engine.client.send(add("too long", tuple(range(400))))
        await engine.client.send(add("good", (1,)))
        (refusal, *_) = await engine.next_updates()
        assert (refusal.request_id, refusal.token_ids, refusal.finish_reason) == ("too long", (), "error")
        assert "400 tokens" in str(refusal.error)
        await engine.client.send(add("another", (1,)))
        assert await engine.output("another") == ((2, 3, 4), "length")


@pytest.mark.parametrize("wrong", [-1, VOCAB_SIZE, 2**62])
async def test_a_token_that_the_model_does_not_know_is_refused_alone(wrong: int) -> None:
    async with ready_engine(CountingRunner()) as engine:
        await engine.client.send(add("good", (1,)))
        await engine.client.send(add("bad", (1, wrong, 1)))
        await engine.client.send(add("another", (1,)))
        answers: dict[str, tuple[int, ...]] = {"good": (), "another": ()}
        while min(map(len, answers.values())) < 3:
            for update in await engine.next_updates():
                if update.request_id == "bad":
                    assert (update.finish_reason, f"token id {wrong}" in str(update.error)) == ("error", True)
                else:
                    answers[update.request_id] += update.token_ids
        assert answers == {"good": (2, 3, 4), "another": (2, 3, 4)}


async def test_an_aborted_request_gets_nothing_after_the_step_that_runs() -> None:
    runner = HangingRunner()
    async with ready_engine(runner) as engine:
        await engine.client.send(add("aborted", (1,)))
        assert await asyncio.to_thread(runner.begun.wait, DEADLINE)
        await engine.client.send(AbortRequest(request_id="aborted"))
        await engine.client.send(add("next", (1,)))
        runner.released.set()
        assert [[update.request_id for update in await engine.next_updates()] for _ in range(2)] == [
            ["aborted"],
            ["next"],
        ]


async def test_a_step_that_hangs_is_silent() -> None:
    runner = HangingRunner()
    async with ready_engine(runner) as engine:
        await engine.client.send(add("a", (1,), max_tokens=1))
        assert await asyncio.to_thread(runner.begun.wait, DEADLINE)
        messages = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.5 * core.IDLE_WAIT_SECONDS):
                while True:
                    messages.append(await engine.client.receive())
        idle_before = [message for message in messages if isinstance(message, StepOutputs) and not message.updates]
        assert len(messages) == len(idle_before) <= 1, "one heartbeat may have been under way"
        runner.released.set()
        assert await engine.output("a") == ((2,), "length")


async def test_shutdown_drops_what_runs_and_ends_with_status_0() -> None:
    async with ready_engine(CountingRunner()) as engine:
        await engine.client.send(add("a", (1,), max_tokens=399))
        await engine.client.send(Shutdown())
        assert await engine.status == 0


async def test_a_closed_socket_ends_an_idle_engine_with_status_0() -> None:
    async with ready_engine(CountingRunner()) as engine:
        await engine.client.close()
        assert await engine.status == 0


async def test_a_user_error_while_loading_is_told_and_ends_with_status_1() -> None:
    def load(_config: EngineConfig, _on_progress: core.OnProgress) -> LoadedModel:
        raise ModelInvalid("fake.gguf is truncated")

    async with engine(load) as loading:
        assert await loading.client.receive() == Refused(
            reason="ModelInvalid", message="fake.gguf is truncated", facts={}
        )
        assert await loading.status == 1


async def test_an_unexpected_failure_while_loading_is_logged_and_told(caplog: pytest.LogCaptureFixture) -> None:
    def load(_config: EngineConfig, _on_progress: core.OnProgress) -> LoadedModel:
        raise KeyError("general.architecture")

    async with engine(load) as loading:
        assert await loading.client.receive() == Refused(
            reason="EngineFailed", message="KeyError: 'general.architecture'", facts={}
        )
        assert await loading.status == 1
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert record.exc_info is not None, "with the traceback"


async def test_a_step_that_raises_ends_the_engine_and_says_why() -> None:
    async with ready_engine(FailingRunner()) as engine:
        await engine.client.send(add("a", (1,)))
        while isinstance(message := await engine.client.receive(), StepOutputs):
            assert not message.updates
        assert message == Refused(reason="EngineFailed", message="RuntimeError: out of memory in step 0", facts={})
        assert await engine.status == 1


async def test_an_idle_engine_ends_when_what_computes_is_not_all_there_any_more() -> None:
    def load(config: EngineConfig, on_progress: core.OnProgress) -> LoadedModel:
        def check() -> None:
            raise RankLost("rank 1 (pid 7) ended by signal SIGKILL")

        return replace(load_at_once(CountingRunner())(config, on_progress), check=check)

    async with engine(load) as idle:
        messages = [await idle.client.receive() for _ in range(3)]
        assert messages[-1] == Refused(
            reason="EngineFailed", message="RankLost: rank 1 (pid 7) ended by signal SIGKILL", facts={}
        )
        assert await idle.status == 1


async def test_a_socket_closed_within_a_step_ends_the_engine_after_it() -> None:
    runner = HangingRunner()
    async with ready_engine(runner) as engine:
        await engine.client.send(add("a", (1,), max_tokens=399))
        assert await asyncio.to_thread(runner.begun.wait, DEADLINE)
        await engine.client.close()
        runner.released.set()
        assert await engine.status == 0


async def test_a_socket_closed_while_loading_ends_the_engine() -> None:
    async with engine(load_for_ever) as loading:
        await loading.client.receive()
        await loading.client.close()
        assert await loading.status == 0


async def test_an_end_of_file_in_the_model_is_not_taken_for_the_end_of_the_api_process() -> None:
    def load(_config: EngineConfig, _on_progress: core.OnProgress) -> LoadedModel:
        raise EOFError("the file ends early")

    async with engine(load) as loading:
        assert await loading.client.receive() == Refused(
            reason="EngineFailed", message="EOFError: the file ends early", facts={}
        )
        assert await loading.status == 1


class AnnouncedHangingRunner:
    """Says on standard output that it begins a step, and does not come back."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Hang."""
        print(f"step {plan.step}", flush=True)  # noqa: T201 - the test reads it
        while True:
            signal.pause()


def run_as_engine_process(fd: str, behaviour: str) -> int:
    """The program of the real processes below: the engine's own main with a fake model."""
    loads = {
        "counts": load_at_once(CountingRunner()),
        "hangs": load_at_once(AnnouncedHangingRunner()),
        "loads": load_for_ever,
    }
    return core.main([fd, config_to_json(CONFIG)], loads[behaviour])


def start_engine_process(behaviour: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """As transport.spawn does it, with this file as the program."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, __file__, "engine", str(theirs.fileno()), behaviour]
        return subprocess.Popen(command, pass_fds=[theirs.fileno()]), ours


def run_as_api_process(behaviour: str) -> int:
    """A stand-in for the API process: gives an engine process a long request, prints its id and waits to be killed."""
    process, sock = start_engine_process(behaviour)
    print(process.pid, flush=True)  # noqa: T201 - the test reads it
    sock.sendall(encode_frame(add("long", (1,), max_tokens=399)))
    while sock.recv(2**16):
        pass
    return 0


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits to be reaped by whoever inherited it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@contextlib.asynccontextmanager
async def engine_process(
    process: subprocess.Popen[bytes], sock: socket.socket
) -> AsyncIterator[tuple[subprocess.Popen[bytes], ClientChannel]]:
    """A real engine process and this side of its socket; both are gone afterwards."""
    client = await ClientChannel.open(sock)
    try:
        async with asyncio.timeout(DEADLINE):
            yield process, client
    finally:
        await client.close()
        process.kill()
        process.wait()


async def exit_status(process: subprocess.Popen[bytes]) -> int:
    return await asyncio.to_thread(process.wait, DEADLINE)


async def wait_until_ready(client: ClientChannel) -> None:
    while not isinstance(await client.receive(), EngineFacts):
        pass


@pytest.mark.parametrize("busy", [False, True])
async def test_an_engine_process_ends_when_its_socket_is_closed(*, busy: bool) -> None:
    async with engine_process(*start_engine_process("counts")) as (process, client):
        await wait_until_ready(client)
        if busy:
            await client.send(add("a", (1,), max_tokens=399))
            await Engine(client).next_updates()
        await client.close()
        assert await exit_status(process) == 0


async def test_a_loading_engine_process_ends_when_its_socket_is_closed() -> None:
    async with engine_process(*start_engine_process("loads")) as (process, client):
        await client.receive()
        await client.close()
        assert await exit_status(process) == 0


async def test_an_engine_process_leaves_signals_to_the_api_process_and_ends_on_shutdown() -> None:
    async with engine_process(*start_engine_process("counts")) as (process, client):
        await wait_until_ready(client)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        await client.send(add("a", (1,)))
        assert await Engine(client).output("a") == ((2, 3, 4), "length")
        await client.send(Shutdown())
        assert await exit_status(process) == 0


async def test_an_engine_process_is_told_by_its_name() -> None:
    async with engine_process(*start_engine_process("counts")) as (process, client):
        await wait_until_ready(client)
        assert await asyncio.to_thread(Path(f"/proc/{process.pid}/comm").read_text) == "octavo-engine\n"


@pytest.mark.parametrize("behaviour", ["counts", "hangs", "loads"])
def test_an_engine_process_never_outlives_a_killed_api_process(behaviour: str) -> None:
    command = [sys.executable, __file__, "api", behaviour]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as api_process:
        assert api_process.stdout is not None
        engine_pid = int(api_process.stdout.readline())
        if behaviour == "hangs":
            assert api_process.stdout.readline() == b"step 0\n"
        assert not has_ended(engine_pid)
        api_process.kill()
    give_up = time.monotonic() + DEADLINE
    while not has_ended(engine_pid):
        assert time.monotonic() < give_up
        time.sleep(0.01)


async def test_spawn_starts_an_engine_process_that_refuses_a_model_that_is_not_there(tmp_path: Path) -> None:
    config = EngineConfig(model=tmp_path / "missing.gguf", served_model_names=("missing",))
    async with engine_process(*spawn(config)) as (process, client):
        while isinstance(message := await client.receive(), Loading):
            pass
        assert isinstance(message, Refused)
        assert (message.reason, "missing.gguf" in message.message) == ("ModelNotFound", True), message
        assert await exit_status(process) == 1


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    sys.exit(run_as_engine_process(*arguments) if role == "engine" else run_as_api_process(*arguments))
