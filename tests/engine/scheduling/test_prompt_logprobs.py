"""Prompts whose logprobs are asked for: each token is told once and in order, and a step's logits are bounded."""

from __future__ import annotations

from tests.engine.scheduling.conftest import Engine

from octavo_engine.plan import SamplingParams
from octavo_engine.sizing import NUM_PROMPT_ROWS

PROMPT = tuple(1 + i * i % 19 for i in range(150))
TELLING = SamplingParams(max_tokens=3, ignore_eos=True, num_prompt_logprobs=1)
SILENT = SamplingParams(max_tokens=3, ignore_eos=True)


def test_a_prompt_is_told_in_pieces_and_whole_before_its_first_token() -> None:
    engine = Engine(max_num_seqs=4, max_num_batched_tokens=1000)
    engine.add_request("a", PROMPT, TELLING)
    num_rows = NUM_PROMPT_ROWS + 3
    whole, rest = divmod(len(PROMPT), num_rows)
    assert [engine.step()["a"] for _ in range(whole + 1)] == [num_rows] * whole + [rest]
    assert engine.num_told["a"] == len(PROMPT) - 1
    engine.run()
    engine.check_outputs()


def test_it_finds_nothing_in_the_prefix_cache_and_others_find_its_blocks() -> None:
    engine = Engine(max_num_batched_tokens=1000)
    engine.add_request("first", PROMPT, SILENT)
    engine.run()
    before = engine.scheduler.stats().num_prefix_cache_queries
    engine.add_request("telling", PROMPT, TELLING)
    engine.run()
    assert engine.num_told["telling"] == len(PROMPT) - 1
    assert engine.num_cached_tokens["telling"] == 0
    assert engine.scheduler.stats().num_prefix_cache_queries == before
    engine.add_request("last", PROMPT, SILENT)
    engine.run()
    assert engine.num_cached_tokens["last"] > 0


def test_the_first_in_order_is_told_however_many_shorter_ones_come() -> None:
    engine = Engine(num_blocks=500, max_num_seqs=8, max_num_batched_tokens=1000)
    engine.add_request("long", PROMPT, TELLING)
    for number in range(20):
        engine.add_request(f"short{number}", PROMPT[:40], TELLING)
        if "long" not in engine.finished:
            engine.step()
    assert engine.num_told["long"] == len(PROMPT) - 1
    engine.run()
    engine.check_outputs()


def test_several_answers_share_a_prompt_that_is_told_once() -> None:
    engine = Engine(max_num_batched_tokens=1000)
    engine.add_request("a", PROMPT[:30], TELLING, num_choices=3)
    engine.run()
    assert engine.num_told["a"] == 29
    engine.check_outputs()


def test_a_prompt_of_one_token_has_nothing_to_tell() -> None:
    engine = Engine()
    engine.add_request("a", (5,), TELLING)
    engine.run()
    assert engine.num_told["a"] == 0
    engine.check_outputs()
