"""What fits into how much memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo_engine.config import EngineConfig, SpeculativeConfig
from octavo_engine.cpu.compute import kv_block_bytes
from octavo_engine.errors import ConfigError, ModelDoesNotFit
from octavo_engine.models.spec import DecoderSpec, Rope
from octavo_engine.sizing import (
    MAX_CPU_KV_BYTES,
    TYPICAL_REQUEST_TOKENS,
    DraftSizes,
    Memory,
    MemoryPlan,
    plan_memory,
    tensor_parallel_sizes,
    weight_bytes,
)
from octavo_engine.weights.gguf import TensorInfo
from octavo_engine.weights.quant_type import QuantType

if TYPE_CHECKING:
    from octavo_engine.cpu.compute import Compute
    from octavo_engine.planning import ComputeDType

MIB = 2**20
GIB = 2**30
PROCESSES = 100 * MIB

# SmolLM2-135M. A token's KV is 2 * 30 layers * 3 heads * 64 = 11,520 numbers.
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
KV_BYTES = 11_520 * 4


def tensor(name: str, *shape: int, quant_type: QuantType = QuantType.Q4_1) -> TensorInfo:
    return TensorInfo(name, Path("m.gguf"), shape, quant_type, offset=0, num_bytes=0)


LAYER = (
    tensor("q", 576, 576),
    tensor("k", 192, 576),
    tensor("v", 192, 576),
    tensor("o", 576, 576),
    tensor("gate", 1536, 576),
    tensor("up", 1536, 576),
    tensor("down", 576, 1536),
    tensor("norm", 576, quant_type=QuantType.F32),
    tensor("mlp_norm", 576, quant_type=QuantType.F32),
)
EMBEDDING = tensor("embedding", 49152, 576, quant_type=QuantType.Q8_0)
TENSORS = (EMBEDDING, tensor("final_norm", 576, quant_type=QuantType.F32), *LAYER * 30)
NUM_PARAMETERS = 134_515_008
WEIGHTS_F32 = (NUM_PARAMETERS + 49152 * 576) * 4  # the tied embedding counts twice


def plan(
    available_bytes: int,
    *,
    dtype: ComputeDType = "float32",
    device: str = "cpu",
    native: Compute | None = None,
    **options: Any,
) -> MemoryPlan:
    config = EngineConfig(model=Path("m.gguf"), served_model_names=("m",), **options)
    memory = Memory(device=device, available_bytes=available_bytes, process_bytes=PROCESSES, native=native)
    return plan_memory(SMOLLM2, TENSORS, config, dtype=dtype, memory=memory)


def fixed_bytes(promised: MemoryPlan) -> int:
    return promised.process_bytes + promised.margin_bytes + promised.weight_bytes + promised.work_bytes


def test_the_weights_are_those_of_the_model() -> None:
    assert sum(one.num_elements for one in TENSORS) == NUM_PARAMETERS
    assert plan(24 * GIB).weight_bytes == WEIGHTS_F32


def test_on_a_large_cpu_machine_the_cache_holds_what_is_typical_and_no_more() -> None:
    large = plan(24 * GIB)
    assert large.kv_bytes_per_token == KV_BYTES
    assert (large.block_size, large.max_model_len) == (8, 8192)
    assert large.num_blocks * 8 == 64 * TYPICAL_REQUEST_TOKENS


def test_on_a_cpu_the_cache_holds_at_least_the_longest_request() -> None:
    assert plan(24 * GIB, max_num_seqs=2).num_blocks * 8 == 8192


def test_on_a_cpu_the_cache_is_capped() -> None:
    assert plan(24 * GIB, max_num_seqs=512).kv_bytes <= MAX_CPU_KV_BYTES


def test_the_cache_is_never_more_than_the_requests_can_use() -> None:
    small = plan(24 * GIB, max_num_seqs=2, max_model_len=1001, kv_cache_memory_bytes=8 * GIB)
    assert small.num_blocks == 2 * 126


def test_a_gpu_has_larger_blocks_and_gives_the_cache_all_that_is_left() -> None:
    gpu = plan(80 * GIB, device="cuda", dtype="bfloat16", max_num_seqs=512)
    assert gpu.block_size == 16
    left = 80 * GIB - fixed_bytes(gpu)
    assert left - 16 * gpu.kv_bytes_per_token < gpu.kv_bytes <= left


def test_each_guess_needs_logits_of_its_own_as_far_as_a_step_has_room() -> None:
    guesses = SpeculativeConfig(num_speculative_tokens=3, prompt_lookup_min=1, prompt_lookup_max=1)
    without, with_guesses = (plan(24 * GIB, max_num_seqs=64, speculative_config=one) for one in (None, guesses))
    assert with_guesses.work_bytes - without.work_bytes == 64 * 3 * 49152 * 20
    full = plan(24 * GIB, max_num_seqs=64, max_num_batched_tokens=64, speculative_config=guesses)
    assert full.work_bytes == plan(24 * GIB, max_num_seqs=64, max_num_batched_tokens=64).work_bytes


def test_a_draft_model_takes_its_part_of_everything() -> None:
    config = EngineConfig(model=Path("m.gguf"), served_model_names=("m",), speculative_config=None)
    memory = Memory(device="cpu", available_bytes=24 * GIB, process_bytes=PROCESSES, native=None)
    alone = plan_memory(SMOLLM2, TENSORS, config, dtype="float32", memory=memory)
    draft = DraftSizes(spec=SMOLLM2, tensors=TENSORS, dtype="float32", native=None)
    together = plan_memory(SMOLLM2, TENSORS, config, dtype="float32", memory=memory, draft=draft)
    for part in ("weight_bytes", "work_bytes", "kv_bytes_per_token"):
        assert getattr(together, part) == 2 * getattr(alone, part)
    assert together.num_blocks == alone.num_blocks


def test_half_precision_halves_weights_and_cache() -> None:
    half, full = plan(2 * GIB, dtype="bfloat16"), plan(2 * GIB)
    norms = 61 * 576 * 4  # stay float32
    assert (half.weight_bytes - norms) * 2 == full.weight_bytes - norms
    assert half.kv_bytes_per_token * 2 == full.kv_bytes_per_token


def test_ranks_share_matrices_and_cache_but_not_norms() -> None:
    one, three = (weight_bytes(SMOLLM2, TENSORS, "bfloat16", ranks, native=None) for ranks in (1, 3))
    norms = 61 * 576 * 4
    assert (three - norms) * 3 == one - norms
    assert plan(24 * GIB, tensor_parallel_size=3).kv_bytes_per_token == KV_BYTES // 3


def test_the_cpu_library_keeps_a_tied_embedding_once_and_quantised_weights_as_they_are() -> None:
    assert weight_bytes(SMOLLM2, TENSORS, "float32", 1, native="float32") == NUM_PARAMETERS * 4
    norms, embedding = 61 * 576 * 4, 49152 * 576 // 32 * 34  # Q8_0
    others = (NUM_PARAMETERS - 61 * 576 - 49152 * 576) // 32 * 20  # Q4_1
    assert weight_bytes(SMOLLM2, TENSORS, "int8", 1, native="int8") == norms + embedding + others
    k_quants = [replace(one, quant_type=QuantType.Q6_K) for one in TENSORS if len(one.shape) == 2]
    assert weight_bytes(SMOLLM2, k_quants, "int8", 1, native="int8") == (NUM_PARAMETERS - 61 * 576) * 2


def test_the_cpu_library_caches_in_half_precision_but_for_float32() -> None:
    assert plan(24 * GIB, native="float32").kv_bytes_per_token == KV_BYTES
    assert plan(24 * GIB, dtype="bfloat16", native="bfloat16").kv_bytes_per_token == KV_BYTES // 2
    assert plan(24 * GIB, dtype="int8", native="int8").kv_bytes_per_token == KV_BYTES // 2


def test_what_pads_a_block_of_the_cpu_library_counts() -> None:
    # Keys are kept in tiles of 8 slots: a block of 10 has room for 16 of them beside 10 values.
    assert plan(24 * GIB, dtype="int8", native="int8", block_size=10).kv_bytes_per_token == KV_BYTES // 4 * 26 // 10
    odd_heads = replace(SMOLLM2, head_dim=20)
    assert kv_block_bytes("int8", odd_heads, 8) == kv_block_bytes("int8", replace(SMOLLM2, head_dim=32), 8)


def test_in_little_memory_the_context_becomes_what_fits() -> None:
    roomy = plan(24 * GIB)
    available = next(
        mib * MIB
        for mib in range(600, 2000)
        if mib * MIB * 31 // 32 > fixed_bytes(roomy) - roomy.margin_bytes + 100 * MIB
    )
    tight = plan(available)
    left = available - fixed_bytes(tight)
    assert tight.max_model_len == left // (8 * KV_BYTES) * 8 < 8192
    assert tight.num_blocks * tight.block_size == tight.max_model_len


def test_an_explicit_budget_is_taken_as_it_is() -> None:
    assert plan(24 * GIB, kv_cache_memory_bytes=8 * GIB).num_blocks == 8 * GIB // (8 * KV_BYTES)
    assert plan(24 * GIB, kv_cache_memory_bytes=1000 * KV_BYTES, block_size=10).num_blocks == 100


def test_weights_that_do_not_fit_are_refused_with_the_arithmetic() -> None:
    arithmetic = r"512 MiB available - 100 MiB processes - 16 MiB margin - 621 MiB weights - \d+ MiB working memory = -"
    with pytest.raises(ModelDoesNotFit, match=arithmetic) as refused:
        plan(512 * MIB)
    facts = refused.value.facts
    assert facts["availableBytes"] == 512 * MIB
    assert facts["weightBytes"] == WEIGHTS_F32


def test_a_context_that_does_not_fit_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ModelDoesNotFit, match=r"8192 x 46080 bytes = 360 MiB, but .* lower --max-model-len") as refused:
        plan(1024 * MIB, max_model_len=8192)
    assert refused.value.facts["neededTokens"] == 8192
    with pytest.raises(ModelDoesNotFit, match=r"one request of 512 tokens .* raise --kv-cache-memory-bytes"):
        plan(24 * GIB, kv_cache_memory_bytes=MIB)
    with pytest.raises(ModelDoesNotFit, match=r"--kv-cache-memory-bytes 34359738368 .* is more than"):
        plan(24 * GIB, kv_cache_memory_bytes=32 * GIB)


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
    available = available_mib * MIB
    try:
        promised = plan(available, device=device, **options)
    except ModelDoesNotFit:
        return
    assert fixed_bytes(promised) + promised.kv_bytes <= available
    assert 1 <= promised.max_model_len <= min(8192, promised.num_blocks * promised.block_size)
    assert promised.max_model_len == (options["max_model_len"] or promised.max_model_len)


def test_a_model_is_split_between_heads_and_between_blocks_of_the_quantisation() -> None:
    assert tensor_parallel_sizes(SMOLLM2, TENSORS) == (1, 3)  # 9 query and 3 KV heads
    eight_heads = replace(SMOLLM2, num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=14336)
    assert tensor_parallel_sizes(eight_heads, TENSORS) == (1, 2, 4, 8, 16, 32)  # from 16 on a KV head is on several
    coarse = tuple(replace(one, quant_type=QuantType.Q8_0) for one in TENSORS)
    narrow = replace(eight_heads, intermediate_size=4 * 32)  # 16 of them are no block of 32
    assert tensor_parallel_sizes(narrow, coarse) == (1, 2, 4)
    six_of_three = replace(eight_heads, num_heads=6, num_kv_heads=3, intermediate_size=6 * 32)
    assert tensor_parallel_sizes(six_of_three, TENSORS) == (1, 3, 6)  # two devices cannot have the same KV heads
    odd_vocabulary = replace(eight_heads, vocab_size=32_001)  # is filled up
    assert tensor_parallel_sizes(odd_vocabulary, TENSORS) == (1, 2, 4, 8, 16, 32)


def test_ranks_on_more_devices_than_kv_heads_each_keep_one() -> None:
    wide = replace(SMOLLM2, num_heads=12, num_kv_heads=3)
    assert [wide.share(ranks).kv_elements_per_token for ranks in (1, 3, 6)] == [11_520, 3_840, 3_840]
