"""Who goes first: short and long prompts, priorities."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.scheduling.conftest import Engine, answer

from octavo_engine.messages import AddRequest
from octavo_engine.plan import SamplingParams
from octavo_engine.prefills import (
    FIRST_PARTS,
    PACED_FIRST_PARTS,
    PACED_WORK,
    PACED_WORK_A_DECODE,
    PrefillRule,
)

NEVER_MATTERS = 10**6  # of positions: attention to the few of a test is next to nothing


def test_a_lower_priority_number_is_admitted_first_and_preempted_last() -> None:
    engine = Engine(num_blocks=6, block_size=4, max_num_seqs=2, max_num_batched_tokens=32)
    engine.add("first", 4, max_tokens=12, priority=5)
    engine.add("later", 4, max_tokens=12, priority=5)
    engine.add("urgent", 4, max_tokens=17, priority=-1)
    engine.add("soon", 4, max_tokens=17, priority=2)
    assert engine.step() == {"urgent": 4, "soon": 4}
    steps = []
    while "urgent" not in engine.finished:
        steps.append(engine.step())
    assert engine.scheduler.stats().num_preemptions == 1
    assert all("urgent" in step for step in steps)
    assert engine.step().keys() == {"soon", "first"}
    engine.run()
    assert list(engine.finished) == ["urgent", "soon", "first", "later"]


def test_short_prompts_overtake_a_long_one_that_keeps_a_part_of_the_budget() -> None:
    engine = Engine(max_num_seqs=8, max_num_batched_tokens=16)
    engine.add("long", 100)
    assert engine.step() == {"long": 16}
    for request_id in ("short 1", "short 2", "short 3"):
        engine.add(request_id, 6, max_tokens=1)
    assert engine.step() == {"short 1": 6, "short 2": 6, "long": 1}
    assert engine.step() == {"short 3": 6, "long": 1}
    assert engine.step() == {"long": 16}


@settings(deadline=None)
@given(
    num_decodes=st.integers(0, 4),
    long_lengths=st.lists(st.integers(100, 150), max_size=4),  # after one step still longer than the short ones
    short_lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8),
)
def test_short_prompts_are_computed_as_they_are_admitted_however_many_long_ones_run(
    num_decodes: int, long_lengths: list[int], short_lengths: list[int]
) -> None:
    engine = Engine(num_blocks=1000, max_num_seqs=20, max_num_batched_tokens=64)
    for i in range(num_decodes):
        engine.add(f"decode {i}", 1, max_tokens=100)
    for i, length in enumerate(long_lengths):
        engine.add(f"long {i}", length)
    engine.step()
    num_decoding = sum(1 for output in engine.outputs.values() if output)
    room = (64 - num_decoding) * (FIRST_PARTS - 1) // FIRST_PARTS
    fitting = {f"short {i}": length for i, length in enumerate(short_lengths) if sum(short_lengths[: i + 1]) <= room}
    for request_id, length in fitting.items():
        engine.add(request_id, length)
    step = engine.step()
    assert {request_id: step.get(request_id) for request_id in fitting} == fitting


@settings(deadline=None, max_examples=40)
@given(
    max_num_seqs=st.integers(4, 8),
    num_spare_tokens=st.integers(0, 20),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    short_length=st.integers(1, 6),
    short_priority=st.sampled_from([0, 3]),
    positions_a_token=st.none() | st.integers(1, 60),
)
def test_a_long_prompt_is_done_within_its_bound_however_many_short_ones_keep_coming(
    *,
    max_num_seqs: int,
    num_spare_tokens: int,
    lengths: list[int],
    short_length: int,
    short_priority: int,
    positions_a_token: int | None,
) -> None:
    budget = max_num_seqs + num_spare_tokens
    engine = Engine(
        num_blocks=1000,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        positions_a_token=positions_a_token,
    )
    for i, length in enumerate(lengths):
        engine.add(f"long {i}", length, max_tokens=1)
    sure_work = -(-(budget - max_num_seqs + 1) // FIRST_PARTS)
    if positions_a_token is not None:
        sure_work = min(sure_work, PACED_WORK // PACED_FIRST_PARTS)
    bound = 0
    for i, length in enumerate(lengths):
        bound += num_steps_at_least_sure(PrefillRule(positions_a_token), length, sure_work)
        while f"long {i}" not in engine.finished:
            for k in range(max_num_seqs):
                engine.add(f"short {engine.num_steps}-{k}", short_length, max_tokens=2, priority=short_priority)
            engine.step()
            assert engine.num_steps <= bound


def num_steps_at_least_sure(rule: PrefillRule, length: int, sure_work: int) -> int:
    """Steps that a prompt needs when each computes what is sure and no more."""
    num_steps = position = 0
    while position < length:
        position += max(1, rule.reach(position, sure_work))
        num_steps += 1
    return num_steps


@settings(deadline=None)
@given(num_decodes=st.integers(0, 12), length=st.integers(1, 200))
def test_a_paced_prefill_gets_the_whole_step_alone_and_little_beside_decodes(num_decodes: int, length: int) -> None:
    engine = Engine(num_blocks=1000, max_num_seqs=20, max_num_batched_tokens=64, positions_a_token=NEVER_MATTERS)
    for i in range(num_decodes):
        engine.add(f"decode {i}", 1, max_tokens=100)
    engine.step()
    engine.add("prefill", length)
    step = engine.step()
    room = min(64 - num_decodes, PACED_WORK + PACED_WORK_A_DECODE * num_decodes) - 1 if num_decodes else 63
    assert step == {f"decode {i}": 1 for i in range(num_decodes)} | {"prefill": min(room, length)}


@given(positions_a_token=st.integers(1, 10_000), start=st.integers(0, 200_000), work=st.integers(1, 4096))
def test_work_is_each_tokens_own_and_one_for_so_many_positions_before_it(
    positions_a_token: int, start: int, work: int
) -> None:
    rule = PrefillRule(positions_a_token)
    num_tokens = rule.reach(start, work)
    # A token from p to p + 1 looks back at p + 1/2 positions on average.
    exact = [1 + Fraction(2 * position + 1, 2 * positions_a_token) for position in range(start, start + num_tokens + 1)]
    assert sum(exact[:-1]) <= work < sum(exact)
    assert rule.work(start, num_tokens) == math.ceil(sum(exact[:-1]))


def test_a_step_deep_in_a_long_prompt_computes_fewer_tokens_and_no_more_work() -> None:
    engine = Engine(num_blocks=300, max_num_seqs=4, max_num_batched_tokens=64, positions_a_token=100)
    engine.add("long", 1000, max_tokens=1)
    sizes = []
    while "long" not in engine.finished:
        sizes.append(engine.step()["long"])
    assert sizes[0] > 40
    assert sizes[-2] < 8
    assert sum(sizes) == 1000
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True)


class TimedEngine:
    """A step takes as long as SmolLM2's on two cores: so many seconds, and so many for each token and its context.

    Measured on AVX2: half a millisecond a token, and as much again for each 720 positions before it.
    """

    def __init__(self) -> None:
        self.engine = Engine(
            num_blocks=2000, block_size=8, max_num_seqs=64, max_num_batched_tokens=512, positions_a_token=720
        )
        self.now = 0.0
        self.longest_step = 0.0
        self.arrivals: dict[str, float] = {}
        self.first_tokens: dict[str, float] = {}

    def step(self) -> None:
        """One step; time passes."""
        scheduler = self.engine.scheduler
        plan = scheduler.schedule()
        assert plan is not None
        seconds = 0.006
        for request in plan.requests:
            mean_context = request.num_computed_tokens + len(request.token_ids) / 2
            seconds += len(request.token_ids) * 0.5e-3 * (1 + mean_context / 720)
        self.now += seconds
        self.longest_step = max(self.longest_step, seconds)
        for update in scheduler.update(plan, answer(plan)):
            self.first_tokens.setdefault(update.request_id, self.now)

    def add(self, request_id: str, num_tokens: int, max_tokens: int, arrival: float) -> None:
        """Add a request that came at `arrival`, while the last step was under way."""
        self.arrivals[request_id] = arrival
        prompt = (len(self.arrivals), *range(num_tokens - 1))
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        message = AddRequest(request_id=request_id, prompt_token_ids=prompt, sampling=sampling)
        self.engine.scheduler.add(message)

    def waited(self, request_id: str) -> float:
        """Seconds until its first token."""
        return self.first_tokens[request_id] - self.arrivals[request_id]


def test_a_prompt_of_7000_tokens_at_most_doubles_the_wait_of_short_ones_plus_a_step() -> None:
    idle = TimedEngine()
    idle.add("short", 100, 4, 0.0)
    idle.step()

    busy = TimedEngine()
    busy.add("long", 7000, 4, 0.0)
    thinking = itertools.cycle((0.05, 0.17, 0.29, 0.02, 0.11, 0.23))  # so that arrivals meet steps everywhere
    arrival = next(thinking)
    num_short = 0
    while "long" not in busy.first_tokens:
        busy.step()
        if arrival <= busy.now:
            busy.add(f"short {num_short}", 100, 1, arrival)
            while f"short {num_short}" not in busy.first_tokens:
                busy.step()
            num_short += 1
            arrival = busy.now + next(thinking)

    waits = sorted(busy.waited(f"short {number}") for number in range(num_short))
    assert num_short >= 10
    assert waits[-1] <= 2 * idle.waited("short") + busy.longest_step
    alone = TimedEngine()
    alone.add("long", 7000, 4, 0.0)
    while not alone.first_tokens:
        alone.step()
    assert busy.waited("long") < 2 * alone.waited("long")
