"""A server over a fake model: the real engine loop and scheduler in a thread, with a runner that says what it is told.

The model file is a real GGUF header with a vocabulary of single bytes, so that a text has as many tokens as bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import struct
import subprocess
import threading
from typing import TYPE_CHECKING, Final

import gguf
import httpx
import numpy as np
import pytest
from ollama import AsyncClient

from octavo_engine import core
from octavo_engine.config import EngineConfig, ServerConfig
from octavo_engine.errors import ModelInvalid, ModelNotFound, ModelUnsupported
from octavo_engine.messages import EngineFacts
from octavo_engine.plan import LoadedModel, RequestResult, StepPlan, StepResult, TokenLogprobs
from octavo_engine.server.app import create_app
from octavo_engine.server.run import run_service
from octavo_engine.server.service import Service
from octavo_engine.store.local import Location
from octavo_engine.store.remote import Hub
from octavo_engine.transport import EngineChannel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from octavo_engine.core import OnProgress
    from octavo_engine.plan import SamplingParams

    Eventually = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS = 2
FIRST_BYTE = len(CONTROL_TOKENS)  # the id of the token of byte 0
SPACES = FIRST_BYTE + 256  # the id of the token of two spaces
MAX_MODEL_LEN = 400
CHATML = (
    "{% for message in messages %}"
    "{% if message.content == 'RAISE' %}{{ raise_exception('no raising here') }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# In the manner of Qwen 3's: tools in the system message, calls between tags, thoughts that can be switched off.
TEMPLATE: Final = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}"
    "{% for call in message.tool_calls %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
WEATHER: Final = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL: Final = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def tokens_of(text: str | bytes) -> list[int]:
    """The tokens of a text without control tokens."""
    data = text.encode() if isinstance(text, str) else text
    return [FIRST_BYTE + byte for byte in data]


def logprobs_of(token_id: int, num_logprobs: int | None) -> TokenLogprobs | None:
    """What the fake says of each token: it is the likeliest, at -0.5; the next ids are at -1, -2, the 20th at -inf."""
    if num_logprobs is None:
        return None
    logprobs = (-0.5, *range(-1, -19, -1), -math.inf)
    return TokenLogprobs(-0.5, tuple((token_id + place, logprobs[place]) for place in range(num_logprobs)), rank=1)


class FakeEngine:
    """Engine processes that are threads. Attributes may be set at any time.

    Attributes:
        answer: the text that every request gets, after which comes EOS.
        answers: where one is given for a choice, it gets this instead.
        sampling: of the last request.
        prompt_token_ids: of the same.
        begun: the prompts' tokens of all requests, in the order of their first tokens.
        refusal: refuse to start with this message.
        failing: requests whose prompt holds this text fail, alone.
        loaded: the model is loaded once this is set.
        steps: the engine steps while this is set, and is silent while it is not.
        num_steps: how many steps have begun.
        adapters: the loaded LoRA adapters; each says its path.
    """

    def __init__(self) -> None:
        self.answer: str | bytes = "The answer is 42."
        self.answers: dict[int, str | bytes] = {}
        self.sampling: SamplingParams | None = None
        self.prompt_token_ids: list[int] = []
        self.begun: list[list[int]] = []
        self.refusal: str | None = None
        self.failing: str | None = None
        self.loaded = threading.Event()
        self.loaded.set()
        self.steps = threading.Event()
        self.steps.set()
        self.num_steps = 0
        self.processes: list[FakeProcess] = []
        self.adapters: dict[int, Path] = {}

    @property
    def prompt(self) -> bytes:
        """The prompt of the last request as text, its control tokens written out."""
        names = [token.encode() for token in CONTROL_TOKENS]
        texts = (
            names[i] if i < FIRST_BYTE else bytes([i - FIRST_BYTE]) if i < SPACES else b"  "
            for i in self.prompt_token_ids
        )
        return b"".join(texts)

    @property
    def num_control_tokens(self) -> int:
        """How many are in that prompt."""
        return sum(token_id < FIRST_BYTE for token_id in self.prompt_token_ids)

    def spawn(self, config: EngineConfig) -> tuple[FakeProcess, socket.socket]:
        """As transport.spawn."""
        ours, theirs = socket.socketpair()
        process = FakeProcess(self, config, theirs)
        self.processes.append(process)
        return process, ours

    def load(self, config: EngineConfig, on_progress: OnProgress) -> LoadedModel:
        """As runner.load_runner."""
        on_progress("Loading", 25, 100)
        self.loaded.wait()
        if self.refusal is not None:
            raise ModelUnsupported(self.refusal)
        facts = EngineFacts(
            max_model_len=config.max_model_len or MAX_MODEL_LEN,
            block_size=4,
            num_blocks=1000,
            dtype="int8",
            cache_dtype="float16",
            device="cpu",
            num_parameters=1,
        )
        self.adapters.clear()
        adapters = FakeAdapters(self)
        for number, path in enumerate(config.adapters, start=1):
            adapters.load(number, path)
        return LoadedModel(
            runner=FakeRunner(self), facts=facts, eos_token_ids=frozenset({EOS}), vocab_size=260, adapters=adapters
        )

    def end(self) -> None:
        """Let every process end."""
        self.loaded.set()
        self.steps.set()
        for process in self.processes:
            process.kill()
            process.wait()


class FakeAdapters:
    """Takes any path but those with "wrong" in them."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    def load(self, adapter: int, path: Path) -> None:
        """As Adapters.load."""
        assert adapter > max(self._engine.adapters, default=0), "numbers are used once"
        if "wrong" in path.name:
            raise ModelInvalid(f"{path.name}: tensor x has shape [1, 2]")
        if "none" in path.name:
            raise ModelNotFound(f"there is no adapter at {path.name}")
        self._engine.adapters[adapter] = path

    def unload(self, adapter: int) -> None:
        """As Adapters.unload."""
        del self._engine.adapters[adapter]


