from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest

from octavo_engine.errors import ModelNotFound
from octavo_engine.store import local
from octavo_engine.store.blobs import Blobs

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.engine.store.conftest import ModelServer

    Fetch = Callable[..., list[int]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with two models."""
    root = tmp_path / "store"
    for place in (local.CATALOGUE["smollm2"].file, "hf/org/repo/main/other.gguf"):
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"GGUF")
    return root


def test_a_model_is_found_by_short_name_by_place_and_by_path(root: Path) -> None:
    smollm2 = root / local.CATALOGUE["smollm2"].file
    assert local.locate("smollm2", root).path == smollm2
    assert local.locate("smollm2", root).name == "smollm2"
    assert local.locate(smollm2.stem, root).path == smollm2
    assert local.locate(str(smollm2), root / "elsewhere").path == smollm2
    assert local.locate("hf/org/repo/main/other", root).name == "other"
    assert local.locate("hf://org/repo:other.gguf", root).is_missing is False


def test_a_folder_with_a_config_is_a_model_of_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    (folder / "config.json").touch()
    location = local.locate(str(folder), tmp_path)
    assert (location.name, location.path, location.is_missing) == ("tiny-llama", folder, False)


def test_a_folder_of_the_parts_of_one_model_is_that_model(tmp_path: Path) -> None:
    parts = [tmp_path / f"big-0000{number}-of-00002.gguf" for number in (1, 2)]
    for part in parts:
        part.touch()
    location = local.locate(str(tmp_path), tmp_path / "store")
    assert (location.name, location.model) == (tmp_path.name, parts[0])
    (tmp_path / "another.gguf").touch()
    with pytest.raises(ModelNotFound, match=r"give one file: another\.gguf, big-"):
        local.locate(str(tmp_path), tmp_path / "store")


def test_what_has_a_source_may_be_missing_and_then_has_a_place_to_go(tmp_path: Path) -> None:
    for model in ("smollm2", "hf://org/repo:other.gguf"):
        location = local.locate(model, tmp_path)
        assert location.is_missing
        assert location.source is not None
        assert location.path.is_relative_to(tmp_path)


def test_a_model_that_is_not_there_is_told_with_what_is(root: Path) -> None:
    with pytest.raises(ModelNotFound, match="known names: hf/org/repo/main/other, smollm2"):
        local.locate("no name", root)
    with pytest.raises(ModelNotFound, match=r"mistyped.gguf is not there; in .*: SmolLM2.*\.gguf"):
        local.locate(str(root / "mistyped.gguf"), root)
    with pytest.raises(ModelNotFound, match=r"is a folder without config\.json; give one file: SmolLM2"):
        local.locate(str(root), root)
    with pytest.raises(ModelNotFound, match="there is no folder"):
        local.locate(str(root / "no" / "folder.gguf"), root)


def test_the_list_has_names_that_locate_understands(root: Path) -> None:
    models = local.list_models(root)
    assert [model.name for model in models] == ["hf/org/repo/main/other", "smollm2"]
    assert [local.locate(model.name, root).path for model in models] == [model.path for model in models]
    assert models[0].num_bytes == 4
    assert local.list_models(root / "empty") == []


def test_a_removed_model_takes_its_empty_folders_along_and_no_others(root: Path) -> None:
    local.remove("hf/org/repo/main/other", root)
    assert [path.name for path in root.iterdir()] == [local.CATALOGUE["smollm2"].file]
    with pytest.raises(ModelNotFound, match="octavo list"):
        local.remove("hf://org/repo:other.gguf", root)


def test_files_outside_the_store_are_never_removed(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "mine.gguf"
    outside.write_bytes(b"GGUF")
    for name in (str(outside), "../mine", "../mine.gguf"):
        with pytest.raises(ModelNotFound):
            local.remove(name, root)
    assert outside.exists()


def test_the_store_is_where_xdg_says(tmp_path: Path) -> None:
    assert local.default_root({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "octavo" / "models"
    assert local.default_root({"HOME": str(tmp_path)}) == tmp_path / ".cache" / "octavo" / "models"


@pytest.mark.model
def test_the_catalogue_has_the_digest_of_the_demo_model(smollm2_path: Path) -> None:
    with smollm2_path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == local.CATALOGUE["smollm2"].sha256


def test_a_pulled_file_is_a_link_to_a_blob_and_goes_with_it(
    fetch: Fetch, server: ModelServer, tmp_path: Path, content: bytes, sha256: str
) -> None:
    store = tmp_path / "store"
    place = store / "hf/org/repo/main/model.gguf"
    fetch(place, store=store)
    assert place.read_bytes() == content
    assert place.resolve() == store / "blobs" / f"sha256-{sha256}"
    assert list((store / "partial").iterdir()) == []
    assert [(model.name, model.num_bytes) for model in local.list_models(store)] == [
        ("hf/org/repo/main/model", len(content))
    ]
    again = store / "again.gguf"
    fetch(again, store=store, sha256=sha256)
    assert len(server.fetched_ranges()) == 1  # its blob was there
    local.remove("again", store)
    assert place.read_bytes() == content
    local.remove("hf/org/repo/main/model", store)
    assert list((store / "blobs").iterdir()) == []


def test_two_pulls_into_one_store_fetch_a_file_once(
    fetch: Fetch, server: ModelServer, tmp_path: Path, content: bytes
) -> None:
    place = tmp_path / "store" / "model.gguf"
    fetch(place, store=tmp_path / "store", num_pulls=2, sha256=hashlib.sha256(content).hexdigest())
    assert place.read_bytes() == content
    assert len(server.fetched_ranges()) == 1


def test_a_folder_appears_whole_and_is_listed_under_its_short_name(tmp_path: Path) -> None:
    blobs, place = Blobs(tmp_path), tmp_path / "ollama/registry.ollama.ai/library/llama3.2@latest"
    for text in ("GGUF", "other"):
        blobs.partial("new").write_text(text)
        blobs.adopt(blobs.partial("new"), hashlib.sha256(text.encode()).hexdigest())
    digest = hashlib.sha256(b"GGUF").hexdigest()
    for _ in range(2):  # another process may have been faster
        blobs.link_folder(place, {PurePosixPath("model.gguf"): digest}, {"Modelfile": "FROM ./model.gguf\nSYSTEM Hi\n"})
    location = local.locate("llama3.2", tmp_path)
    assert location.model == place / "model.gguf"
    assert location.modelfile is not None
    assert (location.modelfile.system, location.name) == ("Hi", "llama3.2")
    assert location.modelfile.source == "ollama://registry.ollama.ai/library/llama3.2:latest"
    assert [model.name for model in local.list_models(tmp_path)] == ["llama3.2"]
    local.remove("llama3.2:latest", tmp_path)
    assert [path.read_text() for path in (tmp_path / "blobs").iterdir()] == ["other"]  # which was not its own


def test_files_of_an_older_version_of_the_store_stay_what_they_were(root: Path) -> None:
    assert not (root / "hf/org/repo/main/other.gguf").is_symlink()
    assert local.locate("hf://org/repo:other.gguf", root).model == root / "hf/org/repo/main/other.gguf"


def test_a_split_model_is_one_line_of_the_list_and_goes_as_one(tmp_path: Path) -> None:
    for part in (1, 2):
        (tmp_path / f"m-0000{part}-of-00002.gguf").write_bytes(b"GGUF")
    assert [(model.name, model.num_bytes) for model in local.list_models(tmp_path)] == [("m-00001-of-00002", 8)]
    local.remove("m-00001-of-00002", tmp_path)
    assert list(tmp_path.iterdir()) == []
