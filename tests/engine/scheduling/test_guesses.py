"""Speculative decoding in the scheduler: who has room for guesses, and what becomes of right and wrong ones."""

from __future__ import annotations

from tests.engine.scheduling.conftest import EOS, Engine, Oracle, generate

from octavo_engine.plan import RequestResult, SamplingParams, StepResult, TokenLogprobs


def test_right_guesses_are_tokens_of_the_same_step() -> None:
    engine = Engine(make_proposer=lambda: Oracle(3))
    engine.add("a", 6, max_tokens=9)
    assert [engine.step() for _ in range(4)] == [{"a": 6}, {"a": 4}, {"a": 4}, {}]
    engine.check_outputs()


def test_the_last_token_is_never_guessed() -> None:
    engine = Engine(make_proposer=lambda: Oracle(5))
    engine.add("a", 6, max_tokens=4)
    assert [engine.step() for _ in range(3)] == [{"a": 6}, {"a": 3}, {}]
    engine.check_outputs()


def test_a_token_that_would_end_the_request_is_never_guessed() -> None:
    prompt = next(
        p
        for n in range(3000)
        if 3 <= len(generate(p := (n % 20 + 1, n // 20), SamplingParams(max_tokens=5), 99)[0]) < 5
    )
    engine = Engine(make_proposer=lambda: Oracle(5))
    engine.add_request("a", prompt, SamplingParams(max_tokens=9))
    num_tokens = len(engine.alone["a"][0])
    assert [engine.step() for _ in range(3)] == [{"a": 2}, {"a": num_tokens - 1}, {}]
    assert engine.outputs["a"][-1] == EOS
    engine.check_outputs()


def test_a_token_that_ends_the_request_may_be_among_drafted_guesses() -> None:
    prompt = next(
        p
        for n in range(3000)
        if 3 <= len(generate(p := (n % 20 + 1, n // 20), SamplingParams(max_tokens=5), 99)[0]) < 5
    )
    engine = Engine(drafter=Oracle(5))
    engine.add_request("a", prompt, SamplingParams(max_tokens=9))
    assert [engine.step() for _ in range(3)] == [{"a": 2}, {"a": 1 + 5}, {}]
    engine.check_outputs()
    drafts = engine.scheduler.stats().drafts
    assert drafts is not None
    assert (drafts.num_draft_tokens, sum(drafts.num_accepted_tokens_per_pos)) == (5, len(engine.outputs["a"]) - 2)


def test_wrong_guesses_cost_room_and_nothing_else() -> None:
    engine = Engine(make_proposer=lambda: Oracle(3, wrong_one_in=1))
    engine.add("a", 6, max_tokens=4)
    assert [engine.step() for _ in range(5)] == [{"a": 6}, {"a": 3}, {"a": 2}, {"a": 1}, {}]
    engine.check_outputs()


def test_what_was_guessed_wrongly_is_in_no_block_that_others_find() -> None:
    engine = Engine(max_num_batched_tokens=64, make_proposer=lambda: Oracle(3, wrong_one_in=2))
    engine.add("a", 7, max_tokens=30)
    engine.run()
    (outputs,) = engine.outputs.values()
    prompt = engine.runner.sequences["a"][: 7 + 29]
    engine.add_request("again", prompt, SamplingParams(max_tokens=1, ignore_eos=True))
    assert engine.step() == {"again": 4}
    assert engine.outputs["again"] == outputs[-1:]


def test_guesses_have_what_decodes_and_prompts_leave_of_the_budget() -> None:
    engine = Engine(max_num_batched_tokens=12, make_proposer=lambda: Oracle(4))
    engine.add("a", 3, max_tokens=40)
    engine.step()
    engine.add("b", 20, max_tokens=40)
    assert engine.step() == {"a": 1, "b": 11}
    assert engine.step() == {"a": 1 + 2, "b": 9}
    assert engine.step() == {"a": 1 + 4, "b": 1 + 4}
    engine.add("c", 3, max_tokens=40)
    engine.add("d", 3, max_tokens=40)
    assert engine.step() == {"a": 1 + 4, "b": 1, "c": 3, "d": 3}


def test_guesses_take_no_block_that_a_running_request_may_need_next() -> None:
    engine = Engine(num_blocks=6, block_size=4, max_num_seqs=2, make_proposer=lambda: Oracle(6))
    for request_id in ("a", "b"):
        engine.add(request_id, 6, max_tokens=10)
    engine.step()
    # Two of the six blocks are free, and each of the two requests may need one.
    assert engine.step() == {"a": 1 + 1, "b": 1 + 1}
    engine.run()
    engine.check_outputs()


def test_a_guess_whose_logits_fail_is_computed_anew_as_a_token() -> None:
    engine = Engine(make_proposer=lambda: Oracle(2))
    engine.add("a", 3, max_tokens=6)
    engine.step()
    plan = engine.scheduler.schedule()
    assert plan is not None
    rows = engine.runner.execute(plan).results
    bad = StepResult(plan.step, (*rows[:2], RequestResult(error="logits are NaN")))
    (update,) = engine.scheduler.update(plan, bad)
    assert update.token_ids == (rows[0].token_id, rows[1].token_id)
    assert update.finish_reason is None
    engine.scheduler.check_integrity()
    (anew,) = engine.scheduler.schedule().requests  # type: ignore[union-attr] # there is a request
    assert (anew.num_computed_tokens, anew.token_ids[0]) == (3 + 2, rows[1].token_id)


def test_logprobs_come_with_every_token() -> None:
    engine = Engine(make_proposer=lambda: Oracle(2))
    engine.add("a", 3, max_tokens=6)
    engine.step()
    plan = engine.scheduler.schedule()
    assert plan is not None
    rows = [
        RequestResult(token_id=row.token_id, logprobs=TokenLogprobs(-float(place), ()))
        for place, row in enumerate(engine.runner.execute(plan).results)
    ]
    (update,) = engine.scheduler.update(plan, StepResult(plan.step, tuple(rows)))
    assert [each.logprob for each in update.logprobs] == [0, -1, -2]
    assert update.token_ids == tuple(row.token_id for row in rows)


def test_each_choice_has_guesses_of_its_own() -> None:
    proposers: list[Oracle] = []

    def make() -> Oracle:
        proposers.append(Oracle(3))
        return proposers[-1]

    engine = Engine(max_num_batched_tokens=64, make_proposer=make)
    engine.add("a", 5, max_tokens=12, num_choices=3)
    engine.run()
    engine.check_outputs()
    assert len(proposers) == 3
    first, *others = (sum(proposer.num_right) for proposer in proposers)
    assert first == 12 - 1 - len(proposers[0].num_right) > max(others)


def test_what_became_of_guesses_is_counted_by_their_place() -> None:
    engine = Engine(make_proposer=lambda: Oracle(3))
    engine.add("a", 6, max_tokens=8)
    engine.run()
    drafts = engine.scheduler.stats().drafts
    assert drafts is not None
    assert (drafts.num_drafts, drafts.num_draft_tokens, drafts.num_accepted_tokens_per_pos) == (2, 5, (2, 2, 1))
    assert Engine().scheduler.stats().drafts is None


def test_a_preempted_request_guesses_on_once_it_is_computed_again() -> None:
    engine = Engine(num_blocks=6, block_size=4, max_num_seqs=3, make_proposer=lambda: Oracle(2, wrong_one_in=3))
    for request_id in ("a", "b", "c"):
        engine.add(request_id, 4, max_tokens=16)
    engine.run()
    assert engine.scheduler.stats().num_preemptions > 0
    engine.check_outputs()