class FakeRunner:
    """Says the engine's answer, to each request from its beginning."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._prompts: dict[str, list[int]] = {}
        self._answers: dict[tuple[str, int], Iterator[int]] = {}  # by request and choice

    def execute(self, plan: StepPlan) -> StepResult:
        """As Runner.execute."""
        self._engine.num_steps += 1
        self._engine.steps.wait()
        results, told = [], []
        for request in plan.requests:
            prompt = self._prompts.setdefault(request.request_id, [])
            if (request.request_id, 0) not in self._answers:
                prompt += request.token_ids
            if request.prompt_targets:
                num = request.sampling.num_prompt_logprobs
                told.append(tuple(one for target in request.prompt_targets if (one := logprobs_of(target, num))))
            if not request.needs_token:
                continue
            failing = self._engine.failing
            if failing is not None and bytes(max(0, i - FIRST_BYTE) for i in prompt).find(failing.encode()) >= 0:
                results += [RequestResult(error="not a number") for _ in request.choices]
                continue
            if (request.request_id, 0) not in self._answers:
                self._engine.begun.append(prompt)
            self._engine.sampling = request.sampling
            self._engine.prompt_token_ids = prompt
            if request.sampling.embed:
                results.append(RequestResult(state=struct.pack("<2f", len(prompt), prompt[-1])))
                continue
            for choice in request.choices:
                key = (request.request_id, choice)
                text = self._engine.answers.get(choice, self._engine.answer)
                if request.adapter:
                    text = f"I am {self._engine.adapters[request.adapter].name}, number {request.adapter}."
                token_id = next(self._answers.setdefault(key, iter(tokens_of(text))), EOS)
                results.append(
                    RequestResult(token_id=token_id, logprobs=logprobs_of(token_id, request.sampling.num_logprobs))
                )
        return StepResult(plan.step, tuple(results), prompt_logprobs=tuple(told))


class FakeProcess:
    """One engine in a thread, seen as client.EngineProcess."""

    pid = 2**30  # no process of that number can be: what it does cannot be looked up

    def __init__(self, engine: FakeEngine, config: EngineConfig, sock: socket.socket) -> None:
        self._socket = sock
        self._exit_code: int | None = None
        self._thread = threading.Thread(target=self._run, args=(engine, config), daemon=True)
        self._thread.start()

    def _run(self, engine: FakeEngine, config: EngineConfig) -> None:
        with self._socket:
            code = core.run_engine(EngineChannel(self._socket), config, engine.load)
        if self._exit_code is None:
            self._exit_code = code

    def wait(self, timeout: float | None = None) -> int:
        """As Popen.wait."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise subprocess.TimeoutExpired("fake engine", timeout or 0.0)
        assert self._exit_code is not None  # a thread that ended has set it
        return self._exit_code

    def kill(self, exit_code: int = -9) -> None:
        """As Popen.kill."""
        if self._exit_code is None:
            self._exit_code = exit_code
        with contextlib.suppress(OSError):  # closed: it has ended
            self._socket.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    """An engine whose behaviour the test sets."""
    fake = FakeEngine()
    yield fake
    fake.end()


