"""The store's bytes: each file once, named by its SHA-256, and links to it in the places of the models that have it.

    blobs/sha256-DIGEST     a whole file; nothing else ever has such a name
    partial/...             what is on its way here, with its journals and locks
    adapters/...            folders of links: LoRA adapters that were uploaded, which derived models name

A place is a link (a model of one file) or a folder of links, which appears with all of them at once. Called by pull.py
and local.py.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path, PurePosixPath

_BLOBS: Final = "blobs"
_PARTIAL: Final = "partial"
ADAPTERS: Final = "adapters"
INTERNAL: Final = frozenset({_BLOBS, _PARTIAL, ADAPTERS})  # the folders in the store that hold no places
_BLOB_NAME: Final = re.compile(r"sha256-(?P<sha256>[0-9a-f]{64})")
_READ_ONLY: Final = 0o444


class Blobs:
    """The blobs of one store."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, sha256: str) -> Path:
        """Where a blob is, or would be."""
        return self._root / _BLOBS / f"sha256-{sha256}"

    def partial(self, key: str) -> Path:
        """Where a file is put together; its folder is made."""
        folder = self._root / _PARTIAL
        folder.mkdir(parents=True, exist_ok=True)
        return folder / key

    def adopt(self, whole: Path, sha256: str) -> None:
        """Make a blob of a file on the same disk, which is gone from where it was."""
        blob = self.path(sha256)
        blob.parent.mkdir(parents=True, exist_ok=True)
        whole.chmod(_READ_ONLY)
        whole.replace(blob)

    def link(self, place: Path, sha256: str) -> None:
        """Let `place` be this blob; whoever looks meanwhile sees nothing or the whole."""
        place.parent.mkdir(parents=True, exist_ok=True)
        new = self.partial(f"new-{secrets.token_hex(8)}")
        new.symlink_to(_relative(self.path(sha256), place))
        new.replace(place)

    def link_folder(
        self, place: Path, files: Mapping[PurePosixPath, str], texts: Mapping[str, str], *, replace: bool = False
    ) -> None:
        """Let `place` be a folder of these files by their digests, and of these texts, which appears as a whole.

        One that is there already stays, as another process was faster with the same, unless it is to be replaced.
        """
        place.parent.mkdir(parents=True, exist_ok=True)
        new = self.partial(f"new-{secrets.token_hex(8)}")
        for name, sha256 in files.items():
            link = new / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(_relative(self.path(sha256), place / name))
        for title, text in texts.items():
            (new / title).write_text(text, encoding="utf-8", newline="")
        if replace and place.exists():
            self.remove(place, keep=files.values())
            place.parent.mkdir(parents=True, exist_ok=True)
        try:
            new.rename(place)
        except OSError:
            shutil.rmtree(new)
            if not place.is_dir():
                raise

    def remove(self, place: Path, *, keep: Collection[str] = ()) -> None:
        """Delete a place, the folders that it leaves empty, and its blobs unless others or `keep` have them."""
        links = [place] if place.is_symlink() else [path for path in place.rglob("*") if path.is_symlink()]
        blobs = {path.resolve() for path in links} & set(self._all())
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink()
        for folder in place.parents:
            if folder == self._root or any(folder.iterdir()):
                break
            folder.rmdir()
        used = {path.resolve() for path in self._root.rglob("*") if path.is_symlink()}
        kept = {self.path(sha256).resolve() for sha256 in keep}
        for blob in blobs - used - kept:
            blob.unlink()

    def _all(self) -> list[Path]:
        return [path.resolve() for path in (self._root / _BLOBS).glob("sha256-*")]


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file: a blob's is its name."""
    if match := _BLOB_NAME.fullmatch(path.resolve().name):
        return match["sha256"]
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _relative(blob: Path, place: Path) -> str:
    return os.path.relpath(blob, place.parent)
