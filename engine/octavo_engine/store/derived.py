"""Models that a Modelfile makes of others: each is its Modelfile, under its name beside the weights in the store.

Called by local.py and the command line. The Modelfile in the store has no base but weights: what its FROM named was
looked up when it was created.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from octavo_engine.errors import ModelNotFound

if TYPE_CHECKING:
    from octavo_engine.modelfile import Modelfile

_FOLDER: Final = "modelfiles"
_SUFFIX: Final = ".Modelfile"
_LATEST: Final = ":latest"
_NAME: Final = re.compile(r"([A-Za-z0-9][\w.-]*:\d+/)?[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*(:[\w.-]+)?", re.ASCII)
_MAX_NAME: Final = 200


def path_of(name: str, root: Path) -> Path:
    """Return where the Modelfile of `name` is, or would be.

    Raises:
        ModelNotFound: no model can have this name.
    """
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise ModelNotFound(f"{name[:_MAX_NAME]!r} cannot name a model: write it as name, org/name or name:tag")
    return root / _FOLDER / f"{name.removesuffix(_LATEST)}{_SUFFIX}"


def load(name: str, root: Path) -> Modelfile | None:
    """Return the Modelfile of a derived model; None: there is no such model.

    Raises:
        ModelfileInvalid: somebody wrote into the store what cannot be read.
    """
    path = _find(name, root)
    if path is None:
        return None
    from octavo_engine.modelfile import parse_modelfile  # noqa: PLC0415 - it brings numpy, and most models have none

    return parse_modelfile(path.read_text(encoding="utf-8"))


def save(name: str, modelfile: Modelfile, root: Path) -> Path:
    """Make a derived model, or replace it: whoever looks meanwhile sees the one or the other whole.

    Raises:
        ModelNotFound: no model can have this name.
        ModelfileInvalid: it cannot be written.
    """
    path, text = path_of(name, root), modelfile.render()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", newline="", delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)
    return path


def remove(name: str, root: Path) -> Path | None:
    """Delete a derived model; None: there is no such model. What it was made of stays."""
    path = _find(name, root)
    if path is not None:
        path.unlink()
    return path


def names(root: Path) -> list[str]:
    """Return the names of all derived models."""
    folder = root / _FOLDER
    return sorted(str(path.relative_to(folder)).removesuffix(_SUFFIX) for path in folder.rglob(f"*{_SUFFIX}"))


def _find(name: str, root: Path) -> Path | None:
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        return None
    path = path_of(name, root)
    return path if path.is_file() else None
