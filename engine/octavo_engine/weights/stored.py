"""Tensors as they lie in the files: packed rows, mapped and not copied, handed out by their role.

Called by the decoders (models/decoder.py, and the C++ one) while they build themselves. It knows no architecture:
which name a role has in the files is the checkpoint's business, and which part of a tensor a rank has is shard.py's.

The file stays mapped for as long as a tensor that lies in it is alive, and no longer.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from octavo_engine.errors import ModelInvalid, ModelUnsupported
from octavo_engine.weights.gguf_quants import dequantize
from octavo_engine.weights.grouped import unpack
from octavo_engine.weights.quantized import QuantizedTensor
from octavo_engine.weights.safetensors import RawTensor
from octavo_engine.weights.shard import WHOLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from octavo_engine.models.checkpoint import Checkpoint
    from octavo_engine.models.family import LayerRole, ModelRole
    from octavo_engine.weights.gguf import TensorInfo
    from octavo_engine.weights.quant_type import QuantType
    from octavo_engine.weights.shard import Part, Shard

# Numbers dequantised at a time: bounds the float32 temporaries, whatever the size of the tensor.
_SLICE_ELEMENTS = 4 * 1024 * 1024


class Matrix(Protocol):
    """A weight matrix before it is put into the form that it is multiplied in."""

    @property
    def quant_type(self) -> QuantType:
        """How `packed` is packed."""
        ...

    @property
    def packed(self) -> torch.Tensor:
        """Its rows, uint8 [out, row_bytes], contiguous, on the CPU."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Out, in."""
        ...

    def dequantize(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The numbers: `dtype` [out, in] on `device`."""
        ...


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A weight matrix as the file has it, but its rows in the order that the arithmetic wants. See Matrix."""

    packed: torch.Tensor  # uint8 [out, row_bytes], contiguous, on the CPU; mapped from the file where rows keep order
    quant_type: QuantType  # how a row is stored: in / block_size blocks of block_bytes
    shape: tuple[int, int]  # out, in

    def dequantize(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The numbers: `dtype` [out, in] on `device`."""
        num_rows, width = self.shape
        out = torch.empty(self.shape, dtype=dtype, device=device)
        at_once = max(1, _SLICE_ELEMENTS // width)
        for start in range(0, num_rows, at_once):
            rows = self.packed[start : start + at_once]
            out[start : start + at_once] = dequantize(rows.reshape(-1), self.quant_type).view(-1, width)
        return out


class WeightSource:
    """Hands out each tensor of a checkpoint once, or one rank's part of each."""

    def __init__(
        self, checkpoint: Checkpoint, *, on_progress: Callable[[int, int], None], shard: Shard = WHOLE
    ) -> None:
        """Map the files.

        Args:
            checkpoint: the model.
            on_progress: called with (bytes done, bytes in all tensors) before each tensor and at the end.
            shard: whose parts to hand out.
        """
        self._checkpoint = checkpoint
        self._shard = shard
        self._unread = dict(checkpoint.tensors)
        self._on_progress = on_progress
        self._num_bytes_done = 0
        self._num_bytes = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
        parts = [part for tensor in checkpoint.tensors.values() for part in _parts(tensor)]
        self._files = {path: _map(path) for path in {part.path for part in parts}}

    def matrix(self, role: ModelRole | LayerRole, shape: tuple[int, int], *, layer: int | None = None) -> Matrix:
        """The shard's part of a weight matrix; queries and keys with the pairs of a rotation in the halves of a head.

        Args:
            role: which one.
            shape: out, in, of the whole matrix.
            layer: whose.

        Raises:
            ModelInvalid: the files have no such tensor, or it has another shape.
        """
        info = self._take(role, shape, layer)
        part = self._shard.part(role, shape, self._checkpoint.spec)
        if isinstance(info, QuantizedTensor):
            return unpack(info, {name: self._part(tensor) for name, tensor in info.parts.items()}, part)
        matrix = _cut(StoredMatrix(self._bytes(info).view(shape[0], -1), info.quant_type, shape), part)
        if role in ("q", "k") and self._checkpoint.pairs_adjacent:
            return replace(matrix, packed=in_halves(matrix.packed, self._checkpoint.spec.head_dim))
        return matrix

    def vector(self, role: ModelRole | LayerRole, size: int, *, layer: int | None = None) -> torch.Tensor:
        """A norm's weight, or the shard's part of a bias: float32 on the CPU.

        Args:
            role: which one.
            size: how many numbers the whole of it has.
            layer: whose.

        Raises:
            ModelInvalid: the files have no such tensor, or it has another shape.
        """
        info = self._take(role, (size,), layer)
        assert not isinstance(info, QuantizedTensor), "those are matrices"
        part = self._shard.part(role, (size,), self._checkpoint.spec)
        numbers = dequantize(self._bytes(info), info.quant_type)[part.start : part.stop]
        if role.endswith("norm"):
            return numbers + self._checkpoint.norm_offset
        if role in ("q_bias", "k_bias") and self._checkpoint.pairs_adjacent:
            return in_halves(numbers[:, None], self._checkpoint.spec.head_dim)[:, 0]
        return numbers.clone()

    def check_all_read(self) -> None:
        """Refuse a model with tensors that nobody asked for: it is not the model that we would run.

        Raises:
            ModelUnsupported: names the first of them.
        """
        self._on_progress(self._num_bytes, self._num_bytes)
        for name, info in self._unread.items():
            if self._is_empty_bias(name, info):
                continue
            raise ModelUnsupported(
                f"{info.path.name}: tensor {info.name} ({len(self._unread)} in all) "
                "is not part of this architecture as this engine knows it"
            )

    def _is_empty_bias(self, name: str, info: TensorInfo | QuantizedTensor) -> bool:
        """Whether it is one of the biases that AutoGPTQ writes to every quantised matrix: zeros where there is none."""
        if isinstance(info, QuantizedTensor) or not name.endswith(".bias"):
            return False
        matrix = self._checkpoint.tensors.get(f"{name.removesuffix('bias')}weight")
        return isinstance(matrix, QuantizedTensor) and not dequantize(self._bytes(info), info.quant_type).any()

    def _take(
        self, role: ModelRole | LayerRole, shape: tuple[int, ...], layer: int | None
    ) -> TensorInfo | QuantizedTensor:
        self._on_progress(self._num_bytes_done, self._num_bytes)
        name = self._checkpoint.names[role].format(layer=layer)
        info = self._unread.pop(name, None)
        if info is None:
            raise ModelInvalid(f"{self._checkpoint.path.name}: tensor {name} is missing")
        if info.shape != shape:
            raise ModelInvalid(
                f"{info.path.name}: tensor {name} has shape {list(info.shape)}, "
                f"but the model's description says {list(shape)}"
            )
        self._num_bytes_done += info.num_bytes
        return info

    def _part(self, info: TensorInfo | RawTensor) -> torch.Tensor:
        """A tensor of a quantised matrix: its bytes, or scales as float32 in their shape."""
        if isinstance(info, RawTensor):
            return self._bytes(info)
        return dequantize(self._bytes(info), info.quant_type).view(info.shape)

    def _bytes(self, info: TensorInfo | RawTensor) -> torch.Tensor:
        """The tensor's own bytes in the mapping, uint8 [num_bytes]."""
        return torch.frombuffer(self._files[info.path], dtype=torch.uint8, offset=info.offset, count=info.num_bytes)


def _parts(tensor: TensorInfo | QuantizedTensor) -> Iterable[TensorInfo | RawTensor]:
    return tensor.parts.values() if isinstance(tensor, QuantizedTensor) else (tensor,)


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants writable memory


def _cut(matrix: StoredMatrix, part: Part) -> StoredMatrix:
    """A part of a matrix, without a copy where it is of whole rows; rows beyond the last one are zeros."""
    rows, columns = matrix.shape
    if part.dim == 1:
        block = matrix.quant_type
        assert part.start % block.block_size == 0, "ranks that would cut a block are refused before weights are read"
        first, last = (end // block.block_size * block.block_bytes for end in (part.start, part.stop))
        return replace(matrix, packed=matrix.packed[:, first:last].contiguous(), shape=(rows, part.stop - part.start))
    packed = matrix.packed[part.start : part.stop]
    num_rows = part.stop - part.start
    if len(packed) < num_rows:  # a block of nothing but zero bytes is one of zeros, in every type
        packed = torch.cat((packed, packed.new_zeros(num_rows - len(packed), packed.shape[1])))
    return replace(matrix, packed=packed, shape=(num_rows, columns))


def in_halves(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Undo llama.cpp's order of the rows of queries and keys [heads * D, anything].

    Its converter puts the pairs that a rotation turns side by side; ours are the two halves of a head.
    """
    return rows.view(-1, head_dim // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
