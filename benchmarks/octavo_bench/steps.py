"""`python -m octavo_bench.steps`: what one step of the C++ decoder costs, and in which phases, without a server.

The demo model in each way of computing, with all cores: a token each for 1, 8 and 32 sequences of 200 tokens, and a
prompt of 256. Printed is the fastest of several steps with the milliseconds of its phases; what they lack is Python's.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, get_args

from msgspec.structs import replace

from octavo_cluster.model import demo_model
from octavo_engine import resources
from octavo_engine.cpu.compute import Compute
from octavo_engine.cpu.decoder import CpuDecoder
from octavo_engine.cpu.library import best_library
from octavo_engine.models.checkpoint import read_checkpoint
from octavo_engine.plan import SamplingParams, ScheduledRequest, StepPlan
from octavo_engine.weights.stored import WeightSource

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Iterator

    from octavo_engine.plan import StepResult

# ruff: noqa: T201 - printing is what this is for

_TRIES: Final = 8
_CONTEXT: Final = 200  # tokens that a decoding sequence holds
_BLOCK_SIZE: Final = 8
_BLOCKS_EACH: Final = 33  # of a sequence, or of the prompt
_MAX_SEQUENCES: Final = 32


def main() -> None:
    """Measure and print."""
    library = best_library()
    if library is None:
        raise SystemExit("steps: the C++ library was not built here")
    for compute in get_args(Compute):
        decoder = _load(library, compute)
        print(f"{compute}: {decoder.weight_bytes / 1e6:.0f} MB of weights")
        for num_sequences in (1, 8, 32):
            plan = decodes(num_sequences, context=_CONTEXT, block_size=_BLOCK_SIZE)
            _print(f"{num_sequences} sequences", *fastest(decoder, plan))
        _print("prompt of 256", *fastest(decoder, _prompt(256)))


def fastest(decoder: CpuDecoder, plan: StepPlan) -> tuple[float, dict[str, float]]:
    """Seconds of the fastest of several steps, and of its phases."""
    tries = []
    for _ in range(_TRIES):
        before, started = decoder.phase_seconds(), time.perf_counter()
        decoder.forward(plan)
        seconds = time.perf_counter() - started
        tries.append((seconds, {phase: after - before[phase] for phase, after in decoder.phase_seconds().items()}))
    return min(tries, key=lambda one: one[0])


def _load(library: ctypes.CDLL, compute: Compute) -> CpuDecoder:
    checkpoint = read_checkpoint(demo_model())
    return CpuDecoder(
        library,
        checkpoint.spec,
        WeightSource(checkpoint, on_progress=lambda *_: None),
        compute=compute,
        num_positions=2048,
        num_blocks=_MAX_SEQUENCES * _BLOCKS_EACH,
        block_size=_BLOCK_SIZE,
        num_threads=resources.num_threads(),
    )


def decodes(num_sequences: int, *, context: int, block_size: int, num_steps: int = 1) -> StepPlan:
    """A step that brings each of some sequences, which hold `context` tokens, a further one; with blocks for more."""
    width = (context + num_steps - 1) // block_size + 1
    requests = [
        _request(number, (1000 + number,), context, range(number * width, (number + 1) * width))
        for number in range(num_sequences)
    ]
    return StepPlan(0, tuple(requests))


def prompts(plan: StepPlan) -> Iterator[StepPlan]:
    """Steps that compute what the sequences of one of `decodes` hold, one after the other."""
    for request in plan.requests:
        token_ids = tuple(range(1000, 1000 + request.num_computed_tokens))
        yield StepPlan(plan.step, (replace(request, token_ids=token_ids, num_computed_tokens=0),))


def after(plan: StepPlan, result: StepResult) -> StepPlan:
    """The step that follows one of `decodes`."""
    requests = [
        replace(request, token_ids=(one.token_id,), num_computed_tokens=request.num_computed_tokens + 1)
        for request, one in zip(plan.requests, result.results, strict=True)
    ]
    return StepPlan(plan.step + 1, tuple(requests))


def _prompt(num_tokens: int) -> StepPlan:
    token_ids = tuple(range(1000, 1000 + num_tokens))
    return StepPlan(0, (_request(0, token_ids, 0, range(num_tokens // _BLOCK_SIZE + 1)),))


def _request(number: int, token_ids: tuple[int, ...], num_before: int, blocks: range) -> ScheduledRequest:
    sampling = SamplingParams(max_tokens=2**20, temperature=0.0)
    return ScheduledRequest(str(number), token_ids, num_before, tuple(blocks), needs_token=True, sampling=sampling)


def _print(what: str, seconds: float, phases: dict[str, float]) -> None:
    parts = ", ".join(f"{phase} {1e3 * spent:.1f}" for phase, spent in phases.items())
    print(f"  {what:14} {1e3 * seconds:6.1f} ms: {parts}")


if __name__ == "__main__":
    main()
