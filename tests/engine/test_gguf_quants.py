"""Dequantisation against the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from octavo_engine.weights.gguf import QuantType
from octavo_engine.weights.gguf_quants import dequantize


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
