"""Finding the machine's trees of control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo_cluster.cgroup import hierarchies
from octavo_cluster.errors import PrerequisiteMissing

CPU = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct"
PIDS = "39 31 0:36 / /sys/fs/cgroup/pids rw,relatime shared:7 - cgroup cgroup rw,pids"
UNIFIED = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"
ONLY_UNIFIED = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
DISK = "31 23 0:28 / / rw,relatime - ext4 /dev/vda rw"


def test_on_version_1_processes_are_followed_in_the_pids_tree() -> None:
    found = hierarchies(f"{DISK}\n{CPU}\n{PIDS}")
    assert found.processes == Path("/sys/fs/cgroup/pids")
    assert set(found.all) == {Path("/sys/fs/cgroup/cpu,cpuacct"), Path("/sys/fs/cgroup/pids")}
    assert not found.unified


def test_a_version_2_tree_beside_version_1_is_cleaned_too() -> None:
    found = hierarchies(f"{CPU}\n{PIDS}\n{UNIFIED}")
    assert found.processes == Path("/sys/fs/cgroup/pids")
    assert Path("/sys/fs/cgroup/unified") in found.all
    assert not found.unified


def test_version_2_alone_is_one_tree_for_everything() -> None:
    found = hierarchies(f"{DISK}\n{ONLY_UNIFIED}")
    assert found.all == (Path("/sys/fs/cgroup"),)
    assert found.processes == Path("/sys/fs/cgroup")
    assert found.unified


def test_a_machine_without_control_groups_is_refused() -> None:
    with pytest.raises(PrerequisiteMissing, match="control groups"):
        hierarchies(DISK)
