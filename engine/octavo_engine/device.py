"""Which device and which dtype the engine computes with. Called by runner.py, once at start.

An explicit choice is never replaced by another: what cannot be had is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from octavo_engine import resources
from octavo_engine.errors import DeviceMissing

if TYPE_CHECKING:
    from octavo_engine.config import Device, DType

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(wanted: Device) -> torch.device:
    """The device for `--device`.

    Raises:
        DeviceMissing: cuda is asked for, and torch finds no usable GPU.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if wanted == "cuda":
        why = "finds no GPU" if torch.version.cuda else f"{torch.__version__} is built without CUDA"
        raise DeviceMissing(f"--device cuda: torch {why}; give the container a GPU, or choose --device cpu")
    return torch.device("cpu")


def choose_dtype(wanted: DType, device: torch.device) -> torch.dtype:
    """The dtype for `--dtype`; auto is bfloat16 where the device multiplies it natively, else float32."""
    if wanted != "auto":
        return _DTYPES[wanted]
    return torch.bfloat16 if _has_native_bfloat16(device) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The name that `--dtype` has for it."""
    return str(dtype).removeprefix("torch.")


def available_memory(device: torch.device) -> int:
    """Bytes of the device's memory that this process may still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return resources.available_memory()


def _has_native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()  # x86 names; an ARM CPU reports none of them
    return bool(capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False))
