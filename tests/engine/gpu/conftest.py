"""A GPU that is none: torch on the CPU behind the accelerator's interface, and the kernels' twins.

What it makes of a mistake shows as wrong tokens or fails at once. A copy to the host is rubbish until it is awaited. A
pinned buffer that is written before the device is known to have read it is found out. A graph runs again what was
captured, on the same tensors, so that it computes on whatever is in them; its output is NaN once another one runs.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from octavo_engine.config import EngineConfig
from octavo_engine.planning import make_plan, read_model
from octavo_engine.runner import Loaded, ModelRunner
from octavo_engine.scheduler import Scheduler
from octavo_engine.sizing import Memory
from octavo_engine.steps import load_torch_steps

collect_ignore_glob = [] if sys.platform == "linux" else ["*"]  # there is no Triton elsewhere

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from octavo_engine.kernels.attention import Scores, Tiles
    from octavo_engine.kernels.suite import Suite
    from octavo_engine.messages import AddRequest, SchedulerStats
    from octavo_engine.plan import Runner
    from octavo_engine.planning import Plan

# ruff: noqa: PLC0415 - Triton is not everywhere where these tests are collected

RUBBISH = -77
GIB = 2**30
NUM_BLOCKS = 36  # what six requests of 96 tokens need
NUM_LAYERS, HEAD_DIM, VOCAB_SIZE = 2, 64, 96
KV_BYTES_PER_TOKEN = 2 * NUM_LAYERS * HEAD_DIM * 4  # one KV head, float32


class FakeMark:
    """A place in the queue."""

    def __init__(self, accelerator: FakeAccelerator, place: int) -> None:
        self._accelerator, self._place = accelerator, place

    def wait(self) -> None:
        """See Mark."""
        self._accelerator.wait(self._place)


class FakeGraph:
    """A function that is called again."""

    def __init__(self, accelerator: FakeAccelerator, compute: Callable[[], torch.Tensor], size: int) -> None:
        self._accelerator, self._compute, self._size = accelerator, compute, size

    def replay(self) -> torch.Tensor:
        """See Graph."""
        return self._accelerator.run(self._compute, self._size)


@dataclass
class FakeAccelerator:
    """See Accelerator. `log` has what was queued and what was awaited, in order."""

    total: int = 8 * GIB
    weights: int = GIB  # that are gone once the model is loaded
    peaks: Sequence[int] = (GIB // 2, GIB // 8)  # of the largest step, and of the largest graph
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._free = [self.total, self.total - self.weights]
        self._peaks = list(self.peaks)
        self._fresh: set[int] = set()  # pinned, not uploaded yet
        self._queue: list[tuple[torch.Tensor, torch.Tensor, bool]] = []  # host memory, its numbers, is to the host
        self._num_done = 0
        self._output: torch.Tensor | None = None  # of the last graph

    def pinned(self, size: int) -> torch.Tensor:
        """See Accelerator."""
        tensor = torch.full((size,), RUBBISH, dtype=torch.int64)
        self._fresh.add(tensor.data_ptr())
        return tensor

    def upload(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """See Accelerator."""
        self._fresh.remove(source.data_ptr())  # each is used once
        destination.copy_(source)
        self._queue.append((source, source.clone(), False))
        self.log.append("upload")

    def download(self, source: torch.Tensor) -> torch.Tensor:
        """See Accelerator."""
        host = torch.full_like(source, RUBBISH)
        self._queue.append((host, source.clone(), True))
        self.log.append("download")
        return host

    def mark(self) -> FakeMark:
        """See Accelerator."""
        return FakeMark(self, len(self._queue))

    def wait(self, place: int) -> None:
        """Be done with what was queued before."""
        self.log.append("wait")
        with torch.inference_mode():
            for host, numbers, is_to_host in self._queue[self._num_done : place]:
                if is_to_host:
                    host.copy_(numbers)
                else:
                    assert torch.equal(host, numbers), "a pinned buffer was written before the device had read it"
        self._num_done = max(self._num_done, place)

    def capture(self, compute: Callable[[], torch.Tensor]) -> FakeGraph:
        """See Accelerator."""
        size = len(compute())
        self.log.append(f"capture {size}")
        return FakeGraph(self, compute, size)

    def run(self, compute: Callable[[], torch.Tensor], size: int) -> torch.Tensor:
        """Replay."""
        if self._output is not None:
            self._output.fill_(torch.nan)
        self._output = compute()
        self.log.append(f"replay {size}")
        return self._output

    def free_bytes(self) -> int:
        """See Accelerator."""
        return self._free.pop(0)

    def peak_bytes(self, compute: Callable[[], object]) -> int:
        """See Accelerator."""
        self.log.append("measure")
        compute()
        return self._peaks.pop(0)


def twins() -> Suite:
    """The kernels' twins, which compute in float32 too."""
    from octavo_engine.kernels import attention, cache, sampling
    from octavo_engine.kernels.suite import Suite

    def attend(  # noqa: PLR0917 - as the kernel has them
        out: torch.Tensor,
        q: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        tables: torch.Tensor,
        requests: torch.Tensor,
        tiles: Tiles,  # noqa: ARG001 - all are computed
        scores: Scores,
        *,
        window: int | None,
    ) -> None:
        out.copy_(attention.attend_twin(q, key_cache, value_cache, tables, requests, scores, window=window))

    return Suite(
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
        store_kv=cache.store_kv_twin,
        attend=attend,
        sample=sampling.sample_twin,
    )


