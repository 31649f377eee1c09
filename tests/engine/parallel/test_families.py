"""Two, three and four ranks compute what one computes: every family, on tiny random checkpoints.

One set of processes for each number of ranks loads all the models, one after the other: over gloo on the processors,
and over NCCL where there is a GPU for each rank.
"""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch
import transformers

from octavo_engine.device import of_rank
from octavo_engine.models.checkpoint import read_checkpoint
from octavo_engine.plan import SamplingParams, ScheduledRequest, StepPlan
from octavo_engine.ranks import Ranks
from octavo_engine.runner import ModelRunner
from octavo_engine.sizing import MemoryPlan
from octavo_engine.steps import Steps, load_torch_steps

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(300)

TOKENS = tuple(random.Random(7).choices(range(98), k=70))  # noqa: S311 - test data
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
MEMORY = MemoryPlan(
    available_bytes=0,
    process_bytes=0,
    margin_bytes=0,
    weight_bytes=0,
    work_bytes=0,
    kv_bytes_per_token=0,
    block_size=8,
    num_blocks=36,
    max_model_len=96,
)
# What the kernels of a GPU have: heads of 64 at least, and blocks of 16.
MEMORIES = {"cpu": MEMORY, "cuda": dataclasses.replace(MEMORY, block_size=16)}
HEAD_DIMS = {"cpu": 8, "cuda": 64}

SIZES = {
    "vocab_size": 98,  # no multiple of three or four
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Each rank has its own KV heads, or with four ranks one together with another.
NUM_KV_HEADS = {2: 6, 3: 3, 4: 2}
PLACES = [
    *(("cpu", size) for size in NUM_KV_HEADS),
    *(("cuda", size) for size in NUM_KV_HEADS if size <= torch.cuda.device_count()),
]
GEMMA = {"tie_word_embeddings": True, "sliding_window": 8, "query_pre_attn_scalar": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True},
    "Mistral": {"sliding_window": 16, "num_key_value_heads": 1},  # which all ranks have
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Gemma2": GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 6.0},
    "Gemma3": GEMMA | {"num_hidden_layers": 6},
}
# Between logits of which the largest are about 5, of several ranks and of one. NCCL sums in any order.
MAX_ERRORS = {torch.float32: 1e-5, torch.bfloat16: 0.3, torch.float16: 0.04}
ANY_ORDER = {"cpu": 0.0, "cuda": 5e-5}


@dataclasses.dataclass(frozen=True)
class Shared:
    """Running ranks."""

    kind: str  # of their devices
    size: int
    ranks: Ranks


@pytest.fixture(scope="module", params=PLACES, ids=lambda place: f"{place[1]} ranks on {place[0]}")
def shared(request: pytest.FixtureRequest) -> Iterator[Shared]:
    """So many ranks, of which this process is the first."""
    kind, size = request.param
    num_threads = torch.get_num_threads()
    ranks = Ranks(size, of_rank(kind, 0))
    yield Shared(kind, size, ranks)
    ranks.close()
    torch.set_num_threads(num_threads)


def save(family: str, shared: Shared, folder: Path) -> Path:
    """A random model that the ranks can share, with random numbers where transformers begins with zeros and ones."""
    torch.manual_seed(0)
    heads = {"num_key_value_heads": NUM_KV_HEADS[shared.size], "head_dim": HEAD_DIMS[shared.kind]}
    options = SIZES | heads | FAMILIES[family]
    config = getattr(transformers, f"{family}{'TextConfig' if family == 'Gemma3' else 'Config'}")(**options)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


def load(path: Path, shared: Shared, dtype: torch.dtype = torch.float32, *, alone: bool = False) -> ModelRunner:
    """The model in all the processes that there are, or in this one alone."""
    checkpoint, memory = read_checkpoint(path), MEMORIES[shared.kind]
    steps: Steps
    if alone:
        device = of_rank(shared.kind, 0)
        steps = load_torch_steps(checkpoint, memory, dtype=dtype, device=device, on_progress=lambda *_: None)
    else:
        steps = shared.ranks.load(checkpoint, memory, dtype=dtype, num_threads=1, on_progress=lambda *_: None)
    return ModelRunner(steps, seed=0)


