"""Every kernel compiles for every GPU there is a target for, without one: no spills, and shared memory that exists.

`make test-kernels` builds all variants that launchers can ask for. CI builds one of each kernel for two targets, so
that every target has some, and one of attention for all.
"""

from __future__ import annotations

import random
import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from octavo_engine.kernels.attention import ATTEND
from octavo_engine.kernels.catalogue import KERNELS
from octavo_engine.kernels.launch import TARGETS, Kernel, Target, Variant

if TYPE_CHECKING:
    from pathlib import Path

MAX_TENSOR_MEMORY = 512  # columns, on sm_100
ALL_TARGETS = list(TARGETS.values())
IN_CI = [
    (kernel, target)
    for number, kernel in enumerate(KERNELS)
    for place, target in enumerate(ALL_TARGETS)
    if kernel is ATTEND or (place - number) % len(ALL_TARGETS) in (0, 2)
]

every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: f"sm_{target.capability}")


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a variant needs on a target."""

    registers: int  # of a thread
    spilled_bytes: int  # of a thread, and whatever else it keeps in local memory
    shared_bytes: int  # of a thread block
    tensor_memory: int  # columns


def compiled(kernel: Kernel, variant: Variant, target: Target, folder: Path) -> Compiled:
    """Compile for a target, and read what the machine code needs out of it."""
    constants, types = dict(variant.constants), iter(variant.types)
    signature = {name: "constexpr" if name in constants else next(types) for name in kernel.function.arg_names}
    assert not list(types)
    attributes = {
        (index,): [["tt.divisibility", 16]] for index, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    program = triton.compile(
        ASTSource(kernel.function, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", target.capability, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(program.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    metadata = program.metadata
    return Compiled(numbers["REG"], numbers["STACK"] + numbers["LOCAL"], metadata.shared, metadata.tmem_size or 0)


def complaints(kernel: Kernel, variant: Variant, target: Target, folder: Path) -> list[str]:
    """What is wrong with a variant."""
    what = compiled(kernel, variant, target, folder)
    named = f"{kernel.name} for sm_{target.capability}, {variant}: {what}"
    wrong = what.spilled_bytes > 0 or what.shared_bytes > target.shared_bytes or what.tensor_memory > MAX_TENSOR_MEMORY
    return [named] if wrong else []


@pytest.mark.parametrize(
    ("kernel", "target"), IN_CI, ids=[f"{kernel.name}-sm_{target.capability}" for kernel, target in IN_CI]
)
def test_a_variant_compiles_without_spills(kernel: Kernel, target: Target, tmp_path: Path) -> None:
    variants = sorted(kernel.variants(target), key=repr)
    variant = random.Random(target.capability).choice(variants)  # noqa: S311 - a choice that is always the same
    assert complaints(kernel, variant, target, tmp_path) == []


@pytest.mark.kernels
@pytest.mark.timeout(7200)
@every_kernel
@every_target
def test_all_variants_compile_without_spills(kernel: Kernel, target: Target, tmp_path: Path) -> None:
    variants = sorted(kernel.variants(target), key=repr)
    assert [each for variant in variants for each in complaints(kernel, variant, target, tmp_path)] == []


@every_kernel
@every_target
def test_e4m3_is_only_asked_of_targets_that_have_it(kernel: Kernel, target: Target) -> None:
    types = {kind for variant in kernel.variants(target) for kind in variant.types}
    assert target.has_fp8 or "*fp8e4nv" not in types


@triton.jit
def _spills(out, n, BLOCK: triton.language.constexpr):
    """Keeps more numbers than a thread has registers."""
    places = triton.language.arange(0, BLOCK)
    first = triton.language.load(out + places)
    second = triton.language.load(out + BLOCK + places)
    for _ in range(n):
        first, second = first * second + n, second * first + 1
    triton.language.store(out + places, first + second)


def test_a_spill_is_seen(tmp_path: Path) -> None:
    variant = Variant(("*fp32", "i32"), (("BLOCK", 8192),), num_warps=1)
    kernel = Kernel(_spills, lambda _: [variant])
    assert compiled(kernel, variant, TARGETS[80], tmp_path).spilled_bytes > 0
    assert complaints(kernel, variant, TARGETS[80], tmp_path)
