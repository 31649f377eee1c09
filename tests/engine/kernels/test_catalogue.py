"""The list of kernels is whole, and docs/kernels.md says what is in it."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

from octavo_engine import kernels
from octavo_engine.kernels.catalogue import KERNELS
from octavo_engine.kernels.launch import Kernel

ROOT = Path(__file__).parents[3]


def test_the_catalogue_has_every_kernel() -> None:
    names = [each.name for each in pkgutil.iter_modules(kernels.__path__)]
    modules = [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]
    found = {value for module in modules for value in vars(module).values() if isinstance(value, Kernel)}
    assert found == set(KERNELS)


def test_the_page_of_kernels_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate_kernels.py"), "--check"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stderr) == (0, "")


def test_only_one_place_starts_programs() -> None:
    sources = {path.name: path.read_text() for path in Path(kernels.__path__[0]).glob("*.py")}
    assert [name for name, source in sources.items() if re.search(r"\w\[[^\]\n]*\]\(\*?\w", source)] == ["launch.py"]
