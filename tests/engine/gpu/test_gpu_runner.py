"""The GPU's runner on a device that is none: the CPU's tokens, and the order in which the device gets its work."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as changed_to
from tests.engine.gpu.conftest import GIB, KV_BYTES_PER_TOKEN, NUM_BLOCKS, FakeAccelerator, Tiny, serve, twins

from octavo_engine.config import SpeculativeConfig
from octavo_engine.errors import ModelDoesNotFit
from octavo_engine.gpu.graphs import DecodeGraphs, graph_sizes
from octavo_engine.gpu.runner import AheadRunner
from octavo_engine.messages import AddRequest
from octavo_engine.plan import SamplingParams, ScheduledRequest, StepPlan
from octavo_engine.runner import ModelRunner
from octavo_engine.speculation import LookupProposer, Speculation
from octavo_engine.weights.low_rank import LowRank

if TYPE_CHECKING:
    from octavo_engine.models.adapter import Place
    from octavo_engine.plan import Runner

GREEDY: dict[str, Any] = {"temperature": 0.0}
RULES: list[dict[str, Any]] = [
    {"ignore_eos": True},
    {},
    {"logit_bias": ((7, 3.0), (2, -100.0))},
    {"frequency_penalty": 0.5, "presence_penalty": 0.2},
    {"num_logprobs": 2},
    {"min_tokens": 3},
]


@st.composite
def request_sets(draw: st.DrawFn, rules: list[dict[str, Any]]) -> list[AddRequest]:
    """Prompts that begin alike or not, of any length, for one answer or several."""
    words = draw(st.lists(st.integers(3, 95), min_size=60, max_size=60))
    return [
        AddRequest(
            request_id=f"r{number}",
            prompt_token_ids=(*words[: draw(st.integers(0, 50))], 3 + number),
            sampling=SamplingParams(max_tokens=draw(st.integers(1, 25)), **GREEDY, **draw(st.sampled_from(rules))),
            num_choices=draw(st.sampled_from((1, 1, 1, 2))),
        )
        for number in range(draw(st.integers(1, 7)))
    ]


@pytest.fixture(scope="module")
def on_cpu(tiny: Tiny) -> ModelRunner:
    """What is to be equalled."""
    return tiny.on_cpu()


@pytest.fixture(scope="module")
def accelerator() -> FakeAccelerator:
    """The device of `on_gpu`."""
    return FakeAccelerator()


@pytest.fixture(scope="module")
def on_gpu(tiny: Tiny, accelerator: FakeAccelerator) -> Runner:
    """What runs plans, one step ahead."""
    runner = tiny.on_gpu(accelerator).runner
    assert isinstance(runner, AheadRunner)
    return runner


@settings(max_examples=10, deadline=None)
@given(
    requests=request_sets(RULES),
    num_blocks=st.sampled_from((7, NUM_BLOCKS)),
    aborted=st.dictionaries(st.integers(1, 20), st.sampled_from(("r0", "r1", "r2"))),
)
def test_tokens_are_those_of_the_cpu_in_any_traffic(
    on_cpu: ModelRunner, on_gpu: Runner, requests: list[AddRequest], num_blocks: int, aborted: dict[int, str]
) -> None:
    expected, _ = serve(on_cpu, requests, aborted=aborted, num_blocks=num_blocks)
    assert serve(on_gpu, requests, aborted=aborted, num_blocks=num_blocks)[0] == expected


def traffic(*, temperature: float = 0.0, **rules: Any) -> list[AddRequest]:
    """Eight requests of different lengths that never end early."""
    rng = random.Random(4)  # noqa: S311 - test data
    return [
        AddRequest(
            request_id=f"r{number}",
            prompt_token_ids=tuple(rng.choices(range(3, 96), k=10 + 5 * number)),
            sampling=SamplingParams(max_tokens=20 + number, ignore_eos=True, temperature=temperature, **rules),
        )
        for number in range(8)
    ]


def test_preempted_requests_get_what_the_cpu_gives_them(on_cpu: ModelRunner, on_gpu: Runner) -> None:
    expected, _ = serve(on_cpu, traffic())
    tokens, stats = serve(on_gpu, traffic(), num_blocks=9)
    assert stats.num_preemptions > 0
    assert tokens == expected


def test_guesses_are_verified_without_looking_ahead_and_change_nothing(tiny: Tiny, on_cpu: ModelRunner) -> None:
    guess = SpeculativeConfig(num_speculative_tokens=3, prompt_lookup_min=1, prompt_lookup_max=2)
    runner = tiny.on_gpu(FakeAccelerator(), speculative_config=guess).runner
    assert isinstance(runner, ModelRunner)
    expected, _ = serve(on_cpu, traffic())
    tokens, stats = serve(runner, traffic(), speculation=Speculation(lambda: LookupProposer(guess)))
    assert stats.drafts is not None
    assert stats.drafts.num_drafts > 5
    assert tokens == expected


def test_seeded_draws_are_the_same_ahead_and_not_and_in_any_company(tiny: Tiny, on_gpu: Runner) -> None:
    requests = traffic(temperature=1.3, top_p=0.95, seed=7)
    plain = on_gpu._runner  # type: ignore[attr-defined] # what does not look ahead
    expected: dict[tuple[str, int], list[int]] = {}
    for request in requests:
        expected |= serve(plain, [request])[0]
    assert serve(on_gpu, requests)[0] == serve(on_gpu, requests, num_blocks=9)[0] == expected
    assert len({tuple(tokens[:10]) for tokens in expected.values()}) == 8


TABLES = [(block,) for block in range(7)]  # the scheduler too hands out the same tuple until a table grows


def decodes(num: int, *, step: int = 0, tokens: list[int] | None = None, **rules: Any) -> StepPlan:
    """A step of so many requests of one token each, whose blocks have room for sixteen."""
    sampling = SamplingParams(max_tokens=16, temperature=0.0, **rules)
    return StepPlan(
        step,
        tuple(
            ScheduledRequest(f"d{row}", ((tokens or [5] * num)[row],), step, TABLES[row], True, sampling)
            for row in range(num)
        ),
    )


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (40, (1, 2, 4, 8, 16, 32, 40)),
        (64, (1, 2, 4, 8, 16, 32, 48, 64)),
    ],
)
def test_there_is_a_graph_for_as_many_requests_as_may_run_and_for_some_below(most: int, sizes: tuple[int, ...]) -> None:
    assert graph_sizes(most) == sizes
    assert graph_sizes(2000)[-1] == 512


def test_graphs_are_captured_once_the_cache_is_there_the_largest_first(tiny: Tiny) -> None:
    accelerator = FakeAccelerator()
    tiny.on_gpu(accelerator)
    begun = [event for event in accelerator.log if event.startswith(("measure", "capture"))]
    assert begun == ["measure", "measure", "capture 6", "capture 4", "capture 2", "capture 1"]


@pytest.mark.parametrize(("num", "size"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 6), (6, 6)])
def test_decodes_run_in_the_smallest_graph_that_holds_them(tiny: Tiny, num: int, size: int) -> None:
    accelerator = FakeAccelerator()
    runner = tiny.on_gpu(accelerator).runner
    accelerator.log.clear()
    runner.execute(decodes(num))
    assert [event for event in accelerator.log if event.startswith("replay")] == [f"replay {size}"] * 2


def test_the_next_step_is_queued_before_the_tokens_of_this_one_are_awaited_and_nothing_else_is(
    on_gpu: Runner, accelerator: FakeAccelerator
) -> None:
    first = on_gpu.execute(decodes(3)).results
    accelerator.log.clear()
    tokens = [result.token_id or 0 for result in first]
    for step in range(1, 10):
        results = on_gpu.execute(decodes(3, step=step, tokens=tokens)).results
        tokens = [result.token_id or 0 for result in results]
    # Each step: its inputs, the graph, how its tokens are drawn, both copies back; then the tokens before are awaited.
    one = ["upload", "replay 4", "upload", "download", "download", "wait"]
    assert accelerator.log == one * 9


def test_a_prompt_that_comes_in_is_computed_beside_what_was_foreseen(
    on_gpu: Runner, on_cpu: ModelRunner, accelerator: FakeAccelerator
) -> None:
    prompt = ScheduledRequest("new", (9, 8, 7), 0, (30,), True, SamplingParams(max_tokens=9, temperature=0.0))
    expected = [on_cpu.execute(decodes(2)).results]
    tokens = [result.token_id or 0 for result in expected[0]]
    mixed = StepPlan(
        1, (decodes(2, step=1, tokens=tokens).requests[0], prompt, decodes(2, step=1, tokens=tokens).requests[1])
    )
    expected.append(on_cpu.execute(mixed).results)

    assert on_gpu.execute(decodes(2)).results == expected[0]
    accelerator.log.clear()
    assert on_gpu.execute(mixed).results == expected[1]
    assert [event for event in accelerator.log if event.startswith("replay")] == ["replay 4"]  # the step after, of all


@pytest.mark.parametrize(
    "changed",
    [
        {"token_ids": (50,)},
        {"block_ids": (33,)},
        {"request_id": "other"},
    ],
    ids=str,
)
def test_what_turns_out_otherwise_than_foreseen_is_computed(
    tiny: Tiny, on_cpu: ModelRunner, changed: dict[str, Any]
) -> None:
    runner = tiny.on_gpu(FakeAccelerator()).runner
    results = []
    for each in (on_cpu, runner):
        for block in (0, 33):  # the same keys and values
            each.execute(
                StepPlan(
                    0, (ScheduledRequest("x", tuple(range(16)), 0, (block,), False, SamplingParams(max_tokens=1)),)
                )
            )
        (first,) = each.execute(decodes(1)).results
        plan = decodes(1, step=1, tokens=[first.token_id or 0])
        results.append(each.execute(StepPlan(1, (changed_to(plan.requests[0], **changed),))).results)
    assert results[0] == results[1]


def test_prefills_guesses_adapters_and_many_requests_are_not_taken_by_graphs(tiny: Tiny) -> None:
    steps = tiny.on_gpu(FakeAccelerator()).steps
    graphs = steps._graphs  # type: ignore[attr-defined]
    assert isinstance(graphs, DecodeGraphs)
    one = decodes(1).requests[0]

    def takes(**changed: Any) -> bool:
        return graphs.take(StepPlan(0, (one, changed_to(one, **changed))))

    assert takes()
    assert not takes(token_ids=(1, 2))
    assert not takes(token_ids=(1, 2), num_proposed=1)
    assert not takes(adapter=1)
    assert not graphs.take(decodes(7))


BLOCK_BYTES = 16 * KV_BYTES_PER_TOKEN
PEAKS = (2**21, 2**20)


def scarce(num_blocks: int, *, share: float = 0.9) -> FakeAccelerator:
    """A GPU of one GiB, of which a share has room for so many blocks besides weights, peaks and margin."""
    available = int(GIB * share)
    weights = available - int(available / 32) - sum(PEAKS) - num_blocks * BLOCK_BYTES
    return FakeAccelerator(total=GIB, weights=weights, peaks=PEAKS)


def test_the_cache_has_what_is_left_after_weights_and_peaks_were_measured(tiny: Tiny) -> None:
    accelerator = scarce(20)
    memory = tiny.on_gpu(accelerator).plan.memory
    assert memory.num_blocks == 20
    assert memory.weight_bytes == accelerator.weights
    assert memory.work_bytes == sum(PEAKS)
    assert memory.max_model_len == 96


def test_a_larger_share_of_the_memory_gives_a_larger_cache_up_to_what_is_of_use(tiny: Tiny) -> None:
    assert tiny.on_gpu(scarce(20), gpu_memory_utilization=0.9).plan.memory.num_blocks == 20
    more = int(GIB * 0.9002) - int(GIB * 0.9)
    memory = tiny.on_gpu(scarce(20), gpu_memory_utilization=0.9002).plan.memory
    assert memory.num_blocks == 20 + (more - more // 32) // BLOCK_BYTES == 32
    assert tiny.on_gpu(scarce(20), gpu_memory_utilization=0.95).plan.memory.num_blocks == NUM_BLOCKS


def test_without_a_length_the_longest_context_is_what_the_measured_cache_holds(tiny: Tiny) -> None:
    assert tiny.on_gpu(scarce(40), max_model_len=None, max_num_seqs=1).plan.memory.max_model_len == 640


def test_what_does_not_fit_once_it_is_measured_is_refused_with_the_figures(tiny: Tiny) -> None:
    with pytest.raises(ModelDoesNotFit, match=r"nothing is left for the KV cache .* weights - 3 MiB working memory"):
        tiny.on_gpu(scarce(0))
    with pytest.raises(ModelDoesNotFit, match=r"one request of 96 tokens .*: lower --max-model-len or give"):
        tiny.on_gpu(scarce(5))


def test_in_float32_a_gpu_has_no_graphs_and_still_the_cpus_tokens(tiny: Tiny, on_cpu: ModelRunner) -> None:
    kernels = twins()
    accelerator = FakeAccelerator()
    runner = tiny.on_gpu(accelerator, replace(kernels, dtypes=kernels.dtypes[1:])).runner
    expected, _ = serve(on_cpu, traffic())
    assert serve(runner, traffic())[0] == expected
    assert not [event for event in accelerator.log if event.startswith(("capture", "replay"))]


def test_requests_with_adapters_and_without_get_the_cpus_tokens_side_by_side(tiny: Tiny) -> None:
    generator = torch.Generator().manual_seed(5)

    def pair(inputs: int, outputs: int) -> LowRank:
        a, b = (torch.randn(shape, generator=generator) * 0.3 for shape in ((4, inputs), (outputs, 4)))
        return LowRank(a, b)

    pairs: dict[Place, LowRank] = {(0, "q"): pair(64, 128), (1, "down"): pair(96, 64)}
    on_cpu, loaded = tiny.on_cpu(), tiny.on_gpu(FakeAccelerator())
    for steps in (on_cpu._steps, loaded.steps):
        assert steps.adapters is not None
        steps.adapters.load(1, pairs)
    plain = traffic()
    mixed = [changed_to(request, adapter=number % 2) for number, request in enumerate(plain)]
    expected, _ = serve(on_cpu, mixed)
    assert serve(loaded.runner, mixed)[0] == expected
    without, _ = serve(on_cpu, plain)
    assert {name for name, _ in expected if expected[name, 0] != without[name, 0]} == {"r1", "r3", "r5", "r7"}
    assert serve(loaded.runner, plain)[0] == without  # by graphs again
