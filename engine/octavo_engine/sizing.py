"""What fits: bytes of weights, of working memory and of KV cache, the number of blocks, the longest context. No torch.

Called by planning.py. Pure arithmetic over a model's sizes, the options and the memory that is there. Everything that a
refusal says in words is in its `facts` too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from octavo_engine.cpu import compute as cpu
from octavo_engine.errors import ConfigError, ModelDoesNotFit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo_engine.config import EngineConfig
    from octavo_engine.cpu.compute import Compute
    from octavo_engine.errors import Facts
    from octavo_engine.models.spec import DecoderSpec
    from octavo_engine.planning import ComputeDType
    from octavo_engine.weights.quant_type import QuantType

MIB = 2**20

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # where torch computes
BLOCK_SIZES = {"cpu": 8, "cuda": 16}  # KV slots in a block, by device
# A step has room for the logits of max_num_seqs requests and of so many tokens of prompts whose logprobs are asked for.
NUM_PROMPT_ROWS = 16
# On a CPU attention multiplies float32, and the other products int8 where they can: so many times as fast. Measured 3.2
# with SmolLM2 on AVX2. Where they cannot, a step deep in a long prompt is made shorter than need be.
_ATTENTION_COST = 3

# What two processes take before there is a model, in anonymous memory and in the parts of libraries that are in use.
# Measured on x86-64 with Python 3.11 and the CPU build of torch 2.13, rounded up: the API process has 65 MiB with a
# vocabulary of 49,152 tokens, and 64 streaming clients add 20; the engine 156 MiB and 100 of libraries.
API_PROCESS_BYTES = 96 * MIB
ENGINE_PROCESS_BYTES = 256 * MIB
# On a GPU: context, kernels and cuBLAS workspace. An estimate, for `octavo plan` alone: the engine asks the driver.
CUDA_CONTEXT_BYTES = 512 * MIB
# Of what is available this share is promised to nobody: page tables, sockets, what the allocator has in its gaps.
MARGIN = 1 / 32

# On a CPU the host has other uses for its memory: without --kv-cache-memory-bytes the cache holds as many requests as
# may run, of this many tokens each, or one request of the longest length, and never takes more than the maximum.
TYPICAL_REQUEST_TOKENS = 256
MAX_CPU_KV_BYTES = 4 * 1024 * MIB
# A context that nobody chose must be worth serving; less is refused rather than offered in silence.
MIN_AUTO_MODEL_LEN = 512

_LOGIT_BYTES = 20  # a logit in the compute dtype, as float32 twice, and its cumulative probability as float64
_NORM_BYTES = 4  # norms and biases stay float32
_NATIVE_ADAPTER_BYTES = 4  # the C++ decoder adds LoRA adapters in float32
_ROTATION_BYTES = 4  # half of a head's numbers have a cosine and a sine each, float32


class StoredTensor(Protocol):
    """What sizes need to know of a tensor in a file (weights.gguf.TensorInfo)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Outermost dimension first."""

    @property
    def num_elements(self) -> int:
        """Numbers in the tensor."""

    @property
    def quant_type(self) -> QuantType:
        """How they are stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The memory to divide: of each GPU, or on a CPU of the machine, of which each rank gets an equal share."""

    device: str  # a key of BLOCK_SIZES
    available_bytes: int  # what this engine may take in all
    process_bytes: int  # of it, what goes to processes and libraries before there is a model
    native: Compute | None  # the C++ decoder computes in this, and keeps all in forms of its own; None: torch computes


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a loaded model was seen to take of a GPU, a draft model beside it included."""

    weight_bytes: int
    work_bytes: int  # the peak of the largest step and of the graphs
    max_model_len: int  # that it was loaded for


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where the memory of one device goes, and what that allows."""

    available_bytes: int
    process_bytes: int  # processes and their libraries
    margin_bytes: int  # promised to nobody
    weight_bytes: int  # as they are kept while running, LoRA adapters included
    work_bytes: int  # activations and logits of the largest step
    kv_bytes_per_token: int  # over all layers; with what a block is padded by, rounded up
    block_size: int  # KV slots in a block
    num_blocks: int
    max_model_len: int  # longest prompt + output, in tokens

    @property
    def kv_bytes(self) -> int:
        """Bytes of all KV blocks."""
        return self.num_blocks * self.block_size * self.kv_bytes_per_token


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSizes:
    """What sizes need to know of a draft model, whose KV cache has as many blocks as the model's."""

    spec: DecoderSpec
    tensors: Sequence[StoredTensor]
    dtype: ComputeDType
    native: Compute | None


