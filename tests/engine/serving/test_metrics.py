from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from octavo_engine.messages import EngineFacts, SchedulerStats
from octavo_engine.server.metrics import Metrics

if TYPE_CHECKING:
    import httpx
    from tests.engine.serving.conftest import Eventually


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


def stats(**changes: int) -> SchedulerStats:
    idle = dict.fromkeys(SchedulerStats.__struct_fields__, 0)
    return SchedulerStats(**(idle | {"num_blocks": 10} | changes))


async def test_the_metrics_are_vllms_by_name_and_type(ready: httpx.AsyncClient) -> None:
    text = (await ready.get("/metrics")).text
    types = {family.name: family.type for family in text_string_to_metric_families(text)}
    assert {name: kind for name, kind in types.items() if not name.endswith("_created")} == {
        "vllm:num_requests_running": "gauge",
        "vllm:num_requests_waiting": "gauge",
        "vllm:kv_cache_usage_perc": "gauge",
        "vllm:num_preemptions": "counter",
        "vllm:prefix_cache_queries": "counter",
        "vllm:prefix_cache_hits": "counter",
        "vllm:prompt_tokens": "counter",
        "vllm:generation_tokens": "counter",
        "vllm:time_to_first_token_seconds": "histogram",
        "vllm:inter_token_latency_seconds": "histogram",
        "vllm:e2e_request_latency_seconds": "histogram",
        "vllm:request_success": "counter",
        "vllm:request_queue_time_seconds": "histogram",
        "vllm:request_prefill_time_seconds": "histogram",
        "vllm:request_decode_time_seconds": "histogram",
        "vllm:request_inference_time_seconds": "histogram",
        "vllm:request_time_per_output_token_seconds": "histogram",
        "vllm:request_prompt_tokens": "histogram",
        "vllm:request_generation_tokens": "histogram",
        "vllm:request_params_max_tokens": "histogram",
        "vllm:iteration_tokens_total": "histogram",
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
    assert values["vllm:cache_config_info{block_size=4,cache_dtype=float16,num_gpu_blocks=1000}"] == 1
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


def test_tokens_that_came_together_share_their_time() -> None:
    metrics = Metrics("fake")
    metrics.on_next_tokens(seconds=0.4, num_tokens=4)
    values = values_of(metrics.render().decode())
    assert values["vllm:inter_token_latency_seconds_count"] == 4
    assert values["vllm:inter_token_latency_seconds_sum"] == pytest.approx(0.4)
    assert values["vllm:inter_token_latency_seconds_bucket{le=0.1}"] == 4
    assert values["vllm:inter_token_latency_seconds_bucket{le=0.075}"] == 0
