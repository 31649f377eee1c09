"""The engine's Dockerfile for both devices: what the image is made of, and that Triton can compile with that."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from triton.backends.nvidia import driver
from triton.runtime import build

if TYPE_CHECKING:
    from collections.abc import Iterable

DOCKERFILE: Final = Path(__file__).parents[1] / "Dockerfile.engine"
IMAGE: Final = "the image"
ARGUMENT: Final = re.compile(r"\$\{(\w+)\}")


def instructions() -> list[str]:
    """Each on a line, without comments."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    return [line for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines() if line]


def stages(**arguments: str) -> dict[str, tuple[str, list[str]]]:
    """By name, the last being IMAGE: what a stage is from, and its instructions."""
    found: dict[str, tuple[str, list[str]]] = {}
    values: dict[str, str] = {}
    current: list[str] = []
    for line in instructions():
        if line.startswith("ARG ") and not found:
            name, _, value = line.removeprefix("ARG ").partition("=")
            values[name] = arguments.get(name, value)
        elif line.startswith("FROM "):
            _, base, *named = line.split()
            current = []
            found[named[1] if named else IMAGE] = (ARGUMENT.sub(lambda match: values[match[1]], base), current)
        else:
            current.append(line)
    return found


def chain(**arguments: str) -> list[str]:
    """The stages that the image consists of, the last one first; then the base."""
    every, names = stages(**arguments), [IMAGE]
    while names[-1] in every:
        names.append(every[names[-1]][0])
    return names


def installed(**arguments: str) -> list[str]:
    """Debian's packages that the image has beside its base's."""
    every = stages(**arguments)
    lines = [line for name in chain(**arguments) if name in every for line in every[name][1]]
    options = re.compile(r"apt-get install ((?:-\S+ )*)([^&|;]*)")
    return [word for line in lines if (match := options.search(line)) for word in match[2].split()]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_stage_is_made_of_earlier_ones(device: str) -> None:
    seen = {"scratch", "python:3.11-slim-bookworm"}
    for name, (base, lines) in stages(DEVICE=device).items():
        used = {base, *(word for line in lines for word in re.findall(r"\bfrom=([\w-]+)", line))}
        assert used <= seen, name
        seen.add(name)


def test_the_image_is_for_processors_unless_gpus_are_asked_for() -> None:
    assert chain() == chain(DEVICE="cpu") == [IMAGE, "device-cpu", "dependencies", "python:3.11-slim-bookworm"]
    assert chain(DEVICE="cuda") == [IMAGE, "device-cuda", "dependencies", "python:3.11-slim-bookworm"]
    assert installed() == []
    assert installed(DEVICE="cuda") == ["gcc", "libc6-dev", "$python"]


def test_what_triton_writes_goes_where_the_user_may_write() -> None:
    (environment,) = [line for line in stages(DEVICE="cuda")["device-cuda"][1] if line.startswith("ENV ")]
    assert "TRITON_CACHE_DIR=/tmp/" in environment
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in environment


def closure(packages: Iterable[str]) -> set[str]:
    """Debian's packages with all that they depend on, of those that are installed here."""
    wanted, found = list(packages), set[str]()
    while wanted:
        name = wanted.pop()
        query = ["dpkg-query", "--show", "--showformat=${Depends}, ${Pre-Depends}", name]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        if name not in found and answer.returncode == 0:
            found.add(name)
            wanted += [part.split()[0].split(":")[0] for part in re.split(r"[,|]", answer.stdout) if part.strip()]
    return found


def test_tritons_launcher_compiles_with_nothing_but_these_packages(tmp_path: Path) -> None:
    source = Path(driver.dirname) / "driver.c"
    # The driver's own library comes with a GPU; that it is linked against is all that counts here.
    (tmp_path / "empty.c").touch()
    subprocess.run(["gcc", "-shared", "-o", tmp_path / "libcuda.so.1", tmp_path / "empty.c"], check=True)
    folders = [driver.libdevice_dir, str(tmp_path)]
    built = build._build(
        "cuda_utils", str(source), str(tmp_path), folders, driver.include_dirs, driver.libraries, ["-w"]
    )
    assert Path(built).stat().st_size > 0

    include = Path(build.sysconfig.get_paths("posix_prefix")["include"]).resolve()
    command = ["gcc", "-M", f"-I{include}", *(f"-I{folder}" for folder in driver.include_dirs), str(source)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    read = [Path(word).resolve() for word in printed.replace("\\\n", " ").split()[1:]]
    assert include / "Python.h" in read
    known = (include, Path(driver.dirname).resolve())
    others = [str(path) for path in read if not any(path.is_relative_to(folder) for folder in known)]
    owners = subprocess.run(["dpkg", "--search", *others], capture_output=True, text=True, check=True).stdout
    assert {line.split(":")[0] for line in owners.splitlines()} <= closure(["gcc", "libc6-dev"])
