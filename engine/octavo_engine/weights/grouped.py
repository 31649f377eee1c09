"""Quantised matrices of safetensors files as numbers: unpacked, cut for a rank, dequantised or packed as ggml packs.

Called by stored.py. What the parts are is quantized.py's knowledge; this module knows their bits.

Four-bit numbers with a zero point become ggml's Q4_1 for kernels that multiply that: its minimum is -scale * zero in
float16, exact where the zero point is a power of two (as in all symmetric checkpoints), else within half a thousandth
of itself. Dequantised they are exact in float32.

Shapes: O outputs, I inputs, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from octavo_engine.errors import ModelInvalid
from octavo_engine.weights.quant_type import QuantType
from octavo_engine.weights.quantized import FloatScheme, GroupScheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    from octavo_engine.weights.quantized import QuantizedTensor
    from octavo_engine.weights.shard import Part

_BLOCK: Final = 32  # numbers in a block of Q4_1 and Q8_0
_SLICE_ELEMENTS: Final = 4 * 1024 * 1024  # dequantised at a time
# AWQ's kernels want the columns 0 2 4 6 1 3 5 7 in the fields of a word: where each column is.
_AWQ_FIELDS: Final = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True)
class GroupedMatrix:
    """w = scale * (number - zero), with a scale and a zero for each group of inputs. See stored.Matrix."""

    numbers: torch.Tensor  # uint8 or float8_e4m3fn [O, I]
    scales: torch.Tensor  # float32 [O, G]
    zeros: torch.Tensor | None  # float32 [O, G]; None: 0
    group_of: torch.Tensor  # int64 [I]
    quant_type: QuantType  # of `packed`

    @property
    def shape(self) -> tuple[int, int]:
        """O, I."""
        return self.numbers.shape[0], self.numbers.shape[1]

    @property
    def packed(self) -> torch.Tensor:
        """The rows as ggml has them in quant_type, uint8 [O, row bytes]; scales are rounded to float16."""
        outputs, inputs = self.shape
        group = self.group_of[::_BLOCK]  # a block is within a group
        scales = self.scales[:, group].half()
        numbers = self.numbers.view(outputs, inputs // _BLOCK, _BLOCK)
        if self.quant_type is QuantType.Q8_0:
            assert self.zeros is not None, "bytes stand for numbers around a zero point"
            signed = (numbers.to(torch.int16) - self.zeros[:, group, None].to(torch.int16)).to(torch.int8)
            parts = [_as_bytes(scales), signed.view(torch.uint8)]
        else:
            assert self.quant_type is QuantType.Q4_1
            assert self.zeros is not None, "nibbles too"
            minima = -(scales.float() * self.zeros[:, group])
            half = _BLOCK // 2
            nibbles = numbers[..., :half] | numbers[..., half:] << 4
            parts = [_as_bytes(scales), _as_bytes(minima.half()), nibbles]
        return torch.cat(parts, dim=-1).view(outputs, -1)

    def dequantize(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The numbers: `dtype` [O, I] on `device`, computed in float32."""
        outputs, inputs = self.shape
        out = torch.empty(self.shape, dtype=dtype, device=device)
        at_once = max(1, _SLICE_ELEMENTS // inputs)
        for start in range(0, outputs, at_once):
            rows = slice(start, start + at_once)
            numbers = self.numbers[rows].float()
            if self.zeros is not None:
                numbers -= self.zeros[rows][:, self.group_of]
            out[rows] = numbers.mul_(self.scales[rows][:, self.group_of])
        return out


def unpack(tensor: QuantizedTensor, parts: Mapping[str, torch.Tensor], part: Part) -> GroupedMatrix:
    """A rank's part of a matrix.

    Args:
        tensor: which one.
        parts: the bytes of its tensors, uint8 [num_bytes] each; scales as float32 in their shape.
        part: of it.

    Raises:
        ModelInvalid: zero points or groups are not what config.json says of them.
    """
    scheme = tensor.scheme
    if isinstance(scheme, FloatScheme):
        whole = _floats(tensor, scheme, parts)
    else:
        whole = _GROUPED[scheme.layout](tensor, scheme, parts)
        _check(tensor, scheme, whole)
    return _cut(whole, part)


def _floats(tensor: QuantizedTensor, scheme: FloatScheme, parts: Mapping[str, torch.Tensor]) -> GroupedMatrix:
    outputs, inputs = tensor.shape
    numbers = parts["weight"].view(torch.float8_e4m3fn).view(outputs, inputs)
    scales = parts["weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"]
    if scheme.block is None:
        scales, group_of = scales.reshape(-1, 1).expand(outputs, 1), torch.zeros(inputs, dtype=torch.int64)
    else:
        rows, columns = scheme.block
        scales, group_of = scales.repeat_interleave(rows, dim=0)[:outputs], torch.arange(inputs) // columns
    return GroupedMatrix(numbers, scales, None, group_of, tensor.quant_type)


def _gptq(tensor: QuantizedTensor, scheme: GroupScheme, parts: Mapping[str, torch.Tensor]) -> GroupedMatrix:
    outputs, inputs = tensor.shape
    words = parts["qweight"].view(-1, outputs, 4)  # along the inputs
    numbers = _fields(words, scheme.bits).transpose(0, 1).reshape(outputs, inputs)
    zeros = _fields(parts["qzeros"], scheme.bits).view(-1, outputs).T.float() + scheme.zero_offset
    group_of = parts["g_idx"].view(torch.int32).long() if "g_idx" in parts else _in_order(tensor, scheme)
    return GroupedMatrix(numbers, parts["scales"].T.contiguous(), zeros, group_of, tensor.quant_type)


def _awq(tensor: QuantizedTensor, scheme: GroupScheme, parts: Mapping[str, torch.Tensor]) -> GroupedMatrix:
    outputs, inputs = tensor.shape

    def columns(packed: torch.Tensor) -> torch.Tensor:
        """Uint8 [anything, O]."""
        return _fields(packed.view(-1, 4), scheme.bits)[:, _AWQ_FIELDS].view(-1, outputs)

    numbers, zeros = columns(parts["qweight"]).T.contiguous(), columns(parts["qzeros"]).T.float()
    assert numbers.shape[1] == inputs
    return GroupedMatrix(numbers, parts["scales"].T.contiguous(), zeros, _in_order(tensor, scheme), tensor.quant_type)


def _packed(tensor: QuantizedTensor, scheme: GroupScheme, parts: Mapping[str, torch.Tensor]) -> GroupedMatrix:
    outputs, inputs = tensor.shape
    numbers = _fields(parts["weight_packed"], scheme.bits).view(outputs, inputs)
    scales = parts["weight_scale"]
    if "weight_zero_point" in parts:  # packed along the outputs, both being around the middle of the range
        words = parts["weight_zero_point"].view(-1, scales.shape[1], 4)
        zeros = _fields(words, scheme.bits).transpose(1, 2).reshape(-1, scales.shape[1])[:outputs].float()
    else:
        zeros = torch.full_like(scales, 1 << scheme.bits - 1)
    has_order = "weight_g_idx" in parts
    group_of = parts["weight_g_idx"].view(torch.int32).long() if has_order else _in_order(tensor, scheme)
    return GroupedMatrix(numbers, scales, zeros, group_of, tensor.quant_type)


_GROUPED: Final = {"gptq": _gptq, "awq": _awq, "packed": _packed}


def _fields(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The fields of little-endian words, lowest first: uint8 [..., bytes] -> uint8 [..., bytes * 8 / bits]."""
    if bits == 8:
        return packed
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)


def _in_order(tensor: QuantizedTensor, scheme: GroupScheme) -> torch.Tensor:
    inputs = tensor.shape[1]
    return torch.arange(inputs) // (scheme.group_size or inputs)


def _check(tensor: QuantizedTensor, scheme: GroupScheme, whole: GroupedMatrix) -> None:
    """Refuse numbers that contradict config.json, which the choice of a kernel relies on."""
    where = f"{tensor.path.name}: {tensor.name}"
    if whole.group_of.min() < 0 or whole.group_of.max() >= whole.scales.shape[1]:
        raise ModelInvalid(f"{where} has inputs in groups that have no scale (g_idx)")
    if not scheme.reordered and not torch.equal(whole.group_of, _in_order(tensor, scheme)):
        raise ModelInvalid(f"{where} has its groups in another order, but config.json does not say so (desc_act)")
    if tensor.quant_type is QuantType.Q8_0 and whole.zeros is not None and not bool((whole.zeros == 1 << 7).all()):
        raise ModelInvalid(f"{where} has zero points other than 128, but config.json says that there are none (sym)")


def _cut(whole: GroupedMatrix, part: Part) -> GroupedMatrix:
    numbers, scales, zeros, group_of = whole.numbers, whole.scales, whole.zeros, whole.group_of
    if part.dim == 1:
        numbers, group_of = numbers[:, part.start : part.stop], group_of[part.start : part.stop]
    else:
        rows = [numbers, scales] if zeros is None else [numbers, scales, zeros]
        numbers, scales, *rest = (_rows(one, part) for one in rows)
        zeros = rest[0] if rest else None
    return GroupedMatrix(numbers.contiguous(), scales, zeros, group_of, whole.quant_type)


def _rows(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """Some rows; those beyond the last one are zeros."""
    rows = tensor[part.start : part.stop]
    missing = part.stop - part.start - len(rows)
    return torch.cat((rows, rows.new_zeros(missing, rows.shape[1]))) if missing > 0 else rows


def _as_bytes(halves: torch.Tensor) -> torch.Tensor:
    """Float16 [...] -> uint8 [..., 2]."""
    return halves.unsqueeze(-1).view(torch.uint8)
