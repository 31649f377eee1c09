"""What a step holds, how requests join and end, and what is refused."""

from __future__ import annotations

import pytest
from tests.engine.scheduling.conftest import EOS, Engine, generate, next_token

from octavo_engine.errors import RequestInvalid
from octavo_engine.messages import RequestUpdate
from octavo_engine.plan import SamplingParams


def test_an_idle_scheduler_plans_nothing() -> None:
    engine = Engine()
    assert engine.scheduler.schedule() is None
    assert not engine.scheduler.has_requests


def test_a_prompt_is_computed_at_once_and_then_decodes_one_token_a_step() -> None:
    engine = Engine()
    engine.add("a", 6, max_tokens=3)
    assert [engine.step() for _ in range(4)] == [{"a": 6}, {"a": 1}, {"a": 1}, {}]
    assert engine.finished == {"a": "length"}


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks_and_samples_only_at_its_end() -> None:
    engine = Engine(max_num_batched_tokens=16)
    engine.add("a", 40)
    assert [engine.step() for _ in range(2)] == [{"a": 16}, {"a": 16}]
    assert engine.outputs["a"] == ()
    assert engine.step() == {"a": 8}
    assert len(engine.outputs["a"]) == 1


def test_requests_join_and_leave_a_running_batch() -> None:
    engine = Engine()
    engine.add("a", 3, max_tokens=4)
    assert engine.step() == {"a": 3}
    engine.add("b", 5, max_tokens=2)
    assert engine.step() == {"a": 1, "b": 5}
    assert engine.step() == {"a": 1, "b": 1}
    assert engine.finished == {"b": "length"}
    assert engine.step() == {"a": 1}
    assert engine.step() == {}


def test_decodes_come_before_prefills() -> None:
    engine = Engine(max_num_batched_tokens=16)
    engine.add("decode", 3, max_tokens=10)
    engine.step()
    engine.add("long", 100)
    assert engine.step() == {"decode": 1, "long": 15}


def test_requests_wait_for_a_seat_in_order_of_arrival() -> None:
    engine = Engine(max_num_seqs=2)
    for request_id, max_tokens in {"a": 2, "b": 9, "c": 9}.items():
        engine.add(request_id, 3, max_tokens=max_tokens)
    assert engine.step() == {"a": 3, "b": 3}
    assert engine.step() == {"a": 1, "b": 1}
    assert engine.step() == {"b": 1, "c": 3}


def test_a_prompt_whose_kv_does_not_fit_now_waits_and_so_do_those_behind_it() -> None:
    engine = Engine(num_blocks=8, block_size=4)
    engine.add("a", 12, max_tokens=3)
    engine.step()
    engine.add("big", 24)
    engine.add("small", 1)
    assert engine.step() == {"a": 1}
    assert engine.step() == {"a": 1}
    assert set(engine.step()) == {"big", "small"}


def test_a_stop_token_ends_a_request_unless_eos_is_to_be_ignored() -> None:
    prompt = next(
        p for n in range(1000) if generate(p := (n % 20 + 1, n // 20), SamplingParams(max_tokens=5), 99)[1] == "stop"
    )
    engine = Engine()
    engine.add_request("stops", prompt, SamplingParams(max_tokens=5))
    engine.add_request("goes on", prompt, SamplingParams(max_tokens=5, ignore_eos=True))
    engine.run()
    assert engine.finished == {"stops": "stop", "goes on": "length"}
    assert engine.outputs["stops"][-1] == EOS
    assert len(engine.outputs["goes on"]) == 5


def test_a_requests_own_stop_tokens_hold_also_without_eos() -> None:
    first = next_token((5,))
    engine = Engine()
    engine.add_request("a", (5,), SamplingParams(max_tokens=9, ignore_eos=True, stop_token_ids=(first,)))
    engine.run()
    assert (engine.outputs["a"], engine.finished["a"]) == ((first,), "stop")


def test_a_request_ends_with_length_at_max_model_len() -> None:
    engine = Engine(max_model_len=10)
    engine.add("a", 9, max_tokens=5)
    engine.run()
    assert (len(engine.outputs["a"]), engine.finished["a"]) == (1, "length")


@pytest.mark.parametrize("num_prompt_tokens", [10, 11, 500])
def test_a_prompt_that_leaves_no_room_for_output_is_refused_with_both_numbers(num_prompt_tokens: int) -> None:
    engine = Engine(max_model_len=10)
    with pytest.raises(RequestInvalid, match=f"has {num_prompt_tokens} tokens.* may have 10") as refusal:
        engine.add("a", num_prompt_tokens)
    assert refusal.value.code == "context_length_exceeded"
    assert not engine.scheduler.has_requests


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestInvalid, match="no tokens"):
        Engine().add("a", 0)


def test_a_row_that_fails_ends_its_request_alone() -> None:
    engine = Engine()
    engine.add("good", 3, max_tokens=3)
    engine.add("bad", 3, max_tokens=3)
    engine.runner.failing = {"bad"}
    engine.run()
    assert engine.finished == {"good": "length", "bad": "error"}
    assert engine.outputs["bad"] == ()
    assert engine.scheduler.stats().num_used_blocks == 0


def test_the_update_of_a_failed_row_carries_its_error() -> None:
    engine = Engine()
    engine.add("bad", 3)
    engine.runner.failing = {"bad"}
    plan = engine.scheduler.schedule()
    assert plan is not None
    assert engine.scheduler.update(plan, engine.runner.execute(plan)) == (
        RequestUpdate(request_id="bad", token_ids=(), finish_reason="error", error="logits are NaN"),
    )


def test_an_abort_frees_a_running_and_a_waiting_request() -> None:
    engine = Engine(max_num_seqs=1)
    engine.add("running", 20)
    engine.add("waiting", 20)
    engine.step()
    engine.scheduler.abort("waiting")
    engine.scheduler.abort("running")
    engine.scheduler.abort("never heard of")
    engine.scheduler.check_integrity()
    assert not engine.scheduler.has_requests
    assert engine.scheduler.stats().num_used_blocks == 0


def test_an_aborted_id_may_be_used_again() -> None:
    engine = Engine()
    engine.add("a", 3)
    engine.step()
    engine.scheduler.abort("a")
    engine.add("a", 3, max_tokens=2)
    engine.run()
    assert engine.finished == {"a": "length"}


def test_the_stats_tell_used_slots_from_allocated_ones() -> None:
    engine = Engine(num_blocks=8, block_size=4, max_num_seqs=1)
    engine.add("a", 5)
    engine.add("b", 5)
    engine.step()
    stats = engine.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.step) == (1, 1, 1)
    assert (stats.num_used_blocks, stats.num_blocks, stats.num_used_slots) == (2, 8, 5)
