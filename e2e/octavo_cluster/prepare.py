"""Everything that is costly to make, made side by side: compilers use the processor while images wait for networks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from octavo_cluster import backend, binaries, images, model, packages

if TYPE_CHECKING:
    from octavo_cluster.recipe import Image


def build_images() -> tuple[Image, Image]:
    """Build both of Octavo's images, operator first, unless they are there."""
    return images.build(images.operator()), images.build(images.engine())


def everything() -> tuple[Image, Image]:
    """Make programs, images and model available; returns the operator's and the engine's image.

    Raises:
        HarnessError: what failed first; what runs beside it is brought to its end before.
    """
    docker = backend.docker_answers()
    if not docker:
        packages.ensure()
    with ThreadPoolExecutor(max_workers=2) as pool:
        programs = pool.submit(binaries.ensure, binaries.CLIENTS if docker else binaries.WHOLE_CLUSTER)
        built = pool.submit(build_images)
        model.demo_model()
        programs.result()
        return built.result()