def piece(start: int, end: int, first_block: int = 0) -> ScheduledRequest:
    blocks = tuple(range(first_block, first_block + 12))
    return ScheduledRequest("a", TOKENS[start:end], start, blocks, needs_token=True, sampling=GREEDY)


def all_logits(runner: ModelRunner, *pieces: ScheduledRequest) -> torch.Tensor:
    return runner.forward(StepPlan(0, pieces), every_token=True).float()


def greedy(runner: ModelRunner, num_tokens: int) -> list[int]:
    """The answer to the first twenty of TOKENS."""
    request = piece(0, 20)
    tokens = []
    for step in range(num_tokens):
        (result,) = runner.execute(StepPlan(step, (request,))).results
        assert result.token_id is not None, result.error
        tokens.append(result.token_id)
        request = ScheduledRequest(
            "a", (result.token_id,), 20 + step, request.block_ids, needs_token=True, sampling=GREEDY
        )
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_compute_what_one_computes(shared: Shared, tmp_path: Path, family: str) -> None:
    path = save(family, shared, tmp_path)
    for dtype, bound in MAX_ERRORS.items():
        max_error = bound + ANY_ORDER[shared.kind]
        alone = load(path, shared, dtype, alone=True)
        expected, expected_tokens = all_logits(alone, piece(0, 70)), greedy(alone, 12)
        together = load(path, shared, dtype)
        error = (all_logits(together, piece(0, 70)) - expected).abs().max().item()
        assert error <= max_error, f"{dtype}: max error {error:.3g} of logits up to {expected.abs().max():.3g}"
        if dtype == torch.float32:
            assert greedy(together, 12) == expected_tokens
            guesses = StepPlan(0, (msgspec.structs.replace(piece(20, 24), num_proposed=3),))
            assert together.execute(guesses) == alone.execute(guesses)
            telling = SamplingParams(max_tokens=1, temperature=0, num_prompt_logprobs=2)
            prompt = msgspec.structs.replace(piece(0, 5), prompt_targets=(3, 4, 5, 6), sampling=telling)
            told = [runner.execute(StepPlan(0, (prompt,))).prompt_logprobs[0] for runner in (together, alone)]
            assert [one.logprob for one in told[0]] == pytest.approx([one.logprob for one in told[1]], abs=1e-4)
            assert [one.rank for one in told[0]] == [one.rank for one in told[1]]


def test_a_float32_result_does_not_depend_on_the_batch_with_ranks_either(shared: Shared, tmp_path: Path) -> None:
    runner = load(save("Llama", shared, tmp_path), shared)
    whole = all_logits(runner, piece(0, 70))
    in_pieces = [all_logits(runner, piece(start, end)) for start, end in ((0, 19), (19, 20), (20, 61), (61, 70))]
    bound = ANY_ORDER[shared.kind]
    torch.testing.assert_close(torch.cat(in_pieces), whole, rtol=0.0, atol=bound)
    company = all_logits(runner, piece(0, 33, first_block=12), piece(0, 70), piece(0, 1, first_block=24))
    torch.testing.assert_close(company[33:103], whole, rtol=0.0, atol=bound)


def test_copied_blocks_are_copied_on_every_rank(shared: Shared, tmp_path: Path) -> None:
    runner = load(save("Qwen3", shared, tmp_path), shared)
    expected = all_logits(runner, piece(0, 16))[8:]
    all_logits(runner, piece(0, 8))
    runner.forward(StepPlan(0, (piece(0, 1, first_block=20),), ((0, 12),)))
    copied = all_logits(runner, piece(8, 16, first_block=12))
    torch.testing.assert_close(copied, expected, rtol=0.0, atol=ANY_ORDER[shared.kind])


def test_ranks_that_are_there_answer(shared: Shared) -> None:
    shared.ranks.check()
    assert len(set(shared.ranks.pids)) == shared.size - 1
