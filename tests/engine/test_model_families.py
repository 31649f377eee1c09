"""Every family on tiny random checkpoints: logits equal to those of transformers, from safetensors and from GGUF."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from typing import TYPE_CHECKING, Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from octavo_engine.attention.base import AttentionRules, CacheShape
from octavo_engine.attention.reference import ReferenceAttention
from octavo_engine.models.checkpoint import read_checkpoint
from octavo_engine.models.decoder import TorchDecoder
from octavo_engine.plan import SamplingParams, ScheduledRequest, StepPlan
from octavo_engine.runner import ModelRunner
from octavo_engine.steps import TorchSteps
from octavo_engine.weights.stored import WeightSource

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

# Longer than every window and every original context below.
TOKENS = tuple(random.Random(7).choices(range(96), k=70))  # noqa: S311 - test data
BLOCK_SIZE = 8

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = SIZES | {"tie_word_embeddings": True, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny model."""

    family: str  # as transformers names its classes
    architecture: str  # of the GGUF file
    options: Mapping[str, Any]
    max_error: float = 1e-5  # between our float32 logits and those of transformers, of which the largest are about 4
    num_positions: int = len(TOKENS)  # longest context that is served
    has_gguf: bool = True  # whether GGUF can say it


def scaled(kind: str, **parameters: Any) -> dict[str, Any]:
    return SIZES | {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **parameters}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 32,
    "factor": 4.0,
}
CASES = {
    "llama": Case("Llama", "llama", SIZES),
    "llama with biases": Case("Llama", "llama", SIZES | {"attention_bias": True}),
    "llama, linear": Case("Llama", "llama", scaled("linear", factor=4.0)),
    "llama, dynamic": Case(
        "Llama", "llama", scaled("dynamic", factor=2.0) | {"max_position_embeddings": 40}, has_gguf=False
    ),
    "llama, llama3": Case("Llama", "llama", scaled("llama3", **LLAMA3)),
    "llama, yarn": Case("Llama", "llama", scaled("yarn", factor=4.0, original_max_position_embeddings=32)),
    "llama, yarn with its own magnitude": Case(
        "Llama",
        "llama",
        scaled("yarn", factor=4.0, original_max_position_embeddings=32, mscale=1.5, mscale_all_dim=0.7, beta_fast=8.0),
        has_gguf=False,
    ),
    "llama, long longrope": Case("Llama", "llama", scaled("longrope", **LONG), has_gguf=False),
    "llama, short longrope": Case("Llama", "llama", scaled("longrope", **LONG), num_positions=32, has_gguf=False),
    "mistral": Case("Mistral", "llama", SIZES | {"sliding_window": 16, "head_dim": 16}),
    "mistral without a window": Case("Mistral", "llama", SIZES | {"sliding_window": None}),
    "qwen2": Case("Qwen2", "qwen2", SIZES | {"tie_word_embeddings": True}),
    "qwen2, windows in the upper layers": Case(
        "Qwen2",
        "qwen2",
        SIZES | {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        has_gguf=False,
    ),
    "qwen3": Case("Qwen3", "qwen3", SIZES | {"head_dim": 16}),
    "gemma2": Case("Gemma2", "gemma2", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 6.0}),
    "gemma2, scaled by another size": Case("Gemma2", "gemma2", GEMMA | {"query_pre_attn_scalar": 24}, has_gguf=False),
    "gemma3": Case(
        "Gemma3",
        "gemma3",
        GEMMA
        | {
            "num_hidden_layers": 7,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            },
        },
    ),
}


