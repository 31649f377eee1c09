"""How the API process and the engine process are joined: the start of the one by the other, and frames between them.

client.py starts the engine and talks through a ClientChannel (asyncio); core.py answers through an EngineChannel
(blocking). Knows the messages' types but not their meaning, and imports no torch.

A frame is a 4-byte big-endian length and that many bytes of msgpack. Both ends are the same version of this package,
so a frame that breaks these rules is a bug and is raised as such; a peer that is gone is a PeerGone on both sides,
however it went.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import subprocess
import sys

import msgspec

from octavo_engine.config import EngineConfig
from octavo_engine.errors import PeerGone
from octavo_engine.messages import ToClient, ToEngine

MAX_FRAME_BYTES = 64 * 2**20  # a prompt of ten million tokens; more is a bug, and not memory to be allocated
RECEIVE_BYTES = 2**18

_LENGTH = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()


def spawn(config: EngineConfig) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start the engine process; return it and this side's end of the socket between both.

    The engine ends when this end is closed, and on Linux is killed when the calling thread ends: call this from the
    main thread.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "octavo_engine.core", str(theirs.fileno()), config_to_json(config)]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]), ours


def config_to_json(config: EngineConfig) -> str:
    """The configuration as the engine process takes it on its command line, where `ps` shows it."""
    return msgspec.json.encode(config, enc_hook=str).decode()


def config_from_json(text: str) -> EngineConfig:
    """The inverse of config_to_json."""
    return msgspec.json.decode(text, type=EngineConfig, dec_hook=lambda wanted, value: wanted(value))


def encode_frame(message: ToEngine | ToClient) -> bytes:
    """The message as a frame.

    Raises:
        ValueError: the frame would be larger than MAX_FRAME_BYTES.
    """
    body = _encoder.encode(message)
    _check_size(len(body))
    return _LENGTH.pack(len(body)) + body


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {num_bytes} bytes exceeds the limit of {MAX_FRAME_BYTES}")


class EngineChannel:
    """The engine's end: sends blocking, receives what has arrived. For one thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._received = bytearray()  # what has arrived and is not yet a whole frame

    def send(self, message: ToClient) -> None:
        """Send a message; waits while the API process does not keep up.

        Raises:
            PeerGone: the API process is gone.
        """
        try:
            self._socket.sendall(encode_frame(message))
        except ConnectionError as error:
            raise PeerGone("the API process is gone") from error

    def receive(self, *, timeout: float) -> list[ToEngine]:
        """All messages that have arrived whole, after waiting up to `timeout` seconds for something to arrive.

        Raises:
            PeerGone: the API process is gone.
        """
        if self._readable.poll(timeout * 1000):
            self._read_available()
        messages = []
        while (message := self._take_message()) is not None:
            messages.append(message)
        return messages

    def _read_available(self) -> None:
        try:
            while data := self._socket.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT):
                self._received += data
        except BlockingIOError:
            return
        except ConnectionError as error:
            raise PeerGone("the API process is gone") from error
        raise PeerGone("the API process is gone")

    def _take_message(self) -> ToEngine | None:
        if len(self._received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        _check_size(length)
        end = _LENGTH.size + length
        if len(self._received) < end:
            return None
        message: ToEngine = self._decoder.decode(self._received[_LENGTH.size : end])
        del self._received[:end]
        return message


class ClientChannel:
    """The API process' end, for one event loop: one task receives, any task sends."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = msgspec.msgpack.Decoder(ToClient)

    @classmethod
    async def open(cls, sock: socket.socket) -> ClientChannel:
        """Take over this side's end of the socket that spawn() returned."""
        return cls(*await asyncio.open_unix_connection(sock=sock))

    async def send(self, message: ToEngine) -> None:
        """Send a message; waits while the engine does not keep up.

        Raises:
            PeerGone: the engine process is gone.
        """
        frame = encode_frame(message)
        try:
            self._writer.write(frame)
            await self._writer.drain()
        except ConnectionError as error:
            raise PeerGone("the engine process is gone") from error

    async def receive(self) -> ToClient:
        """The next message.

        Raises:
            PeerGone: the engine process is gone; every message that it sent whole has been received.
        """
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            _check_size(length)
            frame = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise PeerGone("the engine process is gone") from error
        message: ToClient = self._decoder.decode(frame)
        return message

    async def close(self) -> None:
        """Close the socket, which ends the engine process."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            return  # it was gone already
