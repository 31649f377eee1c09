"""What the scheduler makes of the prefix cache: less work, the same tokens, nobody else's trouble."""

from __future__ import annotations

from tests.engine.scheduling.conftest import Engine

from octavo_engine.plan import SamplingParams

SAMPLING = SamplingParams(max_tokens=4, ignore_eos=True)
PROMPT = tuple(1 + i * i % 19 for i in range(21))


def test_a_prompt_seen_before_is_computed_from_its_last_block_on() -> None:
    engine = Engine(max_num_batched_tokens=64)
    engine.add_request("first", PROMPT, SAMPLING)
    engine.run()
    engine.add_request("again", PROMPT, SAMPLING)
    engine.add_request("longer", (*PROMPT, 5, 6), SAMPLING)
    assert engine.step() == {"again": 1, "longer": 3}
    engine.run()
    engine.check_outputs()
    assert engine.num_cached_tokens == {"first": 0, "again": 20, "longer": 20}
    stats = engine.scheduler.stats()
    assert (stats.num_prefix_cache_queries, stats.num_prefix_cache_hits) == (21 + 21 + 23, 40)


def test_a_prompt_that_is_cached_to_its_last_token_still_gives_logits() -> None:
    engine = Engine(max_num_batched_tokens=64)
    engine.add_request("first", PROMPT[:20], SAMPLING)
    engine.run()
    engine.add_request("again", PROMPT[:20], SAMPLING)
    assert engine.step() == {"again": 4}
    engine.run()
    engine.check_outputs()


def test_the_next_turn_of_a_conversation_finds_the_last_answer_too() -> None:
    engine = Engine(max_num_batched_tokens=64)
    engine.add_request("first", PROMPT[:6], SamplingParams(max_tokens=20, ignore_eos=True))
    engine.run()
    engine.add_request("next", (*PROMPT[:6], *engine.outputs["first"], 3, 3), SAMPLING)
    assert engine.step() == {"next": 6 + 20 + 2 - 24}


def test_the_same_prompt_is_shared_within_an_adapter_and_with_no_other() -> None:
    engine = Engine(max_num_batched_tokens=64)
    for adapter, name in ((0, "none"), (1, "one"), (2, "two")):
        engine.add_request(name, PROMPT, SAMPLING, adapter=adapter)
        engine.run()
    engine.add_request("one again", PROMPT, SAMPLING, adapter=1, num_choices=2)
    engine.add_request("none again", PROMPT, SAMPLING)
    engine.run()
    engine.check_outputs()
    found = {"none": 0, "one": 0, "two": 0, "one again": 20, "one again#1": 20, "none again": 20}
    assert engine.num_cached_tokens == found


def test_choices_tell_what_their_prompt_found() -> None:
    engine = Engine(max_num_batched_tokens=64)
    engine.add_request("first", PROMPT, SAMPLING)
    engine.run()
    engine.add_request("three", PROMPT, SAMPLING, num_choices=3)
    engine.run()
    engine.check_outputs()
    assert [engine.num_cached_tokens[key] for key in ("three", "three#1", "three#2")] == [20, 20, 20]


def test_what_a_failed_request_computed_is_found_by_nobody() -> None:
    engine = Engine(max_num_batched_tokens=8)
    engine.runner.failing = {"bad"}
    engine.add_request("bad", PROMPT, SAMPLING)
    engine.step()
    engine.add_request("beside", PROMPT, SAMPLING)  # while the bad one is computed, before anyone knows
    engine.run()
    engine.add_request("after", PROMPT, SAMPLING)
    engine.run()
    assert engine.finished == {"bad": "error", "beside": "length", "after": "length"}
    assert engine.outputs["beside"] == engine.outputs["after"] == engine.alone["after"][0]
    assert engine.num_cached_tokens == {"bad": 0, "beside": 0, "after": 20}


def test_a_failure_late_in_a_request_takes_its_earlier_blocks_out_of_the_cache_too() -> None:
    engine = Engine(max_num_batched_tokens=64)
    engine.add_request("bad", PROMPT, SAMPLING)
    engine.step()
    engine.runner.failing = {"bad"}
    engine.run()
    engine.add_request("after", PROMPT, SAMPLING)
    engine.run()
    assert engine.num_cached_tokens["after"] == 0


def test_without_prefix_caching_every_token_is_computed() -> None:
    engine = Engine(max_num_batched_tokens=64, enable_prefix_caching=False)
    for request_id in ("first", "again"):
        engine.add_request(request_id, PROMPT, SAMPLING)
        assert engine.step() == {request_id: 21}
        engine.run()
    engine.check_outputs()
    assert engine.num_cached_tokens == {"first": 0, "again": 0}
    assert engine.scheduler.stats().num_prefix_cache_hits == 0
