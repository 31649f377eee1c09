"""Prometheus metrics under vLLM's names, types, labels and buckets, so that its dashboards and autoscalers just work.

One Metrics per process, with a registry of its own. It observes the engine client (EngineObserver) and is told by
service.py how each request ended.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Literal, TypeVar, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.registry import Collector

from octavo_engine.errors import RejectionReason
from octavo_engine.messages import DraftStats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from prometheus_client import Metric

    from octavo_engine.messages import EngineFacts, SchedulerStats
    from octavo_engine.stream import Answered

_Kind = TypeVar("_Kind", Counter, Gauge)

FinishedReason = Literal["stop", "length", "abort", "error"]
_FINISHED_REASONS: Final[tuple[FinishedReason, ...]] = ("stop", "length", "abort", "error")

# fmt: off
_FIRST_TOKEN_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0,
    2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # seconds
_INTER_TOKEN_BUCKETS: Final = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # seconds
_REQUEST_BUCKETS: Final = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # seconds
_TOKEN_BUCKETS: Final = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_HTTP_BUCKETS: Final = (0.1, 0.5, 1.0)  # seconds
_CHOICE_BUCKETS: Final = (1, 2, 5, 10, 20)
_PREEMPTION_BUCKETS: Final = (1, 2, 3, 4, 5, 10, 20)
_STEP_TOKEN_BUCKETS: Final = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
# fmt: on


# vLLM's older names, which some dashboards still ask for, by the newer ones.
OLD_NAMES: Final[Mapping[str, str]] = {
    "vllm:inter_token_latency_seconds": "vllm:time_per_output_token_seconds",
    "vllm:kv_cache_usage_perc": "vllm:gpu_cache_usage_perc",
    "vllm:prefix_cache_queries": "vllm:gpu_prefix_cache_queries",
    "vllm:prefix_cache_hits": "vllm:gpu_prefix_cache_hits",
}


class Metrics:
    """The metrics of one engine.

    Args:
        model_name: a label of all.
        old_names: serve OLD_NAMES too.
        num_speculative_tokens: with speculative decoding, the most guesses that a request has in a step; else 0.
    """

    _adapters: Gauge | None = None  # there once adapters may be served

    def __init__(self, model_name: str, *, old_names: bool = False, num_speculative_tokens: int = 0) -> None:
        self._old_names = old_names
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        self._running = self._gauge("vllm:num_requests_running", "Requests in the running batch.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait to be scheduled.")
        # Who waits, waits for room: there is nothing here for which a request would be put off.
        by_reason = self._by("vllm:num_requests_waiting_by_reason", "The same, by why.", Gauge, "reason")
        self._waiting_for_room = by_reason("capacity")
        by_reason("deferred")
        self._add_constants()
        self._kv_usage = self._gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.")
        self._kv_waste = self._gauge(
            "octavo:kv_cache_waste_perc", "Share of the slots in used KV blocks that no token needs, 0 to 1."
        )
        self._block_size = 1
        self._preemptions = self._counter("vllm:num_preemptions", "Requests put back to free KV blocks.")
        self._prefix_queries = self._counter(
            "vllm:prefix_cache_queries", "Tokens of admitted requests that were looked up in the prefix cache."
        )
        self._prefix_hits = self._counter(
            "vllm:prefix_cache_hits", "Tokens whose KV was found in the prefix cache and not computed anew."
        )
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts, those found in a cache included.")
        by_source = self._by("vllm:prompt_tokens_by_source", "The same, by where their KV is from.", Counter, "source")
        self._computed_prompt_tokens = by_source("local_compute")
        self._found_prompt_tokens = by_source("local_cache_hit")
        by_source("external_kv_transfer")
        self._cached_prompt_tokens = self._counter("vllm:prompt_tokens_cached", "Tokens of prompts found in a cache.")
        cached_by = self._by("vllm:prompt_tokens_cached_by_source", "The same, by which cache.", Counter, "source")
        self._found_prompt_tokens_again = cached_by("local_cache_hit")
        cached_by("external_kv_transfer")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From the request to its first token.", _FIRST_TOKEN_BUCKETS
        )
        self._inter_token = self._histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of a request.", _INTER_TOKEN_BUCKETS
        )
        self._request = self._histogram(
            "vllm:e2e_request_latency_seconds", "From the request to its last token.", _REQUEST_BUCKETS
        )
        self._queue_time = self._histogram(
            "vllm:request_queue_time_seconds", "From the request to its first step.", _REQUEST_BUCKETS
        )
        self._prefill_time = self._histogram(
            "vllm:request_prefill_time_seconds", "From the first step to the first token.", _REQUEST_BUCKETS
        )
        self._decode_time = self._histogram(
            "vllm:request_decode_time_seconds", "From the first token to the last.", _REQUEST_BUCKETS
        )
        self._inference_time = self._histogram(
            "vllm:request_inference_time_seconds", "From the first step to the last token.", _REQUEST_BUCKETS
        )
        self._token_time = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "Between two tokens, in the mean over a request.",
            _INTER_TOKEN_BUCKETS,
        )
        self._num_prompt_tokens = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKEN_BUCKETS
        )
        self._num_generation_tokens = self._histogram(
            "vllm:request_generation_tokens", "Tokens generated for a request.", _TOKEN_BUCKETS
        )
        self._max_tokens = self._histogram(
            "vllm:request_params_max_tokens", "Tokens that a request asked for at most.", _TOKEN_BUCKETS
        )
        self._most_tokens = self._histogram(
            "vllm:request_max_num_generation_tokens", "Tokens of a request's longest answer.", _TOKEN_BUCKETS
        )
        self._num_choices = self._histogram(
            "vllm:request_params_n", "Answers that a request asked for.", _CHOICE_BUCKETS
        )
        self._preempted = self._histogram(
            "vllm:request_num_preemptions", "How often a request was put back to free KV blocks.", _PREEMPTION_BUCKETS
        )
        self._prefilled = self._histogram(
            "vllm:request_prefill_kv_computed_tokens", "Prompt tokens of a request that were computed.", _TOKEN_BUCKETS
        )
        self._tool_parses = self._counter(
            "vllm:tool_call_parser_invocations", "Answers in which calls of tools were looked for."
        )
        self._step_tokens = self._histogram(
            "vllm:iteration_tokens_total", "Tokens computed in a step.", _STEP_TOKEN_BUCKETS
        )
        success = Counter(
            "vllm:request_success",
            "Requests ended, by how.",
            [*self._labels, "finished_reason"],
            registry=self._registry,
        )
        # Every reason is there from the start: a rate over a series that appears with its first event misses it.
        self._finished = {
            reason: success.labels(**self._labels, finished_reason=reason) for reason in _FINISHED_REASONS
        }
        rejections = Counter(
            "vllm:admission_rejections",
            "Requests for generation answered 503, by why.",
            ["model_name", "reason"],
            registry=self._registry,
        )
        self._rejections = {
            reason: rejections.labels(model_name=model_name, reason=reason) for reason in get_args(RejectionReason)
        }
        self._http_requests, self._http_seconds = _http_metrics(self._registry)
        self._num_preemptions_seen = 0
        self._num_prefix_queries_seen = self._num_prefix_hits_seen = 0
        self._drafts = self._draft_metrics(num_speculative_tokens) if num_speculative_tokens else None

    def _draft_metrics(self, num_speculative_tokens: int) -> _DraftMetrics:
        """Those that vLLM has with speculative decoding alone."""
        by_place = self._by(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "The same, by place in the draft.", Counter, "position"
        )
        return _DraftMetrics(
            self._counter("vllm:spec_decode_num_drafts", "Drafts: a request's guesses in one step."),
            self._counter("vllm:spec_decode_num_draft_tokens", "Tokens guessed."),
            self._counter("vllm:spec_decode_num_accepted_tokens", "Tokens guessed right."),
            [by_place(str(place)) for place in range(num_speculative_tokens)],
        )

    def _add_constants(self) -> None:
        """What vLLM tells of things that this engine does not have."""
        asleep = self._by(
            "vllm:engine_sleep_state", "Whether the engine sleeps, which this one never does.", Gauge, "sleep_state"
        )
        for state in ("awake", "weights_offloaded", "discard_all"):
            asleep(state).set(state == "awake")
        for cache in ("external_prefix", "mm"):  # that this engine does not have
            for what in ("queries", "hits"):
                self._counter(f"vllm:{cache}_cache_{what}", "Always 0: there is no such cache here.")

    def on_first_tokens(self, *, seconds: float, num_prompt_tokens: int, num_tokens: int) -> None:
        """A request got its first tokens (EngineObserver)."""
        self._first_token.observe(seconds)
        self._prompt_tokens.inc(num_prompt_tokens)
        self._generation_tokens.inc(num_tokens)

    def on_next_tokens(self, *, seconds: float, num_tokens: int) -> None:
        """A request got further tokens (EngineObserver)."""
        for _ in range(num_tokens):
            self._inter_token.observe(seconds / num_tokens)
        self._generation_tokens.inc(num_tokens)

    def on_answered(self, answered: Answered) -> None:
        """A request got its last token (EngineObserver)."""
        self._queue_time.observe(answered.queue_seconds)
        self._prefill_time.observe(answered.prefill_seconds)
        self._decode_time.observe(answered.decode_seconds)
        self._inference_time.observe(answered.prefill_seconds + answered.decode_seconds)
        if answered.num_tokens > 1:
            self._token_time.observe(answered.decode_seconds / (answered.num_tokens - 1))
        self._num_prompt_tokens.observe(answered.num_prompt_tokens)
        self._num_generation_tokens.observe(answered.num_tokens)
        self._max_tokens.observe(answered.max_tokens)
        self._most_tokens.observe(answered.most_tokens)
        self._num_choices.observe(answered.num_choices)
        self._preempted.observe(answered.num_preemptions)
        num_computed = answered.num_prompt_tokens - answered.num_cached_tokens
        self._prefilled.observe(num_computed)
        self._computed_prompt_tokens.inc(num_computed)
        for found in (self._found_prompt_tokens, self._cached_prompt_tokens, self._found_prompt_tokens_again):
            found.inc(answered.num_cached_tokens)

    def on_step(self, stats: SchedulerStats, *, num_tokens: int) -> None:
        """A step ended, or an idle moment (EngineObserver)."""
        if num_tokens:
            self._step_tokens.observe(num_tokens)
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._waiting_for_room.set(stats.num_waiting)
        self._kv_usage.set(stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0)
        num_slots = stats.num_used_blocks * self._block_size
        self._kv_waste.set(1 - stats.num_used_slots / num_slots if num_slots else 0.0)
        self._preemptions.inc(stats.num_preemptions - self._num_preemptions_seen)
        self._num_preemptions_seen = stats.num_preemptions
        self._prefix_queries.inc(stats.num_prefix_cache_queries - self._num_prefix_queries_seen)
        self._num_prefix_queries_seen = stats.num_prefix_cache_queries
        self._prefix_hits.inc(stats.num_prefix_cache_hits - self._num_prefix_hits_seen)
        self._num_prefix_hits_seen = stats.num_prefix_cache_hits
        if self._drafts is not None and stats.drafts is not None:
            self._drafts.take(stats.drafts)

    def on_finished(self, reason: FinishedReason, seconds: float) -> None:
        """A request ended, so many seconds after it came in."""
        self._finished[reason].inc()
        self._request.observe(seconds)

    def on_tools_looked_for(self, count: int) -> None:
        """Calls of tools are looked for in so many answers."""
        self._tool_parses.inc(count)

    def on_rejected(self, reason: RejectionReason) -> None:
        """A request for generation was not let in."""
        self._rejections[reason].inc()

    def on_adapters(self, *, running: Sequence[str], waiting: Sequence[str], most: int) -> None:
        """Which LoRA adapters requests run with and wait for. One series alone tells it, as vLLM has it."""
        if self._adapters is None:
            labels = ("max_lora", "waiting_lora_adapters", "running_lora_adapters")
            self._adapters = Gauge(
                "vllm:lora_requests_info",
                "LoRA adapters of running and of waiting requests, as labels; the value is the time.",
                labels,
                registry=self._registry,
            )
        self._adapters.clear()
        self._adapters.labels(str(most), ",".join(waiting), ",".join(running)).set_to_current_time()

    def on_response(self, *, handler: str, method: str, status: int, seconds: float) -> None:
        """A request was answered. `handler` and `method` are out of small sets, whatever clients send."""
        self._http_requests.labels(handler=handler, method=method, status=f"{status // 100}xx").inc()
        self._http_seconds.labels(handler=handler, method=method).observe(seconds)

    def on_ready(self, facts: EngineFacts) -> None:
        """The engine is ready; its cache has these dimensions from now on."""
        self._block_size = facts.block_size
        info = {
            "block_size": str(facts.block_size),
            "num_gpu_blocks": str(facts.num_blocks),  # vLLM's name, on the CPU too
            "cache_dtype": facts.cache_dtype,
            "kv_cache_size_tokens": str(facts.num_blocks * facts.block_size),
            "kv_cache_max_concurrency": f"{facts.num_blocks * facts.block_size / facts.max_model_len:.2f}",
        }
        gauge = Gauge("vllm:cache_config_info", "The KV cache.", [*self._labels, *info], registry=self._registry)
        gauge.labels(**self._labels, **info).set(1)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        text = generate_latest(self._registry)
        return text + _renamed(text) if self._old_names else text

    def _by(self, name: str, documentation: str, kind: type[_Kind], label: str) -> Callable[[str], _Kind]:
        """A family with a label of its own; the result gives the series of a value, which is there from then on."""
        family = kind(name, documentation, [*self._labels, label], registry=self._registry)
        return lambda value: family.labels(**self._labels, **{label: value})

    def collect(self) -> Iterable[Metric]:
        """Return them as families of samples."""
        return self._registry.collect()

    def _gauge(self, name: str, documentation: str) -> Gauge:
        return Gauge(name, documentation, list(self._labels), registry=self._registry).labels(**self._labels)

    def _counter(self, name: str, documentation: str) -> Counter:
        return Counter(name, documentation, list(self._labels), registry=self._registry).labels(**self._labels)

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, documentation, list(self._labels), buckets=buckets, registry=self._registry).labels(
            **self._labels
        )


class _DraftMetrics:
    """What becomes of the guesses of speculative decoding: drafts, guesses, right ones, and these by their place."""

    def __init__(self, drafts: Counter, guesses: Counter, right: Counter, right_by_place: list[Counter]) -> None:
        self._drafts, self._guesses, self._right, self._right_by_place = drafts, guesses, right, right_by_place
        self._seen = DraftStats(num_drafts=0, num_draft_tokens=0, num_accepted_tokens_per_pos=())

    def take(self, stats: DraftStats) -> None:
        """Take what the scheduler has counted since the start."""
        seen, self._seen = self._seen, stats
        if stats.num_drafts == seen.num_drafts:
            return
        self._drafts.inc(stats.num_drafts - seen.num_drafts)
        self._guesses.inc(stats.num_draft_tokens - seen.num_draft_tokens)
        now, before = stats.num_accepted_tokens_per_pos, seen.num_accepted_tokens_per_pos
        self._right.inc(sum(now) - sum(before))
        for place, right in enumerate(now):
            self._right_by_place[place].inc(right - (before[place] if place < len(before) else 0))


def _http_metrics(registry: CollectorRegistry) -> tuple[Counter, Histogram]:
    """Those of prometheus-fastapi-instrumentator, which vLLM serves beside its own: answers, and their seconds."""
    answers = Counter(
        "http_requests", "Answers by route and class of status.", ["handler", "method", "status"], registry=registry
    )
    seconds = Histogram(
        "http_request_duration_seconds",
        "From a request's head to the last byte of its answer.",
        ["handler", "method"],
        buckets=_HTTP_BUCKETS,
        registry=registry,
    )
    return answers, seconds


def _renamed(text: bytes) -> bytes:
    """The families of OLD_NAMES once more, under these."""
    names = "|".join(map(re.escape, OLD_NAMES))
    found = re.compile(rf"^(# \w+ )?({names})(?=[_ {{])(?!_by)", re.MULTILINE)
    lines = (line for line in text.decode().splitlines(keepends=True) if found.match(line))
    return "".join(found.sub(lambda match: (match[1] or "") + OLD_NAMES[match[2]], line) for line in lines).encode()


def render_together(several: Iterable[Metrics], *, old_names: bool) -> bytes:
    """Return the metrics of several engines, which their labels tell apart, in Prometheus' text format."""
    families: dict[str, Metric] = {}
    for metrics in several:
        for family in metrics.collect():
            known = families.setdefault(family.name, family)
            if known is not family:
                known.samples += family.samples
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(list(families.values())))
    text = generate_latest(registry)
    return text + _renamed(text) if old_names else text


class _Collected(Collector):
    """Families that are there already."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """Return them (prometheus_client's Collector)."""
        return self._families
