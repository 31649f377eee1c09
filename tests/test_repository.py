"""What every file of the repository keeps to, and that files made of others are up to date."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).parents[1]

# Where packages come from is the business of the machine that installs them: its clients know.
REGISTRIES: Final = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("download", "pytorch", "org"),
        ("anaconda", "org"),
        ("npmjs", "org"),
        ("npmjs", "com"),
        ("crates", "io"),
        ("rubygems", "org"),
        ("proxy", "golang", "org"),
        ("sum", "golang", "org"),
        ("maven", "org"),
        ("deb", "debian", "org"),
        ("archive", "ubuntu", "com"),
    )
]
HOME: Final = re.compile(r"(?<![\w.~$}-])/(?:root|home|work|Users)/[\w.]")


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def lines_with(pattern: re.Pattern[str]) -> list[str]:
    """Every line of a tracked text file that the pattern is in, with its place."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in tracked()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if pattern.search(line)
    ]


def test_no_file_names_a_package_registry() -> None:
    assert not lines_with(re.compile("|".join(map(re.escape, REGISTRIES)), re.IGNORECASE))


def test_no_file_holds_a_path_of_somebodys_machine() -> None:
    assert not lines_with(HOME)


def test_the_crd_and_the_charts_template_of_it_are_up_to_date() -> None:
    # The other generated files, in manifests/install, need helm: tests/helm/test_manifests.py.
    answer = subprocess.run(
        [sys.executable, "-m", "octavo_operator.api.crd", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


def pins() -> dict[str, list[Requirement]]:
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            found.setdefault(canonicalize_name(pin.name), []).append(pin)
    return found


def requirements() -> list[str]:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = document["project"]
    groups = [*project["optional-dependencies"].values(), *document["dependency-groups"].values()]
    return [
        *document["build-system"]["requires"],
        *project["dependencies"],
        *(one for group in groups for one in group),
    ]


def test_every_constraint_is_one_version() -> None:
    for name, alternatives in pins().items():
        for pin in alternatives:
            (specifier,) = pin.specifier
            assert specifier.operator == "==", name
            assert "*" not in specifier.version, name
        applying = [pin for pin in alternatives if pin.marker is None or pin.marker.evaluate()]
        assert len(applying) <= 1, name


@pytest.mark.parametrize("text", requirements())
def test_every_requirement_has_a_constraint_that_satisfies_it(text: str) -> None:
    requirement = Requirement(text)
    alternatives = pins()[canonicalize_name(requirement.name)]

    for pin in alternatives:
        (specifier,) = pin.specifier
        assert requirement.specifier.contains(specifier.version)
