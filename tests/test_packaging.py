"""The wheel and the source distribution, built for real; and what the Dockerfiles build from."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import yaml
from packaging.requirements import Requirement

from octavo_engine.cpu.variants import VARIANTS

if TYPE_CHECKING:
    from email.message import Message

ROOT: Final = Path(__file__).parents[1]
PACKAGES: Final = {"octavo_operator": ROOT / "operator", "octavo_engine": ROOT / "engine"}
PROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION: Final[str] = PROJECT["version"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT], check=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


def in_dist_info(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(f"octavo-{VERSION}.dist-info/{name}").decode()


def wheel_metadata(wheel: Path) -> Message:
    return Parser().parsestr(in_dist_info(wheel, "METADATA"))


def files_of(package: str) -> set[str]:
    """The files of a package in the repository, as they should be named in the wheel."""
    root = PACKAGES[package]
    return {
        str(path.relative_to(root))
        for path in (root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.startswith(f"octavo-{VERSION}.dist-info/")}


def is_library(name: str) -> bool:
    return name.endswith(".so")


def test_the_wheel_holds_both_packages_and_nothing_else(wheel: Path) -> None:
    names = {name for name in names_in(wheel) if not is_library(name)}

    assert names == files_of("octavo_operator") | files_of("octavo_engine")
    assert {"octavo_operator/py.typed", "octavo_engine/py.typed"} <= names


def test_the_wheel_has_the_cpu_library_for_every_processor_and_runs_with_any_python(wheel: Path) -> None:
    assert wheel.name == f"octavo-{VERSION}-py3-none-linux_x86_64.whl"
    assert {name for name in names_in(wheel) if is_library(name)} == {
        f"octavo_engine/cpu/{variant.file_name}" for variant in VARIANTS
    }


def test_without_a_compiler_the_wheel_is_the_pure_one_and_the_build_says_so(tmp_path: Path) -> None:
    source = tmp_path / "source"
    libraries = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("operator", "engine"):
        shutil.copytree(ROOT / name, source / name, ignore=libraries)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": str(tmp_path)})

    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"octavo-{VERSION}-py3-none-any.whl"
    assert names_in(wheel) == files_of("octavo_operator") | files_of("octavo_engine")
    assert "no C++ compiler" in answer.stdout + answer.stderr


def test_the_wheel_brings_two_commands(wheel: Path) -> None:
    parser = configparser.ConfigParser()
    parser.read_string(in_dist_info(wheel, "entry_points.txt"))

    assert {section: dict(parser[section]) for section in parser.sections()} == {
        "console_scripts": {"octavo": "octavo_engine.cli:main", "kubectl-octavo": "octavo_operator.cli:main"}
    }


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    about = wheel_metadata(wheel)

    assert about["Name"] == "octavo"
    assert about["Version"] == VERSION
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == PROJECT["requires-python"]
    assert set(about.get_all("Provides-Extra", [])) == {"operator", "engine", "otel", "s3"}
    assert in_dist_info(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()


def test_the_source_distribution_holds_what_a_build_needs(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    prefix = f"octavo-{VERSION}/"
    with tarfile.open(path) as archive:
        names = {name.removeprefix(prefix) for name in archive.getnames()}

    assert {"pyproject.toml", "hatch_build.py", "constraints.txt", "README.md", "CHANGELOG.md", "LICENSE"} <= names
    assert {f"operator/{name}" for name in files_of("octavo_operator")} <= names
    assert {f"engine/{name}" for name in files_of("octavo_engine")} <= names
    assert {f"crds/{path.name}" for path in (ROOT / "crds").glob("*.yaml")} <= names
    assert not [name for name in names if name.startswith(("tests/", "e2e/"))]


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment with the wheel, and with the dependencies that the tests run with."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    uv = Path(sysconfig.get_path("scripts")) / "uv"
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--offline", "--no-deps", "--no-cache", "--python", python, wheel], check=True
    )
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # Paths of a .pth file come last, and .pth files over there are not read: the editable Octavo is not found.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.mark.parametrize("command", ["octavo", "kubectl-octavo"])
def test_the_installed_commands_tell_their_version(environment: Path, command: str) -> None:
    answer = subprocess.run(
        [environment / command, "--version"], capture_output=True, text=True, check=False, cwd=environment
    )

    assert (answer.returncode, answer.stdout, answer.stderr) == (0, f"{command} {VERSION}\n", "")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_installed_packages_are_the_wheels(environment: Path, package: str) -> None:
    program = f"import {package}; print({package}.__file__, {package}.__version__)"
    answer = subprocess.run(
        [environment / "python", "-c", program], capture_output=True, text=True, check=True, cwd=environment
    )

    file, version = answer.stdout.split()
    assert Path(file).is_relative_to(environment.parent)
    assert version == VERSION


def closure(extra: str) -> set[str]:
    """The names of all distributions that `octavo[extra]` brings, by what is installed here."""
    found: set[str] = set()
    pending = [("octavo", frozenset({extra}))]
    while pending:
        name, extras = pending.pop()
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            applies = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": one}) for one in extras | {""}
            )
            if applies and requirement.name.lower() not in found:
                found.add(requirement.name.lower())
                pending.append((requirement.name, frozenset(requirement.extras)))
    return found


def test_the_operator_brings_nothing_that_only_the_engine_needs() -> None:
    assert {"torch", "fastapi", "tokenizers", "numpy"} <= closure("engine")
    assert not {"torch", "fastapi", "tokenizers", "numpy"} & closure("operator")


def test_the_engine_brings_no_client_of_kubernetes() -> None:
    assert {"kopf", "kubernetes"} <= closure("operator")
    assert not {"kopf", "kubernetes"} & closure("engine")


def test_one_version_everywhere() -> None:
    chart = yaml.safe_load((ROOT / "helm/octavo/Chart.yaml").read_text())
    manifests = (ROOT / "manifests/install/deployment.yaml").read_text()

    assert chart["version"] == VERSION
    assert chart["appVersion"] == VERSION
    assert set(re.findall(r"octavo/(?:operator|engine):(\S+)", manifests)) == {VERSION}


@pytest.mark.parametrize("half", ["operator", "engine"])
def test_the_build_context_has_what_the_dockerfile_copies(half: str) -> None:
    allowed = {
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = {
        source
        for line in (ROOT / f"Dockerfile.{half}").read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }

    assert copied == allowed
