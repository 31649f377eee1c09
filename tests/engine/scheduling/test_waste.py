"""How many of the slots in used blocks hold no token."""

from __future__ import annotations

import random

from tests.engine.scheduling.conftest import Engine, answer

from octavo_engine.messages import AddRequest
from octavo_engine.plan import SamplingParams


def test_on_spread_work_less_than_four_percent_of_the_allocated_slots_are_unused() -> None:
    # 32 users whose next request follows the last one: about 37 tokens in, 32 to 256 out.
    draw = random.Random(0)  # noqa: S311 - test data
    scheduler = Engine(num_blocks=1500, block_size=8, max_num_seqs=64, max_num_batched_tokens=512).scheduler
    num_added = num_finished = num_allocated = num_unused = 0
    for _ in range(600):
        while num_added < 32 + num_finished:
            prompt = tuple(draw.choices(range(1000), k=draw.randint(24, 50)))
            sampling = SamplingParams(max_tokens=draw.randint(32, 256), ignore_eos=True)
            scheduler.add(AddRequest(request_id=f"r{num_added}", prompt_token_ids=prompt, sampling=sampling))
            num_added += 1
        plan = scheduler.schedule()
        assert plan is not None
        num_finished += sum(update.finish_reason is not None for update in scheduler.update(plan, answer(plan)))
        stats = scheduler.stats()
        num_allocated += stats.num_used_blocks * 8
        num_unused += stats.num_used_blocks * 8 - stats.num_used_slots
    assert num_added > 100
    assert 0.01 < num_unused / num_allocated < 0.04


def test_a_slot_in_a_shared_block_counts_once() -> None:
    engine = Engine(num_blocks=16, block_size=4)
    prompt = tuple(range(1, 14))
    sampling = SamplingParams(max_tokens=9, ignore_eos=True)
    engine.add_request("a", prompt, sampling)
    engine.step()
    engine.add_request("b", prompt, sampling)
    engine.step()
    stats = engine.scheduler.stats()
    assert (stats.num_used_blocks, stats.num_used_slots) == (3 + 1 + 1, 12 + 2 + 1)
