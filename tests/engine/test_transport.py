import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_engine.config import EngineConfig, LoraModule
from octavo_engine.errors import PeerGone
from octavo_engine.messages import (
    AbortRequest,
    AddRequest,
    EngineFacts,
    Loading,
    Refused,
    RequestUpdate,
    SchedulerStats,
    Shutdown,
    StepOutputs,
    ToClient,
    ToEngine,
)
from octavo_engine.plan import SamplingParams
from octavo_engine.transport import (
    MAX_FRAME_BYTES,
    ClientChannel,
    EngineChannel,
    config_from_json,
    config_to_json,
    encode_frame,
)

ADD = AddRequest(
    request_id="a",
    prompt_token_ids=(1, 2, 50_000),
    sampling=SamplingParams(max_tokens=9, temperature=0.5, seed=3, stop_token_ids=(7,)),
    num_choices=2,
    priority=-1,
)
OUTPUTS = StepOutputs(
    updates=(
        RequestUpdate(request_id="a", token_ids=(5,), choice=1, num_cached_tokens=16),
        RequestUpdate(request_id="b", token_ids=(), finish_reason="error", error="logits are NaN"),
    ),
    stats=SchedulerStats(
        num_running=1,
        num_waiting=2,
        num_used_blocks=3,
        num_blocks=4,
        num_used_slots=5,
        num_preemptions=6,
        num_prefix_cache_queries=8,
        num_prefix_cache_hits=9,
        step=7,
    ),
)
TO_ENGINE: list[ToEngine] = [ADD, AbortRequest(request_id="a", choice=1), Shutdown()]
TO_CLIENT: list[ToClient] = [
    Loading(phase="Loading", done=1, total=2),
    EngineFacts(
        max_model_len=1, block_size=2, num_blocks=3, dtype="int8", cache_dtype="float16", device="cpu", num_parameters=4
    ),
    Refused(reason="ModelInvalid", message="truncated", facts={"bytes": 1, "dtype": "q4", "share": 0.5}),
    OUTPUTS,
]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The API process' and the engine's end of one stream socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@contextlib.asynccontextmanager
async def client_channel(sock: socket.socket) -> AsyncIterator[ClientChannel]:
    channel = await ClientChannel.open(sock)
    try:
        yield channel
    finally:
        await channel.close()


async def test_every_message_reaches_the_engine_as_it_was_sent(ends: tuple[socket.socket, socket.socket]) -> None:
    engine = EngineChannel(ends[1])
    async with client_channel(ends[0]) as client:
        for message in TO_ENGINE:
            await client.send(message)
        assert await asyncio.to_thread(engine.receive, timeout=10) == TO_ENGINE


async def test_every_message_reaches_the_api_process_as_it_was_sent(ends: tuple[socket.socket, socket.socket]) -> None:
    engine = EngineChannel(ends[1])
    for message in TO_CLIENT:
        engine.send(message)
    async with client_channel(ends[0]) as client:
        assert [await client.receive() for _ in TO_CLIENT] == TO_CLIENT


def test_receive_returns_nothing_when_nothing_comes(ends: tuple[socket.socket, socket.socket]) -> None:
    engine = EngineChannel(ends[1])
    assert engine.receive(timeout=0) == []
    assert engine.receive(timeout=0.01) == []


def test_receive_wakes_up_when_something_comes(ends: tuple[socket.socket, socket.socket]) -> None:
    engine = EngineChannel(ends[1])
    sender = threading.Timer(0.01, ends[0].sendall, [encode_frame(ADD)])
    sender.start()
    assert engine.receive(timeout=60) == [ADD]
    sender.join()


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1))
def test_frames_may_arrive_in_pieces_of_any_size(sizes: list[int]) -> None:
    stream = b"".join(encode_frame(message) for message in TO_ENGINE)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        engine = EngineChannel(theirs)
        received = []
        for size in [*sizes, len(stream)]:
            piece, stream = stream[:size], stream[size:]
            ours.sendall(piece)
            received += engine.receive(timeout=0)
        assert received == TO_ENGINE


async def test_a_message_larger_than_the_sockets_buffer_passes(ends: tuple[socket.socket, socket.socket]) -> None:
    engine = EngineChannel(ends[1])
    long_prompt = AddRequest(
        request_id="long", prompt_token_ids=tuple(range(1_000_000)), sampling=SamplingParams(max_tokens=1)
    )

    def receive_one() -> ToEngine:
        received: list[ToEngine] = []
        while not received:
            received += engine.receive(timeout=10)
        return received[0]

    async with client_channel(ends[0]) as client:
        _, received = await asyncio.gather(client.send(long_prompt), asyncio.to_thread(receive_one))
    assert received == long_prompt


def test_the_engine_is_told_that_the_api_process_is_gone(ends: tuple[socket.socket, socket.socket]) -> None:
    engine = EngineChannel(ends[1])
    ends[0].close()
    with pytest.raises(PeerGone, match="API process is gone"):
        engine.receive(timeout=10)
    with pytest.raises(PeerGone, match="API process is gone"):
        engine.send(OUTPUTS)


def test_an_api_process_that_leaves_unread_messages_behind_is_gone_too(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    engine = EngineChannel(ends[1])
    engine.send(OUTPUTS)
    ends[0].close()  # with unread data: a reset instead of an end of file
    with pytest.raises(PeerGone, match="API process is gone"):
        engine.receive(timeout=10)


async def test_the_api_process_gets_the_engines_last_message_before_it_is_told_that_it_is_gone(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    EngineChannel(ends[1]).send(TO_CLIENT[2])
    ends[1].close()
    async with client_channel(ends[0]) as client:
        assert await client.receive() == TO_CLIENT[2]
        with pytest.raises(PeerGone, match="engine process is gone"):
            await client.receive()


async def test_an_engine_that_dies_within_a_message_is_gone(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[1].sendall(encode_frame(OUTPUTS)[:-1])
    ends[1].close()
    async with client_channel(ends[0]) as client:
        with pytest.raises(PeerGone, match="engine process is gone"):
            await client.receive()


async def test_sending_to_a_dead_engine_says_so(ends: tuple[socket.socket, socket.socket]) -> None:
    async def send_for_ever(client: ClientChannel) -> NoReturn:
        while True:
            await client.send(ADD)

    async with client_channel(ends[0]) as client:
        ends[1].close()
        with pytest.raises(PeerGone, match="engine process is gone"):
            await asyncio.wait_for(send_for_ever(client), timeout=10)


async def test_a_frame_over_the_limit_is_refused_before_memory_is_taken_for_it(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    announcement = struct.pack(">I", MAX_FRAME_BYTES + 1)
    ends[0].sendall(announcement)
    with pytest.raises(ValueError, match=str(MAX_FRAME_BYTES)):
        EngineChannel(ends[1]).receive(timeout=10)
    ends[1].sendall(announcement)
    async with client_channel(ends[0]) as client:
        with pytest.raises(ValueError, match=str(MAX_FRAME_BYTES)):
            await client.receive()


def test_a_message_over_the_limit_is_not_sent() -> None:
    with pytest.raises(ValueError, match=str(MAX_FRAME_BYTES)):
        encode_frame(Loading(phase="x" * MAX_FRAME_BYTES, done=0, total=0))


def test_the_configuration_survives_the_command_line() -> None:
    config = EngineConfig(
        model=Path("dir/with space/model.gguf"),
        served_model_names=("a", "b"),
        max_model_len=99,
        dtype="float32",
        enable_lora=True,
        lora_modules=(LoraModule("poet", Path("adapters/poet")),),
        adapter=Path("own"),
    )
    assert config_from_json(config_to_json(config)) == config
