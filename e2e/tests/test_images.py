"""Images: what decides whether one is built, and by which command lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from octavo_cluster import buildah, images, paths
from octavo_cluster.recipe import CERTIFICATES, Image, Recipe

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with one source, one file that is no part of an image, and a cache."""
    (tmp_path / ".dockerignore").write_text("*\n!engine\n!pyproject.toml\n**/__pycache__\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "notes.txt").write_text("not in the image\n")
    (tmp_path / "engine" / "__pycache__").mkdir(parents=True)
    (tmp_path / "engine" / "main.py").write_text("print()\n")
    (tmp_path / "engine" / "__pycache__" / "main.pyc").write_bytes(b"")
    return tmp_path


def test_an_image_is_built_from_what_dockerignore_allows(checkout: Path) -> None:
    names = [str(file.relative_to(checkout)) for file in images.context_files(checkout)]
    assert names == ["engine/main.py", "pyproject.toml"]


def test_the_tag_follows_contents_names_and_arguments(checkout: Path) -> None:
    files = images.context_files(checkout)
    first = images.content_hash(files, ["BASE=a"])
    assert images.content_hash(files, ["BASE=a"]) == first
    assert images.content_hash(files, ["BASE=b"]) != first
    (checkout / "engine" / "main.py").write_text("print(1)\n")
    changed = images.content_hash(files, ["BASE=a"])
    assert changed != first
    (checkout / "engine" / "main.py").rename(checkout / "engine" / "other.py")
    assert images.content_hash(images.context_files(checkout), ["BASE=a"]) not in {first, changed}


def test_both_images_share_what_they_are_built_from_but_have_tags_of_their_own() -> None:
    operator, engine = images.operator(), images.engine()
    assert operator.image.repository == "docker.io/octavo/operator"
    assert engine.image.repository == "docker.io/octavo/engine"
    assert operator.image.tag != engine.image.tag
    assert dict(operator.arguments)["VERSION"] == "0.1.0"


def test_the_engine_for_gpus_is_another_image_and_has_torch_from_the_index() -> None:
    cpu, cuda = images.engine(), images.engine("cuda")
    assert dict(cpu.arguments)["DEVICE"] == "cpu"
    assert dict(cuda.arguments)["DEVICE"] == "cuda"
    assert cpu.image.tag != cuda.image.tag
    assert cuda.wheels is None


@pytest.fixture
def recipe(checkout: Path) -> Recipe:
    return Recipe(
        image=Image("octavo/engine", "abc"),
        dockerfile=checkout / "Dockerfile",
        context=checkout,
        arguments=(("BASE", "debian"),),
        wheels=checkout / "wheels",
    )


def common_options(recipe: Recipe) -> list[str]:
    secret = ["--secret", f"id=ca,src={CERTIFICATES}"] if CERTIFICATES.exists() else []
    return [
        *("--file", str(recipe.dockerfile), "--tag", "docker.io/octavo/engine:abc", "--build-arg", "BASE=debian"),
        *secret,
        *("--build-context", f"wheels={recipe.wheels}"),
    ]


def test_docker_gets_the_dockerfile_the_base_the_certificates_and_the_wheels(recipe: Recipe) -> None:
    command = [str(word) for word in images.docker_command(recipe)]
    assert command == ["docker", "build", "--progress=plain", *common_options(recipe), str(recipe.context)]


def test_buildah_gets_the_same_and_leaves_its_mounts_in_a_namespace(recipe: Recipe) -> None:
    command = [str(word) for word in buildah.build_command(recipe)]
    assert command[:3] == ["unshare", "--mount", "--propagation=slave"]
    begin = command.index("build")
    assert command[begin:] == [
        *("build", "--layers", "--isolation=chroot", "--network=host"),
        *common_options(recipe),
        str(recipe.context),
    ]
    assert str(paths.cache_dir() / "buildah" / "layers") in command


def test_nothing_is_mounted_into_the_build_of_an_image_that_fetches_nothing(checkout: Path) -> None:
    recipe = Recipe(image=Image("octavo/pause", "abc"), dockerfile=checkout / "Dockerfile", context=checkout)
    assert "--secret" not in images.docker_command(recipe)
