"""What fits into how much memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError, ModelDoesNotFit
from octavo_engine.models.spec import DecoderSpec, Rope
from octavo_engine.sizing import MAX_CPU_KV_BYTES, MemoryPlan, plan_memory

GIB = 2**30

# SmolLM2-135M: 134,515,008 numbers; a token's KV is 2 * 30 layers * 3 heads * 64 = 11,520 numbers.
SMOLLM2 = DecoderSpec(
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_context=8192,
    ropes=(Rope(100_000.0),) * 30,
    windows=(None,) * 30,
    attention_scale=64**-0.5,
    rms_norm_eps=1e-5,
    tied_embeddings=True,
    eos_token_ids=frozenset({2}),
)
NUM_PARAMETERS = 134_515_008
WEIGHTS_F32 = (NUM_PARAMETERS + 49152 * 576) * 4  # the tied embedding counts twice


def plan(available_bytes: int, *, dtype: str = "float32", device: str = "cpu", **options: Any) -> MemoryPlan:
    config = EngineConfig(model=Path("m.gguf"), served_model_names=("m",), **options)
    return plan_memory(
        SMOLLM2, config, num_parameters=NUM_PARAMETERS, dtype=dtype, device=device, available_bytes=available_bytes
    )


def test_on_a_large_cpu_machine_the_cache_is_capped() -> None:
    large = plan(24 * GIB)
    assert large.weight_bytes == WEIGHTS_F32
    assert large.kv_bytes_per_token == 11_520 * 4
    assert large.block_size == 8
    assert large.max_model_len == 8192
    assert large.num_blocks == MAX_CPU_KV_BYTES // (8 * 11_520 * 4)
    assert large.kv_bytes <= MAX_CPU_KV_BYTES


def test_the_cache_is_never_more_than_the_requests_can_use() -> None:
    small = plan(24 * GIB, max_num_seqs=2, max_model_len=1001)
    assert small.num_blocks == 2 * 126


def test_a_gpu_has_larger_blocks_and_no_cap() -> None:
    gpu = plan(80 * GIB, device="cuda", dtype="bfloat16", max_num_seqs=256)
    assert gpu.block_size == 16
    assert gpu.kv_bytes > MAX_CPU_KV_BYTES


def test_half_precision_halves_everything() -> None:
    half, full = plan(2 * GIB, dtype="bfloat16"), plan(2 * GIB)
    assert half.weight_bytes * 2 == full.weight_bytes
    assert half.kv_bytes_per_token * 2 == full.kv_bytes_per_token


def test_in_little_memory_the_context_becomes_what_fits() -> None:
    tight = plan(WEIGHTS_F32 + 200 * 2**20)  # half of it for KV: 100 MiB of 46,080 bytes a token
    assert tight.max_model_len == 100 * 2**20 // (8 * 46_080) * 8 == 2272
    assert tight.num_blocks * tight.block_size == tight.max_model_len


def test_an_explicit_budget_is_taken_as_it_is() -> None:
    assert plan(24 * GIB, kv_cache_memory_bytes=8 * GIB).num_blocks == 8 * GIB // (8 * 46_080)
    assert plan(24 * GIB, kv_cache_memory_bytes=1000 * 46_080, block_size=10).num_blocks == 100


def test_weights_that_do_not_fit_are_refused_with_the_arithmetic() -> None:
    with pytest.raises(ModelDoesNotFit, match=r"the weights take 621 MiB, but 512 MiB of memory are available"):
        plan(512 * 2**20)


def test_a_context_that_does_not_fit_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ModelDoesNotFit, match=r"8192 x 46080 bytes = 360 MiB, but 100 MiB .* lower --max-model-len"):
        plan(WEIGHTS_F32 + 200 * 2**20, max_model_len=8192)
    with pytest.raises(ModelDoesNotFit, match=r"one request of 512 tokens .* raise --kv-cache-memory-bytes"):
        plan(24 * GIB, kv_cache_memory_bytes=2**20)
    with pytest.raises(ModelDoesNotFit, match=r"--kv-cache-memory-bytes 34359738368 .* is more than"):
        plan(24 * GIB, kv_cache_memory_bytes=32 * GIB)


@pytest.mark.parametrize("max_model_len", [1, 0, -1])
def test_a_context_without_room_for_a_request_is_refused(max_model_len: int) -> None:
    with pytest.raises(ConfigError, match=f"--max-model-len {max_model_len}: .* use at least 2"):
        plan(24 * GIB, max_model_len=max_model_len)


def test_a_context_beyond_the_models_own_is_refused() -> None:
    with pytest.raises(ConfigError, match="--max-model-len 9000: the model was trained for 8192 tokens"):
        plan(24 * GIB, max_model_len=9000)


@given(
    available_mib=st.integers(1, 100_000),
    max_model_len=st.none() | st.integers(2, 8192),
    max_num_seqs=st.integers(1, 512),
    block_size=st.none() | st.integers(1, 64),
    kv_cache_memory_bytes=st.none() | st.integers(1, 2**36),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_what_is_promised_fits(available_mib: int, device: str, **options: Any) -> None:
    available = available_mib * 2**20
    try:
        promised = plan(available, device=device, **options)
    except ModelDoesNotFit:
        return
    assert promised.weight_bytes + promised.kv_bytes <= available
    assert 1 <= promised.max_model_len <= min(8192, promised.num_blocks * promised.block_size)
    assert promised.max_model_len == (options["max_model_len"] or promised.max_model_len)
