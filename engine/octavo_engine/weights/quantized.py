"""Quantised weights in safetensors files: how config.json says they are packed, and which tensors make up a matrix.

Called by models/checkpoint.py; weights/grouped.py (torch) turns the parts into numbers. No torch here: a model is
planned or refused from its headers alone.

A matrix X.weight [out, in] that is quantised lies in several tensors. With `per` fields in an int32, lowest bits first:

    gptq     X.qweight int32 [in / per, out], X.qzeros int32 [groups, out / per], X.scales [groups, out], X.g_idx [in]
    awq      X.qweight int32 [in, out / per], X.qzeros int32 [groups, out / per], X.scales [groups, out]
    packed   X.weight_packed int32 [out, in / per], X.weight_scale [out, groups], X.weight_g_idx [in],
             X.weight_zero_point int32 [out / per, groups], X.weight_shape [2]
    fp8      X.weight F8_E4M3 [out, in], X.weight_scale or X.weight_scale_inv: [], [1], [out, 1] or one for each block;
             X.input_scale

Sources: AutoGPTQ's and GPTQModel's torch kernels, AutoAWQ's packing utilities, compressed-tensors' compressors, and
transformers' fine-grained FP8. Which matrices are quantised is told by the tensors, not by lists of names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from octavo_engine.errors import ModelInvalid, ModelUnsupported
from octavo_engine.weights.quant_type import QuantType, RawType
from octavo_engine.weights.safetensors import RawTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from octavo_engine.models.options import Options
    from octavo_engine.weights.gguf import TensorInfo

_WORD_BITS: Final = 32
_NATIVE_GROUP: Final = 32  # numbers in a block of Q4_1 and Q8_0
# Scales of a quantised KV cache, which ours is not: without them it is only more exact.
_CACHE_SCALES: Final = (".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".prob_output_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScheme:
    """Whole numbers of few bits; a group of inputs shares a scale and a zero point: w = scale * (q - zero)."""

    method: str  # config.json's quant_method
    layout: Literal["gptq", "awq", "packed"]
    bits: int
    group_size: int | None  # inputs in a group; None: all
    symmetric: bool  # every zero point is in the middle of the range
    reordered: bool = False  # groups are not of adjacent inputs: g_idx says which ("act-order")
    zero_offset: int = 0  # to be added to stored zero points

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.method} {self.bits}-bit"


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatScheme:
    """8-bit floats (e4m3) times a scale, of the whole matrix, of each output or of each block of it.

    Scales of activations, static or dynamic, serve hardware that multiplies FP8: where activations keep their precision
    they are not needed.
    """

    method: str
    block: tuple[int, int] | None  # outputs and inputs that share a scale; None: all, or all of an output

    @property
    def name(self) -> str:
        """For people."""
        return "fp8" if self.method == "fp8" else f"{self.method} fp8"


Scheme: TypeAlias = GroupScheme | FloatScheme


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A matrix in several tensors, as TensorInfo is one in one."""

    name: str
    shape: tuple[int, ...]  # out, in
    scheme: Scheme
    parts: Mapping[str, TensorInfo | RawTensor]  # by what follows the module's name

    @property
    def path(self) -> Path:
        """The file that its numbers lie in."""
        return next(iter(self.parts.values())).path

    @property
    def num_elements(self) -> int:
        """Numbers in the matrix."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Of all parts."""
        return sum(part.num_bytes for part in self.parts.values())

    @property
    def stored_as(self) -> str:
        """For people."""
        return self.scheme.name

    @property
    def quant_type(self) -> QuantType:
        """The type of ggml that says the same, so that its kernels serve; F32 where there is none."""
        scheme = self.scheme
        if isinstance(scheme, FloatScheme) or scheme.reordered:
            return QuantType.F32
        if (scheme.group_size or self.shape[1]) % _NATIVE_GROUP or self.shape[1] % _NATIVE_GROUP:
            return QuantType.F32
        if scheme.bits == 4:
            return QuantType.Q4_1
        return QuantType.Q8_0 if scheme.symmetric else QuantType.F32


def scheme_from_config(config: Options) -> Scheme | None:
    """How a config.json says that weights are quantised; None if it does not.

    Raises:
        ModelInvalid: a key is missing or of the wrong type.
        ModelUnsupported: a method or an option of it that is not computed; names the key.
    """
    section = config.section("quantization_config")
    if section is None:
        return None
    method = section.text("quant_method")
    if method not in _METHODS:
        section.unsupported("quant_method", f"is {method}; supported: {', '.join(_METHODS)}")
    return _METHODS[method](section)


