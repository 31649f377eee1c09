"""What GPUs there are for a kernel, in which ways it may be compiled, and its launch.

Every module here with a kernel uses it. A launcher cannot ask for a compilation that `Kernel.variants` does not list,
and the compile matrix (tests/engine/kernels/test_compile_matrix.py) builds all of these for every target: what is
launched on a device has been compiled, and its registers and shared memory looked at, where there was none.

So nothing about a compilation depends on the numbers of a call: integer arguments are not specialised, tensors begin
at multiples of 16 bytes, and everything else that code is made for is a constant of the variant.

In Triton's interpreter (TRITON_INTERPRET=1, tensors on the CPU) the launchers choose as for an H100.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from octavo_engine.errors import DeviceMissing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

KIB: Final = 1024


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of GPU: CUDA's compute capability, and what differs between them for these kernels."""

    capability: int  # 80 for 8.0
    shared_bytes: int  # of shared memory that one thread block can have (CUDA programming guide, table of capabilities)
    has_fp8: bool  # whether its tensor cores multiply e4m3, and Triton converts to it


TARGETS: Final = {
    80: Target(80, 163 * KIB, has_fp8=False),
    86: Target(86, 99 * KIB, has_fp8=False),
    89: Target(89, 99 * KIB, has_fp8=True),
    90: Target(90, 227 * KIB, has_fp8=True),
    100: Target(100, 227 * KIB, has_fp8=True),
}
# Capabilities that run as another one does: 8.7 is Orin, 10.3 is B300, 12.x are consumers' cards with little memory.
_LIKE: Final = {87: 86, 103: 100, 120: 89, 121: 89}

_TYPES: Final = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


@functools.cache
def target_of(device: torch.device) -> Target:
    """The target that kernels are chosen for on a device; any CPU stands for an H100 (the interpreter).

    Raises:
        DeviceMissing: the GPU is of a kind that the kernels are not made for.
    """
    if device.type != "cuda":
        return TARGETS[90]
    major, minor = torch.cuda.get_device_capability(device)
    capability = _LIKE.get(10 * major + minor, 10 * major + minor)
    if capability not in TARGETS:
        known = ", ".join(f"{each // 10}.{each % 10}" for each in (*TARGETS, *_LIKE))
        raise DeviceMissing(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; the GPU kernels are made "
            f"for {known}: use another GPU, or --device cpu"
        )
    return TARGETS[capability]


@dataclass(frozen=True, slots=True)
class Variant:
    """One compilation of a kernel."""

    types: tuple[str, ...]  # of the arguments that are no constants, in order, in Triton's notation: *bf16, i32, fp32
    constants: tuple[tuple[str, int | bool], ...]  # tl.constexpr arguments by name
    num_warps: int
    num_stages: int = 1  # loads that are under way while the loop computes, and one more

    def __getitem__(self, name: str) -> int:
        """One of the constants."""
        return dict(self.constants)[name]


class Kernel:
    """A Triton function and all the ways in which it may be compiled."""

    def __init__(self, function: Any, variants: Callable[[Target], Iterable[Variant]]) -> None:
        """Take what @triton.jit made, and what lists its variants on a target."""
        self.function = function
        self.name: str = function.__name__.strip("_")
        self.variants = functools.cache(lambda target: frozenset(variants(target)))

    def launch(self, variant: Variant, grid: tuple[int, ...], *args: torch.Tensor | float) -> None:
        """Start one program for each point of the grid.

        Args:
            variant: one of `variants(target_of(device))`.
            grid: one to three numbers > 0.
            args: for the arguments that are no constants, in order.
        """
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        assert variant in self.variants(target_of(tensors[0].device)), (self.name, variant)
        assert tuple(map(_type_of, args)) == variant.types, (self.name, tuple(map(_type_of, args)), variant.types)
        assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors), self.name
        warps, stages = variant.num_warps, variant.num_stages
        self.function[grid](*args, **dict(variant.constants), num_warps=warps, num_stages=stages)


def _type_of(arg: torch.Tensor | float) -> str:
    if isinstance(arg, torch.Tensor):
        return _TYPES[arg.dtype]
    if isinstance(arg, int):
        assert -(2**31) <= arg < 2**31, arg
        return "i32"
    return "fp32"


def pointer(dtype: torch.dtype) -> str:
    """How Triton writes a pointer to it."""
    return _TYPES[dtype]


def power_of_two(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()


def ceil_div(number: int, divisor: int) -> int:
    """Quotient, rounded up."""
    return -(-number // divisor)


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; an H100's for the interpreter."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
