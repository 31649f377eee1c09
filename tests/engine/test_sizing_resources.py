"""Memory and processors as control groups limit them, read from made-up /proc and /sys trees."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from octavo_engine import resources

if TYPE_CHECKING:
    from pathlib import Path

MIB = 2**20


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


HOST = {"proc/meminfo": "MemTotal:  16777216 kB\nMemAvailable:    8388608 kB\n"}


def test_without_a_limit_the_host_decides(tmp_path: Path) -> None:
    files = HOST | {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}
    assert resources.available_memory(tree(tmp_path, files)) == 8192 * MIB


def test_in_a_container_the_group_is_mounted_as_the_root(tmp_path: Path) -> None:
    files = HOST | {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{1024 * MIB}\n",
        "sys/fs/cgroup/memory.current": f"{300 * MIB}\n",
        "sys/fs/cgroup/memory.stat": f"anon {200 * MIB}\ninactive_file {60 * MIB}\nactive_file {40 * MIB}\n",
    }
    assert resources.available_memory(tree(tmp_path, files)) == (1024 - 300 + 100) * MIB


def test_the_narrowest_group_on_the_way_up_decides(tmp_path: Path) -> None:
    files = HOST | {
        "proc/self/cgroup": "0::/pods/one/app\n",
        "sys/fs/cgroup/pods/one/app/memory.max": "max\n",
        "sys/fs/cgroup/pods/one/app/memory.current": "0\n",
        "sys/fs/cgroup/pods/one/memory.max": f"{512 * MIB}\n",
        "sys/fs/cgroup/pods/one/memory.current": f"{12 * MIB}\n",
        "sys/fs/cgroup/pods/memory.max": f"{2048 * MIB}\n",
        "sys/fs/cgroup/pods/memory.current": f"{1000 * MIB}\n",
    }
    assert resources.available_memory(tree(tmp_path, files)) == 500 * MIB


def test_version_one_is_read_where_its_controller_is_mounted(tmp_path: Path) -> None:
    files = HOST | {
        "proc/self/cgroup": "4:memory:/box\n2:cpu,cpuacct:/box\n0::/\n",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{1000 * MIB}\n",
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{400 * MIB}\n",
        "sys/fs/cgroup/memory/box/memory.stat": (
            f"inactive_file 1\nactive_file 1\ntotal_inactive_file {90 * MIB}\ntotal_active_file {10 * MIB}\n"
        ),
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{900 * MIB}\n",
    }
    assert resources.available_memory(tree(tmp_path, files)) == 700 * MIB


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    files = HOST | {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{100 * MIB}\n",
        "sys/fs/cgroup/memory.current": f"{120 * MIB}\n",
    }
    assert resources.available_memory(tree(tmp_path, files)) == 0


def test_without_proc_all_physical_memory_is_assumed(tmp_path: Path) -> None:
    assert resources.available_memory(tmp_path) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "5000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "9900000 100000\n"}, 64),
        (
            {
                "proc/self/cgroup": "2:cpu:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        ({}, 64),
    ],
    ids=["no quota", "whole", "a part rounds up", "at least one", "more than there are", "version one", "no groups"],
)
def test_threads_follow_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert resources.num_threads(tree(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx2", False),
        ("avx2 avx512f avx512_vnni", False),
        ("avx2 avx512_bf16", True),
        ("avx2 amx_bf16", True),
    ],
)
def test_bfloat16_is_native_only_where_the_processor_has_instructions_for_it(
    tmp_path: Path, flags: str, *, expected: bool
) -> None:
    root = tree(tmp_path, {"proc/cpuinfo": f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\n"})
    assert resources.has_native_bfloat16(root) == expected


def test_bfloat16_is_not_assumed_where_nothing_tells(tmp_path: Path) -> None:
    assert not resources.has_native_bfloat16(tmp_path)


def test_what_a_process_holds_is_its_anonymous_memory(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/7/status": "Name:\tx\nVmRSS:\t  5000 kB\nRssAnon:\t  2048 kB\n"})
    assert resources.anonymous_memory(7, root) == 2 * MIB
    assert resources.anonymous_memory(8, root) == 0


def test_a_gpu_is_suspected_where_its_driver_is(tmp_path: Path) -> None:
    assert not resources.has_nvidia_driver(tmp_path)
    assert resources.has_nvidia_driver(tree(tmp_path, {"dev/nvidiactl": ""}))
