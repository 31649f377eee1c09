from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from octavo_engine.messages import DraftStats, EngineFacts, SchedulerStats
from octavo_engine.server.metrics import OLD_NAMES, Metrics

if TYPE_CHECKING:
    import httpx
    from prometheus_client import Metric
    from tests.engine.serving.conftest import Eventually


CACHE: Final = (
    "block_size=4,cache_dtype=float16,kv_cache_max_concurrency=10.00,kv_cache_size_tokens=4000,num_gpu_blocks=1000"
)
FACTS = EngineFacts(
    max_model_len=400, block_size=4, num_blocks=10, dtype="int8", cache_dtype="float16", device="cpu", num_parameters=1
)


def values_of(text: str) -> dict[str, float]:
    """Every sample of the engine as name{labels} with the labels that all have left out."""
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.endswith("_created") or sample.name.startswith("http_"):
                continue
            labels = sample.labels.copy()
            assert (labels.pop("model_name"), labels.pop("engine", "0")) == ("fake", "0")
            inside = ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
            values[sample.name + (f"{{{inside}}}" if inside else "")] = sample.value
    return values


def stats(drafts: DraftStats | None = None, **changes: int) -> SchedulerStats:
    idle = dict.fromkeys(set(SchedulerStats.__struct_fields__) - {"drafts"}, 0)
    return SchedulerStats(**(idle | {"num_blocks": 10} | changes), drafts=drafts)


# vLLM 0.33's families with their labels besides model_name and engine, and a part of the histograms' buckets. Not here
# are those that it has only where a feature is on that this engine lacks: LoRA, sampled life of KV blocks.
VLLM: Final[dict[str, tuple[str, set[str], tuple[float, ...]]]] = {
    "num_requests_running": ("gauge", set(), ()),
    "num_requests_waiting": ("gauge", set(), ()),
    "num_requests_waiting_by_reason": ("gauge", {"reason"}, ()),
    "kv_cache_usage_perc": ("gauge", set(), ()),
    "engine_sleep_state": ("gauge", {"sleep_state"}, ()),
    "prefix_cache_queries": ("counter", set(), ()),
    "prefix_cache_hits": ("counter", set(), ()),
    "external_prefix_cache_queries": ("counter", set(), ()),
    "external_prefix_cache_hits": ("counter", set(), ()),
    "mm_cache_queries": ("counter", set(), ()),
    "mm_cache_hits": ("counter", set(), ()),
    "num_preemptions": ("counter", set(), ()),
    "prompt_tokens": ("counter", set(), ()),
    "prompt_tokens_by_source": ("counter", {"source"}, ()),
    "prompt_tokens_cached": ("counter", set(), ()),
    "prompt_tokens_cached_by_source": ("counter", {"source"}, ()),
    "generation_tokens": ("counter", set(), ()),
    "request_success": ("counter", {"finished_reason"}, ()),
    "tool_call_parser_invocations": ("counter", set(), ()),
    "time_to_first_token_seconds": ("histogram", set(), (0.001, 0.02, 0.75, 7.5, 160, 2560)),
    "inter_token_latency_seconds": ("histogram", set(), (0.01, 0.025, 0.4, 5, 80)),
    "request_time_per_output_token_seconds": ("histogram", set(), (0.01, 0.025, 0.4, 5, 80)),
    "e2e_request_latency_seconds": ("histogram", set(), (0.3, 0.8, 2.5, 60, 7680)),
    "request_queue_time_seconds": ("histogram", set(), (0.3, 0.8, 2.5, 60, 7680)),
    "request_prefill_time_seconds": ("histogram", set(), (0.3, 0.8, 2.5, 60, 7680)),
    "request_decode_time_seconds": ("histogram", set(), (0.3, 0.8, 2.5, 60, 7680)),
    "request_inference_time_seconds": ("histogram", set(), (0.3, 0.8, 2.5, 60, 7680)),
    "request_prompt_tokens": ("histogram", set(), (1, 2, 5, 10, 200, 500, 100_000)),
    "request_generation_tokens": ("histogram", set(), (1, 2, 5, 10, 200, 500, 100_000)),
    "request_max_num_generation_tokens": ("histogram", set(), (1, 2, 5, 10, 200, 500, 100_000)),
    "request_params_max_tokens": ("histogram", set(), (1, 2, 5, 10, 200, 500, 100_000)),
    "request_prefill_kv_computed_tokens": ("histogram", set(), (1, 2, 5, 10, 200, 500, 100_000)),
    "request_params_n": ("histogram", set(), (1, 2, 5, 10, 20)),
    "request_num_preemptions": ("histogram", set(), (1, 2, 5)),
    "iteration_tokens_total": ("histogram", set(), (1, 8, 512, 16384)),
}
# Those that it has with speculative decoding alone.
SPECULATION: Final[dict[str, tuple[str, set[str], tuple[float, ...]]]] = {
    "spec_decode_num_drafts": ("counter", set(), ()),
    "spec_decode_num_draft_tokens": ("counter", set(), ()),
    "spec_decode_num_accepted_tokens": ("counter", set(), ()),
    "spec_decode_num_accepted_tokens_per_pos": ("counter", {"position"}, ()),
}


