"""The scheduler against a fake runner that stores tokens in the blocks it is given and reads them back from there."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from octavo_engine.errors import RequestInvalid
from octavo_engine.messages import AddRequest, RequestUpdate
from octavo_engine.plan import RequestResult, SamplingParams, ScheduledRequest, StepPlan, StepResult
from octavo_engine.scheduler import OLDEST_PREFILL_PARTS, Scheduler

EOS = 0
NUM_TOKEN_IDS = 24  # small, so that EOS comes up by itself


def next_token(token_ids: tuple[int, ...], choice: int = 0) -> int:
    """The "model" with its sampler: any token of the context and the choice change what comes next."""
    return hashlib.blake2s(bytes((*token_ids, choice))).digest()[0] % NUM_TOKEN_IDS


def generate(
    prompt: tuple[int, ...], sampling: SamplingParams, max_model_len: int, choice: int = 0
) -> tuple[tuple[int, ...], str]:
    """What a choice of a request gets when it is alone in an engine without limits."""
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS})
    tokens = prompt
    while True:
        tokens += (next_token(tokens, choice),)
        output = tokens[len(prompt) :]
        if output[-1] in stops:
            return output, "stop"
        if len(output) == sampling.max_tokens or len(tokens) == max_model_len:
            return output, "length"


def name(request_id: str, choice: int) -> str:
    """What a choice is called here; the first one as its request."""
    return f"{request_id}#{choice}" if choice else request_id


class PagedFakeRunner:
    """Keeps its KV (here the tokens themselves) in blocks, and sees a request's past through its block table only."""

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        self.slots: list[int | None] = [None] * (num_blocks * block_size)
        self.block_size = block_size
        self.failing: set[str] = set()  # requests whose row comes out as NaN

    def execute(self, plan: StepPlan) -> StepResult:
        """Copy blocks, store every token, then sample."""
        assert not {source for source, _ in plan.copies} & {destination for _, destination in plan.copies}
        size = self.block_size
        for source, destination in plan.copies:
            self.slots[destination * size : (destination + 1) * size] = self.slots[source * size : (source + 1) * size]
        for request in plan.requests:
            for position, token_id in enumerate(request.token_ids, start=request.num_computed_tokens):
                self.slots[self.slot(request, position)] = token_id
        return StepResult(
            plan.step, tuple(self.sample(r, choice) for r in plan.requests if r.needs_token for choice in r.choices)
        )

    def sample(self, request: ScheduledRequest, choice: int) -> RequestResult:
        """The token after what the request's block table holds."""
        if request.request_id in self.failing:
            return RequestResult(error="logits are NaN")
        context = []
        for position in range(request.num_computed_tokens + len(request.token_ids)):
            token_id = self.slots[self.slot(request, position)]
            assert token_id is not None, f"{request.request_id} reads a slot that was never written"
            context.append(token_id)
        return RequestResult(token_id=next_token(tuple(context), choice))

    def slot(self, request: ScheduledRequest, position: int) -> int:
        """Where a position's token is kept."""
        return request.block_ids[position // self.block_size] * self.block_size + position % self.block_size


class Engine:
    """A scheduler with its runner, stepped by hand; collects what each request got."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_model_len: int | None = None,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 16,
    ) -> None:
        self.max_model_len = max_model_len or num_blocks * block_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.scheduler = Scheduler(
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=self.max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            eos_token_ids=frozenset({EOS}),
        )
        self.runner = PagedFakeRunner(num_blocks=num_blocks, block_size=block_size)
        self.outputs: dict[str, tuple[int, ...]] = {}
        self.finished: dict[str, str] = {}
        self.num_steps = 0

    def add(self, request_id: str, num_prompt_tokens: int, *, max_tokens: int = 4, **options: int) -> None:
        """Add a request that runs to max_tokens."""
        prompt = tuple(1 + i % 7 for i in range(num_prompt_tokens))
        self.add_request(request_id, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True), **options)

    def add_request(self, request_id: str, prompt: tuple[int, ...], sampling: SamplingParams, **options: int) -> None:
        """Add a request; the options are AddRequest's."""
        message = AddRequest(request_id=request_id, prompt_token_ids=prompt, sampling=sampling, **options)
        self.scheduler.add(message)
        self.outputs |= {name(request_id, choice): () for choice in range(message.num_choices)}

    def step(self) -> dict[str, int]:
        """One step; the number of tokens computed for each request in it."""
        plan = self.scheduler.schedule()
        if plan is None:
            assert not self.scheduler.has_requests
            return {}
        assert 0 < plan.num_tokens <= self.max_num_batched_tokens
        assert all(request.token_ids for request in plan.requests)
        self.finish_step(plan)
        num_tokens = {name(request.request_id, request.choice): len(request.token_ids) for request in plan.requests}
        assert len(num_tokens) == len(plan.requests)
        return num_tokens

    def finish_step(self, plan: StepPlan) -> None:
        """Compute a plan and collect what the requests got."""
        self.num_steps += 1
        for update in self.scheduler.update(plan, self.runner.execute(plan)):
            key = name(update.request_id, update.choice)
            assert key not in self.finished
            self.outputs[key] += update.token_ids
            if update.finish_reason is not None:
                self.finished[key] = update.finish_reason
        self.scheduler.check_integrity()

    def run(self, max_steps: int = 10_000) -> None:
        """Step until nothing is left."""
        for _ in range(max_steps):
            if not self.step():
                return
        raise AssertionError(f"not idle after {max_steps} steps")


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
    assert engine.step() == {"big": 15, "small": 1}


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


def test_when_blocks_run_out_the_latest_admitted_is_preempted_and_recomputed_first() -> None:
    engine = Engine(num_blocks=6, block_size=4, max_num_seqs=2, max_num_batched_tokens=32)
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
    assert set(engine.finished.values()) == {"length"}
    for request_id in ("old", "new"):
        assert (
            engine.outputs[request_id] == generate((1, 2, 3, 4), SamplingParams(max_tokens=17, ignore_eos=True), 99)[0]
        )


def test_a_request_that_needs_the_whole_pool_runs_to_its_end_beside_others() -> None:
    engine = Engine(num_blocks=4, block_size=4)
    engine.add("small", 3, max_tokens=6)
    engine.add("whole pool", 10, max_tokens=6)
    engine.add("another", 3, max_tokens=6)
    engine.run()
    assert engine.finished == dict.fromkeys(("small", "whole pool", "another"), "length")


def test_the_stats_tell_used_slots_from_allocated_ones() -> None:
    engine = Engine(num_blocks=8, block_size=4, max_num_seqs=1)
    engine.add("a", 5)
    engine.add("b", 5)
    engine.step()
    stats = engine.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.step) == (1, 1, 1)
    assert (stats.num_used_blocks, stats.num_blocks, stats.num_used_slots) == (2, 8, 5)


