"""Container images, built from Dockerfiles by Docker where it answers, else by buildah, and never built twice.

An image's tag is a hash of everything it is built from, so that an unchanged tree builds nothing and a pod never runs
an older image than the tree's. Where there is no Docker there is no image registry either: images travel as archives,
and the base image is made by debootstrap.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from octavo_cluster import backend, binaries, locks, packages, paths, shell
from octavo_cluster.progress import say, step

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PUBLIC_BASE = "docker.io/library/python:3.11-slim-bookworm"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")  # may hold an authority of this network's own

# The same as the public base, as far as the Dockerfiles ask: Debian 12 with its Python 3.11.
DEBIAN = "bookworm"
BASE_PACKAGES = ("python3", "python3-venv", "ca-certificates")
BASE_DROPPED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/lib/apt/lists", "var/cache/apt", "var/log")

KEPT_ARCHIVES = 2  # of each image
STORAGE_LIMIT = 8 << 30  # bytes of buildah's layers, above which it starts anew


@dataclass(frozen=True, slots=True)
class Image:
    """An image by name and content."""

    name: str  # such as octavo/engine
    tag: str  # hash of what it is built from

    @property
    def repository(self) -> str:
        """Its full name without the tag, as pods may call it."""
        return f"docker.io/{self.name}"

    @property
    def reference(self) -> str:
        """Its full name, which means the same to buildah, Docker, containerd and the kubelet."""
        return f"{self.repository}:{self.tag}"

    @property
    def archive(self) -> Path:
        """Where the cache has it where there is no Docker."""
        return paths.cache_dir() / "images" / f"{self.name.replace('/', '-')}-{self.tag}.tar"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an image is built."""

    image: Image
    dockerfile: Path
    context: Path
    expected: str = ""  # how long it is known to take
    arguments: tuple[tuple[str, str], ...] = ()
    wheels: Path | None = None  # a folder of wheels that go before the package index


def operator() -> Recipe:
    """The operator's image, of this checkout."""
    return _product("operator", expected="about 30 s", wheels=None)


def engine() -> Recipe:
    """The engine's image, of this checkout."""
    wheels = paths.WHEELS if paths.WHEELS.is_dir() else None
    return _product("engine", expected="about 2 min" if wheels else "downloads 3 GB of torch with CUDA", wheels=wheels)


def _product(half: str, *, expected: str, wheels: Path | None) -> Recipe:
    dockerfile = paths.PROJECT / f"Dockerfile.{half}"
    base = PUBLIC_BASE if backend.docker_answers() else base_image().reference
    project = tomllib.loads((paths.PROJECT / "pyproject.toml").read_text())["project"]
    arguments = (("BASE", base), ("VERSION", project["version"]))
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


def build(recipe: Recipe) -> Image:
    """Build an image unless it is there.

    Raises:
        PrerequisiteMissing: neither Docker nor buildah can be used.
        CommandFailed: the build failed; the message holds the last lines of its log.
    """
    if backend.docker_answers():
        _build_with_docker(recipe)
    else:
        _build_archive(recipe)
    return recipe.image


def build_pause(programs: Path) -> Image:
    """The image whose only program holds a pod's namespaces open."""
    recipe = Recipe(
        image=Image("octavo/pause", binaries.sources_hash()),
        dockerfile=paths.TOOLS / "pause" / "Dockerfile",
        context=programs,
    )
    _build_archive(recipe)
    return recipe.image


def base_image() -> Image:
    """What the base image is called where debootstrap makes it."""
    settings = [DEBIAN, *BASE_PACKAGES, *BASE_DROPPED]
    return Image("octavo/base", hashlib.sha256("\0".join(settings).encode()).hexdigest()[:12])


# ---- Docker


def docker_command(recipe: Recipe) -> list[str | Path]:
    """The command line that builds an image with Docker."""
    return ["docker", "build", "--progress=plain", *_options(recipe), recipe.context]


def _build_with_docker(recipe: Recipe) -> None:
    image = recipe.image
    if shell.run(["docker", "image", "inspect", image.reference], check=False).returncode == 0:
        return
    with step(f"image {image.name}: building with Docker", expected=recipe.expected):
        shell.run_logged(docker_command(recipe), _log(image), env=os.environ | {"DOCKER_BUILDKIT": "1"})


# ---- buildah


def _storage() -> Path:
    return paths.cache_dir() / "buildah"