def build(case: Case) -> Any:
    """The model in transformers, with random numbers where it would start from zeros and ones too."""
    torch.manual_seed(0)
    suffix = "TextConfig" if case.family == "Gemma3" else "Config"
    config = getattr(transformers, case.family + suffix)(**case.options)
    config._attn_implementation = "eager"  # the one that knows soft caps
    model = getattr(transformers, f"{case.family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def expected_logits(model: Any, num_tokens: int) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([TOKENS[:num_tokens]])).logits[0]
    return logits


def load(path: Path, num_positions: int = len(TOKENS), num_blocks: int = 9) -> ModelRunner:
    """The model in torch, float32: what the C++ decoder is compared with too."""
    checkpoint = read_checkpoint(path)
    spec, device = checkpoint.spec, torch.device("cpu")
    shape = CacheShape(
        num_layers=spec.num_layers,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
    )
    rules = AttentionRules(scale=spec.attention_scale, windows=spec.windows, softcap=spec.attention_softcap)
    attention = ReferenceAttention(shape, rules, dtype=torch.float32, device=device)
    weights = WeightSource(checkpoint, on_progress=lambda *_: None)
    decoder = TorchDecoder(spec, weights, attention, num_positions=num_positions, dtype=torch.float32, device=device)
    weights.check_all_read()
    return ModelRunner(TorchSteps(decoder, attention, block_size=BLOCK_SIZE, device=device), seed=0)


def logits_of(runner: ModelRunner, *ends: int) -> torch.Tensor:
    """Logits after every token up to the last of `ends`, computed in pieces that end there."""
    sampling = SamplingParams(max_tokens=1)
    logits = []
    for start, end in zip((0, *ends), ends, strict=False):
        request = ScheduledRequest("a", TOKENS[start:end], start, tuple(range(9)), needs_token=False, sampling=sampling)
        logits.append(runner.forward(StepPlan(0, (request,)), every_token=True))
    return torch.cat(logits)


def write_gguf(path: Path, model: Any, architecture: str) -> Path:
    """The file as llama.cpp's converter writes it; the names of tensors are those of its own gguf package."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_eos_token_id(2)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim).numpy())
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    add_tensors(writer, model, architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensors(writer: gguf.GGUFWriter, model: Any, architecture: str) -> None:
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        numbers = tensor
        if architecture == "llama" and ".q_proj." in name:
            numbers = pairs_adjacent(tensor, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            numbers = pairs_adjacent(tensor, config.num_key_value_heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            numbers = tensor + 1
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None
        writer.add_tensor(gguf_name, numbers.contiguous().numpy())


def pairs_adjacent(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    return weight.reshape(num_heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def llama3_factors(rope: Mapping[str, float], head_dim: int) -> torch.Tensor:
    """The divisors that llama.cpp's converter computes."""
    context = rope["original_max_position_embeddings"]
    low, high = context / rope["low_freq_factor"], context / rope["high_freq_factor"]
    factors = []
    for dimension in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (dimension / head_dim)
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(rope["factor"])
        else:
            smooth = (context / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.tensor(factors)


def check(path: Path, case: Case, expected: torch.Tensor) -> None:
    runner = load(path, case.num_positions)
    whole = logits_of(runner, len(expected))
    error = (whole - expected).abs().max().item()
    assert error <= case.max_error, f"max error {error:.3g} of logits up to {expected.abs().max():.3g}"
    ends = (19, 20, *range(25, len(expected)))  # a chunk, a chunk of one, a chunk, decodes
    assert torch.equal(logits_of(runner, *ends, len(expected)), whole)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_logits_equal_those_of_transformers(tmp_path: Path, case: Case) -> None:
    model = build(case)
    expected = expected_logits(model, case.num_positions)
    model.save_pretrained(tmp_path / "model")
    check(tmp_path / "model", case, expected)
    if case.has_gguf:
        check(write_gguf(tmp_path / "model.gguf", model, case.architecture), case, expected)


def test_shards_are_one_model(tmp_path: Path) -> None:
    model = build(CASES["qwen3"])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check(tmp_path, CASES["qwen3"], expected_logits(model, len(TOKENS)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_files_hold_the_same_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    model = build(CASES["llama"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    expected = expected_logits(model, len(TOKENS))
    model.to(dtype).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == dtype
    check(tmp_path, CASES["llama"], expected)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_of_a_model_that_sees_images_the_text_model_is_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, prefix: str
) -> None:
    model = build(CASES["gemma3"])
    model.save_pretrained(tmp_path)
    text_config = model.config.to_dict()
    rewrite_config(
        tmp_path,
        lambda _: {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": text_config,
            "eos_token_id": [2, 5],
        },
    )
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    tensors["vision_tower.vision_model.embeddings.patch_embedding.weight"] = torch.ones(2, 2)
    save_file(tensors, tmp_path / "model.safetensors")

    check(tmp_path, CASES["gemma3"], expected_logits(model, len(TOKENS)))
    assert "only the text model is served: 1 tensors such as vision_tower." in caplog.text
    assert read_checkpoint(tmp_path).spec.eos_token_ids == {2, 5}


def rewrite_config(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
