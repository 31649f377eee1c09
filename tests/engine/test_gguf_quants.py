"""Dequantisation against the gguf package, and the loader that feeds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
import torch

from octavo_engine.errors import ModelInvalid, ModelUnsupported
from octavo_engine.weights import loader
from octavo_engine.weights.gguf import QuantType, read_header
from octavo_engine.weights.gguf_quants import dequantize
from octavo_engine.weights.loader import WeightLoader

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("quant_type", QuantType, ids=lambda quant_type: quant_type.name)
def test_every_type_gives_exactly_what_the_gguf_package_gives(quant_type: QuantType) -> None:
    packed = np.random.default_rng(0).integers(0, 256, size=(500, 4 * quant_type.block_bytes), dtype=np.uint8)
    theirs_type = gguf.GGMLQuantizationType(int(quant_type))
    assert (quant_type.block_size, quant_type.block_bytes) == gguf.GGML_QUANT_SIZES[theirs_type]
    with np.errstate(all="ignore"):  # random scales may be NaN or overflow
        expected = gguf.quants.dequantize(
            packed.view(np.float32) if quant_type is QuantType.F32 else packed, theirs_type
        ).astype(np.float32)

    ours = dequantize(torch.from_numpy(packed.reshape(-1)), quant_type)

    assert ours.dtype == torch.float32
    np.testing.assert_array_equal(ours.numpy(), expected.reshape(-1))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two tensors: `matrix`, 40 x 64 in Q8_0, and `vector`, 8 numbers in float32."""
    matrix = gguf.quants.quantize(
        np.linspace(-1, 1, 40 * 64, dtype=np.float32).reshape(40, 64), gguf.GGMLQuantizationType.Q8_0
    )
    writer = gguf.GGUFWriter(tmp_path / "two.gguf", "llama")
    writer.add_tensor("matrix", matrix, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("vector", np.arange(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "two.gguf"


def open_weights(path: Path, progress: list[tuple[int, int]] | None = None) -> WeightLoader:
    seen = [] if progress is None else progress
    return WeightLoader(
        read_header(path),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        on_progress=lambda done, total: seen.append((done, total)),
    )


def test_matrices_come_in_the_compute_dtype_and_vectors_in_float32(path: Path) -> None:
    with open_weights(path) as weights:
        matrix = weights.matrix("matrix", (40, 64))
        vector = weights.vector("vector", 8)
        weights.check_all_read()
    assert matrix.dtype == torch.bfloat16
    torch.testing.assert_close(matrix.float(), torch.linspace(-1, 1, 40 * 64).view(40, 64), atol=0.01, rtol=0)
    assert vector.dtype == torch.float32
    assert vector.tolist() == list(range(8))


def test_a_tensor_larger_than_a_slice_is_whole_and_progress_counts_its_bytes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_weights(path) as weights:
        at_once = weights.matrix("matrix", (40, 64))
    monkeypatch.setattr(loader, "_SLICE_ELEMENTS", 960)  # 30 blocks, which is no whole number of rows
    progress: list[tuple[int, int]] = []
    with open_weights(path, progress) as weights:
        in_slices = weights.matrix("matrix", (40, 64))
        weights.vector("vector", 8)
    assert torch.equal(in_slices, at_once)
    total = 40 * 64 // 32 * 34 + 32
    assert progress == [(1020, total), (2040, total), (2720, total), (total, total)]


def test_a_missing_or_misshapen_or_unknown_tensor_is_named(path: Path) -> None:
    with open_weights(path) as weights:
        with pytest.raises(ModelInvalid, match="tensor absent is missing"):
            weights.matrix("absent", (1, 1))
        with pytest.raises(ModelInvalid, match=r"tensor matrix has shape \[40, 64\], .* says \[64, 40\]"):
            weights.matrix("matrix", (64, 40))
        with pytest.raises(ModelUnsupported, match=r"tensor vector .* is not part of this architecture"):
            weights.check_all_read()
