"""What this machine is and what it can do: measured on the spot, for the record and for the share of the roofline.

    python -m octavo_bench.machine                     prints it as JSON
    python -m octavo_bench.machine --device cuda       the same of a GPU
    python -m octavo_bench.machine --small             only shows that it works

Memory speed is that of reading 1 GiB, far more than any cache holds, with all cores. Peaks of arithmetic are those of
the matrix products of torch. All are the best of up to seven tries. Run in a process of its own, because of torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_TRIES = 7
_SECONDS = 3.0  # no further try after so many: some products have no fast code for some processors
_NUMBERS: Final = 2**28  # float32: 1 GiB
_MATRICES: Final = {"cpu": 1024, "cuda": 8192}  # sides of the square ones: those of a GPU must fill it
_SMALL: Final = 64
_FEATURES = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="machine", description="What this machine is and what it can do, as JSON.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--small", action="store_true", help="only show that it works")
    options = parser.parse_args()
    found = describe_gpu() if options.device == "cuda" else describe()
    print(json.dumps(found | measure(options.device, is_small=options.small)))  # noqa: T201


def measure(device: str, *, is_small: bool = False) -> dict[str, float]:
    """Speeds of memory and of arithmetic, in billions a second.

    Args:
        device: cpu or cuda.
        is_small: on so little that the figures mean nothing.
    """
    import torch  # noqa: PLC0415 - describe() is imported where there is no need of it

    def best(work: Callable[[], Any]) -> float:
        seconds: list[float] = []
        while len(seconds) < _TRIES and sum(seconds) < _SECONDS:
            started = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    numbers = torch.ones(_SMALL**2 if is_small else _NUMBERS, device=device)  # written, so that every page is there
    speeds = {"memory_gb_per_s": numbers.numel() * 4 / best(numbers.sum) / 1e9}
    side = _SMALL if is_small else _MATRICES[device]
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = best(lambda left=left, right=right: left @ right)  # type: ignore[misc] # mypy knows no defaults of lambdas
        speeds[f"{name}_gflop_per_s"] = 2 * side**3 / seconds / 1e9
    whole = torch.randint(-100, 100, (side, side), dtype=torch.int8, device=device)
    speeds["int8_gop_per_s"] = 2 * side**3 / best(lambda: torch._int_mm(whole, whole)) / 1e9  # noqa: SLF001 - torch has no other name for it
    return {name: float(f"{speed:.4g}") for name, speed in speeds.items()}


def describe() -> dict[str, Any]:
    """Name the processor and what it understands."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    info = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = info.get("flags", "").split()
    family = f"family {info.get('cpu family', '?')} model {info.get('model', '?')}"
    return {
        "processor": f"{info.get('model name', platform.processor())} ({family})",
        "features": [name for name in _FEATURES if name in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
    }


def describe_gpu() -> dict[str, Any]:
    """Name the first GPU, how many there are, and their driver."""
    import torch  # noqa: PLC0415 - as above

    gpu = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "processor": gpu.name,
        "features": [f"compute capability {gpu.major}.{gpu.minor}"],
        "cores": gpu.multi_processor_count,
        "memory_gib": round(gpu.total_memory / 2**30, 1),
        "kernel": platform.release(),
        "gpus": torch.cuda.device_count(),
        "driver": subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0],
    }


def versions() -> dict[str, str]:
    """Of what computes on a GPU. What is not installed is left out."""
    found = {}
    for name in ("torch", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
