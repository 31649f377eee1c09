"""Requests for several answers: one prompt, shared blocks, copy on write."""

from __future__ import annotations

import pytest
from tests.engine.scheduling.conftest import Engine

from octavo_engine.errors import RequestInvalid


def test_the_choices_of_a_request_share_its_prompt_and_copy_only_its_last_block() -> None:
    engine = Engine(num_blocks=8, block_size=4)
    engine.add("a", 10, max_tokens=3, num_choices=3)
    assert engine.step() == {"a": 10}
    assert engine.scheduler.stats().num_used_blocks == 3
    assert engine.scheduler.stats().num_used_slots == 10
    plan = engine.scheduler.schedule()
    assert plan is not None
    assert [request.block_ids[:2] for request in plan.requests] == [(0, 1)] * 3
    assert plan.copies == ((2, 3), (2, 4)), "the last to write needs no copy"
    engine.finish_step(plan)
    assert engine.scheduler.stats().num_used_blocks == 5
    assert engine.scheduler.stats().num_used_slots == 8 + 3 * 3
    engine.run()
    engine.check_outputs()


def test_a_prompt_that_fills_its_blocks_is_shared_without_a_copy() -> None:
    engine = Engine(num_blocks=8, block_size=4)
    engine.add("a", 8, num_choices=2)
    engine.step()
    plan = engine.scheduler.schedule()
    assert plan is not None
    assert plan.copies == ()
    assert [request.block_ids for request in plan.requests] == [(0, 1, 2), (0, 1, 3)]


def test_choices_take_their_seats_before_they_run() -> None:
    engine = Engine(max_num_seqs=4)
    engine.add("a", 3, max_tokens=3, num_choices=3)
    engine.add("b", 3, max_tokens=1, num_choices=2)
    assert engine.step() == {"a": 3}
    assert engine.step() == {"a": 1, "a#1": 1, "a#2": 1}
    engine.scheduler.abort("a", choice=1)
    assert engine.step() == {"a": 1, "a#2": 1, "b": 3}
    assert set(engine.finished) == {"a", "a#2", "b", "b#1"}


def test_more_choices_than_seats_are_refused() -> None:
    with pytest.raises(RequestInvalid, match="n is 5; this server generates at most 4") as refusal:
        Engine(max_num_seqs=4).add("a", 3, num_choices=5)
    assert refusal.value.param == "n"


def test_choices_that_do_not_fit_together_run_one_after_the_other() -> None:
    engine = Engine(num_blocks=4, block_size=4)
    engine.add("a", 6, max_tokens=10, num_choices=4)
    engine.run()
    assert engine.scheduler.stats().num_preemptions > 0
    engine.check_outputs()


def test_a_row_that_fails_as_the_prompt_ends_fails_every_choice() -> None:
    engine = Engine()
    engine.add("bad", 6, num_choices=3)
    engine.runner.failing = {"bad"}
    engine.step()
    assert engine.finished == dict.fromkeys(("bad", "bad#1", "bad#2"), "error")
    assert engine.step() == {}
    assert engine.scheduler.stats().num_used_blocks == 0


def test_an_abort_ends_all_choices_or_the_one_it_names() -> None:
    engine = Engine()
    engine.add("a", 6, num_choices=3, max_tokens=9)
    engine.scheduler.abort("a", choice=1)  # there is none yet
    engine.step()
    engine.scheduler.abort("a", choice=0)
    assert engine.step() == {"a#1": 1, "a#2": 1}
    engine.scheduler.abort("a")
    assert engine.step() == {}
    assert engine.scheduler.stats().num_used_blocks == 0
