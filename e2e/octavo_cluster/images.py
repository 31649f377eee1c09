"""Octavo's container images: what they are built from, and building them by Docker where it answers, else by buildah.

An image's tag is a hash of everything it is built from, so that an unchanged tree builds nothing, and a pod never runs
an older image than the tree's.
"""

from __future__ import annotations

import hashlib
import os
import tomllib
from typing import TYPE_CHECKING, Literal

from octavo_cluster import backend, binaries, buildah, paths, shell
from octavo_cluster.progress import step
from octavo_cluster.recipe import Image, Recipe

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

PUBLIC_BASE = "docker.io/library/python:3.11-slim-bookworm"


def operator() -> Recipe:
    """The operator's image, of this checkout."""
    return _product("operator", expected="about 40 s", wheels=None)


def engine(device: Literal["cpu", "cuda"] = "cpu") -> Recipe:
    """The engine's image, of this checkout, for processors or for NVIDIA's GPUs."""
    wheels = paths.WHEELS if device == "cpu" and paths.WHEELS.is_dir() else None
    expected = "about 2 min" if wheels else "downloads 3 GB of torch with CUDA"
    return _product("engine", expected=expected, wheels=wheels, more=(("DEVICE", device),))


def pause(programs: Path) -> Recipe:
    """The image whose only program holds a pod's namespaces open."""
    return Recipe(
        image=Image("octavo/pause", binaries.sources_hash()),
        dockerfile=paths.TOOLS / "pause" / "Dockerfile",
        context=programs,
    )


def build(recipe: Recipe) -> Image:
    """Build an image unless it is there.

    Raises:
        PrerequisiteMissing: neither Docker nor buildah can be used.
        CommandFailed: the build failed; the message holds the last lines of its log.
    """
    if backend.docker_answers():
        _build_with_docker(recipe)
    else:
        buildah.ensure(recipe)
    return recipe.image


def docker_command(recipe: Recipe) -> list[str | Path]:
    """The command line that builds an image with Docker."""
    return ["docker", "build", "--progress=plain", *recipe.options(), recipe.context]


def context_files(project: Path) -> list[Path]:
    """The files that .dockerignore lets into the build context: it is a list of what is allowed."""
    ignore = (project / ".dockerignore").read_text().splitlines()
    allowed = [project / line[1:] for line in ignore if line.startswith("!")]
    files: list[Path] = []
    for entry in allowed:
        files += [entry] if entry.is_file() else [file for file in entry.rglob("*") if file.is_file()]
    return sorted(file for file in files if "__pycache__" not in file.parts)


def content_hash(files: Iterable[Path], salt: Sequence[str] = ()) -> str:
    """A short hash of files, their names and `salt`, that does not depend on where the checkout is."""
    digest = hashlib.sha256("\0".join(salt).encode())
    for file in files:
        data = file.read_bytes()
        digest.update(f"\0{os.path.relpath(file, paths.PROJECT)}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()[:12]


def _product(half: str, *, expected: str, wheels: Path | None, more: tuple[tuple[str, str], ...] = ()) -> Recipe:
    dockerfile = paths.PROJECT / f"Dockerfile.{half}"
    base = PUBLIC_BASE if backend.docker_answers() else buildah.base_image().reference
    project = tomllib.loads((paths.PROJECT / "pyproject.toml").read_text())["project"]
    arguments = (("BASE", base), ("VERSION", project["version"]), *more)
    offered = sorted(wheel.name for wheel in wheels.iterdir()) if wheels else []
    salt = [*(f"{name}={value}" for name, value in arguments), *offered]
    tag = content_hash([dockerfile, *context_files(paths.PROJECT)], salt)
    return Recipe(
        image=Image(f"octavo/{half}", tag),
        dockerfile=dockerfile,
        context=paths.PROJECT,
        expected=expected,
        arguments=arguments,
        wheels=wheels,
    )


def _build_with_docker(recipe: Recipe) -> None:
    image = recipe.image
    if shell.run(["docker", "image", "inspect", image.reference], check=False).returncode == 0:
        return
    image.log.parent.mkdir(parents=True, exist_ok=True)
    with step(f"image {image.name}: building with Docker", expected=recipe.expected):
        shell.run_logged(docker_command(recipe), image.log, env=os.environ | {"DOCKER_BUILDKIT": "1"})