def _gptq(section: Options) -> GroupScheme:
    section.require("bits", 4, 8)
    section.require("checkpoint_format", "gptq", "gptq_v2")
    section.require("pack_dtype", "int32")
    section.require("dynamic", {})  # other options for some modules
    return GroupScheme(
        method="gptq",
        layout="gptq",
        bits=section.size("bits"),
        group_size=_group_size(section),
        symmetric=section.flag("sym", default=True),
        reordered=section.flag("desc_act", default=False) and section.get("group_size") != -1,
        zero_offset=0 if section.get("checkpoint_format") == "gptq_v2" else 1,
    )


def _awq(section: Options) -> GroupScheme:
    section.require("bits", 4)
    section.require("version", "gemm", "GEMM")
    section.require("zero_point", True)
    return GroupScheme(method="awq", layout="awq", bits=4, group_size=_group_size(section), symmetric=False)


def _fp8(section: Options) -> FloatScheme:
    section.require("activation_scheme", "dynamic", "static")
    section.require("fmt", "e4m3")
    return FloatScheme(method="fp8", block=_block(section, "weight_block_size"))


def _compressed(section: Options) -> Scheme:
    section.require("format", "float-quantized", "naive-quantized", "pack-quantized")
    section.require("transform_config", {})
    if (sparsity := section.section("sparsity_config")) is not None:
        sparsity.require("format", "dense")
    groups = section.section("config_groups")
    named = section.get("config_groups")
    if groups is None or not isinstance(named, dict) or len(named) != 1:
        section.unsupported("config_groups", "does not have one group: all quantised weights must be packed alike")
    group = groups.section(next(iter(named)))
    weights = group.section("weights") if group is not None else None
    if group is None or weights is None:
        section.invalid("config_groups", "has no weights")
    group.require("format", section.get("format"))
    weights.require("dynamic", False)
    strategy = weights.text("strategy")
    if section.get("format") == "pack-quantized":
        weights.require("type", "int")
        weights.require("num_bits", 4, 8)
        weights.require("strategy", "group", "channel")
        weights.require("actorder", "weight", "static", "group", "dynamic")
        return GroupScheme(
            method="compressed-tensors",
            layout="packed",
            bits=weights.size("num_bits"),
            group_size=weights.size("group_size") if strategy == "group" else None,
            symmetric=weights.flag("symmetric", default=True),
            reordered=weights.get("actorder") in ("group", "dynamic"),
        )
    weights.require("type", "float")
    weights.require("num_bits", 8)
    weights.require("symmetric", True)
    weights.require("strategy", "tensor", "channel", "block")
    block = _block(weights, "block_structure") if strategy == "block" else None
    return FloatScheme(method="compressed-tensors", block=block)


_METHODS: Final[Mapping[str, Callable[[Options], Scheme]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "compressed-tensors": _compressed,
}


def _group_size(section: Options) -> int | None:
    return None if section.get("group_size") == -1 else section.size("group_size")


def _block(section: Options, key: str) -> tuple[int, int] | None:
    value = section.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and size > 0 for size in value):
        section.invalid(key, f"is {value!r}, not two sizes")
    return value[0], value[1]


def assemble(
    tensors: Mapping[str, TensorInfo | RawTensor], scheme: Scheme | None
) -> dict[str, TensorInfo | QuantizedTensor]:
    """A model's tensors, each quantised matrix under the name `X.weight` instead of its parts.

    Raises:
        ModelInvalid: a part is missing, or has another shape than the other parts say.
        ModelUnsupported: a tensor has a type that means nothing by itself, and is no part; names it.
    """
    left = dict(tensors)
    matrices: dict[str, QuantizedTensor] = {}
    for name, tensor in tensors.items():
        if scheme is not None and (module := _module(name, tensor, scheme)) is not None:
            matrix = _matrix(module, left, scheme)
            matrices[matrix.name] = matrix
    whole: dict[str, TensorInfo | QuantizedTensor] = {}
    for name, tensor in left.items():
        if scheme is not None and name.endswith(_CACHE_SCALES):
            continue
        if isinstance(tensor, RawTensor):
            why = (
                "config.json has no quantization_config"
                if scheme is None
                else f"it is no part of {scheme.name} weights"
            )
            raise ModelUnsupported(f"{tensor.path.name}: tensor {name} has type {tensor.raw_type.name}, but {why}")
        whole[name] = tensor
    return whole | matrices


