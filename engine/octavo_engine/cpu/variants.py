"""The libraries that are built from native/, one for each kind of processor, best first. Standard library only.

Read by the build hook (hatch_build.py), by path and without the package, and by library.py.

Each is compiled whole for its processors and only the right one is ever loaded. One library with all variants inside
would be one file, but then the linker keeps a single copy of every inline function of the C++ standard library, from
whichever variant: a processor would meet instructions that it does not have.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SOURCE: Final = "native/library.cpp"  # includes all others

# No -ffast-math: the order of sums is part of the results. No contraction, for the same reason: fused operations stand
# in the source. The warning is wrong about GCC's own header (PR 105593).
COMMON_FLAGS: Final = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
)


@dataclass(frozen=True, slots=True)
class Variant:
    """One library."""

    name: str
    needs: frozenset[str]  # flags of the processor, as /proc/cpuinfo has them
    flags: tuple[str, ...]  # for the compiler

    @property
    def file_name(self) -> str:
        """Of the library, in the package's folder."""
        return f"octavo_cpu_{self.name}.so"


_AVX2: Final = Variant("avx2", frozenset({"avx2", "fma", "f16c"}), ("-mavx2", "-mfma", "-mf16c"))
_AVX_VNNI: Final = Variant("avx_vnni", _AVX2.needs | {"avx_vnni"}, (*_AVX2.flags, "-mavxvnni"))
_AVX512: Final = Variant(
    "avx512",
    _AVX2.needs | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
    (*_AVX2.flags, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512"),
)
_AVX512_BF16: Final = Variant("avx512_bf16", _AVX512.needs | {"avx512_bf16"}, (*_AVX512.flags, "-mavx512bf16"))

VARIANTS: Final = (_AVX512_BF16, _AVX512, _AVX_VNNI, _AVX2)


def best_variant(flags: frozenset[str]) -> Variant | None:
    """The first variant that a processor with these flags runs."""
    return next((variant for variant in VARIANTS if variant.needs <= flags), None)


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the processor and the kernel can do; nothing known if this is no Linux on x86-64."""
    if platform.machine() != "x86_64" or not cpuinfo.exists():
        return frozenset()
    for line in cpuinfo.read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()
