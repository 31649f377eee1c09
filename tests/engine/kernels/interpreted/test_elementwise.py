"""Kernels around the matrices equal their twins: within one unit in the last place of what they write."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from tests.engine.kernels.interpreted.conftest import assert_within, launched, normal

from octavo_engine.kernels import activation, cache, norm, rotary
from octavo_engine.kernels.numeric import decode_e4m3, encode_e4m3
from octavo_engine.layers.activation import gate_and_mul
from octavo_engine.layers.norm import RMSNorm
from octavo_engine.layers.rotary import rotary_table
from octavo_engine.layers.rotary import rotate as rotate_of_layers
from octavo_engine.models.spec import Activation, Llama3Scaling, Rope

DTYPES = [torch.float16, torch.bfloat16]
WIDE = pytest.mark.kernels  # only by make test-kernels


@triton.jit
def _decode_all(out, codes):
    places = tl.arange(0, 256)
    tl.store(out + places, decode_e4m3(tl.load(codes + places)).to(tl.float32))


@triton.jit
def _encode(out, numbers, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(out + places, encode_e4m3(tl.load(numbers + places)))


def test_every_code_of_e4m3_is_decoded_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    out = torch.empty(256)
    launched(_decode_all[(1,)])(out, codes)
    expected = cache.decoded(codes)
    is_nan = expected.isnan()
    assert torch.equal(out[~is_nan], expected[~is_nan])
    assert out[is_nan].tolist() == [480.0, -480.0]


def test_numbers_become_the_nearest_code_of_e4m3() -> None:
    exact = cache.decoded(torch.arange(127, dtype=torch.uint8))
    halfway = (exact[1:] + exact[:-1]) / 2  # ties go to even
    around = torch.cat((halfway, halfway.nextafter(torch.tensor(0.0)), halfway.nextafter(torch.tensor(1e9))))
    numbers = torch.cat((exact, around, normal(512) * 100, torch.tensor([0.0, 449.0, 1e30, torch.inf])))
    numbers = torch.cat((numbers, -numbers))
    padded = torch.nn.functional.pad(numbers, (0, 4096 - len(numbers)))
    out = torch.empty(4096, dtype=torch.uint8)
    launched(_encode[(1,)])(out, padded, BLOCK=4096)
    assert torch.equal(out, cache.encoded(padded))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim"),
    [(3, 64), (1, 80), *(pytest.param(*each, marks=WIDE) for each in [(8, 128), (4, 256), (2, 96), (32, 128)])],
)
def test_stored_keys_and_values(dtype: torch.dtype, num_kv_heads: int, head_dim: int, *, is_fp8: bool) -> None:
    fused = normal(5, 4 * num_kv_heads, head_dim, dtype=dtype)  # rows are parts of longer ones
    k, v = fused[:, num_kv_heads : 2 * num_kv_heads], fused[:, 2 * num_kv_heads : 3 * num_kv_heads]
    slots = torch.tensor([17, 3, -1, 40, 0])
    caches = [torch.zeros((2, 3, 16, num_kv_heads, head_dim), dtype=torch.uint8 if is_fp8 else dtype) for _ in range(2)]
    for store, (keys, values) in zip((launched(cache.store_kv), cache.store_kv_twin), caches, strict=True):
        store(k, v, keys, values, slots, key_scale=0.5, value_scale=2.0)
    assert torch.equal(*caches)
    assert caches[0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", [64, 576, *(pytest.param(each, marks=WIDE) for each in (896, 2048, 4096, 8192, 16384))]
)
def test_a_norm_after_adding_to_the_residual(dtype: torch.dtype, size: int) -> None:
    residual, x, weight = normal(3, size, seed=1), normal(3, 2 * size, dtype=dtype, seed=2)[:, :size], normal(size)
    expected_residual = residual.clone()
    expected = norm.add_rms_norm_twin(expected_residual, x, weight, 1e-5)
    out = launched(norm.add_rms_norm)(residual, x, weight, 1e-5)
    assert torch.equal(residual, expected_residual)
    assert_within(out, expected)
    assert torch.equal(expected, RMSNorm(weight, 1e-5, dtype)(residual)), "the twin is what the layers compute"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_float32", [False, True])
@pytest.mark.parametrize(
    ("heads", "size"),
    [(3, 128), (1, 80), *(pytest.param(*each, marks=WIDE) for each in [(40, 256), (1, 4096), (9, 64)])],
)
def test_a_norm_of_every_head(dtype: torch.dtype, heads: int, size: int, *, is_float32: bool) -> None:
    x = normal(2, heads + 2, size, dtype=torch.float32 if is_float32 else dtype)[:, 1 : heads + 1]
    weight = normal(size, seed=2)
    expected = norm.rms_norm_twin(x, weight, 1e-6, dtype)
    assert_within(launched(norm.rms_norm)(x, weight, 1e-6, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", rotary.HEAD_DIMS)
def test_rotation_in_place(dtype: torch.dtype, head_dim: int) -> None:
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=16)
    cos, sin = rotary_table(Rope(theta=10_000.0, scaling=scaling), head_dim=head_dim, num_positions=50)
    fused = normal(4, 12, head_dim, dtype=dtype)
    positions = torch.tensor([0, 7, 49, 3])
    expected = fused.clone()
    rotary.rotate_twin(expected[:, :10], cos, sin, positions)
    by_layers = rotate_of_layers(fused[:, :10], cos[positions][:, None], sin[positions][:, None]).to(dtype)
    launched(rotary.rotate)(fused[:, :10], cos, sin, positions)
    assert torch.equal(fused, expected)
    assert torch.equal(expected[:, :10], by_layers), "the twin is what the layers compute"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("size", [8, 1536, *(pytest.param(each, marks=WIDE) for each in (4864, 14336))])
def test_gate_and_mul(dtype: torch.dtype, name: Activation, size: int) -> None:
    gate_up = normal(3, 2 * size, dtype=dtype) * 4
    gate_up[0, :4] = torch.tensor([-100.0, 100.0, 0.0, -20.0])
    expected = activation.gate_and_mul_twin(gate_up, name)
    assert_within(launched(activation.gate_and_mul)(gate_up, name), expected)
    assert_within(expected, gate_and_mul(gate_up, name), 2)
