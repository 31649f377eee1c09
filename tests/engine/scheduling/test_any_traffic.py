"""Requests come, fork, are aborted, preempted and fail at random on tiny pools; the rest must not notice."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.engine.scheduling.conftest import NUM_TOKEN_IDS, Engine, name

from octavo_engine.plan import SamplingParams

SHARED = tuple(3 + i * i % 17 for i in range(60))  # many prompts begin like this


class AnyTrafficOnAnyPool(RuleBasedStateMachine):
    """The runner checks after every step that each request reads its own KV; here, that each gets its own tokens."""

    @initialize(
        num_blocks=st.integers(2, 12),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 5),
        num_spare_tokens=st.integers(0, 12),
        enable_prefix_caching=st.sampled_from([True, True, False]),
    )
    def start(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        num_spare_tokens: int,
        enable_prefix_caching: bool,
    ) -> None:
        """Start an engine whose longest request fills the whole pool."""
        self.max_num_seqs = max_num_seqs
        self.engine = Engine(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + num_spare_tokens,
            enable_prefix_caching=enable_prefix_caching,
        )
        self.num_added = 0
        self.longest: dict[str, int] = {}  # living choices: most tokens that each can have
        self.cut_short: set[str] = set()  # aborted, or made to fail

    @rule(
        data=st.data(),
        max_tokens=st.integers(1, 30),
        num_choices=st.sampled_from([1, 1, 1, 2, 3]),
        priority=st.sampled_from([0, 0, 0, -1, 7]),
        ignore_eos=st.booleans(),
        stop_token_ids=st.sampled_from([(), (), (7,)]),
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
    ) -> None:
        """Add any request that is not refused."""
        num_prompt_tokens = data.draw(st.integers(1, self.engine.max_model_len - 1))
        num_shared = data.draw(st.integers(0, num_prompt_tokens))
        own = st.lists(st.integers(0, NUM_TOKEN_IDS - 1), min_size=1, max_size=3)
        prompt = SHARED[:num_shared] + tuple(data.draw(own)) * num_prompt_tokens
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, stop_token_ids=stop_token_ids)
        request_id = f"r{self.num_added}"
        self.num_added += 1
        num_choices = min(num_choices, self.max_num_seqs)
        self.engine.add_request(
            request_id, prompt[:num_prompt_tokens], sampling, num_choices=num_choices, priority=priority
        )
        for choice in range(num_choices):
            self.longest[name(request_id, choice)] = num_prompt_tokens + max_tokens

    @precondition(lambda self: self.longest)
    @rule(data=st.data(), whole=st.booleans())
    def abort(self, data: st.DataObject, *, whole: bool) -> None:
        """Abort any living request, or one of its choices if they have begun."""
        key = data.draw(st.sampled_from(sorted(self.longest)))
        request_id, _, choice = key.partition("#")
        ended = [key] if not whole and self.engine.outputs[key] else self.living(request_id)
        self.engine.scheduler.abort(request_id, int(choice or 0) if ended == [key] else None)
        self.cut_short.update(ended)
        for key in ended:
            del self.longest[key]

    @precondition(lambda self: self.longest)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """Let all that any living request computes from now on be NaN."""
        request_id = data.draw(st.sampled_from(sorted(self.longest))).partition("#")[0]
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
        """One step, in which the first of the running requests always gets on."""
        running = self.engine.scheduler._running
        first = name(running[0].request_id, running[0].choice) if running else None
        step = self.engine.step()
        assert first in {None, *step}
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
            if key in self.cut_short:
                assert self.engine.outputs[key] == output[: len(self.engine.outputs[key])]
            else:
                assert (self.engine.outputs[key], self.engine.finished[key]) == (output, finish_reason)


AnyTrafficOnAnyPool.TestCase.settings = settings(max_examples=330, stateful_step_count=40, deadline=None)
test_any_traffic_on_any_pool_gives_each_request_what_it_would_get_alone = AnyTrafficOnAnyPool.TestCase