def families_of(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


@pytest.mark.parametrize("name", VLLM | SPECULATION)
def test_every_family_of_vllm_is_there_with_its_type_labels_and_buckets(name: str) -> None:
    kind, labels, buckets = (VLLM | SPECULATION)[name]
    metrics = Metrics("fake", num_speculative_tokens=2)
    metrics.on_ready(FACTS)
    family = families_of(metrics.render().decode())[f"vllm:{name}"]
    assert family.type == kind
    samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
    assert samples, "a series that appears with its first event hides that event from rates"
    for sample in samples:
        assert set(sample.labels) - {"le"} == {"model_name", "engine"} | labels
    limits = {float(sample.labels["le"]) for sample in samples if "le" in sample.labels}
    assert limits >= set(buckets)


def test_old_names_are_there_on_request_with_the_values_of_the_new_ones() -> None:
    assert not any(old in families_of(Metrics("fake").render().decode()) for old in OLD_NAMES.values())
    metrics = Metrics("fake", old_names=True)
    metrics.on_next_tokens(seconds=0.4, num_tokens=4)
    metrics.on_step(stats(num_used_blocks=5, num_prefix_cache_queries=40, num_prefix_cache_hits=8), num_tokens=0)
    families = families_of(metrics.render().decode())
    assert len(OLD_NAMES) == 4
    for new, old in OLD_NAMES.items():
        assert families[old].type == families[new].type
        told = {sample.name.removeprefix(old): sample.value for sample in families[old].samples}
        assert told == {sample.name.removeprefix(new): sample.value for sample in families[new].samples}


async def test_the_metrics_are_vllms_by_name_and_type(ready: httpx.AsyncClient) -> None:
    text = (await ready.get("/metrics")).text
    types = {family.name: family.type for family in text_string_to_metric_families(text)}
    assert {name: kind for name, kind in types.items() if not name.endswith("_created")} == {
        **{f"vllm:{name}": kind for name, (kind, _, _) in VLLM.items()},
        "vllm:admission_rejections": "counter",
        "vllm:cache_config_info": "gauge",
        "octavo:kv_cache_waste_perc": "gauge",
        "http_requests": "counter",
        "http_request_duration_seconds": "histogram",
    }


async def test_a_request_is_counted_to_the_token(ready: httpx.AsyncClient, eventually: Eventually) -> None:
    body = {"model": "org/fake", "prompt": "abc", "max_tokens": 5}
    assert (await ready.post("/v1/completions", json=body)).status_code == 200
    assert (await ready.post("/v1/completions", json=body | {"max_tokens": 300})).status_code == 200

    async def idle() -> bool:
        return values_of((await ready.get("/metrics")).text)["vllm:num_requests_running"] == 0

    await eventually(idle)
    values = values_of((await ready.get("/metrics")).text)
    num_generated = 5 + len("The answer is 42.") + 1
    assert values["vllm:prompt_tokens_total"] == 6
    assert values["vllm:generation_tokens_total"] == num_generated
    assert values["vllm:time_to_first_token_seconds_count"] == 2
    assert values["vllm:inter_token_latency_seconds_count"] == num_generated - 2
    assert values["vllm:e2e_request_latency_seconds_count"] == 2
    for part in ("queue", "prefill", "decode", "inference"):
        assert values[f"vllm:request_{part}_time_seconds_count"] == 2
    assert values["vllm:request_prompt_tokens_sum"] == 6
    assert values["vllm:request_generation_tokens_sum"] == num_generated
    assert values["vllm:request_params_max_tokens_sum"] == 305
    assert values["vllm:iteration_tokens_total_sum"] == 6 + num_generated - 2  # the last tokens are not computed with
    assert values["vllm:request_success_total{finished_reason=length}"] == 1
    assert values["vllm:request_success_total{finished_reason=stop}"] == 1
    assert values["vllm:request_success_total{finished_reason=abort}"] == 0
    assert values[f"vllm:cache_config_info{{{CACHE}}}"] == 1
    assert values["vllm:prompt_tokens_by_source_total{source=local_compute}"] == 6
    assert values["vllm:request_prefill_kv_computed_tokens_sum"] == 6
    assert values["vllm:request_max_num_generation_tokens_sum"] == num_generated
    assert values["vllm:request_params_n_sum"] == 2
    assert values["vllm:request_num_preemptions_count"] == 2
    assert values["vllm:kv_cache_usage_perc"] == 0


async def test_answers_are_counted_by_route_method_and_class_of_status_and_probes_are_not(
    ready: httpx.AsyncClient, eventually: Eventually
) -> None:
    for model in ("fake", "other"):
        await ready.post("/v1/completions", json={"model": model, "prompt": "a", "max_tokens": 1})
    for number in range(3):  # whatever clients ask for, there are no more series than routes
        await ready.get(f"/no/such/{number}")
        await ready.get(f"/v1/models/{number}")
        await ready.request(f"FOO{number}", "/v1/models")

    async def counts() -> dict[tuple[str, ...], float]:
        families = {
            family.name: family for family in text_string_to_metric_families((await ready.get("/metrics")).text)
        }
        return {
            (sample.labels["handler"], sample.labels["method"], sample.labels["status"]): sample.value
            for sample in families["http_requests"].samples
            if sample.name == "http_requests_total"
        }

    async def all_are_counted() -> bool:  # when the last byte has left, which the client may see before
        return sum((await counts()).values()) == 11

    await eventually(all_are_counted)
    assert await counts() == {
        ("/v1/completions", "POST", "2xx"): 1,
        ("/v1/completions", "POST", "4xx"): 1,
        ("none", "GET", "4xx"): 3,
        ("/v1/models/{name:path}", "GET", "4xx"): 3,
        ("/v1/models", "other", "4xx"): 3,
    }


def test_waste_is_the_share_of_slots_that_blocks_hold_and_no_token_needs() -> None:
    metrics = Metrics("fake")
    metrics.on_ready(FACTS)
    metrics.on_step(stats(num_used_blocks=5, num_used_slots=15), num_tokens=0)
    assert values_of(metrics.render().decode())["octavo:kv_cache_waste_perc"] == pytest.approx(0.25)
    metrics.on_step(stats(), num_tokens=0)
    assert values_of(metrics.render().decode())["octavo:kv_cache_waste_perc"] == 0


def test_gauges_follow_the_scheduler_and_preemptions_only_grow() -> None:
    metrics = Metrics("fake")
    metrics.on_step(stats(num_running=3, num_waiting=2, num_used_blocks=5, num_preemptions=4), num_tokens=0)
    metrics.on_step(stats(num_running=1, num_waiting=0, num_used_blocks=2, num_preemptions=6), num_tokens=0)
    values = values_of(metrics.render().decode())
    assert values["vllm:num_requests_running"] == 1
    assert values["vllm:num_requests_waiting"] == 0
    assert values["vllm:kv_cache_usage_perc"] == pytest.approx(0.2)
    assert values["vllm:num_preemptions_total"] == 6


def test_the_prefix_caches_counters_are_those_of_the_scheduler() -> None:
    metrics = Metrics("fake")
    metrics.on_step(stats(num_prefix_cache_queries=40, num_prefix_cache_hits=8), num_tokens=0)
    metrics.on_step(stats(num_prefix_cache_queries=100, num_prefix_cache_hits=32), num_tokens=0)
    values = values_of(metrics.render().decode())
    assert values["vllm:prefix_cache_queries_total"] == 100
    assert values["vllm:prefix_cache_hits_total"] == 32


def test_the_counters_of_speculation_are_those_of_the_scheduler_by_place_in_the_draft() -> None:
    metrics = Metrics("fake", num_speculative_tokens=3)
    metrics.on_step(stats(drafts(4, 9, (3, 1))), num_tokens=0)
    metrics.on_step(stats(drafts(4, 9, (3, 1))), num_tokens=0)
    metrics.on_step(stats(drafts(6, 15, (5, 2, 1))), num_tokens=0)
    told = {
        name.removeprefix("vllm:spec_decode_num_"): value
        for name, value in values_of(metrics.render().decode()).items()
        if "spec_decode" in name
    }
    assert told == {
        "drafts_total": 6,
        "draft_tokens_total": 15,
        "accepted_tokens_total": 8,
        "accepted_tokens_per_pos_total{position=0}": 5,
        "accepted_tokens_per_pos_total{position=1}": 2,
        "accepted_tokens_per_pos_total{position=2}": 1,
    }


def drafts(num_drafts: int, num_draft_tokens: int, right_by_place: tuple[int, ...]) -> DraftStats:
    return DraftStats(
        num_drafts=num_drafts, num_draft_tokens=num_draft_tokens, num_accepted_tokens_per_pos=right_by_place
    )


def test_tokens_that_came_together_share_their_time() -> None:
    metrics = Metrics("fake")
    metrics.on_next_tokens(seconds=0.4, num_tokens=4)
    values = values_of(metrics.render().decode())
    assert values["vllm:inter_token_latency_seconds_count"] == 4
    assert values["vllm:inter_token_latency_seconds_sum"] == pytest.approx(0.4)
    assert values["vllm:inter_token_latency_seconds_bucket{le=0.1}"] == 4
    assert values["vllm:inter_token_latency_seconds_bucket{le=0.075}"] == 0
