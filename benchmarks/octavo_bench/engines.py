"""How each engine is started, where it says that it is ready, and how it is asked for log probabilities.

Every engine gets the threads of the whole machine, 32 users' worth of cache at 1,024 tokens each, and nothing that only
helps a benchmark. Prefix caches stay on: no two prompts of the measured work share a prefix.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from octavo_bench import peers, processes
from octavo_cluster import paths
from octavo_cluster.errors import CommandFailed
from octavo_cluster.shell import tail, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

MODEL_NAME: Final = "smollm2"  # under which every engine serves it
NUM_USERS: Final = 32  # the most that any cell has
CONTEXT: Final = 1024  # tokens of one user
_START_SECONDS: Final = 900.0  # vLLM compiles
_STOP_SECONDS: Final = 60.0


@dataclass(frozen=True)
class NextToken:
    """What an engine says of one token of a text, given those before it."""

    logprob: float  # of the token
    top: Mapping[int, float]  # the likeliest token ids -> their log probabilities


class Dialect(Protocol):
    """How an engine is asked about every token of a text but the first."""

    path: str

    def bodies(self, tokens: Sequence[int], num_top: int) -> list[dict[str, Any]]:
        """The requests whose answers, in this order, tell of all of them."""

    def read(self, answer: dict[str, Any], tokens: Sequence[int]) -> list[NextToken]:
        """What one answer tells, of the text's next tokens, which begin with `tokens`."""


class OpenAIDialect:
    """/v1/completions of vLLM and Octavo, with vLLM's prompt_logprobs: one request tells of the whole text."""

    path = "/v1/completions"

    def bodies(self, tokens: Sequence[int], num_top: int) -> list[dict[str, Any]]:
        """As in Dialect."""
        return [
            {
                "model": MODEL_NAME,
                "prompt": list(tokens),
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": num_top,
            }
        ]

    def read(self, answer: dict[str, Any], tokens: Sequence[int]) -> list[NextToken]:
        """As in Dialect."""
        _, *told = answer["choices"][0]["prompt_logprobs"]
        found = []
        for token, entries in zip(tokens, told, strict=True):
            logprobs = {int(token_id): entry["logprob"] for token_id, entry in entries.items()}
            found.append(NextToken(logprobs[token], logprobs))
        return found


class LlamaCppDialect:
    """llama-server's own /completion: log probabilities of the raw logits, tokens by id. A bias forces the token."""

    path = "/completion"

    def bodies(self, tokens: Sequence[int], num_top: int) -> list[dict[str, Any]]:
        """As in Dialect."""
        return [
            {
                "prompt": list(tokens[:position]),
                "n_predict": 1,
                "temperature": 0,
                "logit_bias": [[tokens[position], 100.0]],
                "n_probs": num_top,
            }
            for position in range(1, len(tokens))
        ]

    def read(self, answer: dict[str, Any], tokens: Sequence[int]) -> list[NextToken]:
        """As in Dialect."""
        del tokens
        (first,) = answer["completion_probabilities"]
        return [NextToken(first["logprob"], {top["id"]: top["logprob"] for top in first["top_logprobs"]})]


@dataclass(frozen=True)
class Engine:
    """One row of the table."""

    name: str
    is_octavo: bool
    weights: str  # which form of the model it computes with, for readers
    bytes_per_step: int  # weights that one step reads
    peak: str  # which figure of machine.py is that of its arithmetic
    command: Sequence[str | Path]  # without the port
    dialect: Dialect
    environment: Mapping[str, str] = field(default_factory=dict)
    health: str = "/health"  # 200 once requests are taken


@dataclass(frozen=True)
class Server:
    """A running engine."""

    engine: Engine
    url: str
    pid: int
    started: float  # time.perf_counter() when its process was started


def all_engines(names: Sequence[str], weights: peers.Weights) -> list[Engine]:
    """The engines of these names, in that order; sets up what they need."""
    makers = {
        "octavo": lambda: octavo(weights),
        "octavo-bf16": lambda: octavo(weights, dtype="bfloat16"),
        "llama.cpp-Q4_0": lambda: _llama_cpp(
            "llama.cpp-Q4_0", peers.quantised(weights, "Q4_0"), "Q4_0, made from the float32 form"
        ),
        "llama.cpp-Q4_1": lambda: _llama_cpp("llama.cpp-Q4_1", weights.stored, "Q4_1, the same file as Octavo's"),
        "vllm-bf16": lambda: _vllm("vllm-bf16", weights, "bfloat16"),
        "vllm-f32": lambda: _vllm("vllm-f32", weights, "float32"),
    }
    return [makers[name]() for name in names]