@dataclass(frozen=True)
class Tiny:
    """A checkpoint with heads of a size that the kernels have."""

    folder: Path

    def config(self, **options: Any) -> EngineConfig:
        """Options to load it with."""
        defaults: dict[str, Any] = {"dtype": "float32", "max_model_len": 96, "max_num_seqs": 6}
        defaults |= {"max_num_batched_tokens": 24, "device": "cuda"}
        return EngineConfig(model=self.folder, served_model_names=("tiny",), **defaults | options)

    def plan(self, config: EngineConfig, *, total: int = 8 * GIB) -> Plan:
        """As runner.py makes it on a GPU of so many bytes."""
        dtype: Any = config.dtype
        available = int(total * (config.gpu_memory_utilization or 0.9))
        memory = Memory(device="cuda", available_bytes=available, process_bytes=0, native=None)
        return make_plan(read_model(self.folder), config, device="cuda", dtype=dtype, memory=memory)

    def on_gpu(self, accelerator: FakeAccelerator, kernels: Suite | None = None, **options: Any) -> Loaded:
        """Loaded as on a GPU."""
        from octavo_engine.gpu.load import load_on_gpu

        config = self.config(**options)
        plan = self.plan(config, total=accelerator.total)
        return load_on_gpu(plan, config, accelerator, lambda *_: None, kernels or twins())

    def on_cpu(self) -> ModelRunner:
        """Loaded as torch has it on a CPU, in float32."""
        config = self.config(device="cpu")
        plan = self.plan(config)
        steps = load_torch_steps(
            plan.model.checkpoint,
            replace(plan.memory, num_blocks=NUM_BLOCKS),
            dtype=torch.float32,
            device=torch.device("cpu"),
            on_progress=lambda *_: None,
        )
        return ModelRunner(steps, seed=config.seed)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Two layers of random weights: 2 query heads on one KV head."""
    generator = torch.Generator().manual_seed(3)
    hidden, middle, heads = 64, 96, 2

    def weights(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    tensors = {
        "model.embed_tokens.weight": weights(VOCAB_SIZE, hidden),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": weights(VOCAB_SIZE, hidden),
    }
    shapes = {
        "self_attn.q_proj": (heads * HEAD_DIM, hidden),
        "self_attn.k_proj": (HEAD_DIM, hidden),
        "self_attn.v_proj": (HEAD_DIM, hidden),
        "self_attn.o_proj": (hidden, heads * HEAD_DIM),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
    }
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{name}.weight": weights(*shape) for name, shape in shapes.items()}
        tensors |= {
            f"{prefix}{name}.weight": torch.ones(hidden) for name in ("input_layernorm", "post_attention_layernorm")
        }
    folder = tmp_path_factory.mktemp("tiny")
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": middle,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return Tiny(folder)


Tokens = dict[tuple[str, int], list[int]]


def serve(
    runner: Runner, requests: Iterable[AddRequest], *, aborted: dict[int, str] | None = None, **options: Any
) -> tuple[Tokens, SchedulerStats]:
    """Run requests, one more at every second step, to their ends; `aborted`: who is, by step. Tokens, last gauges."""
    defaults: dict[str, Any] = {"num_blocks": NUM_BLOCKS, "max_num_seqs": 6, "max_num_batched_tokens": 24}
    scheduler = Scheduler(
        block_size=16,
        max_model_len=96,
        eos_token_ids=frozenset({2}),
        reserves_ahead=True,
        **defaults | options,
    )
    tokens: Tokens = {}
    arrivals = list(requests)
    for step in itertools.count():
        if arrivals and step % 2 == 0:
            scheduler.add(arrivals.pop(0))
        if aborted and step in aborted:
            scheduler.abort(aborted[step])
        plan = scheduler.schedule()
        if plan is None:
            if arrivals:
                continue
            break
        for update in scheduler.update(plan, runner.execute(plan)):
            assert update.error is None, update
            tokens.setdefault((update.request_id, update.choice), []).extend(update.token_ids)
        scheduler.check_integrity()
    return tokens, scheduler.stats()
