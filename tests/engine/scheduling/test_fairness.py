"""Who goes first: short and long prompts, priorities."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.scheduling.conftest import Engine, answer

from octavo_engine.messages import AddRequest
from octavo_engine.plan import SamplingParams
from octavo_engine.scheduler import (
    FIRST_PREFILL_PARTS,
    PACED_FIRST_PREFILL_PARTS,
    PACED_TOKENS,
    PACED_TOKENS_A_DECODE,
)


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
    room = (64 - num_decoding) * (FIRST_PREFILL_PARTS - 1) // FIRST_PREFILL_PARTS
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
    paces_prefills=st.booleans(),
)
def test_a_long_prompt_is_done_within_its_bound_however_many_short_ones_keep_coming(
    *,
    max_num_seqs: int,
    num_spare_tokens: int,
    lengths: list[int],
    short_length: int,
    short_priority: int,
    paces_prefills: bool,
) -> None:
    budget = max_num_seqs + num_spare_tokens
    engine = Engine(
        num_blocks=1000,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        paces_prefills=paces_prefills,
    )
    for i, length in enumerate(lengths):
        engine.add(f"long {i}", length, max_tokens=1)
    num_tokens_a_step = -(-(budget - max_num_seqs + 1) // FIRST_PREFILL_PARTS)
    if paces_prefills:
        num_tokens_a_step = min(num_tokens_a_step, PACED_TOKENS // PACED_FIRST_PREFILL_PARTS)
    bound = 0
    for i, length in enumerate(lengths):
        bound += -(-length // num_tokens_a_step)
        while f"long {i}" not in engine.finished:
            for k in range(max_num_seqs):
                engine.add(f"short {engine.num_steps}-{k}", short_length, max_tokens=2, priority=short_priority)
            engine.step()
            assert engine.num_steps <= bound


@settings(deadline=None)
@given(num_decodes=st.integers(0, 12), length=st.integers(1, 200))
def test_a_paced_prefill_gets_the_whole_step_alone_and_little_beside_decodes(num_decodes: int, length: int) -> None:
    engine = Engine(num_blocks=1000, max_num_seqs=20, max_num_batched_tokens=64, paces_prefills=True)
    for i in range(num_decodes):
        engine.add(f"decode {i}", 1, max_tokens=100)
    engine.step()
    engine.add("prefill", length)
    step = engine.step()
    room = min(64 - num_decodes, PACED_TOKENS + PACED_TOKENS_A_DECODE * num_decodes) if num_decodes else 64
    assert step == {f"decode {i}": 1 for i in range(num_decodes)} | {"prefill": min(room, length)}


class TimedEngine:
    """A step takes as long as SmolLM2's on two cores: so many seconds, and so many for each token and its context.

    From the table in design.md (61 ms for 256 rows, 13 ms for 32) and an attention that costs a token at position 7,000
    three times what its linear layers do.
    """

    def __init__(self) -> None:
        self.engine = Engine(
            num_blocks=2000, block_size=8, max_num_seqs=64, max_num_batched_tokens=512, paces_prefills=True
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
            seconds += len(request.token_ids) * 0.21e-3 * (1 + 3 * mean_context / 7000)
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
