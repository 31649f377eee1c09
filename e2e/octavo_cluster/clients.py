"""Clients of the APIs that cannot be among the development tools: packages for Node, and those that want older ones.

tests/clients/ has their versions: package-lock.json, which holds no addresses (npm's omit-lockfile-registry-resolved),
and a file of requirements for each Python client. They are installed into the cache, in folders named after a hash of
these files, so that tests of another version never meet them.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from octavo_cluster import locks, paths, shell
from octavo_cluster.errors import PrerequisiteMissing
from octavo_cluster.progress import step

if TYPE_CHECKING:
    from collections.abc import Callable

PYTHON_CLIENTS = ("instructor", "litellm")
_SOURCES = paths.PROJECT / "tests" / "clients"
_NODE_FILES = tuple(_SOURCES / name for name in ("package.json", "package-lock.json"))


def ensure() -> None:
    """Install what is not in the cache yet.

    Raises:
        PrerequisiteMissing: there is no Node.
        CommandFailed: something could not be installed.
    """
    node()
    for name in PYTHON_CLIENTS:
        python(name)


def node() -> Path:
    """A folder from which a module of Node can import the packages; raises as `ensure`."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise PrerequisiteMissing(
            "node and npm are not on PATH, and clients for Node are tested: install Node.js 20 or newer (on Debian, as "
            "root: apt-get install nodejs npm)"
        )

    def install(folder: Path, log: Path) -> None:
        for file in _NODE_FILES:
            shutil.copy(file, folder)
        shell.run_logged(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], log, cwd=folder)

    return _installed("node", _NODE_FILES, install)


def python(name: str) -> Path:
    """The interpreter of an environment that has one of PYTHON_CLIENTS; raises as `ensure`."""
    requirements = _SOURCES / f"{name}.txt"

    def install(folder: Path, log: Path) -> None:
        uv = Path(sys.executable).with_name("uv")
        # Relocatable: it is made in one folder and moved to another.
        shell.run_logged([uv, "venv", "--quiet", "--relocatable", "--python", sys.executable, folder / "env"], log)
        python = folder / "env" / "bin" / "python"
        shell.run_logged([uv, "pip", "install", "--python", python, "--no-deps", "--requirements", requirements], log)

    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return _installed(f"{version}-{name}", (requirements,), install) / "env" / "bin" / "python"


def _installed(what: str, sources: tuple[Path, ...], install: Callable[[Path, Path], None]) -> Path:
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:12]
    home = paths.cache_dir() / "clients" / f"{what}-{digest}"
    with locks.exclusive(paths.cache_dir() / "clients.lock", f"installing clients: {what}"):
        if home.is_dir():
            return home
        home.parent.mkdir(parents=True, exist_ok=True)
        log = paths.cache_dir() / "logs" / f"clients-{what}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with (
            step(f"clients: installing {what}", expected="about 10 s"),
            tempfile.TemporaryDirectory(dir=home.parent, prefix=".installing-") as temporary,
        ):
            folder = Path(temporary) / "packages"
            folder.mkdir()
            install(folder, log)
            folder.replace(home)  # atomic: what is there is whole
    return home
