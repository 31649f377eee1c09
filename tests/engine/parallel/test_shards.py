"""What of a model each rank has: all of it together, no block of a quantisation cut, and as few bytes as promised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo_engine.config import EngineConfig
from octavo_engine.models.checkpoint import Checkpoint, read_checkpoint
from octavo_engine.models.spec import DecoderSpec, Rope
from octavo_engine.parallel import Alone
from octavo_engine.sizing import Memory, plan_memory, tensor_parallel_sizes, weight_bytes
from octavo_engine.steps import load_torch_steps
from octavo_engine.weights.gguf import read_header
from octavo_engine.weights.quant_type import QuantType
from octavo_engine.weights.shard import Shard
from octavo_engine.weights.stored import WeightSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from octavo_engine.models.family import LayerRole, ModelRole
    from octavo_engine.weights.stored import Matrix

CPU = torch.device("cpu")
SPEC = DecoderSpec(
    vocab_size=50,
    hidden_size=1024,
    intermediate_size=1024,
    num_layers=1,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    rms_norm_eps=1e-5,
    ropes=(Rope(10_000.0),),
    windows=(None,),
    tied_embeddings=True,
    max_context=64,
    eos_token_ids=frozenset(),
    attention_scale=1.0,
)


def part(path: Path, role: ModelRole | LayerRole, shape: tuple[int, int], shard: Shard) -> Matrix:
    """One rank's part of the only tensor of a file, in a role."""
    checkpoint = Checkpoint(
        path=path,
        architecture="llama",
        spec=SPEC,
        tensors=read_header(path).tensors,
        names={role: "matrix"},
        norm_offset=0.0,
        pairs_adjacent=True,
    )
    return WeightSource(checkpoint, on_progress=lambda *_: None, shard=shard).matrix(role, shape)


