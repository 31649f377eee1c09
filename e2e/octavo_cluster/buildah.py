"""Building images where there is no Docker: by buildah, with its layers in the cache, into archives.

There is no image registry either: the base image is made by debootstrap.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from octavo_cluster import locks, packages, paths, shell
from octavo_cluster.progress import say, step
from octavo_cluster.recipe import Image, Recipe

# The same as the public base, as far as the Dockerfiles ask: Debian 12 with its Python 3.11.
DEBIAN = "bookworm"
BASE_PACKAGES = ("python3", "python3-venv", "ca-certificates")
BASE_DROPPED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/lib/apt/lists", "var/cache/apt", "var/log")

KEPT_ARCHIVES = 2  # of each image
STORAGE_LIMIT = 8 << 30  # bytes of layers, above which they are made anew


def ensure(recipe: Recipe) -> None:
    """Build an image into its archive, unless that is there.

    Raises:
        PrerequisiteMissing: the Debian packages are not there and cannot be installed.
        CommandFailed: the build failed; the message holds the last lines of its log.
    """
    image = recipe.image
    with locks.exclusive(paths.cache_dir() / "buildah.lock", "building images"):
        if image.archive.exists():
            image.archive.touch()  # the time of last use, by which older ones are dropped
            return
        packages.ensure()
        for folder in (_run_folder(), image.archive.parent, image.log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        if ("BASE", base_image().reference) in recipe.arguments:
            _ensure_base()
        with step(f"image {image.name}: building", expected=recipe.expected):
            shell.run_logged(build_command(recipe), image.log)
        with step(f"image {image.name}: writing {image.archive.name}"):
            partial = image.archive.with_suffix(".partial")
            partial.unlink(missing_ok=True)
            shell.run(command("push", image.reference, f"docker-archive:{partial}:{image.reference}"))
            partial.replace(image.archive)
        _drop_older(image)


def base_image() -> Image:
    """The base image that debootstrap makes."""
    settings = "\0".join([DEBIAN, *BASE_PACKAGES, *BASE_DROPPED])
    return Image("octavo/base", hashlib.sha256(settings.encode()).hexdigest()[:12])


def command(*arguments: str | Path) -> list[str | Path]:
    """The command line of a buildah that keeps its layers in the cache, and leaves no mount on the machine."""
    run = _run_folder()  # mounts and counts of mounts, which must not outlive them: memory of a namespace
    return [
        *("unshare", "--mount", "--propagation=slave"),
        *("sh", "-euc", 'mount -t tmpfs tmpfs "$0" && exec "$@"', run),
        *("buildah", "--root", _layers(), "--runroot", run, "--storage-driver=overlay"),
        *arguments,
    ]


def build_command(recipe: Recipe) -> list[str | Path]:
    """The command line that builds an image."""
    return command("build", "--layers", "--isolation=chroot", "--network=host", *recipe.options(), recipe.context)


def _layers() -> Path:
    return paths.cache_dir() / "buildah" / "layers"


def _run_folder() -> Path:
    return paths.cache_dir() / "buildah" / "run"


def _ensure_base() -> None:
    image = base_image()
    if shell.run(command("inspect", "--type=image", image.reference), check=False).returncode == 0:
        return
    if not image.archive.exists():
        _debootstrap(image)
    with tempfile.TemporaryDirectory() as folder, step(f"image {image.name}: storing"):
        dockerfile = Path(folder) / "Dockerfile"
        dockerfile.write_text(f'FROM scratch\nADD {image.archive.name} /\nENV LANG=C.UTF-8\nCMD ["python3"]\n')
        recipe = Recipe(image=image, dockerfile=dockerfile, context=image.archive.parent)
        shell.run_logged(build_command(recipe), image.log)


def _debootstrap(image: Image) -> None:
    with (
        tempfile.TemporaryDirectory(dir=paths.cache_dir(), prefix=".debootstrap-") as folder,
        step(f"image {image.name}: Debian {DEBIAN} by debootstrap", expected="about 1 min"),
    ):
        root = Path(folder) / "root"
        unshare = ["unshare", "--mount", "--propagation=slave"]
        include = f"--include={','.join(BASE_PACKAGES)}"
        shell.run_logged([*unshare, "debootstrap", "--variant=minbase", include, DEBIAN, root], image.log)
        for name in BASE_DROPPED:
            shutil.rmtree(root / name)
            (root / name).mkdir()
        partial = image.archive.with_suffix(".partial")
        shell.run(["tar", "--create", "--numeric-owner", f"--file={partial}", f"--directory={root}", "."])
        partial.replace(image.archive)


def _drop_older(image: Image) -> None:
    prefix = image.archive.name.removesuffix(f"{image.tag}.tar")
    archives = sorted(image.archive.parent.glob(f"{prefix}*.tar"), key=os.path.getmtime, reverse=True)
    for old in archives[KEPT_ARCHIVES:]:
        old.unlink()
        reference = Image(image.name, old.stem.removeprefix(prefix)).reference
        shell.run(command("rmi", reference), check=False)  # it may have gone with the layers
    used = int(shell.run(["du", "--summarize", "--block-size=1", _layers()]).stdout.split()[0])
    if used > STORAGE_LIMIT:
        say(f"    buildah's layers take {used / 1e9:.0f} GB: dropping them")
        shutil.rmtree(_layers())
