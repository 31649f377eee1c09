"""Packed tensors by their role: what is handed out, in what order of rows, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
import torch

from octavo_engine.errors import ModelInvalid, ModelUnsupported
from octavo_engine.models.checkpoint import Checkpoint
from octavo_engine.models.spec import DecoderSpec, Rope
from octavo_engine.weights import stored
from octavo_engine.weights.gguf import read_header
from octavo_engine.weights.quant_type import QuantType
from octavo_engine.weights.stored import WeightSource

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
NUMBERS = torch.linspace(-1, 1, 40 * 64).view(40, 64)

SPEC = DecoderSpec(
    vocab_size=40,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    num_heads=5,
    num_kv_heads=5,
    head_dim=8,
    rms_norm_eps=1e-5,
    ropes=(Rope(10_000.0),),
    windows=(None,),
    tied_embeddings=True,
    max_context=64,
    eos_token_ids=frozenset(),
    attention_scale=1.0,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two tensors: `matrix`, 40 x 64 in Q8_0, and `vector`, 40 numbers in float32."""
    writer = gguf.GGUFWriter(tmp_path / "two.gguf", "llama")
    matrix = gguf.quants.quantize(NUMBERS.numpy(), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("matrix", matrix, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("vector", np.arange(40, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "two.gguf"


def source(
    path: Path,
    *,
    matrix: str = "embedding",
    vector: str = "final_norm",
    norm_offset: float = 0.0,
    pairs_adjacent: bool = False,
    progress: list[tuple[int, int]] | None = None,
) -> WeightSource:
    """The two tensors in these roles."""
    seen = [] if progress is None else progress
    checkpoint = Checkpoint(
        path=path,
        architecture="llama",
        spec=SPEC,
        tensors=read_header(path).tensors,
        names={matrix: "matrix", vector: "vector", "output": "absent"},  # type: ignore[dict-item] # a role is a literal
        norm_offset=norm_offset,
        pairs_adjacent=pairs_adjacent,
    )
    return WeightSource(checkpoint, on_progress=lambda done, total: seen.append((done, total)))


def test_a_matrix_stays_packed_until_it_is_dequantised(path: Path) -> None:
    matrix = source(path).matrix("embedding", (40, 64))
    assert (matrix.quant_type, matrix.shape) == (QuantType.Q8_0, (40, 64))
    assert (matrix.packed.dtype, matrix.packed.shape) == (torch.uint8, (40, 2 * 34))
    numbers = matrix.dequantize(torch.bfloat16, CPU)
    assert numbers.dtype == torch.bfloat16
    torch.testing.assert_close(numbers.float(), NUMBERS, atol=0.01, rtol=0)


def test_packed_rows_outlive_their_source_and_the_file(path: Path) -> None:
    matrix = source(path).matrix("embedding", (40, 64))
    path.unlink()
    torch.testing.assert_close(matrix.dequantize(torch.float32, CPU), NUMBERS, atol=0.01, rtol=0)


def test_vectors_are_float32_and_norms_get_what_the_file_leaves_out(path: Path) -> None:
    assert source(path).vector("final_norm", 40).tolist() == list(range(40))
    assert source(path, norm_offset=1.0).vector("final_norm", 40).tolist() == list(range(1, 41))
    assert source(path, vector="o_bias", norm_offset=1.0).vector("o_bias", 40).tolist() == list(range(40))


def test_rows_of_queries_and_keys_are_put_in_halves_and_no_others(path: Path) -> None:
    one_head = [0, 2, 4, 6, 1, 3, 5, 7]  # of 8 rows: first those that turn as cosines, then their partners
    order = [8 * head + row for head in range(5) for row in one_head]
    plain = source(path).matrix("embedding", (40, 64)).packed
    for role in ("q", "k"):
        rows = source(path, matrix=role, pairs_adjacent=True).matrix(role, (40, 64))
        assert torch.equal(rows.packed, plain[order])
        bias = source(path, vector=f"{role}_bias", pairs_adjacent=True)
        assert bias.vector("q_bias" if role == "q" else "k_bias", 40).tolist() == order
    assert torch.equal(source(path, matrix="v", pairs_adjacent=True).matrix("v", (40, 64)).packed, plain)


def test_a_matrix_larger_than_a_slice_is_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = source(path).matrix("embedding", (40, 64)).dequantize(torch.float32, CPU)
    monkeypatch.setattr(stored, "_SLICE_ELEMENTS", 7 * 64)  # 40 rows are no multiple of 7
    assert torch.equal(source(path).matrix("embedding", (40, 64)).dequantize(torch.float32, CPU), at_once)


def test_progress_counts_the_bytes_of_tensors_that_are_done(path: Path) -> None:
    progress: list[tuple[int, int]] = []
    weights = source(path, progress=progress)
    weights.matrix("embedding", (40, 64))
    weights.vector("final_norm", 40)
    weights.check_all_read()
    total = 40 * 64 // 32 * 34 + 40 * 4
    assert progress == [(0, total), (40 * 68, total), (total, total)]


def test_a_missing_or_misshapen_or_unknown_tensor_is_named(path: Path) -> None:
    weights = source(path)
    with pytest.raises(ModelInvalid, match="tensor absent is missing"):
        weights.matrix("output", (1, 1))
    with pytest.raises(ModelInvalid, match=r"tensor matrix has shape \[40, 64\], .* says \[64, 40\]"):
        weights.matrix("embedding", (64, 40))
    with pytest.raises(ModelUnsupported, match=r"tensor vector .* is not part of this architecture"):
        weights.check_all_read()
