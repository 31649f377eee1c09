"""What this machine is and what it can do: measured on the spot, for the record and for the share of the roofline.

    python -m octavo_bench.machine      prints it as JSON

Memory speed is that of reading 1 GiB, far more than any cache holds, with all cores. Peaks of arithmetic are those of
the matrix products of torch. All are the best of up to seven tries. Run in a process of its own, because of torch.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_TRIES = 7
_SECONDS = 3.0  # no further try after so many: some products have no fast code for some processors
_SIZE = 1024  # of the square matrices
_FEATURES = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def main() -> None:
    """Measure and print."""
    import torch  # noqa: PLC0415 - describe() is imported where there is no need of it

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    numbers = torch.ones(2**28)  # float32, 1 GiB, written so that every page is there
    speeds = {"memory_gb_per_s": numbers.numel() * 4 / _best(numbers.sum) / 1e9}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        left, right = torch.randn(_SIZE, _SIZE).to(dtype), torch.randn(_SIZE, _SIZE).to(dtype)
        seconds = _best(lambda left=left, right=right: left @ right)  # type: ignore[misc]
        speeds[f"{name}_gflop_per_s"] = 2 * _SIZE**3 / seconds / 1e9
    whole = torch.randint(-100, 100, (_SIZE, _SIZE), dtype=torch.int8)
    speeds["int8_gop_per_s"] = 2 * _SIZE**3 / _best(lambda: torch._int_mm(whole, whole)) / 1e9  # noqa: SLF001
    print(json.dumps(describe() | {name: round(speed, 1) for name, speed in speeds.items()}))  # noqa: T201


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


def _best(work: Callable[[], Any]) -> float:
    seconds: list[float] = []
    while len(seconds) < _TRIES and sum(seconds) < _SECONDS:
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
