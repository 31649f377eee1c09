"""The real model on this machine against transformers on the same dequantised weights."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoTokenizer

from octavo_engine.config import EngineConfig
from octavo_engine.messages import AddRequest
from octavo_engine.plan import LoadedModel, SamplingParams, ScheduledRequest, StepPlan
from octavo_engine.runner import ModelRunner, load_runner
from octavo_engine.scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

DATA = Path(__file__).parent / "data"
NUM_GENERATED = 64

# Prompts of one length are one batch for transformers, which then needs no padding.
PROMPT_LENGTHS = (5, 12, 23, 40)
# On the way through them the two most likely tokens are never closer than 0.0018, 18 times the difference between our
# logits and those of transformers (1e-4): the comparison does not hang on rounding.
PROMPTS = json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name, local_files_only=True)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[tuple[int, ...]]:
    """The 20 prompts as tokens, cut to four lengths."""
    token_ids = [
        tuple(tokenizer(text)["input_ids"][: PROMPT_LENGTHS[index % len(PROMPT_LENGTHS)]])
        for index, text in enumerate(PROMPTS)
    ]
    assert {len(prompt) for prompt in token_ids} == set(PROMPT_LENGTHS)
    return token_ids


def load(path: Path, dtype: Any) -> LoadedModel:
    config = EngineConfig(
        model=path,
        served_model_names=("smollm2",),
        device="cpu",
        dtype=dtype,
        max_model_len=1024,
        kv_cache_memory_bytes=256 * 2**20,
        seed=1,
    )
    return load_runner(config, lambda *_: None)


@pytest.fixture(scope="module")
def float32(smollm2_path: Path) -> LoadedModel:
    return load(smollm2_path, "float32")


def greedy(request_id: str, prompt: tuple[int, ...]) -> AddRequest:
    sampling = SamplingParams(max_tokens=NUM_GENERATED, temperature=0.0, ignore_eos=True)
    return AddRequest(request_id=request_id, prompt_token_ids=prompt, sampling=sampling)


def run(
    model: LoadedModel, arrivals: Mapping[int, list[AddRequest]], *, max_num_seqs: int, budget: int
) -> tuple[dict[str, list[int]], list[int]]:
    """Run requests that arrive at given steps to their ends: the tokens of each, and how many ran in each step."""
    scheduler = Scheduler(
        num_blocks=model.facts.num_blocks,
        block_size=model.facts.block_size,
        max_model_len=model.facts.max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        eos_token_ids=model.eos_token_ids,
    )
    tokens: dict[str, list[int]] = {}
    batch_sizes = []
    for step in range(10_000):
        for request in arrivals.get(step, ()):
            scheduler.add(request)
        plan = scheduler.schedule()
        if plan is None:
            assert step > max(arrivals)
            break
        batch_sizes.append(len(plan.requests))
        for update in scheduler.update(plan, model.runner.execute(plan)):
            assert update.error is None
            tokens.setdefault(update.request_id, []).extend(update.token_ids)
    return tokens, batch_sizes


@pytest.fixture(scope="module")
def alone(float32: LoadedModel, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """What each prompt gives with the engine to itself."""
    outputs = []
    for prompt in prompts:
        tokens, batch_sizes = run(float32, {0: [greedy("alone", prompt)]}, max_num_seqs=1, budget=512)
        assert set(batch_sizes) == {1}
        outputs.append(tokens["alone"])
    return outputs


def test_greedy_output_in_float32_equals_transformers(
    alone: list[list[int]], prompts: list[tuple[int, ...]], smollm2_in_transformers: Any
) -> None:
    # Where every token is the most likely one after those before it, generating greedily gives these tokens. So one
    # pass over prompt and output says what 64 would say.
    for length in PROMPT_LENGTHS:
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        sequences = torch.tensor([[*prompts[row], *alone[row]] for row in rows])
        with torch.inference_mode():
            logits = smollm2_in_transformers(sequences[:, :-1], logits_to_keep=NUM_GENERATED).logits
        for row, most_likely in zip(rows, logits.argmax(-1).tolist(), strict=True):
            assert len(alone[row]) == NUM_GENERATED
            assert alone[row] == most_likely, PROMPTS[row]


def test_greedy_output_in_float32_is_the_same_among_sixteen_joiners_and_leavers(
    float32: LoadedModel, alone: list[list[int]], prompts: list[tuple[int, ...]]
) -> None:
    # A small budget, so that prompts are computed in pieces. The companions leave after 3 to 40 tokens.
    arrivals: dict[int, list[AddRequest]] = {}
    for index, prompt in enumerate(prompts):
        arrivals.setdefault(index * 4, []).append(greedy(f"checked-{index}", prompt))
        for companion in range(4):
            number = index * 4 + companion
            sampling = SamplingParams(max_tokens=3 + number * 7 % 38, temperature=0.8, seed=number, ignore_eos=True)
            other = prompts[number * 3 % len(prompts)]
            request = AddRequest(request_id=f"other-{number}", prompt_token_ids=other, sampling=sampling)
            arrivals.setdefault(number, []).append(request)

    tokens, batch_sizes = run(float32, arrivals, max_num_seqs=17, budget=32)

    assert max(batch_sizes) == 17
    assert len(set(batch_sizes)) > 8  # the batch keeps changing
    assert [tokens[f"checked-{index}"] for index in range(len(prompts))] == alone


def test_bfloat16_is_as_close_to_float32_as_that_of_transformers_and_int8_is_as_good_a_model(
    smollm2_path: Path,
    smollm2_in_transformers: Any,
    tokenizer: Any,
) -> None:
    text = (DATA / "passage.txt").read_text(encoding="utf-8")
    token_ids = tokenizer(text)["input_ids"][:1000]
    assert len(token_ids) == 1000
    with torch.inference_mode():
        exact = smollm2_in_transformers(torch.tensor([token_ids])).logits[0].log_softmax(-1)
        in_bfloat16 = copy.deepcopy(smollm2_in_transformers).to(torch.bfloat16)
        theirs = in_bfloat16(torch.tensor([token_ids])).logits[0]
    ours = teacher_forced_logits(load(smollm2_path, "bfloat16"), token_ids)
    model = load(smollm2_path, "auto")
    assert model.facts.dtype == "int8"
    in_int8 = teacher_forced_logits(model, token_ids)

    divergence, bound = mean_divergence(exact, ours), mean_divergence(exact, theirs)

    logger.info("mean KL divergence from float32: %.3g nats, that of transformers %.3g", divergence, bound)
    assert 0 < divergence <= 1.2 * bound

    ratio = perplexity(in_int8, token_ids) / perplexity(ours, token_ids)
    logger.info("perplexity of int8 over that of bfloat16: %.4f", ratio)
    assert ratio <= 1.01


def teacher_forced_logits(model: LoadedModel, token_ids: list[int]) -> torch.Tensor:
    """Logits after every token of one request that is computed in four pieces: [1000, V]."""
    assert isinstance(model.runner, ModelRunner)
    blocks = tuple(range(-(-len(token_ids) // model.facts.block_size)))
    logits = []
    for start in range(0, len(token_ids), 250):
        piece = tuple(token_ids[start : start + 250])
        request = ScheduledRequest(
            "text", piece, start, blocks, needs_token=False, sampling=SamplingParams(max_tokens=1)
        )
        logits.append(model.runner.forward(StepPlan(0, (request,)), every_token=True))
    return torch.cat(logits)


def perplexity(logits: torch.Tensor, token_ids: list[int]) -> float:
    """Of the tokens after the first, under these logits."""
    return torch.nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(token_ids[1:])).exp().item()


def mean_divergence(exact: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean over tokens of KL(exact || logits), in nats; `exact` are float32 log-probabilities."""
    other = logits.float().log_softmax(-1)
    return (exact.exp() * (exact - other)).sum(-1).mean().item()
