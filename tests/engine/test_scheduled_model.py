"""A real model, tiny and in float32, under the scheduler: what company, pressure and sharing must not change."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from octavo_engine.config import EngineConfig
from octavo_engine.messages import AddRequest
from octavo_engine.plan import SamplingParams
from octavo_engine.runner import load_runner
from octavo_engine.scheduler import Scheduler

if TYPE_CHECKING:
    from pathlib import Path

    from octavo_engine.messages import SchedulerStats
    from octavo_engine.plan import Runner

BLOCK_SIZE = 8
PROMPT = tuple(random.Random(5).choices(range(3, 96), k=60))  # noqa: S311 - test data


def run(
    runner: Runner, requests: list[AddRequest], **options: Any
) -> tuple[dict[tuple[str, int], list[int]], SchedulerStats, int]:
    """All tokens by request and choice, the last gauges, and how many blocks were copied."""
    defaults: dict[str, Any] = {"num_blocks": 60, "max_num_seqs": 16, "max_num_batched_tokens": 24}
    scheduler = Scheduler(block_size=BLOCK_SIZE, max_model_len=120, eos_token_ids=frozenset({2}), **defaults | options)
    tokens: dict[tuple[str, int], list[int]] = {}
    num_copies = 0
    arrivals = iter(requests)
    while True:
        if (request := next(arrivals, None)) is not None:  # one a step, so that later ones find the KV of earlier ones
            scheduler.add(request)
        plan = scheduler.schedule()
        if plan is None:
            return tokens, scheduler.stats(), num_copies
        num_copies += len(plan.copies)
        for update in scheduler.update(plan, runner.execute(plan)):
            assert update.error is None
            tokens.setdefault((update.request_id, update.choice), []).extend(update.token_ids)
        scheduler.check_integrity()


@pytest.fixture
def runner(write_tiny_gguf: Any) -> Runner:
    config = EngineConfig(
        model=write_tiny_gguf(),
        served_model_names=("tiny",),
        device="cpu",
        dtype="float32",
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=2**22,
    )
    return load_runner(config, lambda *_: None).runner


def test_preempted_forked_and_found_requests_get_what_each_gets_alone(runner: Runner) -> None:
    requests = [
        AddRequest(
            request_id=f"r{number}",
            prompt_token_ids=PROMPT[: 20 + number % 3 * 9] + (3 + number,) * (number % 4),
            sampling=SamplingParams(
                max_tokens=30 + number, temperature=number % 2, seed=number if number % 4 else None, ignore_eos=True
            ),
            num_choices=3 if number in (1, 4) else 1,
        )
        for number in range(8)
    ]
    alone: dict[tuple[str, int], list[int]] = {}
    for request in requests:
        tokens, stats, _ = run(runner, [request], enable_prefix_caching=False)
        assert stats.num_preemptions == 0
        alone |= tokens

    tokens, stats, num_copies = run(runner, requests, num_blocks=20)

    assert stats.num_preemptions > 3
    assert stats.num_prefix_cache_hits > 0
    assert num_copies > 0
    assert len(alone) == 12
    assert tokens == alone


@pytest.mark.model
def test_deterministic_gives_a_seeded_request_the_same_tokens_alone_and_in_company(smollm2_path: Path) -> None:
    config = EngineConfig(
        model=smollm2_path,
        served_model_names=("smollm2",),
        device="cpu",
        deterministic=True,
        block_size=BLOCK_SIZE,
        max_model_len=120,
        kv_cache_memory_bytes=2**26,
    )
    runner = load_runner(config, lambda *_: None).runner
    watched, *others = (
        AddRequest(
            request_id=f"r{number}",
            prompt_token_ids=tuple(1000 + 37 * (number + 1) * place % 40_000 for place in range(30 + number)),
            sampling=SamplingParams(max_tokens=20, temperature=1.0, top_p=0.95, seed=number, ignore_eos=True),
        )
        for number in range(9)
    )
    alone, _, _ = run(runner, [watched])
    together, stats, _ = run(runner, [*others[:4], watched, *others[4:]], num_blocks=40)
    assert stats.num_preemptions > 0
    assert together["r0", 0] == alone["r0", 0]
    assert len({tuple(tokens) for tokens in together.values()}) == len(together)