def plan_memory(
    spec: DecoderSpec,
    tensors: Sequence[StoredTensor],
    config: EngineConfig,
    *,
    dtype: ComputeDType,
    memory: Memory,
    draft: DraftSizes | None = None,
    adapter_elements: int = 0,
    measured: Measured | None = None,
) -> MemoryPlan:
    """Divide the memory.

    Args:
        spec: the model's sizes.
        tensors: the model's weights.
        config: the options; its tensor_parallel_size must be one of `tensor_parallel_sizes`.
        dtype: what is computed in; memory.native where that is set.
        memory: what there is.
        draft: a draft model beside it, on one device; its part of everything is counted with the model's.
        adapter_elements: numbers in LoRA adapters that there is to be room for.
        measured: what the model takes once it is loaded, instead of what its header lets expect.

    Raises:
        ConfigError: --max-model-len exceeds what the model was trained for.
        ModelDoesNotFit: the weights, or the KV cache of one request of the longest length, exceed the memory.
    """
    if config.max_model_len is not None and config.max_model_len > spec.max_context:
        raise ConfigError(
            f"--max-model-len {config.max_model_len}: the model was trained for {spec.max_context} tokens; "
            f"use at most {spec.max_context}"
        )
    ranks = config.tensor_parallel_size
    share = spec.share(ranks)
    block_size = config.block_size or BLOCK_SIZES[memory.device]
    kv_bytes_per_token = _kv_bytes_per_token(share, dtype, block_size, native=memory.native)
    adapter_bytes = adapter_elements * (_NATIVE_ADAPTER_BYTES if memory.native else _DTYPE_BYTES[dtype])
    fixed = {
        "process": memory.process_bytes,
        "margin": int(memory.available_bytes * MARGIN),
        "weight": weight_bytes(spec, tensors, dtype, ranks, native=memory.native) + adapter_bytes,
        "work": _work_bytes(share, config, dtype, native=memory.native),
    }
    if draft is not None:
        kv_bytes_per_token += _kv_bytes_per_token(draft.spec, draft.dtype, block_size, native=draft.native)
        fixed["weight"] += weight_bytes(draft.spec, draft.tensors, draft.dtype, ranks, native=draft.native)
        fixed["work"] += _work_bytes(draft.spec, config, draft.dtype, native=draft.native)
    longest = spec.max_context
    if measured is not None:
        fixed |= {"weight": measured.weight_bytes + adapter_bytes, "work": measured.work_bytes}
        longest = measured.max_model_len
    block_bytes = block_size * kv_bytes_per_token
    budget = _kv_budget(spec, config, memory, fixed, kv_bytes_per_token)
    affordable_blocks = budget // block_bytes
    affordable_tokens = affordable_blocks * block_size
    needed = config.max_model_len or min(longest, MIN_AUTO_MODEL_LEN)
    if affordable_tokens < needed:
        way_out = "lower --max-model-len" if config.max_model_len else "raise --kv-cache-memory-bytes"
        raise ModelDoesNotFit(
            f"the KV cache of one request of {needed} tokens takes {needed} x {kv_bytes_per_token} bytes = "
            f"{in_mib(needed * kv_bytes_per_token)}, but {in_mib(budget)} are there for it "
            f"({_arithmetic(memory, fixed)}): {way_out} or give the process more memory",
            facts=_facts(memory, fixed) | {"kvBytesPerToken": kv_bytes_per_token, "neededTokens": needed},
        )
    max_model_len = config.max_model_len or min(longest, affordable_tokens)
    useful_blocks = config.max_num_seqs * -(-max_model_len // block_size)
    return MemoryPlan(
        available_bytes=memory.available_bytes,
        process_bytes=fixed["process"],
        margin_bytes=fixed["margin"],
        weight_bytes=fixed["weight"],
        work_bytes=fixed["work"],
        kv_bytes_per_token=kv_bytes_per_token,
        block_size=block_size,
        num_blocks=min(affordable_blocks, useful_blocks),
        max_model_len=max_model_len,
    )


def weight_bytes(
    spec: DecoderSpec, tensors: Sequence[StoredTensor], dtype: ComputeDType, ranks: int, *, native: Compute | None
) -> int:
    """Bytes of one rank's weights while running: its part of each matrix (weights/shard.py), and all vectors."""
    vectors = sum(tensor.num_elements for tensor in tensors if len(tensor.shape) == 1)
    if native is not None:
        matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
        num_bytes = sum(cpu.matrix_bytes(native, tensor.quant_type, tensor.shape) for tensor in matrices)
    else:
        share = spec.share(ranks)
        heads = 2 * (share.num_heads + share.num_kv_heads) * spec.head_dim  # queries and output, keys and values
        layers = spec.num_layers * (heads + 3 * share.intermediate_size)
        # Twice, also where one matrix is both: torch has it in rows to look tokens up, and packed to multiply with.
        vocabulary = 2 * -(-spec.vocab_size // ranks)
        num_bytes = (layers + vocabulary) * spec.hidden_size * _DTYPE_BYTES[dtype]
    return num_bytes + vectors * _NORM_BYTES


def tensor_parallel_sizes(spec: DecoderSpec, tensors: Sequence[StoredTensor]) -> tuple[int, ...]:
    """The numbers of devices that the model can be split over, from 1 on.

    Each device gets as many query heads as the others and an equal part of the MLP; whole KV heads, or one that it has
    together with others; an equal part of the vocabulary, the last one filled up. Matrices that are split along their
    rows (attention output, MLP down) are cut between blocks of the quantisation.
    """
    layer_matrices = [tensor for tensor in tensors if len(tensor.shape) > 1 and tensor.shape[0] != spec.vocab_size]
    group = max((tensor.quant_type.block_size for tensor in layer_matrices), default=1)
    widths = (spec.num_heads * spec.head_dim, spec.intermediate_size)
    return tuple(
        size
        for size in range(1, spec.num_heads + 1)
        if spec.num_heads % size == spec.intermediate_size % size == 0
        and (spec.num_kv_heads % size == 0 or size % spec.num_kv_heads == 0)
        and (size == 1 or all(width // size % group == 0 for width in widths))
    )


def positions_a_token(spec: DecoderSpec, max_model_len: int) -> int:
    """To how many positions a token attends in the time that all its other products take, on a CPU.

    A layer with a window counts by the share of the context that its window is.
    """
    products = spec.num_layers * sum(outputs * inputs for outputs, inputs in spec.layer_matrices.values())
    products_a_position = 2 * spec.num_heads * spec.head_dim  # in a layer that sees all of them
    seen = sum(1.0 if window is None else min(1.0, window / max_model_len) for window in spec.windows)
    return max(1, round(products / (products_a_position * _ATTENTION_COST * seen)))


def in_mib(num_bytes: int) -> str:
    """For people."""
    return f"{num_bytes / MIB:.0f} MiB"


def _kv_bytes_per_token(spec: DecoderSpec, dtype: ComputeDType, block_size: int, *, native: Compute | None) -> int:
    if native is not None:
        return -(-cpu.kv_block_bytes(native, spec, block_size) // block_size)
    return spec.kv_elements_per_token * _DTYPE_BYTES[dtype]


def _work_bytes(spec: DecoderSpec, config: EngineConfig, dtype: ComputeDType, *, native: Compute | None) -> int:
    """Bytes that the largest step needs beside weights and cache.

    Of each token, in torch: the residual and its norm, the widest of the layer's intermediate results with its input,
    and a row of the attention mask of the reference backend. Of each token that one is drawn after, or of which the
    logprob is told: logits. Of each position that there may be: its rotations.
    """
    positions = config.max_model_len or spec.max_context
    if native is not None:
        per_token = cpu.token_bytes(spec)
    else:
        heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        widest = max(3 * spec.intermediate_size, 2 * heads)
        per_token = 3 * 4 * spec.hidden_size + widest * _DTYPE_BYTES[dtype] + 8 * positions
    per_row = spec.vocab_size * _LOGIT_BYTES
    num_rows = min(config.max_num_seqs * (1 + config.num_speculative_tokens), config.max_num_batched_tokens)
    num_rows += NUM_PROMPT_ROWS
    per_position = len(set(spec.ropes)) * spec.head_dim * _ROTATION_BYTES
    return config.max_num_batched_tokens * per_token + num_rows * per_row + positions * per_position


def _kv_budget(
    spec: DecoderSpec, config: EngineConfig, memory: Memory, fixed: dict[str, int], kv_bytes_per_token: int
) -> int:
    """Bytes that KV blocks may take.

    Raises:
        ModelDoesNotFit: nothing is left for them, or less than --kv-cache-memory-bytes asks for.
    """
    left = memory.available_bytes - sum(fixed.values())
    if left <= 0:
        raise ModelDoesNotFit(
            f"nothing is left for the KV cache ({_arithmetic(memory, fixed)}): give the process more memory, lower "
            "--max-num-seqs or --max-num-batched-tokens, or choose a smaller model or dtype",
            facts=_facts(memory, fixed),
        )
    wanted = config.kv_cache_memory_bytes
    if wanted is not None and wanted > left:
        raise ModelDoesNotFit(
            f"--kv-cache-memory-bytes {wanted} ({in_mib(wanted)}) is more than the {in_mib(left)} that are left "
            f"({_arithmetic(memory, fixed)}): lower it or give the process more memory",
            facts=_facts(memory, fixed) | {"kvCacheMemoryBytes": wanted},
        )
    if wanted is not None:
        return wanted
    if memory.device != "cpu":
        return left
    tokens = max(config.max_num_seqs * TYPICAL_REQUEST_TOKENS, config.max_model_len or spec.max_context)
    block_size = config.block_size or BLOCK_SIZES[memory.device]
    enough = -(-tokens // block_size) * block_size * kv_bytes_per_token
    return min(left, enough, MAX_CPU_KV_BYTES)


def _arithmetic(memory: Memory, fixed: dict[str, int]) -> str:
    taken = " - ".join(f"{in_mib(num_bytes)} {_NAMES[name]}" for name, num_bytes in fixed.items())
    left = memory.available_bytes - sum(fixed.values())
    return f"{in_mib(memory.available_bytes)} available - {taken} = {in_mib(left)}"


_NAMES = {"process": "processes", "margin": "margin", "weight": "weights", "work": "working memory"}


def _facts(memory: Memory, fixed: dict[str, int]) -> Facts:
    facts: Facts = {f"{name}Bytes": number for name, number in fixed.items()}
    return facts | {"availableBytes": memory.available_bytes}
