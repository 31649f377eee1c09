"""Where things are: the checkout, the cache that outlives clusters, and what one user's cluster leaves for clients.

The cache may be deleted at any time while no command of the harness runs; the next run fills it again.
"""

from __future__ import annotations

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]  # the checkout
TOOLS = PROJECT / "e2e" / "tools"  # Go sources of the cluster's binaries
WHEELS = PROJECT.parent / "shared" / "wheels"  # optional: wheels that the index does not have, such as torch for CPU


def cache_dir() -> Path:
    """The folder for what is costly to make again: binaries, the base image, image archives, the model."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo"


def state_dir() -> Path:
    """The folder for what belongs to the cluster that is up; it goes with the cluster."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "octavo"


def kubeconfig_path() -> Path:
    """The administrator's kubeconfig of the cluster that is up, whichever backend made it."""
    return state_dir() / "kubeconfig"
