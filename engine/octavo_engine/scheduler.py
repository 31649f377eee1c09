"""Which request computes how many tokens in the next step, and which KV blocks it gets.

Called by the engine loop (core.py), one step at a time: `schedule()`, then `update()` with what the runner made of the
plan. The only place where a Request is mutated. Knows nothing of tensors, text or HTTP.

There are no phases: every running request lags behind its known tokens, and a step is one budget of
`max_num_batched_tokens` given to those that lag:

1. Decodes (one token behind), all of them. `max_num_batched_tokens >= max_num_seqs`, so there is always room.
2. Admissions in order, while a seat (`max_num_seqs`) is free and the KV of all tokens known so far fits now and leaves
   each running request one block to grow into. (Where the pool is too small for the load, that block spares about two
   thirds of the recomputation for 1 to 2 % more steps.) Their blocks are taken at once, so a prefill that has begun
   never runs out of blocks. A request for n answers takes n seats, and blocks for its prompt alone.
3. Prefills share what is left after the decodes (prefills.py): the shortest remaining first, of one priority, as far as
   they can be finished. If any can, the others wait, but for the first in order, which is sure of a part. If none can,
   the step is filled up with them.

"In order" is by priority (lower first), then arrival, then choice. When a decode finds no free block, the running
request that is last in order is preempted: its blocks are freed, and it waits in its place in the queue to be
recomputed. So the first in order is never preempted: every request fits alone, it runs to its end, and then the next
one is the first. Of one priority, running and waiting requests together are always in order of arrival.

Once its prompt is computed, a request for n answers forks: its choices hold the same blocks, and each but the last one
to write copies the partly filled last block first, by the plan's `copies`.

With speculative decoding, decodes may compute guesses at what comes next too, out of what budget and blocks all of that
leaves. A guess that is drawn is a token like any other; what follows one that is not is forgotten, and its slots are
written again. A request's outcome does not depend on its guesses.

Where the device begins the next step before its plan is made (`reserves_ahead`: gpu/runner.py), requests that generate
get the block for the token after the one that is being drawn in this step already, if one is free.

A full block is offered to the prefix cache once a token sampled after it was sound, so that a request whose KV is
spoilt (NaN) spoils nobody else's; one that is preempted before finds its own blocks alone. The blocks of ended and
preempted requests stay in the cache until memory is needed; after an error they are forgotten.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import islice, pairwise
from operator import attrgetter
from typing import TYPE_CHECKING

from msgspec.structs import replace

from octavo_engine.errors import RequestInvalid
from octavo_engine.kvcache.manager import KVCacheManager
from octavo_engine.messages import RequestUpdate, SchedulerStats
from octavo_engine.plan import TO_BE_DRAFTED, ScheduledRequest, StepPlan
from octavo_engine.prefills import PrefillRule
from octavo_engine.request import Request, RequestStatus
from octavo_engine.speculation import count_right

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo_engine.grammar import Grammar
    from octavo_engine.messages import AddRequest, FinishReason
    from octavo_engine.plan import RequestResult, StepResult
    from octavo_engine.speculation import Speculation

_order = attrgetter("order")


class Scheduler:
    """Continuous batching over a paged KV cache.

    Args:
        num_blocks: blocks in the KV cache; together they hold at least max_model_len tokens.
        block_size: KV slots in a block.
        max_model_len: longest prompt + output, in tokens.
        max_num_seqs: requests that may run in one step.
        max_num_batched_tokens: token budget of one step, at least max_num_seqs.
        eos_token_ids: the model's end-of-sequence tokens.
        enable_prefix_caching: whether requests find the KV of others that began alike.
        positions_a_token: what LoadedModel says; see prefills.py.
        reserves_ahead: whether the next step may be begun before its plan is made; see above.
        speculation: what guesses come from, with speculative decoding.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        eos_token_ids: frozenset[int],
        enable_prefix_caching: bool = True,
        positions_a_token: int | None = None,
        reserves_ahead: bool = False,
        speculation: Speculation | None = None,
    ) -> None:
        assert max_model_len <= num_blocks * block_size, "a request of max_model_len tokens must fit alone"
        assert max_num_batched_tokens >= max_num_seqs, "the budget must hold every decode"
        self._kv = KVCacheManager(
            num_blocks=num_blocks, block_size=block_size, enable_prefix_caching=enable_prefix_caching
        )
        self._max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._eos_token_ids = eos_token_ids
        self._prefill_rule = PrefillRule(positions_a_token)
        self._reserves_ahead = reserves_ahead
        self._speculation = speculation
        self._requests: dict[str, list[Request]] = {}  # the living choices of every request
        self._running: list[Request] = []  # in order
        self._waiting: list[Request] = []  # in order
        self._num_free_seats = max_num_seqs
        self._in_step: list[Request] = []  # those of the plan that is under way, in its order
        self._copies: list[tuple[int, int]] = []  # of the plan that is being made
        self._num_added = 0
        self._num_ended = 0
        self._num_preemptions = 0
        self._num_prefix_cache_queries = 0
        self._num_prefix_cache_hits = 0
        self._step = 0

    @property
    def has_requests(self) -> bool:
        """Whether anything is running or waiting: then schedule() has work."""
        return bool(self._requests)

    def add(self, message: AddRequest, grammar: Grammar | None = None) -> None:
        """Queue a request, whose answers keep to `grammar` if there is one.

        Raises:
            RequestInvalid: the prompt is empty or leaves no room for a single token of output, or more answers are
                asked for than can run at once.
        """
        num_prompt_tokens = len(message.prompt_token_ids)
        if num_prompt_tokens == 0:
            raise RequestInvalid("the prompt has no tokens", param="prompt")
        if num_prompt_tokens >= self._max_model_len:
            raise RequestInvalid(
                f"the prompt has {num_prompt_tokens} tokens; prompt and output together may have {self._max_model_len}",
                param="prompt",
                code="context_length_exceeded",
            )
        if message.num_choices > self._max_num_seqs:
            raise RequestInvalid(
                f"n is {message.num_choices}; this server generates at most {self._max_num_seqs} answers at once",
                param="n",
            )
        assert message.request_id not in self._requests, f"request id {message.request_id} is in use"
        sampling = message.sampling
        stop_token_ids = frozenset(sampling.stop_token_ids)
        request = Request(
            request_id=message.request_id,
            arrival=self._num_added,
            priority=message.priority,
            num_choices=message.num_choices,
            prompt_token_ids=message.prompt_token_ids,
            sampling=sampling,
            stop_token_ids=stop_token_ids if sampling.ignore_eos else stop_token_ids | self._eos_token_ids,
            max_num_tokens=min(num_prompt_tokens + sampling.max_tokens, self._max_model_len),
            grammar=grammar,
            proposer=None if self._speculation is None else self._speculation.make_proposer(),
            adapter=message.adapter,
        )
        self._num_added += 1
        self._requests[request.request_id] = [request]
        insort(self._waiting, request, key=_order)

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """Drop a request, or one of its choices, and free its blocks, between two steps; no update follows.

        Ids of requests that are not living are ignored, and so are choices that are not, or not yet (before the fork).
        """
        for request in list(self._requests.get(request_id, ())):
            if choice is None or (request.choice == choice and request.num_choices == 1):
                queue = self._running if request.status is RequestStatus.RUNNING else self._waiting
                del queue[bisect_left(queue, request.order, key=_order)]
                self._finish(request)

    def schedule(self) -> StepPlan | None:
        """Choose the work of the next step; None if there are no requests."""
        self._in_step, self._copies = [], []
        scheduled, prefills = self._schedule_decodes()
        self._admit(prefills)
        budget = self._max_num_batched_tokens - len(scheduled)
        if prefills:
            shares, budget = self._prefill_rule.share(prefills, budget, len(scheduled), self._num_free_seats)
            scheduled += [self._share_of_prompt(request, num_tokens) for request, num_tokens in shares]
        if self._speculation is not None:
            self._add_guesses(scheduled, budget)
        if self._reserves_ahead:
            self._reserve_ahead(scheduled)
        return StepPlan(self._step, tuple(scheduled), tuple(self._copies)) if scheduled else None

    def update(self, plan: StepPlan, result: StepResult) -> tuple[RequestUpdate, ...]:
        """Take in what a step computed and drew; an update for each choice with new tokens, or piece of a prompt."""
        assert result.step == plan.step == self._step, "steps are taken back in order"
        self._step += 1
        block_size = self._kv.block_size
        updates: list[RequestUpdate] = []
        results, drafted, told = iter(result.results), iter(result.drafted), iter(result.prompt_logprobs)
        num_ended = self._num_ended
        for request, scheduled in zip(self._in_step, plan.requests, strict=True):
            num_proposed = scheduled.num_proposed
            request.num_computed_tokens += len(scheduled.token_ids) - num_proposed
            if scheduled.prompt_targets:
                new = next(told)[max(0, request.num_told - scheduled.num_computed_tokens) :]
                request.num_told += len(new)
                updates.append(RequestUpdate(request_id=request.request_id, token_ids=(), prompt_logprobs=new))
            if not scheduled.needs_token:
                continue
            row = next(results)
            accepted: Sequence[RequestResult] = ()
            if num_proposed:
                proposed = scheduled.proposed if scheduled.proposed[0] != TO_BE_DRAFTED else next(drafted)
                *accepted, row = self._accept(request, proposed, [row, *islice(results, len(proposed))])
            if row.error is None and request.num_computed_tokens - request.num_offered_tokens >= block_size:
                self._offer_blocks(request)
            if request.num_choices == 1:
                update = self._take(request, row)
                updates.append(_after(accepted, update) if accepted else update)
            else:
                rows = [row, *islice(results, request.num_choices - 1)]
                updates += map(self._take, self._fork(request), rows)
        assert next(results, None) is None, "more results than were asked for"
        if self._num_ended > num_ended:
            self._running = [request for request in self._running if request.status is RequestStatus.RUNNING]
        return tuple(updates)

    def stats(self) -> SchedulerStats:
        """Gauges and counters as they are between two steps."""
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_used_blocks=self._kv.num_used_blocks,
            num_blocks=self._kv.num_blocks,
            num_used_slots=self._num_used_slots(),
            num_preemptions=self._num_preemptions,
            num_prefix_cache_queries=self._num_prefix_cache_queries,
            num_prefix_cache_hits=self._num_prefix_cache_hits,
            step=self._step,
            drafts=None if self._speculation is None else self._speculation.stats(),
        )

    def check_integrity(self) -> None:
        """Assert, between two steps, that queues, requests and blocks agree. O(blocks + requests)."""
        alive = sorted([*self._running, *self._waiting], key=_order)
        assert alive == sorted((r for choices in self._requests.values() for r in choices), key=_order), (
            "the queues do not hold the living requests"
        )
        for queue in (self._running, self._waiting):
            assert all(a.order < b.order for a, b in pairwise(queue)), "a queue is out of order"
        num_seats = sum(request.num_choices for request in self._running)
        assert num_seats + self._num_free_seats == self._max_num_seqs, "seats are lost or taken twice"
        assert self._num_free_seats >= 0, "more requests run than there are seats"
        for request in self._running:
            assert request.status is RequestStatus.RUNNING, f"{request.request_id} runs as {request.status}"
            assert request.num_uncomputed_tokens > 0, f"{request.request_id} has nothing to compute"
            num_slots = len(request.block_ids) * self._kv.block_size
            assert request.num_computed_tokens <= num_slots, f"{request.request_id} has KV outside its block table"
        for request in self._waiting:
            assert request.status is RequestStatus.WAITING, f"{request.request_id} waits as {request.status}"
            assert not request.block_ids, f"{request.request_id} holds blocks while it waits"
            assert request.num_computed_tokens == 0, f"{request.request_id} counts KV that is freed"
        self._kv.check_integrity((r.block_ids, r.token_ids, r.adapter) for r in self._running)

    def _schedule_decodes(self) -> tuple[list[ScheduledRequest], list[Request]]:
        """Schedule every running request that is one token behind; return these and the others, the prefills."""
        block_size = self._kv.block_size
        decodes: list[ScheduledRequest] = []
        prefills: list[Request] = []
        for request in self._running:  # preemption pops at the end, so what this loop has passed stays
            num_tokens = len(request.token_ids)
            if num_tokens - request.num_computed_tokens > 1:
                prefills.append(request)
            elif (
                num_tokens <= len(request.block_ids) * block_size and not request.shares_last_block
            ) or self._make_room(request):
                self._in_step.append(request)
                decodes.append(_share(request, (request.token_ids[-1],), True))
        return decodes, prefills

    def _make_room(self, request: Request) -> bool:
        """Give a decode a slot that it may write, if need be by preemption; False if that hit itself."""
        while (block_ids := self._writable(request)) is None:
            victim = self._running.pop()
            self._offer_blocks(victim, owner=repr(victim.order).encode())
            self._release(victim)
            victim.status = RequestStatus.WAITING
            insort(self._waiting, victim, key=_order)
            self._num_preemptions += 1
            victim.num_preemptions += 1
            if victim is request:
                return False
        if request.shares_last_block and block_ids is not request.block_ids:
            self._copies.append((request.block_ids[-1], block_ids[-1]))
        request.shares_last_block = False
        request.block_ids = block_ids
        return True

    def _writable(self, request: Request) -> tuple[int, ...] | None:
        """The block table with a slot for the newest token that no other table has; None if no block is free."""
        if request.shares_last_block:
            return self._kv.make_last_private(request.block_ids)
        return self._kv.extend(request.block_ids, request.num_tokens)

    def _admit(self, prefills: list[Request]) -> None:
        """Move waiting requests to the running ones and to `prefills`, in order, while they fit."""
        while self._waiting and self._waiting[0].num_choices <= self._num_free_seats:
            request = self._waiting[0]
            num_spare_blocks = self._max_num_seqs - self._num_free_seats
            begun = self._kv.begin(
                request.token_ids,
                request.block_hashes,
                owner=repr(request.order).encode(),
                num_spare_blocks=num_spare_blocks,
                computes_all=request.tells_prompt,
                adapter=request.adapter,
            )
            if begun is None:
                break
            del self._waiting[0]
            request.block_ids, request.num_computed_tokens = begun
            if request.num_cached_tokens is None:
                request.num_cached_tokens = request.num_computed_tokens
                self._num_prefix_cache_queries += 0 if request.tells_prompt else request.num_tokens
                self._num_prefix_cache_hits += request.num_cached_tokens
            request.status = RequestStatus.RUNNING
            self._num_free_seats -= request.num_choices
            insort(self._running, request, key=_order)
            insort(prefills, request, key=_order)

    def _share_of_prompt(self, request: Request, num_tokens: int) -> ScheduledRequest:
        """The next so many tokens that a prefill lacks, with those whose logprobs are told after each of them."""
        start = request.num_computed_tokens
        end = start + num_tokens
        targets: tuple[int, ...] = ()
        if request.tells_prompt:
            targets = tuple(request.token_ids[start + 1 : min(end + 1, request.num_prompt_tokens)])
        self._in_step.append(request)
        token_ids = tuple(request.token_ids[start:end])
        return _share(request, token_ids, end == request.num_tokens, prompt_targets=targets)

    def _add_guesses(self, scheduled: list[ScheduledRequest], budget: int) -> None:
        """Let those of the plan that generate compute guesses too, in order, as far as budget and free blocks reach."""
        for place, request in enumerate(self._in_step):
            num_tokens = request.num_tokens
            most = min(budget, request.max_num_tokens - num_tokens - 1)  # a last token is drawn after all guesses
            if most < 1 or num_tokens == request.num_prompt_tokens or request.num_uncomputed_tokens > 1:
                continue
            guesses = request.guess(most)
            if not guesses:
                continue
            block_ids = self._kv.extend(
                request.block_ids, num_tokens + len(guesses), num_spare_blocks=len(self._running)
            )
            if block_ids is not None:
                request.block_ids = block_ids
            guesses = guesses[: len(request.block_ids) * self._kv.block_size - num_tokens]
            if guesses:
                budget -= len(guesses)
                scheduled[place] = _share(request, (request.token_ids[-1], *guesses), True, len(guesses))

    def _reserve_ahead(self, scheduled: list[ScheduledRequest]) -> None:
        """Give those of the plan that go on a slot for the token that they draw, as far as there are free blocks."""
        for place, request in enumerate(self._in_step):
            num_tokens = request.num_tokens + 1
            if (
                scheduled[place].needs_token
                and request.num_choices == 1
                and len(request.block_ids) * self._kv.block_size < num_tokens < request.max_num_tokens
            ):
                block_ids = self._kv.extend(request.block_ids, num_tokens)
                if block_ids is None:
                    return
                request.block_ids = block_ids
                scheduled[place] = replace(scheduled[place], block_ids=block_ids)

    def _accept(self, request: Request, proposed: tuple[int, ...], rows: list[RequestResult]) -> list[RequestResult]:
        """Take in the guesses that were drawn, and return their rows with the one after them, the next to be taken."""
        assert self._speculation is not None
        assert request.proposer is not None
        right = proposed[: count_right(request.before_end(proposed), rows)]
        for token_id in right:
            finish_reason = request.append(token_id)
            assert finish_reason is None, "no guess that is taken ends a request"
        request.num_computed_tokens += len(right)
        request.proposer.learn(len(right))
        self._speculation.count(len(proposed), len(right))
        return rows[: len(right) + 1]

    def _fork(self, request: Request) -> list[Request]:
        """Split a request whose prompt is computed into its choices."""
        request.shares_last_block = request.num_computed_tokens % self._kv.block_size != 0
        choices = request.fork()
        self._kv.share(request.block_ids, len(choices) - 1)
        for choice in choices[1:]:
            choice.proposer = None if self._speculation is None else self._speculation.make_proposer()
            insort(self._running, choice, key=_order)
        self._requests[request.request_id] = list(choices)
        return choices

    def _take(self, request: Request, row: RequestResult) -> RequestUpdate:
        """Take in what a step sampled for one choice."""
        token_ids: tuple[int, ...] = ()
        if row.state is not None:
            finish_reason: FinishReason | None = "stop"
        elif row.token_id is None:
            finish_reason = "error"
            self._kv.forget(request.block_ids)
        else:
            token_ids = (row.token_id,)
            finish_reason = request.append(row.token_id)
            if finish_reason is None and row.logprobs is None:  # nearly all: half of the time, without the other fields
                return RequestUpdate(
                    request_id=request.request_id,
                    choice=request.choice,
                    token_ids=token_ids,
                    num_cached_tokens=request.num_cached_tokens or 0,
                    num_preemptions=request.num_preemptions,
                )
        if finish_reason is not None:
            self._finish(request)
        return RequestUpdate(
            request_id=request.request_id,
            choice=request.choice,
            token_ids=token_ids,
            finish_reason=finish_reason,
            error=row.error,
            num_cached_tokens=request.num_cached_tokens or 0,
            num_preemptions=request.num_preemptions,
            logprobs=() if row.logprobs is None else (row.logprobs,),
            state=row.state or b"",
        )

    def _offer_blocks(self, request: Request, *, owner: bytes = b"") -> None:
        """Let all, or only `owner`, find the full and computed blocks of a request, as far as it was not done yet."""
        size = self._kv.block_size
        places = range(request.num_offered_tokens // size, request.num_computed_tokens // size)
        self._kv.cache(
            request.block_ids, request.token_ids, request.block_hashes, places, owner=owner, adapter=request.adapter
        )
        request.num_offered_tokens = places.stop * size

    def _num_used_slots(self) -> int:
        """KV slots that hold a token, those in shared blocks counted once."""
        size = self._kv.block_size
        num_unused_slots = 0
        seen: set[int] = set()
        for request in self._running:
            if request.shares_last_block:
                if request.block_ids[-1] in seen:
                    continue
                seen.add(request.block_ids[-1])
            num_unused_slots += len(request.block_ids) * size - request.num_computed_tokens
        return self._kv.num_used_blocks * size - num_unused_slots

    def _finish(self, request: Request) -> None:
        """End a choice; the caller takes it out of its queue."""
        self._num_ended += 1
        self._release(request)
        request.status = RequestStatus.FINISHED
        choices = self._requests[request.request_id]
        choices.remove(request)
        if not choices:
            del self._requests[request.request_id]

    def _release(self, request: Request) -> None:
        """Free a running request's blocks and seats; its KV has to be computed anew if it goes on."""
        if request.status is RequestStatus.RUNNING:
            self._num_free_seats += request.num_choices
        self._kv.free(request.block_ids)
        request.block_ids = ()
        request.shares_last_block = False
        request.num_computed_tokens = request.num_offered_tokens = 0


def _share(
    request: Request,
    token_ids: tuple[int, ...],
    needs_token: bool,  # noqa: FBT001 - hot
    num_proposed: int = 0,
    prompt_targets: tuple[int, ...] = (),
) -> ScheduledRequest:
    """A request's share of the step."""
    return ScheduledRequest(
        request.request_id,
        token_ids,
        request.num_computed_tokens,
        request.block_ids,
        needs_token,
        request.sampling,
        request.choice,
        request.num_choices,
        request.num_prompt_tokens,
        request.past,
        request.grammar,
        num_proposed,
        prompt_targets,
        request.adapter,
    )


def _after(accepted: Sequence[RequestResult], update: RequestUpdate) -> RequestUpdate:
    """An update with the guesses that came before its token."""
    return replace(
        update,
        token_ids=(*(row.token_id for row in accepted if row.token_id is not None), *update.token_ids),
        logprobs=(*(row.logprobs for row in accepted if row.logprobs is not None), *update.logprobs),
    )