@pytest.fixture(scope="session")
def fake_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file with a vocabulary of bytes, a ChatML template and nothing to compute with."""
    path = tmp_path_factory.mktemp("models") / "fake.gguf"
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*CONTROL_TOKENS, *alphabet, "ĠĠ"])
    writer.add_token_types([gguf.TokenType.CONTROL] * len(CONTROL_TOKENS) + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["Ġ Ġ"])  # two spaces: a vocabulary without any merge cannot be written
    writer.add_eos_token_id(EOS)
    writer.add_chat_template(CHATML)
    writer.add_block_count(1)
    writer.add_context_length(MAX_MODEL_LEN)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((260, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def shutdown_timeout() -> float:
    """Seconds; a test may parametrize it."""
    return 60.0


def with_template(model: Path, folder: Path, template: str) -> ServerConfig:
    """A server of the fake model with another chat template; empty: with its own."""
    path = folder / "template.jinja"
    path.write_text(template)
    engine = EngineConfig(model=model, served_model_names=("fake",), max_model_len=4000, enable_prefix_caching=False)
    return ServerConfig(engine=engine, chat_template=path if template else None)


@pytest.fixture
def config(fake_model_path: Path, shutdown_timeout: float) -> ServerConfig:
    """A server of the fake model under two names."""
    engine = EngineConfig(model=fake_model_path, served_model_names=("fake", "org/fake"))
    return ServerConfig(engine=engine, shutdown_timeout=shutdown_timeout)


@pytest.fixture
def service(engine: FakeEngine, config: ServerConfig) -> Service:
    """A service over the fake engine, not yet running."""
    location = Location(name="fake", path=config.engine.model)
    return Service(config, location, Hub(), spawn=engine.spawn)


@pytest.fixture
async def http(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the service behind a real server, which may still be loading."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        serving = asyncio.create_task(run_service(service, sock))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", timeout=30) as client:
            yield client
        if not serving.done():  # a test may have made it end, and told us why
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving


@pytest.fixture
async def unstarted(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application alone, which looks at bodies before it finds that there is no model yet."""
    transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://unstarted") as client:
        yield client


@pytest.fixture
async def ready(http: httpx.AsyncClient) -> httpx.AsyncClient:
    """The same client once the model is loaded."""
    await eventually(lambda: is_ready(http))
    return http


@pytest.fixture
async def ollama(ready: httpx.AsyncClient) -> AsyncIterator[AsyncClient]:
    """Ollama's own client."""
    async with AsyncClient(host=str(ready.base_url)) as client:
        yield client


async def is_ready(http: httpx.AsyncClient) -> bool:
    """Whether the server takes requests."""
    return (await http.get("/ready")).status_code == 200


@pytest.fixture(name="eventually")
def eventually_fixture() -> Eventually:
    """Wait until a condition holds, for at most half a minute."""
    return eventually


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """What the fixture gives."""
    async with asyncio.timeout(30):
        while not await condition():  # noqa: ASYNC110 - what is waited for is on the other side of a network
            await asyncio.sleep(0.01)
