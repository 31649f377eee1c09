"""Fixtures for the tests of the CPU library: the one of this processor, and the 512-bit one in emulation."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import octavo_engine.cpu
from octavo_engine.cpu.library import best_library, open_library
from octavo_engine.cpu.variants import COMMON_FLAGS, SOURCE, VARIANTS

if TYPE_CHECKING:
    import ctypes


@pytest.fixture(scope="session")
def native() -> ctypes.CDLL:
    """The library that the engine takes on this machine; `make venv` builds it."""
    library = best_library()
    assert library is not None, "no library for this processor: install g++ and make venv"
    return library


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The code for 512-bit vectors, VNNI and bfloat16 products, with these computed by AVX2 instructions."""
    path = tmp_path_factory.mktemp("emulated") / "octavo_cpu_emulated.so"
    avx2 = next(variant for variant in VARIANTS if variant.name == "avx2")
    flags = [*COMMON_FLAGS, "-O1", "-Wno-psabi", *avx2.flags, "-DOCTAVO_EMULATE_512"]
    subprocess.run(["g++", *flags, Path(octavo_engine.cpu.__path__[0]) / SOURCE, "-o", path], check=True)
    return open_library(path)


@pytest.fixture(params=["native", "emulated"])
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """Each of them."""
    library: ctypes.CDLL = request.getfixturevalue(request.param)
    return library