def buildah(*arguments: str | Path) -> list[str | Path]:
    """The command line of a buildah that keeps its layers in the cache, and leaves no mount on the machine."""
    run = _storage() / "run"  # mounts and counts of mounts, which must not outlive them: memory of a namespace
    return [
        *("unshare", "--mount", "--propagation=slave"),
        *("sh", "-euc", 'mount -t tmpfs tmpfs "$0" && exec "$@"', run),
        *("buildah", "--root", _storage() / "layers", "--runroot", run, "--storage-driver=overlay"),
        *arguments,
    ]


def buildah_build(recipe: Recipe) -> list[str | Path]:
    """The command line that builds an image with buildah."""
    return buildah("build", "--layers", "--isolation=chroot", "--network=host", *_options(recipe), recipe.context)


def _build_archive(recipe: Recipe) -> None:
    image = recipe.image
    with locks.exclusive(paths.cache_dir() / "buildah.lock", "building images"):
        if image.archive.exists():
            os.utime(image.archive)  # the time of last use, by which older ones are dropped
            return
        packages.ensure()
        if ("BASE", base_image().reference) in recipe.arguments:
            _ensure_base()
        _storage().joinpath("run").mkdir(parents=True, exist_ok=True)
        with step(f"image {image.name}: building", expected=recipe.expected):
            shell.run_logged(buildah_build(recipe), _log(image))
        with step(f"image {image.name}: writing {image.archive.name}"):
            image.archive.parent.mkdir(parents=True, exist_ok=True)
            partial = image.archive.with_suffix(".partial")
            partial.unlink(missing_ok=True)
            shell.run(buildah("push", image.reference, f"docker-archive:{partial}:{image.reference}"))
            partial.replace(image.archive)
        _drop_older(image)


def _options(recipe: Recipe) -> list[str | Path]:
    options: list[str | Path] = ["--file", recipe.dockerfile, "--tag", recipe.image.reference]
    for name, value in recipe.arguments:
        options += ["--build-arg", f"{name}={value}"]
    if recipe.arguments and CERTIFICATES.exists():
        options += ["--secret", f"id=ca,src={CERTIFICATES}"]
    if recipe.wheels:
        options += ["--build-context", f"wheels={recipe.wheels}"]
    return options


def _ensure_base() -> None:
    image = base_image()
    _storage().joinpath("run").mkdir(parents=True, exist_ok=True)
    if shell.run(buildah("inspect", "--type=image", image.reference), check=False).returncode == 0:
        return
    if not image.archive.exists():
        _debootstrap(image)
    with tempfile.TemporaryDirectory() as folder, step("image octavo/base: storing"):
        dockerfile = Path(folder) / "Dockerfile"
        dockerfile.write_text(f'FROM scratch\nADD {image.archive.name} /\nENV LANG=C.UTF-8\nCMD ["python3"]\n')
        recipe = Recipe(image=image, dockerfile=dockerfile, context=image.archive.parent)
        shell.run_logged(buildah_build(recipe), _log(image))


def _debootstrap(image: Image) -> None:
    image.archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=paths.cache_dir(), prefix=".debootstrap-") as folder:
        root = Path(folder) / "root"
        include = ",".join(BASE_PACKAGES)
        with step(f"image octavo/base: Debian {DEBIAN} by debootstrap", expected="about 1 min"):
            shell.run_logged(
                [
                    *("unshare", "--mount", "--propagation=slave"),
                    *("debootstrap", "--variant=minbase", f"--include={include}", DEBIAN, root),
                ],
                _log(image),
            )
            for name in BASE_DROPPED:
                shutil.rmtree(root / name, ignore_errors=True)
                (root / name).mkdir(parents=True)
            partial = image.archive.with_suffix(".partial")
            shell.run(["tar", "--create", "--numeric-owner", "--one-file-system", f"--file={partial}", "-C", root, "."])
            partial.replace(image.archive)


def _drop_older(image: Image) -> None:
    prefix = image.archive.name.removesuffix(f"{image.tag}.tar")
    archives = sorted(image.archive.parent.glob(f"{prefix}*.tar"), key=lambda file: file.stat().st_mtime, reverse=True)
    for old in archives[KEPT_ARCHIVES:]:
        old.unlink()
        reference = Image(image.name, old.stem.removeprefix(prefix)).reference
        shell.run(buildah("rmi", reference), check=False)  # it may have gone with the layers
    used = int(shell.run(["du", "--summarize", "--block-size=1", _storage() / "layers"]).stdout.split()[0])
    if used > STORAGE_LIMIT:
        say(f"    buildah's layers take {used / 1e9:.0f} GB: dropping them")
        shutil.rmtree(_storage() / "layers")


def _log(image: Image) -> Path:
    log = paths.cache_dir() / "logs" / f"{image.name.replace('/', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    return log
