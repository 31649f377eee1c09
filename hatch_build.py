"""Builds the engine's CPU library (engine/octavo_engine/cpu/native) into the package, where a C++ compiler is.

Run by hatchling: for a wheel it builds all variants, for an editable install the one that this processor runs. Where
there is no compiler, or another system than Linux on x86-64, the wheel is the pure one: the engine then computes with
torch and says so.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

if TYPE_CHECKING:
    from types import ModuleType

PACKAGE = Path("engine/octavo_engine/cpu")


class CpuLibraryHook(BuildHookInterface):  # type: ignore[type-arg] # of the builder's configuration, not used here
    """Compiles every variant that is older than its sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build, and make the wheel one for this platform."""
        folder = Path(self.root) / PACKAGE
        compiler = find_compiler()
        if compiler is None:
            self.app.display_warning("no C++ compiler for Linux on x86-64: the wheel has no CPU kernel")
            return
        variants = load_variants(folder)
        chosen = variants.VARIANTS
        if version == "editable":
            best = variants.best_variant(variants.cpu_flags())
            chosen = (best,) if best else ()
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda variant: build(compiler, folder, variants, variant), chosen))
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"  # any Python, as the library knows none


def find_compiler() -> str | None:
    """The compiler to use; None where the library cannot be built."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    return shutil.which("g++") or shutil.which("c++")


def load_variants(folder: Path) -> ModuleType:
    """Import variants.py without the package, whose dependencies are not there while it is built."""
    spec = importlib.util.spec_from_file_location("octavo_cpu_variants", folder / "variants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def build(compiler: str, folder: Path, variants: ModuleType, variant: Any) -> None:
    """Compile one variant, unless it is there and newer than all it is made of."""
    target = folder / variant.file_name
    sources = [*(folder / "native").iterdir(), folder / "variants.py"]
    if target.exists() and target.stat().st_mtime > max(source.stat().st_mtime for source in sources):
        return
    partial = target.with_suffix(".so.new")
    command = [compiler, *variants.COMMON_FLAGS, *variant.flags, folder / variants.SOURCE, "-o", partial]
    subprocess.run(command, check=True)
    partial.replace(target)
