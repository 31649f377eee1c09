"""A real server and a real engine process over a tiny model with random weights, and the load on them.

A vocabulary of single bytes: a text has as many tokens as bytes. NAN_TOKEN is poison: its embedding is not a number.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, Protocol, Self

import gguf
import httpx
import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.engine.conftest import Serve, ServedModel

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS = 2
NAN_TOKEN = 1
NUM_LAYERS, HIDDEN, INTERMEDIATE, NUM_HEADS, NUM_KV_HEADS, CONTEXT = 2, 64, 96, 4, 2, 8192
MANY_TOKENS = 300  # so that a request runs for a second or more
CHATML = "{% for message in messages %}{{ message.content }}{% endfor %}"
OPTIONS = ("--dtype", "float32", "--kv-cache-memory-bytes", "33554432", "--served-model-name", "tiny")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with float32 weights."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny_model(path, nan_token=NAN_TOKEN)
    return path


def write_tiny_model(path: Path, nan_token: int | None = None) -> None:
    """Write it; one token of it may be poison."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]
    tokens = [*CONTROL_TOKENS, *alphabet, "ĠĠ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(NUM_LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(CONTROL_TOKENS) + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["Ġ Ġ"])  # two spaces: a vocabulary without any merge cannot be written
    writer.add_eos_token_id(EOS)
    writer.add_chat_template(CHATML)
    for name, weight in _weights(len(tokens), nan_token).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def nan_token() -> int:
    """A token that is poison to the tiny model."""
    return NAN_TOKEN


def _weights(vocab_size: int, nan_token: int | None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def random(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0.0, 0.2, (rows, columns)).astype(np.float32)

    kv_size = HIDDEN // NUM_HEADS * NUM_KV_HEADS
    weights = {"token_embd.weight": random(vocab_size, HIDDEN), "output.weight": random(vocab_size, HIDDEN)}
    if nan_token is not None:
        weights["token_embd.weight"][nan_token] = np.nan
        weights["output.weight"][nan_token] = 0.0  # far from the likely ones: the model does not poison itself
    weights["output_norm.weight"] = np.ones(HIDDEN, np.float32)
    for layer in range(NUM_LAYERS):
        shapes = {
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (kv_size, HIDDEN),
            "attn_v": (kv_size, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_gate": (INTERMEDIATE, HIDDEN),
            "ffn_up": (INTERMEDIATE, HIDDEN),
            "ffn_down": (HIDDEN, INTERMEDIATE),
        }
        weights |= {f"blk.{layer}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        weights |= {f"blk.{layer}.{name}.weight": np.ones(HIDDEN, np.float32) for name in ("attn_norm", "ffn_norm")}
    return weights


class Load:
    """Users of a server: every other one streams. Each asks for many tokens.

    Attributes:
        answers: for each user, as it comes: the usage, or the error that it was told.
    """

    def __init__(self, served: ServedModel, num_users: int, max_tokens: int) -> None:
        self._served = served
        self._num_users = num_users
        self._max_tokens = max_tokens

    async def __aenter__(self) -> Self:
        self._http = httpx.AsyncClient(base_url=self._served.url, timeout=300)
        self.answers = [asyncio.create_task(self._ask(user)) for user in range(self._num_users)]
        return self

    async def __aexit__(self, *_exception: object) -> None:
        """Drop what is still running."""
        for answer in self.answers:
            answer.cancel()
        await asyncio.gather(*self.answers, return_exceptions=True)
        await self._http.aclose()

    async def all_tokens(self) -> list[int]:
        """How many tokens each user got in the end, all of whom are answered well."""
        return [answer["completion_tokens"] for answer in await asyncio.gather(*self.answers)]

    async def _ask(self, user: int) -> dict[str, Any]:
        body = {
            "model": "tiny",
            "prompt": f"user {user}",
            "max_tokens": self._max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        if user % 2:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            told = (await response.aread()).decode()
        events = [line.removeprefix("data: ") for line in told.splitlines() if line and line != "data: [DONE]"]
        last: dict[str, Any] = json.loads(events[-1])
        answer: dict[str, Any] = last["error"] if "error" in last else last["usage"]
        return answer


class MakeLoad(Protocol):
    """Puts so many users on a server, each of whom asks for so many tokens."""

    def __call__(self, served: ServedModel, *, num_users: int = 32, max_tokens: int = MANY_TOKENS) -> Load:
        """Make it; entering its context starts it, and leaving it drops what is still running."""
        ...


@pytest.fixture
def load() -> MakeLoad:
    """Puts users on a server."""

    def make(served: ServedModel, *, num_users: int = 32, max_tokens: int = MANY_TOKENS) -> Load:
        return Load(served, num_users, max_tokens)

    return make


@pytest.fixture
def start(serve: Serve, tiny_model: Path, tmp_path: Path) -> Callable[..., ServedModel]:
    """Starts a server of one test's own, with more options."""
    return lambda *options: serve(tiny_model, tmp_path / "log", *OPTIONS, *options)


@pytest.fixture(scope="module")
def served(serve: Serve, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    """One server for every test of a module that leaves it as it was."""
    with serve(tiny_model, tmp_path_factory.mktemp("served") / "log", *OPTIONS) as served:
        yield served
