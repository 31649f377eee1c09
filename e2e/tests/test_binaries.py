"""The cluster's programs: which are meant, and where they come from."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from octavo_cluster import binaries, paths
from octavo_cluster.errors import PrerequisiteMissing

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A copy of the programs' sources."""
    return shutil.copytree(paths.TOOLS, tmp_path / "tools")


def test_the_folder_of_programs_is_named_after_their_sources(tools: Path) -> None:
    assert binaries.sources_hash(tools) == binaries.sources_hash()


@pytest.mark.parametrize("name", ["go.mod", "go.sum", "pause/main.go", "coredns/main.go"])
def test_a_change_of_any_source_means_other_programs(tools: Path, name: str) -> None:
    with (tools / name).open("a") as file:
        file.write("\n// changed\n")
    assert binaries.sources_hash(tools) != binaries.sources_hash()


def test_every_program_is_a_tool_of_the_module(tools: Path) -> None:
    module = (tools / "go.mod").read_text()
    for package in binaries.PACKAGES.values():
        assert (tools / package).is_dir() if package.startswith("./") else f"\t{package}\n" in module


def test_the_programs_versions_are_those_of_the_module(tools: Path) -> None:
    assert f"k8s.io/kubernetes {binaries.KUBERNETES} " in (tools / "go.mod").read_text()


def test_kubebuilder_assets_go_before_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in binaries.API_SERVER:
        (tmp_path / name).touch()
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    assert binaries.ensure_for_api_server() == {name: tmp_path / name for name in binaries.API_SERVER}


def test_kubebuilder_assets_without_an_api_server_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "etcd").touch()
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    with pytest.raises(PrerequisiteMissing, match=r"KUBEBUILDER_ASSETS.*correct it or unset it"):
        binaries.ensure_for_api_server()


def test_without_go_and_without_programs_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PrerequisiteMissing, match="install Go"):
        binaries.ensure(["pause"])