def write(path: Path, quant_type: QuantType, shape: tuple[int, int]) -> Path:
    """A matrix of random blocks, whose scales are all finite."""
    row_bytes = shape[1] // quant_type.block_size * quant_type.block_bytes
    packed = np.random.default_rng(0).integers(0, 60, (shape[0], row_bytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(path, "llama")
    kind = gguf.GGMLQuantizationType(int(quant_type))
    if quant_type is QuantType.F32:
        writer.add_tensor("matrix", packed.view(np.float32))
    elif quant_type is QuantType.F16:
        writer.add_tensor("matrix", packed.view(np.float16))
    else:
        writer.add_tensor("matrix", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("quant_type", QuantType)
def test_the_parts_of_all_ranks_are_the_whole_in_every_type(tmp_path: Path, quant_type: QuantType) -> None:
    path = write(tmp_path / "one.gguf", quant_type, (1024, 1024))
    cases: tuple[tuple[LayerRole, int], ...] = (("q", 0), ("gate", 0), ("o", 1), ("down", 1))
    for role, dim in cases:
        whole = part(path, role, (1024, 1024), Shard()).dequantize(torch.float32, CPU)
        parts = [part(path, role, (1024, 1024), Shard(rank, 4)) for rank in range(4)]
        assert {one.shape for one in parts} == {(256, 1024) if dim == 0 else (1024, 256)}
        assert torch.equal(torch.cat([one.dequantize(torch.float32, CPU) for one in parts], dim), whole), role


def test_fewer_kv_heads_than_ranks_are_each_on_several(tmp_path: Path) -> None:
    path = write(tmp_path / "one.gguf", QuantType.Q4_1, (256, 1024))
    heads = part(path, "k", (256, 1024), Shard()).packed.view(2, 128, -1)
    for size, owners in ((2, (0, 1)), (4, (0, 0, 1, 1)), (8, (0, 0, 0, 0, 1, 1, 1, 1))):
        for rank, head in enumerate(owners):
            assert torch.equal(part(path, "k", (256, 1024), Shard(rank, size)).packed, heads[head])


def test_a_vocabulary_that_does_not_divide_is_filled_up_with_zeros(tmp_path: Path) -> None:
    path = write(tmp_path / "one.gguf", QuantType.Q8_0, (50, 1024))
    parts = [part(path, "embedding", (50, 1024), Shard(rank, 4)).dequantize(torch.float32, CPU) for rank in range(4)]
    assert {one.shape for one in parts} == {(13, 1024)}
    together = torch.cat(parts)
    assert torch.equal(together[:50], part(path, "embedding", (50, 1024), Shard()).dequantize(torch.float32, CPU))
    assert not together[50:].any()


@given(groups=st.integers(1, 8), num_kv_heads=st.integers(1, 12), middle=st.sampled_from([96, 128, 840]))
def test_every_rank_has_the_kv_heads_of_its_query_heads(groups: int, num_kv_heads: int, middle: int) -> None:
    heads = groups * num_kv_heads
    spec = replace(SPEC, num_heads=heads, num_kv_heads=num_kv_heads, head_dim=2, intermediate_size=middle)
    sizes = tensor_parallel_sizes(spec, ())
    assert sizes[0] == 1
    for size in sizes:
        share = spec.share(size)
        for rank in range(size):
            shard = Shard(rank, size)
            queries = shard.part("q", (heads * 2, 8), spec)
            keys = shard.part("k", (num_kv_heads * 2, 8), spec)
            assert (queries.stop - queries.start, keys.stop - keys.start) == (
                share.num_heads * 2,
                share.num_kv_heads * 2,
            )
            wanted = {head // groups for head in range(queries.start // 2, queries.stop // 2)}
            assert wanted == set(range(keys.start // 2, keys.stop // 2))


class Silent(Alone):
    """One of several ranks whose others are not there: to look at what it loads."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size  # type: ignore[misc] # another one


def tensors_of(thing: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor that is kept in an object of ours."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, list | tuple):
        for item in thing:
            yield from tensors_of(item, seen)
    elif type(thing).__module__.startswith("octavo_engine"):
        for name, value in vars(thing).items():
            if name not in ("_tables", "_backend"):  # positions' rotations, and the cache
                yield from tensors_of(value, seen)


def config(size: int) -> EngineConfig:
    return EngineConfig(model=Path("m.gguf"), served_model_names=("m",), tensor_parallel_size=size)


def num_bytes(tensors: Iterator[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_rank_keeps_as_many_bytes_as_the_plan_says(write_tiny_gguf: Any, dtype: Any) -> None:
    checkpoint = read_checkpoint(write_tiny_gguf())
    spec, stored = checkpoint.spec, tuple(checkpoint.tensors.values())
    memory = Memory(device="cpu", available_bytes=2**30, process_bytes=0, native=None)
    counted = {}
    for size in tensor_parallel_sizes(spec, stored):
        plan = plan_memory(spec, stored, config(size), dtype=dtype, memory=memory)
        for rank in range(size):
            steps = load_torch_steps(
                checkpoint,
                plan,
                dtype=getattr(torch, dtype),
                device=CPU,
                on_progress=lambda *_: None,
                ranks=Silent(rank, size),
            )
            counted[size] = num_bytes(tensors_of(steps._model, set()))
            assert counted[size] == plan.weight_bytes == weight_bytes(spec, stored, dtype, size, native=None)
            cache = num_bytes(iter((steps._attention._keys, steps._attention._values)))  # type: ignore[attr-defined] # of the reference
            assert cache == (plan.num_blocks + 1) * plan.block_size * plan.kv_bytes_per_token
    assert list(counted) == [1, 2, 4]
    norms = 5 * spec.hidden_size * 4
    assert counted[1] - norms == 2 * (counted[2] - norms)
    keys_and_values = spec.num_layers * 2 * spec.head_dim * spec.hidden_size * (4 if dtype == "float32" else 2)
    assert counted[1] - norms == 4 * (counted[4] - norms - keys_and_values) + 2 * keys_and_values  # 2 KV heads
