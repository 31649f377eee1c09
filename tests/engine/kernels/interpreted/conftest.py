"""Triton's interpreter with the arithmetic of a device, and what the tests of all kernels share.

Where there is a GPU and no interpreter, the same tests run on it: `launched` takes what a test made to the device and
back, and the twins, which are the truth, compute on the CPU either way.

The interpreter of Triton 3.7 keeps bfloat16 and FP8 as bit patterns. It cuts numbers off when it makes them, where a
device rounds to the nearest, and multiplies the patterns themselves in a dot product of bfloat16. Here both are done
in torch's arithmetic, which is that of a device: products exact, sums in float32.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar, cast

import numpy as np
import pytest
import torch
import triton.language as tl
from tests.engine.kernels.conftest import DEVICE
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

P = ParamSpec("P")
T = TypeVar("T")

# ruff: noqa: D103 - a helper's name says what it does

_PATTERNS: Final = {  # types that numpy does not have: the type of the bits, and torch's
    tl.bfloat16: (np.int16, torch.bfloat16),
    tl.float8e4nv: (np.uint8, torch.float8_e4m3fn),
}
_original_cast = InterpreterBuilder.cast_impl


def _numbers(handle: TensorHandle) -> np.ndarray:
    if handle.dtype.scalar not in _PATTERNS:
        data: np.ndarray = handle.data
        return data
    bits, dtype = _PATTERNS[handle.dtype.scalar]
    pattern = torch.from_numpy(np.ascontiguousarray(handle.data).view(bits))
    return np.asarray(pattern.view(dtype).float().numpy())


def _cast(builder: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
    if source.dtype.scalar not in _PATTERNS and target.scalar not in _PATTERNS:
        return _original_cast(builder, source, target)
    numbers = _numbers(source)
    if target.scalar not in _PATTERNS:
        handle = TensorHandle(numbers, tl.float32)
        return _original_cast(builder, handle, target)
    _, dtype = _PATTERNS[target.scalar]
    unsigned = np.uint16 if dtype == torch.bfloat16 else np.uint8
    pattern = torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float32)).to(dtype)
    return TensorHandle(
        pattern.view(torch.int16 if dtype == torch.bfloat16 else torch.uint8).numpy().view(unsigned), target.scalar
    )


def _fp_to_fp(builder: InterpreterBuilder, source: TensorHandle, target: tl.dtype, _rounding: object) -> TensorHandle:
    return _cast(builder, source, target)


def _dot(
    _builder: InterpreterBuilder,
    a: TensorHandle,
    b: TensorHandle,
    d: TensorHandle,
    _precision: object,
    _inexact: object,
) -> TensorHandle:
    product = np.matmul(_numbers(a).astype(d.data.dtype), _numbers(b).astype(d.data.dtype))
    return TensorHandle(product + d.data, d.dtype.scalar)


@pytest.fixture(autouse=True, scope="session")
def _arithmetic_of_a_device() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # a device's kernels do not go through these
        patch.setattr(InterpreterBuilder, "cast_impl", _cast)
        patch.setattr(InterpreterBuilder, "create_fp_to_fp", _fp_to_fp)
        patch.setattr(InterpreterBuilder, "create_dot", _dot)
        yield


@pytest.fixture(autouse=True)
def _overflow_is_infinity() -> Iterator[None]:
    with np.errstate(all="ignore"):  # as on a device
        yield


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_within(out: torch.Tensor, expected: torch.Tensor, ulps: float = 1.0) -> None:
    """Equal up to so many units in the last place, of the number or of 1."""
    bound = ulps * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, expected, rtol=bound, atol=bound)


class _Sent:
    """What tensors on the CPU are on the device: whole memories, so that parts stay parts of the same longer rows."""

    def __init__(self) -> None:
        self._memories: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # bytes here and there, by address here

    def __call__(self, value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: self(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **fields)
        if not isinstance(value, torch.Tensor):
            return value
        memory = value.untyped_storage()
        if memory.data_ptr() not in self._memories:
            here = torch.empty(0, dtype=torch.uint8).set_(memory)
            self._memories[memory.data_ptr()] = (here, here.to(DEVICE, copy=True))
        _, there = self._memories[memory.data_ptr()]
        sent = torch.empty(0, dtype=value.dtype, device=DEVICE)
        return sent.set_(there.untyped_storage(), value.storage_offset(), value.shape, value.stride())

    def fetch(self) -> None:
        """Bring back what was changed there."""
        for here, there in self._memories.values():
            here.copy_(there)


def launched(launcher: Callable[P, T]) -> Callable[P, T]:
    """A launcher, or a kernel on its grid, that takes and returns tensors of the CPU and computes on the device."""

    def launch(*args: P.args, **options: P.kwargs) -> T:
        send = _Sent()
        result: Any = launcher(*map(send, args), **{name: send(value) for name, value in options.items()})
        send.fetch()
        if isinstance(result, torch.Tensor):
            result = result.cpu()
        elif isinstance(result, tuple):
            result = tuple(part.cpu() for part in result)
        return cast("T", result)

    return launch
