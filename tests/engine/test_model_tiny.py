"""The model code on a tiny random Llama: equal to transformers, independent of the batch, and refusals by name."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from octavo_engine.config import EngineConfig
from octavo_engine.errors import ModelInvalid, ModelUnsupported
from octavo_engine.plan import SamplingParams, ScheduledRequest, StepPlan
from octavo_engine.runner import ModelRunner, load_runner

if TYPE_CHECKING:
    from pathlib import Path

SAMPLING = SamplingParams(max_tokens=1, temperature=0.0)
TOKENS = tuple(random.Random(3).choices(range(96), k=70))  # noqa: S311 - test data


def load(path: Path, **options: Any) -> ModelRunner:
    config = EngineConfig(
        model=path,
        served_model_names=("tiny",),
        device="cpu",
        kv_cache_memory_bytes=2**22,
        **{"dtype": "float32"} | options,
    )
    runner = load_runner(config, lambda *_: None).runner
    assert isinstance(runner, ModelRunner)
    return runner


def piece(start: int, end: int, *, name: str = "a", first_block: int = 0) -> ScheduledRequest:
    """Positions start to end of TOKENS, in blocks from `first_block` on."""
    blocks = tuple(range(first_block, first_block + 9))
    return ScheduledRequest(name, TOKENS[start:end], start, blocks, needs_token=True, sampling=SAMPLING)


def all_logits(runner: ModelRunner, *pieces: ScheduledRequest) -> torch.Tensor:
    return runner.forward(StepPlan(0, pieces), every_token=True)


def expected_logits(tiny_llama: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = tiny_llama(torch.tensor([TOKENS])).logits[0]
    return logits


def test_logits_equal_those_of_transformers(write_tiny_gguf: Any, tiny_llama: Any) -> None:
    logits = all_logits(load(write_tiny_gguf()), piece(0, 70))
    torch.testing.assert_close(logits, expected_logits(tiny_llama), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 0.1), ("float16", 0.03)])
def test_half_precision_is_close_to_float32(write_tiny_gguf: Any, tiny_llama: Any, dtype: str, share: float) -> None:
    expected = expected_logits(tiny_llama)
    logits = all_logits(load(write_tiny_gguf(), dtype=dtype), piece(0, 70))
    tolerance = share * expected.abs().max().item()
    torch.testing.assert_close(logits.float(), expected, atol=tolerance, rtol=0)


def test_a_tied_output_matrix_is_the_embedding(write_tiny_gguf: Any, tiny_llama: Any) -> None:
    logits = all_logits(load(write_tiny_gguf(tensors={"output.weight": None})), piece(0, 70))
    with torch.inference_mode():
        hidden = tiny_llama.model(torch.tensor([TOKENS])).last_hidden_state[0]
        expected = hidden @ tiny_llama.model.embed_tokens.weight.T
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_the_rotary_base_of_the_file_is_used(write_tiny_gguf: Any, tiny_llama: Any) -> None:
    logits = all_logits(load(write_tiny_gguf(metadata={"llama.rope.freq_base": 500.0})), piece(0, 70))
    assert not torch.allclose(logits, expected_logits(tiny_llama), atol=1e-2)
    assert torch.allclose(logits[0], expected_logits(tiny_llama)[0], atol=1e-4)  # position 0 is not turned


def test_float32_logits_are_equal_to_the_bit_in_any_batch_and_any_pieces(write_tiny_gguf: Any) -> None:
    runner = load(write_tiny_gguf())
    prompt = all_logits(runner, piece(0, 60))
    alone = torch.cat((prompt, *(all_logits(runner, piece(at, at + 1)) for at in range(60, 70))))
    generator = random.Random(0)  # noqa: S311 - test data
    names = [f"request-{index}" for index in range(10)]
    done = dict.fromkeys(names, 0)
    got: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    while unfinished := [name for name in names if done[name] < 70]:
        chosen = generator.sample(unfinished, generator.randint(1, len(unfinished)))
        ends = {
            name: min(60, done[name] + generator.randint(1, 25)) if done[name] < 60 else done[name] + 1
            for name in chosen
        }
        pieces = [piece(done[name], ends[name], name=name, first_block=names.index(name) * 9) for name in chosen]
        logits = all_logits(runner, *pieces).split([len(request.token_ids) for request in pieces])  # type: ignore[no-untyped-call] # torch
        for name, rows in zip(chosen, logits, strict=True):
            got[name].append(rows)
            done[name] = ends[name]
    assert all(torch.equal(torch.cat(got[name]), alone) for name in names)


def test_a_context_of_two_tokens_loads(write_tiny_gguf: Any) -> None:
    assert all_logits(load(write_tiny_gguf(), max_model_len=2), piece(0, 2)).shape == (2, 96)


UNSUPPORTED = {
    "another architecture": ({"metadata": {"general.architecture": "mamba"}}, "general.architecture is mamba"),
    "rope scaling": ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "llama.rope.scaling.type is longrope"),
    "experts": ({"metadata": {"llama.expert_count": 8}}, "llama.expert_count is 8; supported: 0"),
    "a partial rotation": (
        {"metadata": {"llama.rope.dimension_count": 8}},
        "llama.rope.dimension_count is 8; supported: 16",
    ),
    "an unknown option": ({"metadata": {"llama.attention.clamp_kqv": 1.0}}, "attention.clamp_kqv is not known"),
    "a tensor too many": ({"tensors": {"blk.0.attn_q_norm.weight": torch.ones(16)}}, "tensor blk.0.attn_q_norm.weight"),
}


@pytest.mark.parametrize(("extra", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_what_is_not_computed_is_refused_by_name(write_tiny_gguf: Any, extra: Any, message: str) -> None:
    with pytest.raises(ModelUnsupported, match=message):
        load(write_tiny_gguf(**extra))


INVALID = {
    "a missing tensor": ({"tensors": {"blk.1.ffn_up.weight": None}}, "tensor blk.1.ffn_up.weight is missing"),
    "a layer too few": ({"metadata": {"llama.block_count": 3}}, "tensor blk.2.attn_norm.weight is missing"),
    "another width": (
        {"metadata": {"llama.feed_forward_length": 97}},
        r"tensor blk.0.ffn_gate.weight has shape \[96, 64\]",
    ),
    "no embedding": ({"tensors": {"token_embd.weight": None}}, "token_embd.weight is missing"),
    "a size of zero": ({"metadata": {"llama.block_count": 0}}, "llama.block_count is 0, not positive"),
    "odd groups": ({"metadata": {"llama.attention.head_count_kv": 3}}, "4 query heads do not divide into 3 KV heads"),
    "a size that is a word": ({"metadata": {"llama.block_count": "two"}}, "llama.block_count is str, not int"),
}


@pytest.mark.parametrize(("extra", "message"), INVALID.values(), ids=INVALID.keys())
def test_a_file_that_contradicts_itself_is_refused_by_name(write_tiny_gguf: Any, extra: Any, message: str) -> None:
    with pytest.raises(ModelInvalid, match=message):
        load(write_tiny_gguf(**extra))
