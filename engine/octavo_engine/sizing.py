"""What fits: bytes of weights, bytes of KV cache, the number of blocks and the longest context. No torch here.

Called by runner.py before it reads a single weight. Pure arithmetic over the model's hyperparameters, the options and
the memory that is available (resources.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo_engine.errors import ConfigError, ModelDoesNotFit

if TYPE_CHECKING:
    from octavo_engine.config import EngineConfig
    from octavo_engine.models.spec import DecoderSpec

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BLOCK_SIZES = {"cpu": 8, "cuda": 16}  # KV slots in a block, by device

# Of the memory that the weights leave, the KV cache gets this share; the rest is for activations and the process.
KV_SHARE = 0.5
# On a CPU the host has other uses for its memory: more than this only by --kv-cache-memory-bytes.
MAX_CPU_KV_BYTES = 4 * 1024**3
# A context that nobody chose must be worth serving; less is refused rather than offered in silence.
MIN_AUTO_MODEL_LEN = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where the memory goes, and what that allows."""

    weight_bytes: int  # as they are kept while running, in the compute dtype
    kv_bytes_per_token: int  # over all layers
    block_size: int  # KV slots in a block
    num_blocks: int
    max_model_len: int  # longest prompt + output, in tokens

    @property
    def kv_bytes(self) -> int:
        """Bytes of all KV blocks."""
        return self.num_blocks * self.block_size * self.kv_bytes_per_token


def plan_memory(
    model: DecoderSpec, config: EngineConfig, *, num_parameters: int, dtype: str, device: str, available_bytes: int
) -> MemoryPlan:
    """Divide the memory.

    Args:
        model: hyperparameters.
        config: the options.
        num_parameters: numbers in the model file.
        dtype: compute dtype, a key of DTYPE_BYTES.
        device: a key of BLOCK_SIZES.
        available_bytes: memory of that device that this process may still take.

    Raises:
        ConfigError: --max-model-len holds no request, or exceeds what the model was trained for.
        ModelDoesNotFit: the weights, or the KV cache of one request of the longest length, exceed the memory.
    """
    if config.max_model_len is not None and config.max_model_len < 2:
        raise ConfigError(
            f"--max-model-len {config.max_model_len}: a request has at least a token of prompt and one of output; "
            "use at least 2"
        )
    if config.max_model_len is not None and config.max_model_len > model.max_context:
        raise ConfigError(
            f"--max-model-len {config.max_model_len}: the model was trained for {model.max_context} tokens; "
            f"use at most {model.max_context}"
        )
    itemsize = DTYPE_BYTES[dtype]
    weight_bytes = _weight_bytes(model, num_parameters, itemsize)
    kv_bytes_per_token = model.kv_elements_per_token * itemsize
    block_size = config.block_size or BLOCK_SIZES[device]
    budget = _kv_budget(config, weight_bytes, device, available_bytes)
    block_bytes = block_size * kv_bytes_per_token
    affordable_blocks = budget // block_bytes
    affordable_tokens = affordable_blocks * block_size
    needed = config.max_model_len or min(model.max_context, MIN_AUTO_MODEL_LEN)
    if affordable_tokens < needed:
        way_out = "lower --max-model-len" if config.max_model_len else "raise --kv-cache-memory-bytes"
        raise ModelDoesNotFit(
            f"the KV cache of one request of {needed} tokens takes {needed} x {kv_bytes_per_token} bytes = "
            f"{_mib(needed * kv_bytes_per_token)}, but {_mib(budget)} are there for it "
            f"({_mib(available_bytes)} available, {_mib(weight_bytes)} of it for weights): "
            f"{way_out} or give the process more memory"
        )
    max_model_len = config.max_model_len or min(model.max_context, affordable_tokens)
    useful_blocks = config.max_num_seqs * -(-max_model_len // block_size)
    return MemoryPlan(
        weight_bytes=weight_bytes,
        kv_bytes_per_token=kv_bytes_per_token,
        block_size=block_size,
        num_blocks=min(affordable_blocks, useful_blocks),
        max_model_len=max_model_len,
    )


def _weight_bytes(model: DecoderSpec, num_parameters: int, itemsize: int) -> int:
    """A tied embedding is kept twice: in rows to look tokens up, and packed as the output matrix."""
    twice = model.vocab_size * model.hidden_size if model.tied_embeddings else 0
    return (num_parameters + twice) * itemsize


def _kv_budget(config: EngineConfig, weight_bytes: int, device: str, available_bytes: int) -> int:
    """Bytes that KV blocks may take.

    Raises:
        ModelDoesNotFit: the weights leave nothing, or less than --kv-cache-memory-bytes asks for.
    """
    left = available_bytes - weight_bytes
    if left <= 0:
        raise ModelDoesNotFit(
            f"the weights take {_mib(weight_bytes)}, but {_mib(available_bytes)} of memory are available: "
            "give the process more memory, or choose a smaller model or dtype"
        )
    wanted = config.kv_cache_memory_bytes
    if wanted is None:
        share = int(left * KV_SHARE)
        return min(share, MAX_CPU_KV_BYTES) if device == "cpu" else share
    if wanted > left:
        raise ModelDoesNotFit(
            f"--kv-cache-memory-bytes {wanted} ({_mib(wanted)}) is more than the {_mib(left)} that are left of "
            f"{_mib(available_bytes)} after {_mib(weight_bytes)} of weights: lower it or give the process more memory"
        )
    return wanted


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
