# ruff: noqa: INP001 - a script that nobody imports
"""Writes docs/kernels.md: what each GPU kernel moves and computes, how fast it should be, and what is proven of it.

    python docs/generate_kernels.py           writes it
    python docs/generate_kernels.py --check   only compares

Run by `make generate` and, with --check, by tests/engine/kernels/test_catalogue.py.
"""

from __future__ import annotations

import argparse
import ast
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from octavo_engine import kernels
from octavo_engine.kernels import (
    activation,
    attention,
    cache,
    lora,
    matmul,
    matmul_fp8,
    matmul_gguf,
    matmul_packed,
    norm,
    rotary,
    sampling,
)
from octavo_engine.kernels.catalogue import KERNELS
from octavo_engine.kernels.launch import TARGETS, Kernel, ceil_div
from octavo_engine.kernels.suite import LAUNCHED
from octavo_engine.weights.quant_type import QuantType

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE: Final = Path(__file__).with_name("kernels.md")
ENGINE: Final = Path(__file__).parents[1] / "engine"
COMMAND: Final = "python docs/generate_kernels.py"
BATCHES: Final = (1, 32, 256)

# Llama-3.1-8B, from its config.json.
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MIDDLE, VOCABULARY = 4096, 32, 32, 8, 128, 14336, 128_256
CONTEXT: Final = 1024  # tokens of each request
PRODUCTS: Final = (
    (HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
    (HEADS * HEAD_DIM, HIDDEN),
    (HIDDEN, 2 * MIDDLE),
    (MIDDLE, HIDDEN),
)

# An H100 SXM, from its data sheet: HBM3, dense tensor cores; and its instructions, 128 a cycle of each multiprocessor.
BANDWIDTH, BF16, FP8, PROCESSORS, INSTRUCTIONS = 3.35e12, 989e12, 1979e12, 132, 132 * 128 * 1.755e9

# What the prediction assumes.
REACHED: Final = 0.9  # of the bandwidth by a grid that fills the GPU
UNDER_WAY: Final = 2.3e6  # bytes that must be under way for that: the bandwidth times 0.7 us of latency
START: Final = 2e-6  # seconds that a launch in a CUDA graph takes beside its work

KNOWN: Final = ", ".join(f"{capability // 10}.{capability % 10}" for capability in TARGETS)
HEAD_DIMS: Final = ", ".join(map(str, attention.HEAD_DIMS))
BLOCK_SIZES: Final = " or ".join(map(str, attention.BLOCK_SIZES))

HEAD: Final = f"""\
# GPU kernels

Written by `{COMMAND}` from the kernels themselves. They are in Triton, in
engine/octavo_engine/kernels/; each has a twin in plain torch beside it. How steps run on a GPU is in [gpu.md](gpu.md).

## What is proven, and what waits for a device

No GPU was there when these were written: none of them has run on one. What can be shown without one is shown by tests:

- **Numbers**: each kernel equals its twin in Triton's interpreter, over shapes and dtypes, within the bound given. Its
  rounding and bfloat16 products are replaced by a device's there (tests/engine/kernels/interpreted/conftest.py).
- **Code**: launchers can only ask for a listed variant of a kernel (kernels/launch.py). They are
  compiled for compute capabilities {KNOWN}; a test fails where registers are spilled or more shared
  memory is needed than the GPU has, both read out of the machine code. CI builds some of them, `make test-kernels` all.
- **Waits for a device**: that the machine code does what the interpreter does, and every figure of speed below.
  `make gpu-acceptance` (benchmarks/gpu_acceptance.py) runs the same tests on a GPU, those of tensor parallelism over
  NCCL, the work of nano-vllm's benchmark and decodes against the roofline, and writes a report. CI runs it with
  `--dry-run`, in the interpreter.

| kernel | does | proven: equals its twin within | variants, which CI compiles some of | launched by | waits |
|---|---|---|---|---|---|
"""

MIDDLE_PART: Final = f"""
FP8 (e4m3) is multiplied by tensor cores from 8.9 on; on 8.0 and 8.6 the codes of inputs and weights are decoded to
float16 and multiplied so, the same numbers at half the rate. An FP8 KV cache is decoded by integer arithmetic on all.
Head sizes are {HEAD_DIMS} and blocks {BLOCK_SIZES} slots; others are refused by name.
With `--dtype float32` attention is reference.py's on a GPU too: what it promises of float32 no kernel here does.

## What an H100 should make of them

Decoding with Llama-3.1-8B in bfloat16: one token for each request, {CONTEXT} tokens of context. Bytes and FLOPs are of
one layer at batch 32 (sampling: of the step); intensity is FLOPs per byte. The roofline is the larger of bytes over
3.35 TB/s and FLOPs over 989 TFLOP/s (FP8: 1979). The share of it is predicted, before any measurement, from four
assumptions: a launch costs {START * 1e6:.0f} us besides its work; a full grid reaches {REACHED:.0%} of the bandwidth,
and one with less than {UNDER_WAY / 1e6:.1f} MB of loads under way proportionally less; unpacking costs 7 to 12
instructions a weight, for each tile of rows; loads and computation overlap. The small kernels are all launch: they are
there to be few, not to be fast.

| kernel | bytes | FLOPs | intensity | batch 1 | batch 32 | batch 256 |
|---|---|---|---|---|---|---|
"""

TAIL: Final = """
## Where they are weak, to be looked at first on a device

- Unpacking 4-bit weights is bound by instructions from the first row on, and is repeated for each tile of 64 rows. Past
  a few hundred rows dequantising once and multiplying in bfloat16 would be faster; there is no switch for it yet.
- The matrix products use plain loads, not TMA, and no warp specialisation: for large prefills expect less than a vendor
  library gives on Hopper. Unquantised products are torch's (cuBLAS) for that reason.
- In a CUDA graph attention is cut into as many parts as the longest context asks for, whatever the contexts at hand:
  with short ones most parts are empty, and cost their launch.
- Sampling is one program a row: a batch of one uses one multiprocessor, and top-p reads its row some 70 times, from L2.
"""


@dataclass(frozen=True, slots=True)
class Work:
    """What one launch does."""

    num_bytes: float
    flops: float
    programs: int
    loading: float  # bytes that one program has under way
    peak: float = BF16
    instructions: float = 0.0  # besides those of tensor cores

    def seconds(self) -> float:
        """As predicted."""
        resident = min(self.programs, PROCESSORS * 8)
        reached = BANDWIDTH * min(REACHED, resident * self.loading / UNDER_WAY)
        computing = max(self.flops / self.peak, self.instructions / INSTRUCTIONS)
        return START + max(self.num_bytes / reached, computing)

    def roofline(self) -> float:
        """Seconds that nothing can beat."""
        return max(self.num_bytes / BANDWIDTH, self.flops / self.peak)


@dataclass(frozen=True, slots=True)
class Entry:
    """A kernel on the page."""

    kernel: Kernel
    does: str
    bound: str


ULP: Final = "1 ulp of the output"
SUMS: Final = "2 ulp of the largest output"
ENTRIES: Final = (
    Entry(cache.STORE_KV, "KV of a step to its slots, as it is or in e4m3", "bit for bit"),
    Entry(norm.ADD_RMS_NORM, "adds to the residual, and RMSNorm of it", ULP),
    Entry(norm.RMS_NORM, "RMSNorm of rows or of every head", ULP),
    Entry(rotary.ROTATE, "rotary embedding in place, from the tables of every scaling", "bit for bit"),
    Entry(activation.GATE_AND_MUL, "SiLU or GELU of the gate, times up", ULP),
    Entry(
        attention.ATTEND,
        "paged attention, prefills and decodes in one: GQA, window, soft cap, e4m3 cache",
        "4 ulp of 1",
    ),
    Entry(attention.COMBINE, "joins the parts of tiles that were cut along their keys", "4 ulp of 1, with attend"),
    Entry(matmul_packed.MULTIPLY_PACKED, "GPTQ and AWQ: 4 and 8 bits, groups, act-order", SUMS),
    Entry(matmul_fp8.QUANTIZE_ROWS, "activations to e4m3, one scale or one a row", "bit for bit"),
    Entry(matmul_fp8.QUANTIZE_GROUPS, "activations to e4m3, a scale for 128", "bit for bit"),
    Entry(matmul_fp8.MULTIPLY_FP8, "e4m3 times e4m3: scales of tensors, channels, blocks", SUMS),
    Entry(matmul_gguf.MULTIPLY_GGUF, "Q4_0, Q4_1, Q8_0, Q4_K, Q6_K as the file has them", SUMS),
    Entry(lora.REDUCE_RANK, "rows times the A of each one's LoRA adapter", f"{SUMS}, with add_expanded"),
    Entry(lora.ADD_EXPANDED, "adds that times B to the rows of a product", SUMS),
    Entry(sampling.SAMPLE, "temperature, min-p, top-k, top-p, a draw and its logprob", "the same tokens; 2e-5"),
)


def page() -> str:
    """The whole of docs/kernels.md."""
    assert {entry.kernel for entry in ENTRIES} == set(KERNELS), "every kernel is on the page"
    return HEAD + "".join(map(proof, ENTRIES)) + MIDDLE_PART + "".join(speed()) + TAIL


def proof(entry: Entry) -> str:
    """The line about what is proven."""
    counts = [len(entry.kernel.variants(target)) for target in TARGETS.values()]
    many = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    users = ", ".join(users_of(entry.kernel)) or "nothing yet"
    waits = "numbers and speed on a device" if users_of(entry.kernel) else "its place in the model, then a device"
    told = (f"`{entry.kernel.name}`", entry.does, entry.bound, f"{many} for each of {len(counts)}", users, waits)
    return f"| {' | '.join(told)} |\n"


@functools.cache
def importers() -> dict[str, list[str]]:
    """By module of a kernel: the files of the engine, outside kernels/, that import it or take it out of the suite."""
    package = f"{kernels.__name__}"
    found: dict[str, list[str]] = {}
    for path in sorted((ENGINE / "octavo_engine").rglob("*.py")):
        if path.parent.name == "kernels":
            continue
        name_in_package = str(path.relative_to(ENGINE / "octavo_engine"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self._kernels":
                launcher = getattr(LAUNCHED, node.attr, None)
                found.setdefault(getattr(launcher, "__module__", ""), []).append(name_in_package)
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(package):
                continue
            names = [f"{package}.{alias.name}" for alias in node.names] if node.module == package else [node.module]
            for name in names:
                found.setdefault(str(name), []).append(name_in_package)
    return found


def users_of(kernel: Kernel) -> list[str]:
    """The files that use the module of a kernel."""
    return list(dict.fromkeys(importers().get(kernel.function.__module__, [])))


def speed() -> Iterator[str]:
    """The lines about bytes, FLOPs and the roofline."""
    for name, works in table(32).items():
        num_bytes, flops = sum(work.num_bytes for work in works), sum(work.flops for work in works)
        shares = " | ".join(f"{share(table(batch)[name]):.0%}" for batch in BATCHES)
        yield f"| {name} | {amount(num_bytes)}B | {amount(flops)} | {flops / num_bytes:.2g} | {shares} |\n"


def share(works: list[Work]) -> float:
    """Of the roofline, over some launches one after the other."""
    return sum(work.roofline() for work in works) / sum(work.seconds() for work in works)


def table(batch: int) -> dict[str, list[Work]]:
    """The launches of one layer, or step, by kernel."""
    qkv = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    kv = KV_HEADS * HEAD_DIM
    chunk = 2.0 * 1024
    parts = attention.parts_for(batch * KV_HEADS, CONTEXT, PROCESSORS)
    tile = 2 * 64 * HEAD_DIM * 2.0  # keys and values of one step of the loop
    attended = batch * (CONTEXT * 2 * kv + 2 * HEADS * HEAD_DIM) * 2.0
    partial = batch * KV_HEADS * parts * attention.SMALL_ROWS * HEAD_DIM * 4.0 if parts > 1 else 0.0
    works = {
        "`store_kv`": [Work(batch * 2 * kv * 4.0, 0.0, batch, chunk)],
        "`add_rms_norm`": [Work(batch * HIDDEN * 12.0, batch * HIDDEN * 5.0, batch, HIDDEN * 6.0)],
        "`rms_norm`": [Work(batch * HIDDEN * 4.0, batch * HIDDEN * 4.0, batch, HIDDEN * 2.0)],
        "`rotate`": [Work(batch * (qkv - kv) * 4.0, batch * (qkv - kv) * 3.0, batch * 5, chunk)],
        "`gate_and_mul`": [Work(batch * MIDDLE * 6.0, batch * MIDDLE * 6.0, batch * ceil_div(MIDDLE, 1024), 2 * chunk)],
        "`attend`, with `combine`": [
            Work(attended + partial, 4.0 * batch * HEADS * HEAD_DIM * CONTEXT, batch * KV_HEADS * parts, 2 * tile),
            *([Work(2 * partial, 0.0, batch * KV_HEADS, 8192.0)] if parts > 1 else []),
        ],
    }
    works["`attend`, cache in e4m3"] = [
        Work(attended / 2, 4.0 * batch * HEADS * HEAD_DIM * CONTEXT, batch * KV_HEADS * parts, tile)
    ]
    works["`multiply_packed`, 4 bits, groups of 128"] = [
        product(batch, shape, 0.5 + 3 / 128, 7, matmul_packed.MULTIPLY_PACKED, 64) for shape in PRODUCTS
    ]
    works["`quantize_rows`"] = [Work(batch * HIDDEN * 3.0, batch * HIDDEN * 3.0, batch, chunk)]
    works["`multiply_fp8`"] = [product(batch, shape, 1.0, 0, matmul_fp8.MULTIPLY_FP8, 128, FP8) for shape in PRODUCTS]
    for quant_type, instructions in (
        (QuantType.Q4_0, 8),
        (QuantType.Q8_0, 7),
        (QuantType.Q4_K, 9),
        (QuantType.Q6_K, 12),
    ):
        width = quant_type.block_bytes / quant_type.block_size
        works[f"`multiply_gguf`, {quant_type.name}"] = [
            product(batch, shape, width, instructions, matmul_gguf.MULTIPLY_GGUF, matmul_gguf.STEPS[quant_type])
            for shape in PRODUCTS
        ]
    works["`reduce_rank`, `add_expanded`: 4 adapters of rank 16"] = [
        work for shape in PRODUCTS for work in low_rank(batch, shape, min(batch, 4), 16)
    ]
    works["`sample`, temperature alone"] = [
        Work(
            batch * VOCABULARY * 4.0,
            batch * VOCABULARY * 30.0,
            batch,
            16384.0,
            INSTRUCTIONS,
            batch * VOCABULARY * 100.0,
        )
    ]
    return works


def low_rank(batch: int, shape: tuple[int, int], adapters: int, rank: int) -> list[Work]:
    """What adapters with equally many rows each add to one product."""
    features, columns = shape
    height = matmul.rows_for(ceil_div(batch, adapters))
    tiles = adapters * ceil_div(batch // adapters, height)
    parts = matmul.parts_for(tiles, features // 64, PROCESSORS)
    reduced = parts * tiles * height * rank * 4.0
    flops = 2.0 * tiles * height * rank
    return [
        Work(
            (batch + adapters * rank) * features * 2.0 + reduced, flops * features, tiles * parts, 2 * 64 * rank * 2.0
        ),
        Work(
            reduced + (2 * batch + adapters * rank) * columns * 2.0,
            flops * columns,
            tiles * ceil_div(columns, 128),
            128.0 * rank * 2,
        ),
    ]


def product(  # noqa: PLR0917 - a line of the table
    batch: int, shape: tuple[int, int], width: float, instructions: int, kernel: Kernel, step: int, peak: float = BF16
) -> Work:
    """One product with weights of `width` bytes."""
    features, columns = shape
    height = matmul.rows_for(batch)
    tile_columns = next(iter(kernel.variants(TARGETS[90])))["COLUMNS"]
    tiles = ceil_div(batch, height) * ceil_div(columns, tile_columns)
    parts = matmul.parts_for(tiles, features // step, PROCESSORS)
    num_bytes = features * columns * width + batch * (features + columns * (1 if parts == 1 else 4 * parts)) * 2.0
    unpacking = float(features * columns * ceil_div(batch, height) * instructions)
    loading = 2 * step * tile_columns * width
    return Work(num_bytes, 2.0 * batch * features * columns, tiles * parts, loading, peak, unpacking)


def amount(number: float) -> str:
    """Three digits and a prefix."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g} "


def main() -> None:
    """Write or compare; 1 when the page is out of date."""
    arguments = argparse.ArgumentParser(description="Writes docs/kernels.md.")
    arguments.add_argument("--check", action="store_true", help="only compare")
    text = page()
    if not arguments.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit(f"{PAGE.name} is out of date: run {COMMAND}")


if __name__ == "__main__":
    main()
