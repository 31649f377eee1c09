"""Fixtures for the engine's tests: the real model, a tiny one that is made on the spot, and both in transformers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import gguf
import httpx
import pytest

from octavo_cluster.model import demo_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch
    from openai import AsyncOpenAI, OpenAI

    from octavo_engine.sampler import Chooser

# ruff: noqa: PLC0415 - torch, transformers and openai take ten seconds to import, and many tests here need none of them


START_SECONDS = 240.0  # a busy machine with two cores loads slowly


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """What the fixture gives."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.05)


class ServedModel:
    """`octavo serve` in processes of its own; leaving ends them."""

    def __init__(self, model: Path | None, log: Path, *options: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "octavo_engine", "serve", "--host", "127.0.0.1", "--port", "0"]
        command += [*([] if model is None else [str(model)]), *options]
        with log.open("w") as stderr:
            self.process = subprocess.Popen(command, stderr=stderr, stdin=subprocess.DEVNULL)
        self.url = ""

    def __enter__(self) -> Self:
        try:
            wait_until(self._listens, START_SECONDS)
            wait_until(lambda: self.get("/ready").status_code == 200 or self.process.poll() is not None, START_SECONDS)
            assert self.process.poll() is None, self.log.read_text()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, IndexError):  # it may have ended before
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
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def async_client(self) -> AsyncOpenAI:
        """The same for asyncio."""
        from openai import AsyncOpenAI

        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def _listens(self) -> bool:
        match = re.search(r"listening on (http://\S+)", self.log.read_text())
        self.url = match[1] if match else ""
        assert self.process.poll() is None, self.log.read_text()
        return bool(self.url)


class WriteGGUF(Protocol):
    """Writes the tiny model as a GGUF file, with other or more metadata and tensors; None leaves a tensor out."""

    def __call__(
        self, *, metadata: Mapping[str, Any] | None = None, tensors: Mapping[str, torch.Tensor | None] | None = None
    ) -> Path:
        """Write it and return where."""
        ...


class Serve(Protocol):
    """Starts a server in a context, with options of `octavo serve`; it takes requests when the context is entered."""

    def __call__(self, model: Path | None, log: Path, *options: str) -> ServedModel:
        """Start it, without a model for those of the store; what it says goes to `log`."""
        ...


@pytest.fixture(scope="session")
def serve() -> Serve:
    """Starts servers as users do."""
    return ServedModel


@pytest.fixture(name="wait_until", scope="session")
def wait_until_fixture() -> Callable[..., None]:
    """Poll until a condition holds, for at most so many seconds."""
    return wait_until


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Debian's registry of container images on this machine; gives its address."""
    folder = tmp_path_factory.mktemp("registry")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    config = {
        "version": "0.1",
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    (folder / "config.yml").write_text(json.dumps(config))
    command = ["docker-registry", "serve", str(folder / "config.yml")]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stderr=log, stdout=log) as process:
        try:
            with httpx.Client(transport=httpx.HTTPTransport(retries=8)) as client:  # half a second, doubled each time
                assert client.get(f"http://127.0.0.1:{port}/v2/").status_code == 200
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, downloaded at first use."""
    return demo_model()


@pytest.fixture(scope="session")
def smollm2_in_transformers(smollm2_path: Path) -> Any:
    """The same weights, dequantised to float32 by the gguf package, in transformers' model."""
    from octavo_bench.weights import in_transformers

    return in_transformers(gguf.GGUFReader(smollm2_path))


@pytest.fixture(scope="session")
def cpu_chooser() -> Chooser:
    """The CPU library's, in a decoder that has no layers."""
    import torch

    from octavo_engine.cpu.decoder import CpuDecoder
    from octavo_engine.cpu.library import best_library
    from octavo_engine.models.spec import DecoderSpec
    from octavo_engine.weights.quant_type import QuantType
    from octavo_engine.weights.stored import StoredMatrix

    class Zeros:
        def matrix(self, _role: str, shape: tuple[int, int], **_layer: int | None) -> StoredMatrix:
            return StoredMatrix(torch.zeros(shape).view(torch.uint8), QuantType.F32, shape)

        def vector(self, _role: str, size: int, **_layer: int | None) -> torch.Tensor:
            return torch.zeros(size)

    spec = DecoderSpec(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_layers=0,
        num_heads=1,
        num_kv_heads=1,
        head_dim=32,
        rms_norm_eps=1e-5,
        ropes=(),
        windows=(),
        tied_embeddings=True,
        max_context=8,
        eos_token_ids=frozenset(),
        attention_scale=1.0,
    )
    library = best_library()
    assert library is not None, "no library for this processor: install g++ and make venv"
    weights: Any = Zeros()
    return CpuDecoder(
        library, spec, weights, compute="float32", num_positions=8, num_blocks=1, block_size=8, num_threads=2
    )


@pytest.fixture(scope="session")
def tiny_llama() -> Any:
    """A Llama of two layers with random float32 weights: 4 query heads on 2 KV heads, its own output matrix."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval()


@pytest.fixture
def write_tiny_gguf(tmp_path: Path, tiny_llama: Any) -> WriteGGUF:
    """Writes `tiny_llama` to a file; see WriteGGUF."""
    from octavo_bench.weights import names, reorder

    config = tiny_llama.config
    state = tiny_llama.state_dict()
    own_metadata = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "tokenizer.ggml.eos_token_id": 2,
    }
    own_tensors = {ours: reorder(state[theirs], ours, config, to_gguf=True) for ours, theirs in names(config).items()}

    def write(
        *, metadata: Mapping[str, Any] | None = None, tensors: Mapping[str, torch.Tensor | None] | None = None
    ) -> Path:
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        add: dict[type, Callable[[str, Any], None]] = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        for key, value in (own_metadata | dict(metadata or {})).items():
            add[type(value)](key, value)
        for name, tensor in (own_tensors | dict(tensors or {})).items():
            if tensor is not None:
                writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