def _module(name: str, tensor: TensorInfo | RawTensor, scheme: Scheme) -> str | None:
    """The module whose quantised numbers a tensor holds, if it does."""
    if isinstance(scheme, GroupScheme):
        suffix = ".weight_packed" if scheme.layout == "packed" else ".qweight"
        return name.removesuffix(suffix) if name.endswith(suffix) else None
    is_float8 = isinstance(tensor, RawTensor) and tensor.raw_type is RawType.F8_E4M3
    return name.removesuffix(".weight") if is_float8 and name.endswith(".weight") else None


def _matrix(module: str, left: dict[str, TensorInfo | RawTensor], scheme: Scheme) -> QuantizedTensor:
    """One matrix, whose parts are taken out of `left`."""
    if isinstance(scheme, FloatScheme):
        return _float_matrix(module, left, scheme)
    names = {
        "gptq": ("qweight", "qzeros", "scales", "g_idx"),
        "awq": ("qweight", "qzeros", "scales"),
        "packed": ("weight_packed", "weight_zero_point", "weight_scale", "weight_g_idx", "weight_shape"),
    }[scheme.layout]
    parts = {name: part for name in names if (part := left.pop(f"{module}.{name}", None)) is not None}
    numbers, zeros, scales, *order = names
    per = _WORD_BITS // scheme.bits
    rows, columns = _shape(parts[numbers], 2)
    outputs, inputs = {
        "gptq": (columns, rows * per),
        "awq": (columns * per, rows),
        "packed": (rows, columns * per),
    }[scheme.layout]
    groups = -(-inputs // (scheme.group_size or inputs))
    shapes: dict[str, tuple[int, ...]] = {scales: (outputs, groups), zeros: (-(-outputs // per), groups)}
    if scheme.layout != "packed":
        shapes = {name: shape[::-1] for name, shape in shapes.items()}
    if order:
        shapes[order[0]] = (inputs,)
    optional = {zeros} if scheme.layout == "packed" and scheme.symmetric else set()
    optional |= set() if scheme.reordered else set(order)
    for name, shape in shapes.items():
        _check(module, name, parts, shape, is_optional=name in optional)
    return QuantizedTensor(f"{module}.weight", (outputs, inputs), scheme, parts)


def _float_matrix(module: str, left: dict[str, TensorInfo | RawTensor], scheme: FloatScheme) -> QuantizedTensor:
    names = ("weight", "weight_scale", "weight_scale_inv", "input_scale")
    parts = {name: part for name in names if (part := left.pop(f"{module}.{name}", None)) is not None}
    outputs, inputs = _shape(parts["weight"], 2)
    scale = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
    if scheme.block is not None:
        rows, columns = scheme.block
        _check(module, scale, parts, (-(-outputs // rows), -(-inputs // columns)))
    else:
        _check(module, scale, parts, (), (1,), (1, 1), (outputs,), (outputs, 1))
    return QuantizedTensor(f"{module}.weight", (outputs, inputs), scheme, parts)


def _shape(part: TensorInfo | RawTensor, num_dims: int) -> tuple[int, ...]:
    if len(part.shape) != num_dims:
        raise ModelInvalid(f"{part.path.name}: tensor {part.name} has shape {list(part.shape)}, which is no matrix")
    return part.shape


def _check(
    module: str,
    name: str,
    parts: Mapping[str, TensorInfo | RawTensor],
    *shapes: tuple[int, ...],
    is_optional: bool = False,
) -> None:
    """Refuse a part that is missing or has none of the shapes that the numbers' own allows."""
    part = parts.get(name)
    if part is None and not is_optional:
        numbers = next(iter(parts.values()))
        raise ModelInvalid(f"{numbers.path.name}: tensor {module}.{name} is missing, beside {numbers.name}")
    if part is not None and part.shape not in shapes:
        raise ModelInvalid(
            f"{part.path.name}: tensor {module}.{name} has shape {list(part.shape)}, but by config.json's "
            f"quantization_config it should have {' or '.join(str(list(shape)) for shape in shapes)}"
        )
