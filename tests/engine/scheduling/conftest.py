"""A scheduler with a fake runner that knows which KV every slot holds, and whose every reader it checks."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from octavo_engine.config import SpeculativeConfig
from octavo_engine.messages import AddRequest
from octavo_engine.plan import (
    RequestResult,
    SamplingParams,
    ScheduledRequest,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from octavo_engine.scheduler import Scheduler
from octavo_engine.sizing import NUM_PROMPT_ROWS
from octavo_engine.speculation import DraftProposer, Speculation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from octavo_engine.speculation import Proposer

EOS = 0
NUM_TOKEN_IDS = 24  # small, so that EOS comes up by itself


def next_token(token_ids: tuple[int, ...], choice: int = 0) -> int:
    """The "model" with its sampler: any token of the context and the choice change what comes next."""
    return hashlib.blake2s(bytes((*token_ids, choice))).digest()[0] % NUM_TOKEN_IDS


def seen(token_ids: tuple[int, ...], adapter: int) -> tuple[int, ...]:
    """What KV depends on: the tokens up to it, and the adapter that computes it."""
    return (NUM_TOKEN_IDS + adapter, *token_ids) if adapter else token_ids


def generate(
    prompt: tuple[int, ...], sampling: SamplingParams, max_model_len: int, choice: int = 0, adapter: int = 0
) -> tuple[tuple[int, ...], str]:
    """What a choice of a request gets when it is alone in an engine without limits."""
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS})
    tokens = prompt
    while True:
        tokens += (next_token(seen(tokens, adapter), choice),)
        output = tokens[len(prompt) :]
        if output[-1] in stops:
            return output, "stop"
        if len(output) == sampling.max_tokens or len(tokens) == max_model_len:
            return output, "length"


def name(request_id: str, choice: int) -> str:
    """What a choice is called here; the first one as its request."""
    return f"{request_id}#{choice}" if choice else request_id


class FakeRunner:
    """Keeps as KV, in the slots of its blocks, all that the KV depends on: the tokens up to its own, and the adapter.

    So it sees at once when a request reads what is not its own: shared wrongly, not copied, overwritten, stale.
    """

    def __init__(self, *, num_blocks: int, block_size: int, drafter: Oracle | None = None) -> None:
        self.drafter = drafter  # makes the guesses that are left to the runner
        self.slots: list[tuple[int, ...] | None] = [None] * (num_blocks * block_size)  # None: never written, or NaN
        self.block_size = block_size
        self.failing: set[str] = set()  # requests whose KV and logits come out as NaN from now on
        self.sequences: dict[str, tuple[int, ...]] = {}  # all tokens of each choice, as its user knows them
        self.num_computed = 0  # tokens

    def execute(self, plan: StepPlan) -> StepResult:
        """Copy blocks, then check, store and sample each request."""
        plan, drafted = self.complete(plan)
        destinations = [destination for _, destination in plan.copies]
        assert len(set(destinations)) == len(destinations)
        assert not {source for source, _ in plan.copies} & set(destinations)
        size = self.block_size
        for source, destination in plan.copies:
            self.slots[destination * size : (destination + 1) * size] = self.slots[source * size : (source + 1) * size]
        for request in plan.requests:
            self.store(request)
        for request in plan.requests:
            self.check(request)
        rows = tuple(row for request in plan.requests if request.needs_token for row in self.sample(request))
        told = tuple(self.told(request) for request in plan.requests if request.prompt_targets)
        return StepResult(plan.step, rows, drafted, told)

    def complete(self, plan: StepPlan) -> tuple[StepPlan, tuple[tuple[int, ...], ...]]:
        """Put guesses in where they are left open."""
        if self.drafter is None:
            return plan, ()
        requests = list(plan.requests)
        drafted = []
        for place, request in enumerate(requests):
            if request.num_proposed:
                known = request.token_ids[: -request.num_proposed]
                before = self.sequences[name(request.request_id, request.choice)][: request.num_computed_tokens]
                drafted.append(tuple(self.drafter.propose((*before, *known), request.num_proposed)))
                requests[place] = replace(request, token_ids=known + drafted[-1])
        return StepPlan(plan.step, tuple(requests), plan.copies), tuple(drafted)

    def store(self, request: ScheduledRequest) -> None:
        """Write the KV of the step's tokens, guesses at the end included."""
        sequence = self.sequences[name(request.request_id, request.choice)]
        start, end = request.num_computed_tokens, request.num_computed_tokens + len(request.token_ids)
        assert request.token_ids[: len(request.token_ids) - request.num_proposed] == sequence[start:end]
        assert request.needs_token == (end - request.num_proposed == len(sequence))
        self.num_computed += end - start
        for position in range(start, end):
            failing = request.request_id in self.failing
            own = seen(self.context(request)[: position + 1], request.adapter)
            self.slots[self.slot(request, position)] = None if failing else own

    def check(self, request: ScheduledRequest) -> None:
        """Read, after all have written, what attention reads."""
        if request.request_id not in self.failing:
            context = self.context(request)
            for position in range(len(context)):
                own = seen(context[: position + 1], request.adapter)
                assert self.slots[self.slot(request, position)] == own, (
                    f"{request.request_id} reads another's KV at {position}"
                )

    def context(self, request: ScheduledRequest) -> tuple[int, ...]:
        """All tokens of a request up to the last one of the step, which may be a guess."""
        before = self.sequences[name(request.request_id, request.choice)][: request.num_computed_tokens]
        return before + request.token_ids

    def sample(self, request: ScheduledRequest) -> list[RequestResult]:
        """The tokens after what the request's block table holds: of each choice, then after each guess."""
        if request.request_id in self.failing:
            return [RequestResult(error="logits are NaN")] * request.num_results
        context = self.context(request)
        newest = context[: len(context) - request.num_proposed]
        drawn = [next_token(seen(newest, request.adapter), choice) for choice in request.choices]
        for choice, token_id in zip(request.choices, drawn, strict=True):
            self.sequences[name(request.request_id, choice)] = (*newest, token_id)
        for end in range(len(newest) + 1, len(context) + 1):
            drawn.append(next_token(seen(context[:end], request.adapter), request.choice))
            key = name(request.request_id, request.choice)
            if self.sequences[key] == context[:end]:
                self.sequences[key] += (drawn[-1],)
        return [RequestResult(token_id=token_id) for token_id in drawn]

    def told(self, request: ScheduledRequest) -> tuple[TokenLogprobs, ...]:
        """The logprob of each token of a prompt is its position."""
        first = request.num_computed_tokens + 1
        num_targets = len(request.prompt_targets)
        assert request.prompt_targets == self.sequences[request.request_id][first : first + num_targets]
        assert num_targets == len(request.token_ids) - request.needs_token
        return tuple(TokenLogprobs(position, ()) for position in range(first, first + num_targets))

    def slot(self, request: ScheduledRequest, position: int) -> int:
        """Where a position's KV is kept."""
        return request.block_ids[position // self.block_size] * self.block_size + position % self.block_size


def answer(plan: StepPlan) -> StepResult:
    """The same token to everyone, without looking: for long runs."""
    num_results = sum(len(request.choices) for request in plan.requests if request.needs_token)
    return StepResult(plan.step, (RequestResult(token_id=1),) * num_results)


class Oracle:
    """Guesses what the "model" draws for a first choice; one of `wrong_one_in`, if that is not 0, is wrong."""

    def __init__(self, num_guesses: int, wrong_one_in: int = 0) -> None:
        self.num_guesses, self.wrong_one_in = num_guesses, wrong_one_in
        self.num_right: list[int] = []

    def propose(self, token_ids: Sequence[int], most: int) -> list[int]:
        """See Proposer."""
        guesses: list[int] = []
        for _ in range(min(most, self.num_guesses)):
            context = (*token_ids, *guesses)
            is_wrong = self.wrong_one_in and sum(context) % self.wrong_one_in == 0
            guesses.append((next_token(context) + bool(is_wrong)) % NUM_TOKEN_IDS)
        return guesses

    def learn(self, num_accepted: int) -> None:
        """See Proposer."""
        self.num_right.append(num_accepted)


class Engine:
    """A scheduler with its runner, stepped by hand; collects what each choice of each request got."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_model_len: int | None = None,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 16,
        enable_prefix_caching: bool = True,
        positions_a_token: int | None = None,
        make_proposer: Callable[[], Proposer] | None = None,
        drafter: Oracle | None = None,
    ) -> None:
        if drafter is not None:
            config = SpeculativeConfig(num_speculative_tokens=drafter.num_guesses, model=Path("draft.gguf"))
            make_proposer = partial(DraftProposer, config)
        self.max_model_len = max_model_len or num_blocks * block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.scheduler = Scheduler(
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=self.max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            eos_token_ids=frozenset({EOS}),
            enable_prefix_caching=enable_prefix_caching,
            positions_a_token=positions_a_token,
            speculation=None if make_proposer is None else Speculation(make_proposer),
        )
        self.runner = FakeRunner(num_blocks=num_blocks, block_size=block_size, drafter=drafter)
        self.outputs: dict[str, tuple[int, ...]] = {}
        self.finished: dict[str, str] = {}
        self.num_cached_tokens: dict[str, int] = {}
        self.alone: dict[str, tuple[tuple[int, ...], str]] = {}  # what each should get, and how it should end
        self.num_prompt_tokens: dict[str, int] = {}
        self.num_told: dict[str, int] = {}  # tokens of the prompts of those that ask for their logprobs
        self.num_steps = 0
        self._num_added = 0

    def add(self, request_id: str, num_prompt_tokens: int, *, max_tokens: int = 4, **options: int) -> None:
        """Add a request that runs to max_tokens, with a prompt that begins like no other."""
        self._num_added += 1
        prompt = tuple((self._num_added >> shift & 7) + 1 for shift in (0, 3, 6))
        prompt = (prompt + tuple(1 + i % 7 for i in range(num_prompt_tokens)))[:num_prompt_tokens]
        self.add_request(request_id, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True), **options)

    def add_request(self, request_id: str, prompt: tuple[int, ...], sampling: SamplingParams, **options: int) -> None:
        """Add a request; the options are AddRequest's."""
        message = AddRequest(request_id=request_id, prompt_token_ids=prompt, sampling=sampling, **options)
        self.scheduler.add(message)
        self.num_prompt_tokens[request_id] = len(prompt)
        if sampling.num_prompt_logprobs is not None:
            self.num_told[request_id] = 0
        for choice in range(message.num_choices):
            key = name(request_id, choice)
            self.outputs[key] = ()
            self.runner.sequences[key] = prompt
            self.alone[key] = generate(prompt, sampling, self.max_model_len, choice, message.adapter)

    def step(self) -> dict[str, int]:
        """One step; the number of tokens computed for each choice in it."""
        plan = self.scheduler.schedule()
        if plan is None:
            assert not self.scheduler.has_requests
            return {}
        assert 0 < plan.num_tokens <= self.max_num_batched_tokens
        assert all(request.token_ids for request in plan.requests)
        num_rows = sum(request.num_logits - request.num_proposed for request in plan.requests)
        assert num_rows <= self.max_num_seqs + NUM_PROMPT_ROWS
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
            for logprobs in update.prompt_logprobs:
                self.num_told[update.request_id] += 1
                assert logprobs.logprob == self.num_told[update.request_id], "told twice, or not"
            if update.token_ids and update.request_id in self.num_told:
                num_to_tell = self.num_prompt_tokens[update.request_id] - 1
                assert self.num_told[update.request_id] == num_to_tell, "a token before its prompt is told"
            self.outputs[key] += update.token_ids
            self.num_cached_tokens[key] = update.num_cached_tokens
            if update.finish_reason is not None:
                self.finished[key] = update.finish_reason
        self.scheduler.check_integrity()

    def check_outputs(self) -> None:
        """Assert that all ended and got what each gets alone."""
        assert {key: (self.outputs[key], reason) for key, reason in self.finished.items()} == self.alone

    def run(self, max_steps: int = 10_000) -> None:
        """Step until nothing is left."""
        for _ in range(max_steps):
            if not self.step():
                return
        raise AssertionError(f"not idle after {max_steps} steps")
