"""Which device and which dtype the engine computes with. Called by runner.py, once at start.

An explicit choice is never replaced by another: what cannot be had is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from octavo_engine import planning
from octavo_engine.errors import ConfigError, DeviceMissing
from octavo_engine.sizing import Memory

if TYPE_CHECKING:
    from octavo_engine.config import Device, EngineConfig
    from octavo_engine.planning import ComputeDType

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


def of_rank(kind: str, rank: int) -> torch.device:
    """The device that a rank has: each its own GPU, or the processors that all share."""
    return torch.device(kind, rank) if kind == "cuda" else torch.device(kind)


def require_gpus(number: int) -> None:
    """Check that every rank can have a GPU.

    Raises:
        DeviceMissing: there are fewer.
    """
    if (here := torch.cuda.device_count()) < number:
        raise DeviceMissing(
            f"--tensor-parallel-size {number}: this process may use {here} GPUs; give the container more, or lower it"
        )


def choose_gpu_dtype(config: EngineConfig) -> ComputeDType:
    """The dtype for `--dtype` on a GPU; auto is bfloat16 where it multiplies that natively, else float32.

    Raises:
        ConfigError: --deterministic, and the device does not allow it.
    """
    if config.deterministic:
        raise ConfigError("--deterministic: not with a GPU yet; use --device cpu")
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that `--dtype` has under this name."""
    return _DTYPES[name]


def gpu_memory(device: torch.device, utilization: float | None) -> Memory:
    """What this process may still take of a GPU's memory, under --gpu-memory-utilization.

    What others hold of the GPU counts towards the share, as vLLM has it; this process' CUDA context is among them.
    """
    free, total = torch.cuda.mem_get_info(device)
    share = utilization or planning.DEFAULT_GPU_MEMORY_UTILIZATION
    available = max(0, int(total * share) - (total - free))
    return Memory(device="cuda", available_bytes=available, process_bytes=0, native=None)
