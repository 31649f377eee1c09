"""What this process may use of the machine: memory and processors, as its control group limits them. No torch here.

Called by runner.py (and by `octavo plan`). In a container the host's own figures are far too large: the limits of every
control group from the process' own up to the root hold, the narrowest wins.

References: the kernel's admin-guide/cgroup-v1/memory.rst, scheduler/sched-bwc.rst and admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOT = Path("/")


def available_memory(root: Path = _ROOT) -> int:
    """Bytes that this process may still allocate: what the host and every control group above it have free.

    Page cache counts as free, as the kernel gives it back. `root` is where /proc and /sys are, for tests.
    """
    free = [_host_available(root)]
    for version, group in _control_groups(root, "memory"):
        limit_name, usage_name = _MEMORY_FILES[version]
        limit, usage = _read_int(group / limit_name), _read_int(group / usage_name)
        if limit is not None and usage is not None:
            free.append(limit - (usage - _page_cache(group)))
    return max(0, min(free))


def num_threads(root: Path = _ROOT) -> int:
    """Threads worth running: the processors that this process may use, under its control groups' quotas. At least 1."""
    allowed = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for version, group in _control_groups(root, "cpu"):
        quota = _cpu_quota(version, group)
        if quota is not None:
            allowed = min(allowed, quota)
    return max(1, math.ceil(allowed))


def anonymous_memory(pid: int, root: Path = _ROOT) -> int:
    """Bytes of a process' memory that no file backs; 0 where that cannot be told."""
    for line in _read(root / f"proc/{pid}/status").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def has_native_bfloat16(root: Path = _ROOT) -> bool:
    """Whether the processors multiply bfloat16 (AVX-512 BF16 or AMX); Linux on x86 alone tells."""
    for line in _read(root / "proc/cpuinfo").splitlines():
        if line.startswith("flags"):
            return bool({"avx512_bf16", "amx_bf16"} & set(line.split()))
    return False


def has_nvidia_driver(root: Path = _ROOT) -> bool:
    """Whether there may be a GPU: NVIDIA's driver, or on WSL the one of the host, is here. torch knows for sure."""
    return (root / "dev/nvidiactl").exists() or (root / "dev/dxg").exists()


_MEMORY_FILES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}


def _control_groups(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """(version, directory) of this process' groups for a controller, from its own to the root's.

    A container often sees only its own group, mounted as if it were the root: what does not exist is passed over.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            version, mount = 2, root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            version, mount = 1, root / "sys/fs/cgroup" / controller
        else:
            continue
        group = Path(path.lstrip("/"))
        for relative in (group, *group.parents) if group.parts else (group,):
            if (mount / relative).is_dir():
                yield version, mount / relative


def _host_available(root: Path) -> int:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    pages, page_size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")  # not Linux: all there is
    return pages * page_size


def _page_cache(group: Path) -> int:
    """Bytes of file pages that count towards the group's usage but that the kernel can drop."""
    names = {"inactive_file", "active_file", "total_inactive_file", "total_active_file"}
    entries = dict(line.split(maxsplit=1) for line in _read(group / "memory.stat").splitlines())
    # Version 1 counts descendants under total_*, version 2 always.
    total = {name for name in names & entries.keys() if name.startswith("total_")}
    return sum(int(entries[name]) for name in total or names & entries.keys())


def _cpu_quota(version: int, group: Path) -> float | None:
    """Processors that the group may use at a time; None: no limit."""
    if version == 2:
        fields = _read(group / "cpu.max").split()
        return int(fields[0]) / int(fields[1]) if len(fields) == 2 and fields[0] != "max" else None
    quota, period = _read_int(group / "cpu.cfs_quota_us"), _read_int(group / "cpu.cfs_period_us")
    return quota / period if quota is not None and period and quota > 0 else None


def _read_int(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, PermissionError):
        return ""
