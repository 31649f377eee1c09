"""Requests come, fork, are aborted, preempted and fail at random on tiny pools; the rest must not notice."""

from __future__ import annotations

from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.engine.scheduling.conftest import NUM_TOKEN_IDS, Engine, Oracle, name

from octavo_engine.plan import SamplingParams

MIN_STEPS = 10_000
SHARED = tuple(3 + i * i % 17 for i in range(60))  # many prompts begin like this, others like one of the last requests
NUM_RECENT = 4


class AnyTrafficOnAnyPool(RuleBasedStateMachine):
    """The runner checks after every step that each request reads its own KV; here, that each gets its own tokens."""

    num_steps: ClassVar[int] = 0  # in all examples

    @initialize(
        num_blocks=st.integers(2, 24),
        block_size=st.sampled_from([1, 1, 2, 3, 4]),
        max_num_seqs=st.integers(1, 5),
        num_spare_tokens=st.sampled_from([0, 0, 1, 4, 12]),
        enable_prefix_caching=st.sampled_from([True, True, False]),
        num_guesses=st.sampled_from([0, 1, 2, 5]),
        wrong_one_in=st.sampled_from([0, 2, 5]),
        drafts=st.booleans(),
    )
    def start(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        num_spare_tokens: int,
        enable_prefix_caching: bool,
        num_guesses: int,
        wrong_one_in: int,
        drafts: bool,
    ) -> None:
        """Start an engine whose longest request fills the whole pool."""
        self.max_num_seqs = max_num_seqs
        self.engine = Engine(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + num_spare_tokens,
            enable_prefix_caching=enable_prefix_caching,
            make_proposer=(lambda: Oracle(num_guesses, wrong_one_in)) if num_guesses and not drafts else None,
            drafter=Oracle(num_guesses, wrong_one_in) if num_guesses and drafts else None,
        )
        self.num_added = 0
        self.longest: dict[str, int] = {}  # living choices: most tokens that each can have
        self.cut_short: set[str] = set()  # made to fail
        self.aborted: dict[str, tuple[int, ...]] = {}  # what each had got when it was aborted

    @rule(
        data=st.data(),
        max_tokens=st.integers(1, 30),
        num_choices=st.sampled_from([1, 1, 1, 2, 3]),
        priority=st.sampled_from([0, 0, 0, -1, 7]),
        ignore_eos=st.booleans(),
        stop_token_ids=st.sampled_from([(), (), (7,)]),
        longest=st.sampled_from([3, 8, 100]),
        is_alike=st.booleans(),
        num_prompt_logprobs=st.sampled_from([None, None, None, 2]),
        fails=st.sampled_from([False, False, False, False, True]),
        adapter=st.sampled_from([0, 0, 0, 1, 2]),
    )
    def add(
        self,
        data: st.DataObject,
        *,
        max_tokens: int,
        num_choices: int,
        priority: int,
        ignore_eos: bool,
        stop_token_ids: tuple[int, ...],
        longest: int,
        is_alike: bool,
        num_prompt_logprobs: int | None,
        fails: bool,
        adapter: int,
    ) -> None:
        """Add any request that is not refused; with `fails`, one whose KV and logits are NaN from the beginning."""
        longest = min(longest, self.engine.max_model_len - 1)
        num_prompt_tokens = data.draw(st.integers(1, longest))
        num_shared = num_prompt_tokens if is_alike else data.draw(st.integers(0, num_prompt_tokens))
        shared = data.draw(st.sampled_from([SHARED, *list(self.engine.runner.sequences.values())[-NUM_RECENT:]]))
        own = st.lists(st.integers(0, NUM_TOKEN_IDS - 1), min_size=1, max_size=3)
        prompt = shared[:num_shared] + tuple(data.draw(own)) * num_prompt_tokens
        sampling = SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            stop_token_ids=stop_token_ids,
            num_prompt_logprobs=num_prompt_logprobs,
        )
        request_id = f"r{self.num_added}"
        self.num_added += 1
        num_choices = min(num_choices, self.max_num_seqs)
        self.engine.add_request(
            request_id,
            prompt[:num_prompt_tokens],
            sampling,
            num_choices=num_choices,
            priority=priority,
            adapter=adapter,
        )
        for choice in range(num_choices):
            self.longest[name(request_id, choice)] = num_prompt_tokens + max_tokens
        if fails:
            self.let_fail(request_id)

    @precondition(lambda self: self.longest)
    @rule(data=st.data(), whole=st.booleans())
    def abort(self, data: st.DataObject, *, whole: bool) -> None:
        """Abort any living request, or one of its choices if they have begun."""
        key = data.draw(st.sampled_from(sorted(self.longest)))
        request_id, _, choice = key.partition("#")
        ended = [key] if not whole and self.engine.outputs[key] else self.living(request_id)
        self.engine.scheduler.abort(request_id, int(choice or 0) if ended == [key] else None)
        for key in ended:
            self.aborted[key] = self.engine.outputs[key]
            del self.longest[key]

    @precondition(lambda self: self.longest)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """Let all that any living request computes from now on be NaN."""
        self.let_fail(data.draw(st.sampled_from(sorted(self.longest))).partition("#")[0])

    def let_fail(self, request_id: str) -> None:
        """Spoil what a request computes from now on."""
        self.engine.runner.failing.add(request_id)
        self.cut_short.update(self.living(request_id))

    def living(self, request_id: str) -> list[str]:
        """The living choices of a request."""
        return [key for key in self.longest if key.partition("#")[0] == request_id]

    @rule(num_steps=st.integers(1, 12))
    def run_steps(self, num_steps: int) -> None:
        """Let some steps pass."""
        for _ in range(num_steps):
            self.step()

    def step(self) -> None:
        """One step, in which the first of the running requests always gets on, or one before it that it let in."""
        scheduler = self.engine.scheduler
        first, waiting = scheduler._running[:1], list(scheduler._waiting)
        step = self.engine.step()
        for request in first:
            before = [request, *(other for other in waiting if other.order < request.order)]
            assert any(name(other.request_id, other.choice) in step for other in before)
        type(self).num_steps += 1
        self.longest = {key: n for key, n in self.longest.items() if key not in self.engine.finished}

    @invariant()
    def integrity(self) -> None:
        """Blocks, queues and requests agree."""
        self.engine.scheduler.check_integrity()

    def teardown(self) -> None:
        """All end in bounded time, with what they would have got alone."""
        for _ in range(sum(self.longest.values()) * (1 + len(self.longest))):
            if not self.longest:
                break
            self.step()
        assert not self.engine.scheduler.has_requests
        stats = self.engine.scheduler.stats()
        assert (stats.num_used_blocks, stats.num_used_slots) == (0, 0)
        for key, (output, finish_reason) in self.engine.alone.items():
            told = self.engine.outputs[key]
            if key in self.aborted:
                assert told == self.aborted[key] == output[: len(told)]
                assert key not in self.engine.finished
            elif key in self.cut_short:
                assert told == output[: len(told)]
            else:
                assert (told, self.engine.finished[key]) == (output, finish_reason)


def test_any_traffic_on_any_pool_gives_each_request_what_it_would_get_alone() -> None:
    AnyTrafficOnAnyPool.num_steps = 0
    run_state_machine_as_test(
        AnyTrafficOnAnyPool, settings=settings(max_examples=330, stateful_step_count=40, deadline=None)
    )
    assert AnyTrafficOnAnyPool.num_steps >= MIN_STEPS
