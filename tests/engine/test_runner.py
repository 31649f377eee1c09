"""The runner: from a plan to tokens, what it refuses, and what it tells while it loads. On the tiny model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
import torch

from octavo_engine import device
from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError, DeviceMissing, ModelDoesNotFit, ModelNotFound, TensorParallelInvalid
from octavo_engine.past import PastTokens
from octavo_engine.plan import (
    LoadedModel,
    RequestResult,
    SamplingParams,
    ScheduledRequest,
    StepPlan,
    TokenLogprobs,
)
from octavo_engine.planning import plan_ahead
from octavo_engine.runner import ModelRunner, load_runner

if TYPE_CHECKING:
    from pathlib import Path

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)


def config(path: Path, **options: Any) -> EngineConfig:
    defaults: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache_memory_bytes": 2**22}
    return EngineConfig(model=path, served_model_names=("tiny",), **defaults | options)


def load(path: Path, **options: Any) -> LoadedModel:
    return load_runner(config(path, **options), lambda *_: None)


def request(
    name: str, token_ids: tuple[int, ...], *, at: int = 0, block: int = 0, sampling: SamplingParams = GREEDY
) -> ScheduledRequest:
    return ScheduledRequest(name, token_ids, at, (block, block + 1), needs_token=True, sampling=sampling)


def test_greedy_tokens_are_those_of_transformers(write_tiny_gguf: Any, tiny_llama: Any) -> None:
    runner = load(write_tiny_gguf()).runner
    prompt = [5, 17, 80, 3]
    expected = tiny_llama.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 4, dtype=torch.int64),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )[0, 4:].tolist()

    tokens = []
    step = request("a", tuple(prompt))
    for number in range(8):
        result = runner.execute(StepPlan(number, (step,)))
        assert result.step == number
        token = result.results[0].token_id
        assert token is not None
        tokens.append(token)
        step = request("a", (token,), at=3 + len(tokens))

    assert tokens == expected


def test_only_requests_that_need_a_token_get_one(write_tiny_gguf: Any) -> None:
    runner = load(write_tiny_gguf()).runner
    unfinished = ScheduledRequest("a", (1, 2), 0, (0,), needs_token=False, sampling=GREEDY)
    assert runner.execute(StepPlan(0, (unfinished,))).results == ()
    assert len(runner.execute(StepPlan(1, (request("b", (3,), block=2), unfinished))).results) == 1


def test_a_seeded_request_draws_the_same_tokens_alone_and_in_company(write_tiny_gguf: Any) -> None:
    runner = load(write_tiny_gguf()).runner
    sampling = SamplingParams(max_tokens=8, temperature=1.5, top_p=0.95, seed=11)
    checked = request("a", (5, 6, 7), sampling=sampling)
    others = tuple(request(str(block), (block,) * block, block=block, sampling=sampling) for block in (2, 4, 6))
    (alone,) = runner.execute(StepPlan(0, (checked,))).results
    assert runner.execute(StepPlan(0, (*others, checked))).results[-1] == alone
    renamed = request("z", (5, 6, 7), sampling=sampling)
    assert runner.execute(StepPlan(0, (renamed,))).results == (alone,)


def test_choices_that_begin_draw_from_one_row_each_by_itself(write_tiny_gguf: Any) -> None:
    runner = load(write_tiny_gguf()).runner
    sampling = SamplingParams(max_tokens=8, temperature=1.5, seed=11)
    prompt = ScheduledRequest("a", (5, 6, 7), 0, (0,), needs_token=True, sampling=sampling, num_choices=8)
    beside = request("b", (3, 4), block=2, sampling=sampling)
    *choices, last = runner.execute(StepPlan(0, (prompt, beside))).results
    assert len(set(choices)) > 1
    assert runner.execute(StepPlan(1, (beside,))).results == (last,)
    for choice, expected in enumerate(choices):
        alone = ScheduledRequest("a", (5, 6, 7), 0, (0,), needs_token=True, sampling=sampling, choice=choice)
        assert runner.execute(StepPlan(2, (alone,))).results == (expected,)


class Odd:
    """A grammar: tokens up and down, first an odd one."""

    def __init__(self, parity: int = 1) -> None:
        self.parity = parity

    def mask(self) -> np.ndarray:
        """See Grammar."""
        return np.packbits(np.arange(96) % 2 == self.parity, bitorder="little")

    def accept(self, token_id: int) -> None:
        """See Grammar."""
        assert token_id % 2 == self.parity
        self.parity = 1 - self.parity

    def fork(self) -> Odd:
        """See Grammar."""
        return Odd(self.parity)


RULES: dict[str, dict[str, Any]] = {
    "greedy with logprobs": {"temperature": 0.0, "num_logprobs": 3},
    "random": {"temperature": 1.5, "top_p": 0.9, "seed": 3},
    "penalties": {"temperature": 0.0, "frequency_penalty": 2.0, "repetition_penalty": 1.5},
    "min_tokens": {"temperature": 1.0, "top_k": 5, "min_tokens": 3, "logit_bias": ((2, 50.0),)},
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("with_grammar", [False, True])
def test_what_is_drawn_after_guesses_is_what_is_drawn_once_they_have_come(
    write_tiny_gguf: Any, rules: dict[str, Any], *, with_grammar: bool
) -> None:
    runner = load(write_tiny_gguf()).runner
    sampling = SamplingParams(max_tokens=8, **rules)
    beside = request("beside", (9, 8), block=2)
    past = PastTokens((5, 6), (2,))
    grammar = Odd() if with_grammar else None

    def decode(token_ids: tuple[int, ...], at: int, num_proposed: int) -> ScheduledRequest:
        return ScheduledRequest(
            "a", token_ids, at, (0, 1), True, sampling, past=past, grammar=grammar, num_proposed=num_proposed
        )

    runner.execute(StepPlan(0, (request("a", (5, 6)),)))
    guessed = runner.execute(StepPlan(1, (decode((7, 11, 4, 41), 2, 3), beside))).results
    one_by_one: list[RequestResult] = []
    for at, token_id in enumerate((7, 11, 4, 41), 2):
        if at > 2:
            past.add(token_id)
            if grammar is not None:
                grammar.accept(token_id)
        one_by_one += runner.execute(StepPlan(at, (decode((token_id,), at, 0),))).results
    assert list(guessed[:4]) == one_by_one
    assert guessed[4:] == runner.execute(StepPlan(9, (beside,))).results


def test_logprobs_of_a_prompt_are_those_of_its_tokens_however_it_is_cut_and_whoever_is_beside_it(
    write_tiny_gguf: Any,
) -> None:
    loaded = load(write_tiny_gguf())
    runner = loaded.runner
    assert isinstance(runner, ModelRunner)
    tokens = (5, 17, 80, 3, 9, 11)
    sampling = SamplingParams(max_tokens=8, temperature=0.0, num_prompt_logprobs=2)
    everything = runner.forward(StepPlan(0, (request("a", tokens),)), every_token=True).float().log_softmax(dim=1)

    def told(at: int, end: int, beside: tuple[ScheduledRequest, ...] = ()) -> list[TokenLogprobs]:
        piece = request("a", tokens[at:end], at=at, sampling=sampling)
        piece = msgspec.structs.replace(
            piece, needs_token=end == len(tokens), prompt_targets=tokens[at + 1 : min(end + 1, len(tokens))]
        )
        result = runner.execute(StepPlan(0, (*beside, piece, *beside)))
        assert len(result.results) == 2 * len(beside) + piece.needs_token
        return list(*result.prompt_logprobs)

    whole = told(0, 6)
    assert told(0, 2) + told(2, 5) + told(5, 6) == whole
    assert told(0, 6, (request("b", (7, 8), block=2),)) == whole
    for place, one in enumerate(whole):
        row = everything[place]
        assert one.logprob == pytest.approx(row[tokens[place + 1]].item(), abs=1e-5)
        assert one.rank == (row > row[tokens[place + 1]]).sum().item() + 1
        assert [token_id for token_id, _ in one.top] == row.topk(2).indices.tolist()
        assert one.top[0][1] == pytest.approx(row.max().item(), abs=1e-5)


def test_a_plans_copies_are_made_before_its_tokens_are_stored(write_tiny_gguf: Any) -> None:
    runner = load(write_tiny_gguf()).runner
    runner.execute(StepPlan(0, (request("a", (5, 6, 7)),)))
    on_its_own = request("a", (8,), at=3, block=2)
    fork = ScheduledRequest("a", (9,), 3, (0,), needs_token=True, sampling=GREEDY, choice=1)
    forked = runner.execute(StepPlan(1, (on_its_own, fork), ((0, 2),))).results
    for last, expected in zip((8, 9), forked, strict=True):
        assert runner.execute(StepPlan(2, (request("b", (5, 6, 7, last), block=4),))).results == (expected,)


def test_a_request_whose_numbers_are_not_finite_fails_alone(write_tiny_gguf: Any, tiny_llama: Any) -> None:
    embedding = tiny_llama.state_dict()["model.embed_tokens.weight"].clone()
    embedding[50] = math.nan
    runner = load(write_tiny_gguf(tensors={"token_embd.weight": embedding})).runner
    healthy = request("healthy", (1, 2, 3), block=2)
    expected = runner.execute(StepPlan(0, (healthy,))).results

    poisoned, beside = runner.execute(StepPlan(1, (request("poisoned", (1, 50, 3)), healthy))).results
    assert (beside,) == expected
    assert "NaN" in (poisoned.error or "")

    # Nor does it reach whoever gets its blocks next.
    moved = request("healthy", (1, 2, 3), block=0)
    assert runner.execute(StepPlan(2, (moved,))).results == expected


def test_loading_tells_bytes_then_the_warm_up_and_the_facts(write_tiny_gguf: Any, tiny_llama: Any) -> None:
    progress: list[tuple[str, int, int]] = []
    model = load_runner(config(write_tiny_gguf(), max_model_len=96), lambda *event: progress.append(event))

    loading = [(done, total) for phase, done, total in progress if phase == "Loading"]
    num_parameters = sum(weight.numel() for weight in tiny_llama.state_dict().values())
    assert [done for done, _ in loading] == sorted(done for done, _ in loading)
    assert {total for _, total in loading} == {4 * num_parameters}
    assert loading[-1] == (4 * num_parameters, 4 * num_parameters)
    assert progress[-2:] == [("Warmup", 0, 1), ("Warmup", 1, 1)]
    assert isinstance(model.runner, ModelRunner)
    assert model.eos_token_ids == {2}
    facts = model.facts
    assert (facts.max_model_len, facts.block_size, facts.dtype, facts.device) == (96, 8, "float32", "cpu")
    assert facts.num_parameters == num_parameters
    assert facts.num_blocks == 64 * 96 // 8


REFUSALS = {
    "no file": ({"model": "/nowhere/model.gguf"}, ModelNotFound, "no model file at /nowhere/model.gguf"),
    "three ranks": (
        {"tensor_parallel_size": 3},
        TensorParallelInvalid,
        "3 devices cannot .* use --tensor-parallel-size 1, 2 or 4",
    ),
    "a GPU's share of a CPU": ({"gpu_memory_utilization": 0.5}, ConfigError, "use --kv-cache-memory-bytes"),
    "a dtype that is not the same in every batch": (
        {"deterministic": True, "dtype": "float16"},
        ConfigError,
        "--deterministic: .* use --dtype float32",
    ),
    "too long a context": ({"max_model_len": 1025}, ConfigError, "--max-model-len 1025: .* at most 1024"),
    "too small a cache": ({"kv_cache_memory_bytes": 1000}, ModelDoesNotFit, "one request of 512 tokens"),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_cannot_work_is_refused_before_a_weight_is_read(
    write_tiny_gguf: Any, options: Any, error: type[Exception], message: str
) -> None:
    progress: list[object] = []
    path = write_tiny_gguf()
    model = type(path)(options.get("model", path))
    rest = {key: value for key, value in options.items() if key != "model"}
    with pytest.raises(error, match=message):
        load_runner(config(model, **rest), lambda *event: progress.append(event))
    assert progress == []


def test_cuda_is_refused_where_there_is_no_gpu(write_tiny_gguf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # also where the tests run beside a GPU
    with pytest.raises(DeviceMissing, match=r"--device cuda: .* choose --device cpu"):
        load(write_tiny_gguf(), device="cuda")
    assert device.choose_device("auto").type == "cpu"


def test_a_plan_made_ahead_is_what_is_loaded(write_tiny_gguf: Any) -> None:
    wanted = config(write_tiny_gguf(), max_model_len=64, max_num_seqs=3, max_num_batched_tokens=16)
    plan = plan_ahead(wanted)
    assert plan is not None
    facts = load_runner(wanted, lambda *_: None, plan).facts
    assert (facts.num_blocks, facts.max_model_len) == (plan.memory.num_blocks, 64) == (3 * 64 // 8, 64)
