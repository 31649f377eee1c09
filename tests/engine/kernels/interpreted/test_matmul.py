"""Products with packed weights equal their twins, and the layouts are those of the public formats.

Bound: sums in another order differ by 2**-24 of their terms' size, far less than the rounding of what is written: two
units in the last place of the largest result.
"""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from tests.engine.kernels.conftest import DEVICE
from tests.engine.kernels.interpreted.conftest import launched, normal

from octavo_engine.kernels import matmul, matmul_fp8, matmul_gguf, matmul_packed
from octavo_engine.kernels.launch import TARGETS, target_of
from octavo_engine.weights.quant_type import QuantType

DTYPES = [torch.float16, torch.bfloat16]
WIDE = pytest.mark.kernels


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    bound = 2 * torch.finfo(out.dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(out, expected, rtol=0, atol=bound)


def codes(*shape: int, bits: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def in_columns(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack along the second dimension, as GPTQ does with zeros."""
    return matmul_packed.pack(numbers.T.contiguous(), bits).T.contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("bits", "group_size", "is_shuffled"), [(4, 32, False), (4, 64, True), (8, 256, False), (8, 32, True)]
)
@pytest.mark.parametrize(("rows", "columns"), [(3, 144), pytest.param(70, 128, marks=WIDE)])
def test_gptq(dtype: torch.dtype, bits: int, group_size: int, rows: int, columns: int, *, is_shuffled: bool) -> None:
    features = 256
    groups = features // group_size
    weight = codes(features, columns, bits=bits)
    zeros = codes(groups, columns, bits=bits, seed=6).clamp_max(254)  # as stored: one less
    scales = (normal(groups, columns).abs() / 64).half()
    group_of_row = torch.arange(features, dtype=torch.int32) // group_size
    if is_shuffled:
        group_of_row = group_of_row[torch.randperm(features, generator=torch.Generator().manual_seed(7))]
    numbers = (weight - zeros[group_of_row] - 1).float() * scales.float()[group_of_row]

    packed = matmul_packed.from_gptq(
        matmul_packed.pack(weight, bits), in_columns(zeros, bits), scales, group_of_row, bits=bits
    )
    x = normal(rows, features, dtype=dtype)
    out = launched(matmul_packed.multiply_packed)(x, packed)
    assert_close(out, matmul_packed.multiply_packed_twin(x, packed))
    assert_close(out, (x.float() @ numbers.to(dtype).float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_awq(dtype: torch.dtype) -> None:
    weight, zeros = codes(128, 64, bits=4), codes(2, 64, bits=4, seed=6)
    scales = (normal(2, 64).abs() / 64).half()

    def interleaved(numbers: torch.Tensor) -> torch.Tensor:  # as AutoAWQ packs: columns 0, 2, 4, 6, 1, 3, 5, 7
        in_eights = numbers.view(len(numbers), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1)
        return in_columns(in_eights, 4)

    packed = matmul_packed.from_awq(interleaved(weight), interleaved(zeros), scales)
    x = normal(5, 128, dtype=dtype)
    group_of_row = torch.arange(128) // 64
    numbers = (weight - zeros[group_of_row]).float() * scales.float()[group_of_row]
    out = launched(matmul_packed.multiply_packed)(x, packed)
    assert_close(out, (x.float() @ numbers.to(dtype).float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_static", [False, True])
def test_activations_in_e4m3(dtype: torch.dtype, *, is_static: bool) -> None:
    x = normal(3, 1536, dtype=dtype) * torch.tensor([[1.0], [100.0], [0.0]], dtype=dtype)
    scale = torch.tensor([0.05]) if is_static else None
    by_rows = launched(matmul_fp8.quantize_rows)(x, scale)
    for out, expected in zip(by_rows, matmul_fp8.quantize_rows_twin(x, scale), strict=True):
        assert torch.equal(out, expected)
    by_groups = launched(matmul_fp8.quantize_groups)(x)
    for out, expected in zip(by_groups, matmul_fp8.quantize_groups_twin(x), strict=True):
        assert torch.equal(out, expected)


@pytest.mark.parametrize("capability", sorted({80, target_of(DEVICE).capability}))  # decoded, and as it is
@pytest.mark.parametrize("scales", ["tensor", "channel", "block"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(3, 144), pytest.param(70, 256, marks=WIDE)])
def test_e4m3_times_e4m3(
    capability: int, scales: str, dtype: torch.dtype, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("launch", "matmul_fp8"):
        monkeypatch.setattr(f"octavo_engine.kernels.{module}.target_of", lambda _: TARGETS[capability])
    features = 256
    weight, _ = matmul_fp8.quantize_rows_twin(normal(columns, features, dtype=dtype, seed=2), torch.tensor([0.01]))
    if scales == "block":
        x, x_scales = matmul_fp8.quantize_groups_twin(normal(rows, features, dtype=dtype))
        weight_scales = normal(-(-columns // 128), 2, seed=3).abs()
    else:
        static = torch.tensor([0.01]) if scales == "tensor" else None
        x, x_scales = matmul_fp8.quantize_rows_twin(normal(rows, features, dtype=dtype), static)
        weight_scales = normal(1 if scales == "tensor" else columns, seed=3).abs()
    out = launched(matmul_fp8.multiply_fp8)(x, weight, x_scales, weight_scales, dtype)
    assert_close(out, matmul_fp8.multiply_fp8_twin(x, weight, x_scales, weight_scales, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", matmul_gguf.STEPS, ids=lambda quant_type: quant_type.name)
@pytest.mark.parametrize(
    ("rows", "features", "columns"),
    [(3, 256, 80), *(pytest.param(*each, marks=WIDE) for each in [(70, 512, 64), (1, 2048, 96)])],
)
def test_gguf(dtype: torch.dtype, quant_type: QuantType, rows: int, features: int, columns: int) -> None:
    generator = np.random.default_rng(4)
    row_bytes = features // quant_type.block_size * quant_type.block_bytes
    raw = generator.integers(
        0, 256, (columns, row_bytes // quant_type.block_bytes, quant_type.block_bytes), dtype=np.uint8
    )
    numbers = generator.uniform(0.001, 0.02, (*raw.shape[:2], 2)).astype(np.float16).view(np.uint8)
    at = {QuantType.Q4_0: (0, 2), QuantType.Q8_0: (0, 2), QuantType.Q6_K: (208, 210)}.get(quant_type, (0, 4))
    raw[:, :, at[0] : at[1]] = numbers[:, :, : at[1] - at[0]]  # scales that are numbers; all other bits are any
    packed = torch.from_numpy(raw.reshape(columns, row_bytes))
    x = normal(rows, features, dtype=dtype)

    out = launched(matmul_gguf.multiply_gguf)(x, packed, quant_type)
    assert_close(out, matmul_gguf.multiply_gguf_twin(x, packed, quant_type))
    by_ggml = gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType(int(quant_type)))
    assert_close(out, (x.float() @ torch.from_numpy(by_ggml).to(dtype).float().T).to(dtype))


@pytest.mark.parametrize(
    ("programs", "steps", "parts"), [(32, 64, 8), (32, 8, 2), (132, 64, 2), (300, 64, 1), (1, 3, 1)]
)
def test_products_of_few_rows_are_cut_into_parts(programs: int, steps: int, parts: int) -> None:
    assert matmul.parts_for(programs, steps, 132) == parts