def test_short_prompts_overtake_a_long_one_that_keeps_a_quarter_of_the_budget() -> None:
    engine = Engine(max_num_seqs=8, max_num_batched_tokens=16)
    engine.add("long", 100)
    assert engine.step() == {"long": 16}
    for request_id in ("short 1", "short 2", "short 3"):
        engine.add(request_id, 6, max_tokens=1)
    assert engine.step() == {"short 1": 6, "short 2": 6, "long": 4}
    assert engine.step() == {"short 3": 6, "long": 10}


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
    room = (64 - num_decoding) * (OLDEST_PREFILL_PARTS - 1) // OLDEST_PREFILL_PARTS
    fitting = {f"short {i}": length for i, length in enumerate(short_lengths) if sum(short_lengths[: i + 1]) <= room}
    for request_id, length in fitting.items():
        engine.add(request_id, length)
    step = engine.step()
    assert {request_id: step.get(request_id) for request_id in fitting} == fitting


@settings(deadline=None)
@given(
    max_num_seqs=st.integers(4, 8),
    num_spare_tokens=st.integers(0, 20),
    lengths=st.lists(st.integers(1, 80), min_size=1, max_size=4),
    short_length=st.integers(1, 6),
)
def test_a_long_prompt_is_done_within_its_bound_however_many_short_ones_keep_coming(
    max_num_seqs: int, num_spare_tokens: int, lengths: list[int], short_length: int
) -> None:
    budget = max_num_seqs + num_spare_tokens
    engine = Engine(num_blocks=1000, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    for i, length in enumerate(lengths):
        engine.add(f"long {i}", length, max_tokens=1)
    num_tokens_a_step = -(-(budget - max_num_seqs + 1) // OLDEST_PREFILL_PARTS)
    bound = 0
    for i, length in enumerate(lengths):
        bound += -(-length // num_tokens_a_step)
        while f"long {i}" not in engine.finished:
            for k in range(max_num_seqs):
                engine.add(f"short {engine.num_steps}-{k}", short_length, max_tokens=2)
            engine.step()
            assert engine.num_steps <= bound


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
    sampling = SamplingParams(max_tokens=3, ignore_eos=True)
    prompt = tuple(1 + i % 7 for i in range(10))
    for choice in range(3):
        assert engine.outputs[name("a", choice)] == generate(prompt, sampling, 99, choice)[0]


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
    for choice in range(4):
        sampling = SamplingParams(max_tokens=10, ignore_eos=True)
        assert engine.outputs[name("a", choice)] == generate((1, 2, 3, 4, 5, 6), sampling, 16, choice)[0]


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


class AnyTrafficOnAnyPool(RuleBasedStateMachine):
    """Requests come, are aborted and fail at random on tiny pools; the rest must not notice."""

    @initialize(
        num_blocks=st.integers(2, 12),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 5),
        num_spare_tokens=st.integers(0, 12),
    )
    def start(self, num_blocks: int, block_size: int, max_num_seqs: int, num_spare_tokens: int) -> None:
        """Start an engine whose longest request fills the whole pool."""
        self.engine = Engine(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + num_spare_tokens,
        )
        self.expected: dict[str, tuple[tuple[int, ...], str]] = {}
        self.longest: dict[str, int] = {}  # living requests in order of arrival: most tokens that each can have
        self.cut_short: set[str] = set()  # aborted, or made to fail

    @rule(
        data=st.data(),
        max_tokens=st.integers(1, 30),
        ignore_eos=st.booleans(),
        stop_token_ids=st.sampled_from([(), (), (7,)]),
    )
    def add(self, data: st.DataObject, max_tokens: int, ignore_eos: bool, stop_token_ids: tuple[int, ...]) -> None:  # noqa: FBT001 - hypothesis passes by name
        """Add any request that is not refused."""
        token_ids = st.integers(0, NUM_TOKEN_IDS - 1)
        prompt = tuple(data.draw(st.lists(token_ids, min_size=1, max_size=self.engine.max_model_len - 1)))
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, stop_token_ids=stop_token_ids)
        request_id = f"r{len(self.expected)}"
        self.expected[request_id] = generate(prompt, sampling, self.engine.max_model_len)
        self.longest[request_id] = len(prompt) + max_tokens
        self.engine.add_request(request_id, prompt, sampling)

    @precondition(lambda self: self.longest)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """Abort any living request."""
        request_id = data.draw(st.sampled_from(sorted(self.longest)))
        self.engine.scheduler.abort(request_id)
        self.cut_short.add(request_id)
        del self.longest[request_id]

    @precondition(lambda self: self.longest)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """Let any living request fail when it samples next."""
        request_id = data.draw(st.sampled_from(sorted(self.longest)))
        self.engine.runner.failing.add(request_id)
        self.cut_short.add(request_id)

    @rule(num_steps=st.integers(1, 8))
    def run_steps(self, num_steps: int) -> None:
        """Let some steps pass."""
        for _ in range(num_steps):
            self.step()

    def step(self) -> None:
        """One step, in which the oldest request always gets on."""
        step = self.engine.step()
        assert next(iter(self.longest), None) in {None, *step}
        self.longest = {
            request_id: n for request_id, n in self.longest.items() if request_id not in self.engine.finished
        }

    @invariant()
    def integrity(self) -> None:
        """Blocks, queues and requests agree."""
        self.engine.scheduler.check_integrity()

    def teardown(self) -> None:
        """All end, within as many steps as they have tokens, with what they would have got alone."""
        for _ in range(sum(self.longest.values())):
            self.step()
        assert not self.engine.scheduler.has_requests
        assert self.engine.scheduler.stats().num_used_blocks == 0
        for request_id, (output, finish_reason) in self.expected.items():
            if request_id in self.cut_short:
                num_tokens = len(self.engine.outputs[request_id])
                assert self.engine.outputs[request_id] == output[:num_tokens]
            else:
                assert self.engine.outputs[request_id] == output
                assert self.engine.finished[request_id] == finish_reason


AnyTrafficOnAnyPool.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_any_traffic_on_any_pool_gives_each_request_what_it_would_get_alone = AnyTrafficOnAnyPool.TestCase