NAMES: Final = ("octavo", "octavo-bf16", "llama.cpp-Q4_0", "llama.cpp-Q4_1", "vllm-bf16", "vllm-f32")


def octavo(weights: peers.Weights, *, dtype: str = "auto", context: int = CONTEXT) -> Engine:
    """This checkout's engine, as it is installed beside the interpreter."""
    return Engine(
        name="octavo" if dtype == "auto" else "octavo-bf16",
        is_octavo=True,
        weights=f"Q4_1, --dtype {dtype}",
        bytes_per_step=weights.stored.stat().st_size if dtype == "auto" else _dense_bytes(weights, dtype),
        peak="int8_gop_per_s" if dtype == "auto" else f"{dtype}_gflop_per_s",
        command=_vllms_words(Path(sys.executable).with_name("octavo"), weights.stored, dtype, context),
        dialect=OpenAIDialect(),
        health="/ready",
    )


def _llama_cpp(name: str, model: Path, what: str) -> Engine:
    threads = str(os.cpu_count() or 1)
    return Engine(
        name=name,
        is_octavo=False,
        weights=what,
        bytes_per_step=model.stat().st_size,
        peak="int8_gop_per_s",
        command=[
            *(peers.llama_cpp("llama-server"), "--model", model, "--alias", MODEL_NAME, "--host", "127.0.0.1"),
            *("--threads", threads, "--parallel", str(NUM_USERS), "--ctx-size", str(NUM_USERS * CONTEXT)),
            *("--cache-ram", "0"),  # do not copy ended prompts aside for a return that never comes
        ],
        dialect=LlamaCppDialect(),
    )


def _vllm(name: str, weights: peers.Weights, dtype: str) -> Engine:
    return Engine(
        name=name,
        is_octavo=False,
        weights=f"{dtype}, from the float32 form",
        bytes_per_step=_dense_bytes(weights, dtype),
        peak=f"{dtype}_gflop_per_s",
        command=_vllms_words(peers.vllm(), weights.transformers, dtype, CONTEXT),
        dialect=OpenAIDialect(),
        environment={
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
            "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; 32 users of 1,024 tokens need 0.7 in bfloat16, 1.4 in float32
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        },
    )


def _dense_bytes(weights: peers.Weights, dtype: str) -> int:
    width = {"bfloat16": 2, "float32": 4}[dtype]
    return (weights.transformers / "model.safetensors").stat().st_size * width // 4


def _vllms_words(program: Path, model: Path, dtype: str, context: int) -> list[str | Path]:
    """A command line that vLLM and Octavo have in common."""
    return [
        *(program, "serve", model, "--served-model-name", MODEL_NAME, "--dtype", dtype),
        *("--host", "127.0.0.1", "--max-model-len", str(context)),
    ]


@contextlib.contextmanager
def serving(engine: Engine) -> Iterator[Server]:
    """Start an engine, wait until it takes requests, and end it with everything that it started.

    What it prints is kept in the cache's folder of logs.

    Raises:
        CommandFailed: it ended before it was ready.
        NotReady: it took too long.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    log = paths.cache_dir() / "logs" / f"bench-{engine.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(word) for word in (*engine.command, "--port", str(port))],
            env={**os.environ, **engine.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )

    def missing() -> str | None:
        if process.poll() is not None:
            ending = tail(log.read_text(errors="replace"))
            raise CommandFailed(f"{engine.name}: exit status {process.returncode}; {log} ends with\n{ending}")
        return _unready(url + engine.health)

    family: list[int] = []
    try:
        wait_until(missing, what=engine.name, seconds=_START_SECONDS, poll=0.02)
        yield Server(engine, url, process.pid, started)
    finally:
        family = processes.tree(process.pid)
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _end_stragglers(family)


def _end_stragglers(pids: Sequence[int]) -> None:
    """An engine that leaves its children behind would slow the next one down."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)


def _unready(url: str) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310 - our own address
            return None
    except urllib.error.HTTPError as error:
        return f"{url}: {error.code} {error.read()[:200].decode(errors='replace')}"
    except (OSError, json.JSONDecodeError) as error:
        return f"{url}: {error}"


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
