"""Where things are in the repository, and why `operator/` must stay no package.

The folder has the name of a module of the standard library. As long as it holds no `__init__.py` the standard library's
module wins, wherever the folder stands on sys.path; with one, every `python -m` at the root of the repository breaks.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
PACKAGES: Final = {"operator": "octavo_operator", "engine": "octavo_engine"}

TOP_LEVEL: Final = {
    ".ci/run",
    ".dockerignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Dockerfile.engine",
    "Dockerfile.operator",
    "LICENSE",
    "Makefile",
    "README.md",
    "benchmarks",
    "constraints.txt",
    "crds",
    "docs/architecture.md",
    "docs/cpu.md",
    "e2e",
    "engine",
    "hatch_build.py",
    "helm/octavo",
    "manifests/install",
    "manifests/samples",
    "operator",
    "pyproject.toml",
    "tests/engine",
    "tests/helm",
    "tests/operator",
}


def entries(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if entry.name != "__pycache__"}


def origin(module: str, folder: Path) -> str:
    """The file that `python -m` in a folder imports a module from, or the error."""
    answer = subprocess.run(
        [sys.executable, "-m", "inspect", module, "--details"], cwd=folder, capture_output=True, text=True, check=False
    )
    lines = dict(line.split(": ", 1) for line in answer.stdout.splitlines() if ": " in line)
    return lines.get("Origin", answer.stderr)


@pytest.mark.parametrize(("folder", "package"), PACKAGES.items())
def test_each_root_holds_its_package_and_nothing_else_that_can_be_imported(folder: str, package: str) -> None:
    assert entries(ROOT / folder) == {package}
    assert (ROOT / folder / package / "__init__.py").is_file()


def test_python_at_the_root_gets_the_standard_librarys_operator() -> None:
    assert origin("operator", ROOT) == str(Path(sysconfig.get_path("stdlib")) / "operator.py")


def test_it_would_not_if_the_folder_were_a_package(tmp_path: Path) -> None:
    package = tmp_path / "operator"
    package.mkdir()
    (package / "__init__.py").touch()

    assert origin("operator", tmp_path) != str(Path(sysconfig.get_path("stdlib")) / "operator.py")


@pytest.mark.parametrize(("folder", "package"), PACKAGES.items())
def test_packages_hold_no_tests(folder: str, package: str) -> None:
    files = (ROOT / folder / package).rglob("*.py")
    assert not [file for file in files if file.name.startswith("test_") or file.name == "conftest.py"]
    assert "tests" not in entries(ROOT / folder / package)


@pytest.mark.parametrize("folder", ["tests", "e2e/tests"])
def test_folders_of_tests_are_no_packages(folder: str) -> None:
    # Two of them are called operator and engine; and equal file names in two folders must not clash.
    assert not list((ROOT / folder).rglob("__init__.py"))


def test_what_belongs_to_the_top_level_is_there() -> None:
    assert not {name for name in TOP_LEVEL if not (ROOT / name).exists()}
