"""`python -m octavo_bench.scheduling`: what one step costs the scheduler, by the number of running requests.

32 run on a CPU by default, 1,024 on a GPU, and each number is measured with its device's block size. Requests of 37 to
44 tokens decode against a runner that answers at once. Printed is the processor time of the thread,
which other programs disturb less than the time on the wall; the least of ten rounds, as what the code itself needs.
"""

from __future__ import annotations

import time

from octavo_engine.messages import AddRequest
from octavo_engine.plan import RequestResult, SamplingParams, StepResult
from octavo_engine.scheduler import Scheduler
from octavo_engine.sizing import BLOCK_SIZES

# ruff: noqa: T201 - printing is what this is for

_ROUNDS = 10
_REQUEST_STEPS_A_ROUND = 100_000


def main() -> None:
    """Measure at 32 and at 1,024 running requests."""
    for num_running, device in ((32, "cpu"), (1024, "cuda")):
        schedule, update = measure(num_running, BLOCK_SIZES[device])
        print(
            f"{num_running:5} running: {1 / schedule:7,.0f} schedule() calls/s; "
            f"schedule and update {(schedule + update) * 1e3:.3f} ms a step"
        )


def measure(num_running: int, block_size: int) -> tuple[float, float]:
    """Seconds of one schedule() and of one update()."""
    scheduler = Scheduler(
        num_blocks=4000 // block_size * num_running,
        block_size=block_size,
        max_model_len=4000,
        max_num_seqs=num_running,
        max_num_batched_tokens=64 * num_running,
        eos_token_ids=frozenset({0}),
    )
    sampling = SamplingParams(max_tokens=3900, ignore_eos=True)
    for number in range(num_running):
        prompt = (number, *range(36 + number % 8))
        scheduler.add(AddRequest(request_id=f"chatcmpl-{number:032x}", prompt_token_ids=prompt, sampling=sampling))
    step(scheduler)  # computes all prompts
    num_steps = _REQUEST_STEPS_A_ROUND // num_running // _ROUNDS
    rounds = []
    for _ in range(_ROUNDS):
        times = [step(scheduler) for _ in range(num_steps)]
        rounds.append((sum(s for s, _ in times) / num_steps, sum(u for _, u in times) / num_steps))
    return min(rounds, key=sum)


def step(scheduler: Scheduler) -> tuple[float, float]:
    """One step; the seconds that schedule() and update() took."""
    start = time.thread_time()
    plan = scheduler.schedule()
    scheduled = time.thread_time()
    assert plan is not None
    num_results = sum(request.needs_token for request in plan.requests)
    result = StepResult(plan.step, (RequestResult(token_id=5),) * num_results)
    computed = time.thread_time()
    scheduler.update(plan, result)
    return scheduled - start, time.thread_time() - computed


if __name__ == "__main__":
    main()
