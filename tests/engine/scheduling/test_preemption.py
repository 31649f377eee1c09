"""What happens when blocks run out."""

from __future__ import annotations

import pytest
from tests.engine.scheduling.conftest import Engine

from octavo_engine.plan import SamplingParams


def test_when_blocks_run_out_the_latest_admitted_is_preempted_and_recomputed_first() -> None:
    engine = Engine(num_blocks=6, block_size=4, max_num_seqs=2, max_num_batched_tokens=32, enable_prefix_caching=False)
    engine.add("old", 4, max_tokens=17)
    engine.add("new", 4, max_tokens=17)
    engine.add("next", 4, max_tokens=2)
    steps = []
    while "old" not in engine.finished:
        steps.append(engine.step())
    preempted_at = next(i for i, step in enumerate(steps) if "new" not in step)
    assert all("old" in step for step in steps), "the oldest is never held up"
    assert all(step == {"old": 1} for step in steps[preempted_at:]), "nobody overtakes the preempted request"
    assert engine.scheduler.stats().num_preemptions == 1
    num_known_tokens = 4 + len(engine.outputs["new"])
    assert engine.step() == {"new": num_known_tokens, "next": 4}
    engine.run()
    engine.check_outputs()


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    engine = Engine(num_blocks=16, block_size=4, max_num_seqs=2, max_num_batched_tokens=64)
    engine.add("old", 4, max_tokens=40)
    engine.add("new", 30, max_tokens=20)
    while not engine.scheduler.stats().num_preemptions:
        assert engine.step()
    num_known_tokens = 30 + len(engine.outputs["new"])
    while "new" not in (step := engine.step()):
        pass
    assert step["new"] == num_known_tokens - 5 * 4, "the older request has taken 11 of the 16 blocks"
    assert engine.num_cached_tokens["new"] == 0, "what it finds of its own is no hit"
    assert engine.scheduler.stats().num_prefix_cache_hits == 0
    engine.run()
    engine.check_outputs()


@pytest.mark.parametrize("num_old_tokens", [13, 14, 15, 16])  # so that it stops anywhere in a block
def test_a_prompt_preempted_half_computed_goes_on_where_it_was(num_old_tokens: int) -> None:
    engine = Engine(num_blocks=16, block_size=4, max_num_seqs=2, max_num_batched_tokens=4)
    engine.add("old", num_old_tokens, max_tokens=20)
    while not engine.outputs["old"]:
        engine.step()
    engine.add("new", 40)
    steps = [engine.step()]
    while not engine.scheduler.stats().num_preemptions:
        steps.append(engine.step())
    num_computed = sum(step.get("new", 0) for step in steps)
    assert 0 < num_computed < 40
    engine.run()
    engine.check_outputs()
    assert engine.runner.num_computed < num_old_tokens + 20 + 40 + 4 + 8, "hardly anything was computed twice"


def test_what_a_prompt_had_computed_when_it_was_preempted_is_found_by_nobody_else() -> None:
    engine = Engine(num_blocks=16, block_size=4, max_num_seqs=2, max_num_batched_tokens=4)
    engine.add("old", 14, max_tokens=20)
    while not engine.outputs["old"]:
        engine.step()
    engine.runner.failing = {"bad"}  # but its first token, which would tell, is not due yet
    prompt = tuple(1 + place % 7 for place in range(40))
    engine.add_request("bad", prompt, SamplingParams(max_tokens=4))
    while not engine.scheduler.stats().num_preemptions:
        engine.step()
    engine.add_request("alike", prompt[:14], SamplingParams(max_tokens=4, ignore_eos=True), priority=-1)
    while "alike" not in engine.finished:
        engine.step()
    assert engine.num_cached_tokens["alike"] == 0
    assert engine.outputs["alike"] == engine.alone["alike"][0]
    engine.run()
    assert engine.finished["bad"] == "error"


def test_a_request_that_needs_the_whole_pool_runs_to_its_end_beside_others() -> None:
    engine = Engine(num_blocks=4, block_size=4)
    engine.add("small", 3, max_tokens=6)
    engine.add("whole pool", 10, max_tokens=6)
    engine.add("another", 3, max_tokens=6)
    engine.run()
    assert engine.finished == dict.fromkeys(("small", "whole pool", "another"), "length")
