"""Tensors out of a GGUF file, dequantised to the compute dtype and counted in bytes as they are read.

Called by the models while they build themselves (models/llama.py): each layer takes the tensors it needs by name.
It knows no architecture.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Self

import torch

from octavo_engine.errors import ModelInvalid, ModelUnsupported
from octavo_engine.weights.gguf_quants import dequantize

if TYPE_CHECKING:
    from collections.abc import Callable

    from octavo_engine.weights.gguf import GGUFHeader, TensorInfo

# Numbers dequantised at a time: bounds the float32 temporaries, whatever the size of the tensor.
_SLICE_ELEMENTS = 4 * 1024 * 1024


class WeightLoader:
    """Hands out each tensor of a GGUF file once; a context manager, as it keeps the file mapped."""

    def __init__(
        self,
        header: GGUFHeader,
        *,
        device: torch.device,
        dtype: torch.dtype,
        on_progress: Callable[[int, int], None],
    ) -> None:
        """Map the file.

        Args:
            header: of the file.
            device: where tensors go.
            dtype: what `matrix` returns.
            on_progress: called with (bytes read, bytes in all tensors) after every slice.
        """
        self.device = device
        self.dtype = dtype
        self._header = header
        self._unread = dict(header.tensors)
        self._on_progress = on_progress
        self._num_bytes_read = 0
        self._num_bytes = sum(tensor.num_bytes for tensor in header.tensors.values())
        with header.path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants writable memory

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()

    def __contains__(self, name: str) -> bool:
        """Whether the file has the tensor and nobody has taken it yet."""
        return name in self._unread

    def matrix(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        """A weight matrix [out, in] in the compute dtype.

        Raises:
            ModelInvalid: the file has no such tensor, or it has another shape.
        """
        return self._load(name, shape, self.dtype)

    def vector(self, name: str, size: int) -> torch.Tensor:
        """A norm's weight [size], always float32: norms are computed in it.

        Raises:
            ModelInvalid: the file has no such tensor, or it has another shape.
        """
        return self._load(name, (size,), torch.float32)

    def check_all_read(self) -> None:
        """Refuse a file with tensors that the model did not ask for: it is not the model that we would run.

        Raises:
            ModelUnsupported: names the first of them.
        """
        if self._unread:
            raise ModelUnsupported(
                f"{self._header.path.name}: tensor {next(iter(self._unread))} ({len(self._unread)} in all) "
                "is not part of this architecture as this engine knows it"
            )

    def _load(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        info = self._unread.pop(name, None)
        if info is None:
            raise ModelInvalid(f"{self._header.path.name}: tensor {name} is missing")
        if info.shape != shape:
            raise ModelInvalid(
                f"{self._header.path.name}: tensor {name} has shape {list(info.shape)}, "
                f"but the model's metadata says {list(shape)}"
            )
        out = torch.empty(shape, dtype=dtype, device=self.device)
        self._fill(out.view(-1), info)
        return out

    def _fill(self, out: torch.Tensor, info: TensorInfo) -> None:
        """Dequantise the whole tensor into `out` [num_elements], slice by slice."""
        quant_type = info.quant_type
        for start in range(0, info.num_elements, _SLICE_ELEMENTS):
            stop = min(start + _SLICE_ELEMENTS, info.num_elements)
            first, last = (element // quant_type.block_size * quant_type.block_bytes for element in (start, stop))
            packed = torch.frombuffer(self._data, dtype=torch.uint8, offset=info.offset + first, count=last - first)
            out[start:stop] = dequantize(packed, quant_type)
            self._num_bytes_read += last - first
            self._on_progress(self._num_bytes_read, self._num_bytes)
