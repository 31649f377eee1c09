"""GPTQ, AWQ, FP8 and compressed-tensors checkpoints: as the dequantised model, cut for ranks, planned from headers.

Each tiny checkpoint is packed here, in the format's own way and by code of its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from octavo_engine.config import EngineConfig
from octavo_engine.cpu.decoder import CpuDecoder
from octavo_engine.errors import ConfigError, ModelInvalid, ModelUnsupported
from octavo_engine.models.checkpoint import read_checkpoint
from octavo_engine.plan import SamplingParams, ScheduledRequest, StepPlan
from octavo_engine.planning import plan_for_cpu, read_model
from octavo_engine.runner import ModelRunner, load_runner
from octavo_engine.weights.quant_type import QuantType
from octavo_engine.weights.shard import Shard
from octavo_engine.weights.stored import WeightSource

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CPU = torch.device("cpu")
TOKENS = tuple(range(3, 43))
MAX_ERROR = 2e-5  # in float32, of logits up to 5
MAX_SHARE = 0.05
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that each field of a word holds

Parts = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Quantised:
    """What a format makes of one matrix."""

    parts: Parts
    numbers: torch.Tensor  # float32 [out, in], that the parts stand for


@dataclass(frozen=True)
class Format:
    """A way to quantise."""

    config: dict[str, Any]
    quantise: Callable[[torch.Tensor], Quantised]
    native: QuantType | None  # as which the CPU library multiplies it
    name: str = ""
    beside: Callable[[dict[str, torch.Tensor]], Parts] = field(default=lambda _: {})


def words(fields: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Whole numbers packed into int32 along a dimension, the first one in the lowest bits."""
    per = 32 // bits
    grouped = fields.long().movedim(dim, -1)
    grouped = grouped.reshape(*grouped.shape[:-1], -1, per)
    packed = sum(grouped[..., index] << bits * index for index in range(per))
    assert isinstance(packed, torch.Tensor)
    return ((packed + 2**31) % 2**32 - 2**31).to(torch.int32).movedim(-1, dim).contiguous()


def rounded(weight: torch.Tensor, bits: int, group: int, *, symmetric: bool, order: torch.Tensor | None = None) -> Any:
    """Round to nearest: numbers [out, in], scales and zeros [out, groups], groups of inputs, what they stand for."""
    outputs, inputs = weight.shape
    group_of = torch.arange(inputs) // group if order is None else order
    numbers = torch.empty(outputs, inputs, dtype=torch.int64)
    scales, zeros = (torch.empty(outputs, inputs // group) for _ in range(2))
    top = 2**bits - 1
    for index in range(inputs // group):
        members = group_of == index
        part = weight[:, members]
        if symmetric:
            scale = part.abs().amax(1) / (2 ** (bits - 1) - 1)
            zero = torch.full_like(scale, 2 ** (bits - 1))
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scale = (high - low) / top
            zero = (-low / scale).round().clamp(1, top)
        scale = scale.half().float()
        numbers[:, members] = (part / scale[:, None] + zero[:, None]).round().clamp(0, top).long()
        scales[:, index], zeros[:, index] = scale, zero
    return numbers, scales, zeros, group_of, (numbers - zeros[:, group_of]) * scales[:, group_of]


def gptq(bits: int, group: int, *, symmetric: bool, act_order: bool = False, v2: bool = False) -> Format:
    def quantise(weight: torch.Tensor) -> Quantised:
        inputs = weight.shape[1]
        size = inputs if group == -1 else group
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs)) // size if act_order else None
        numbers, scales, zeros, group_of, whole = rounded(weight, bits, size, symmetric=symmetric, order=order)
        parts = {
            "qweight": words(numbers.T, bits, 0),
            "qzeros": words((zeros - (0 if v2 else 1)).T, bits, 1),
            "scales": scales.T.half().contiguous(),
            "g_idx": group_of.int(),
        }
        return Quantised(parts, whole)

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": symmetric}
    native = QuantType.Q4_1 if bits == 4 else QuantType.Q8_0 if symmetric else None
    if act_order or group == 16:
        native = None
    return Format(config | ({"checkpoint_format": "gptq_v2"} if v2 else {}), quantise, native, f"gptq {bits}-bit")


def awq(group: int) -> Format:
    def quantise(weight: torch.Tensor) -> Quantised:
        numbers, scales, zeros, _, whole = rounded(weight, 4, group, symmetric=False)

        def interleaved(columns: torch.Tensor) -> torch.Tensor:
            return words(columns.reshape(len(columns), -1, 8)[..., AWQ_ORDER].flatten(1), 4, 1)

        parts = {
            "qweight": interleaved(numbers.T),
            "qzeros": interleaved(zeros.T),
            "scales": scales.T.half().contiguous(),
        }
        return Quantised(parts, whole)

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return Format(config, quantise, QuantType.Q4_1, "awq 4-bit")


def packed(group: int | None, *, symmetric: bool, act_order: bool = False) -> Format:
    """compressed-tensors' W4A16."""

    def quantise(weight: torch.Tensor) -> Quantised:
        inputs = weight.shape[1]
        size = group or inputs
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs)) // size if act_order else None
        numbers, scales, zeros, group_of, whole = rounded(weight, 4, size, symmetric=symmetric, order=order)
        parts = {
            "weight_packed": words(numbers, 4, 1),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            parts["weight_zero_point"] = words(zeros, 4, 0)
        if act_order:
            parts["weight_g_idx"] = group_of.int()
        return Quantised(parts, whole)

    weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "symmetric": symmetric,
        "dynamic": False,
        "actorder": "group" if act_order else None,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }
    return Format(config, quantise, None if act_order else QuantType.Q4_1, "compressed-tensors 4-bit")


def float8(weight: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers [out, in], scales [blocks, blocks], what they stand for."""
    outputs, inputs = weight.shape
    whole = torch.empty_like(weight)
    numbers = torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-outputs // rows), -(-inputs // columns))
    for row in range(len(scales)):
        for column in range(scales.shape[1]):
            block = (
                slice(row * rows, min(outputs, (row + 1) * rows)),
                slice(column * columns, min(inputs, (column + 1) * columns)),
            )
            scales[row, column] = weight[block].abs().max() / 448
            numbers[block] = (weight[block] / scales[row, column]).to(torch.float8_e4m3fn)
            whole[block] = numbers[block].float() * scales[row, column]
    return numbers, scales, whole


def fp8(block: tuple[int, int] | None, *, activations: str = "dynamic") -> Format:
    """As transformers and vLLM have it."""

    def quantise(weight: torch.Tensor) -> Quantised:
        numbers, scales, whole = float8(weight, *(block or weight.shape))
        parts = {"weight": numbers}
        parts |= {"weight_scale_inv": scales} if block else {"weight_scale": scales.view(())}
        if activations == "static":
            parts["input_scale"] = torch.tensor(0.02)
        return Quantised(parts, whole)

    config = {"quant_method": "fp8", "activation_scheme": activations}
    return Format(config | ({"weight_block_size": list(block)} if block else {}), quantise, None, "fp8")


def compressed_fp8(strategy: str, *, static: bool = False) -> Format:
    """As compressed-tensors has it."""
    block = (16, 32)

    def quantise(weight: torch.Tensor) -> Quantised:
        sizes = {"tensor": tuple(weight.shape), "channel": (1, weight.shape[1]), "block": block}
        numbers, scales, whole = float8(weight, *sizes[strategy])
        parts = {"weight": numbers, "weight_scale": scales.view(1) if strategy == "tensor" else scales}
        return Quantised(parts | ({"input_scale": torch.tensor([0.02])} if static else {}), whole)

    weights: dict[str, Any] = {
        "num_bits": 8,
        "type": "float",
        "strategy": strategy,
        "symmetric": True,
        "dynamic": False,
    }
    if strategy == "block":
        weights["block_structure"] = list(block)
    activations = {"num_bits": 8, "type": "float", "strategy": "tensor" if static else "token", "dynamic": not static}
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
        "ignore": ["lm_head"],
    }
    return Format(config, quantise, None, "compressed-tensors fp8")


FORMATS = {
    "gptq, groups of 32": gptq(4, 32, symmetric=False),
    "gptq, symmetric groups of 64": gptq(4, 64, symmetric=True),
    "gptq, one group": gptq(4, -1, symmetric=False),
    "gptq, groups of 16": gptq(4, 16, symmetric=True),
    "gptq, act-order": gptq(4, 32, symmetric=False, act_order=True),
    "gptq v2": gptq(4, 32, symmetric=False, v2=True),
    "gptq, 8 bits": gptq(8, 32, symmetric=True),
    "gptq, 8 bits with zero points": gptq(8, 32, symmetric=False),
    "gptq, 8 bits, act-order": gptq(8, 64, symmetric=True, act_order=True),
    "awq": awq(32),
    "awq, groups of 128": awq(128),
    "compressed, groups of 32": packed(32, symmetric=True),
    "compressed, zero points": packed(64, symmetric=False),
    "compressed, channels": packed(None, symmetric=True),
    "compressed, act-order": packed(32, symmetric=True, act_order=True),
    "fp8, dynamic": fp8(None),
    "fp8, static": fp8(None, activations="static"),
    "fp8, blocks": fp8((16, 48)),
    "compressed fp8, tensors": compressed_fp8("tensor", static=True),
    "compressed fp8, channels": compressed_fp8("channel"),
    "compressed fp8, blocks": compressed_fp8("block"),
}


@dataclass(frozen=True)
class Saved:
    """A checkpoint."""

    folder: Path
    matrices: dict[str, torch.Tensor]  # by module, what they stand for
    expected: torch.Tensor  # transformers' float32 logits of the dequantised model
    num_parameters: int

    def config(self, **options: Any) -> EngineConfig:
        """Options to load it with."""
        defaults: dict[str, Any] = {"device": "cpu", "kv_cache_memory_bytes": 2**22, "max_model_len": 64}
        return EngineConfig(model=self.folder, served_model_names=("tiny",), **defaults | options)

    def logits(self, **options: Any) -> torch.Tensor:
        """Ours after each token."""
        runner = load_runner(self.config(**options), lambda *_: None).runner
        assert isinstance(runner, ModelRunner)
        request = ScheduledRequest(
            "a", TOKENS, 0, tuple(range(8)), needs_token=True, sampling=SamplingParams(max_tokens=1)
        )
        return runner.forward(StepPlan(0, (request,)), every_token=True)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Format], Saved]:
    """Quantises all but embedding and output of a tiny Llama, and saves it."""

    def write(format_: Format) -> Saved:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=96,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.1,
            tie_word_embeddings=False,
        )
        model: Any = LlamaForCausalLM(config).eval()
        tensors, matrices = {}, {}
        for name, tensor in model.state_dict().items():
            if not name.endswith("_proj.weight"):
                tensors[name] = tensor
                continue
            module = name.removesuffix(".weight")
            quantised = format_.quantise(tensor)
            tensors |= {f"{module}.{part}": value for part, value in quantised.parts.items()}
            matrices[module] = quantised.numbers
            tensor.copy_(quantised.numbers)
        save_file(tensors | format_.beside(matrices), tmp_path / "model.safetensors")
        written = json.loads(config.to_json_string(use_diff=False))
        written |= {"architectures": ["LlamaForCausalLM"], "quantization_config": format_.config}
        (tmp_path / "config.json").write_text(json.dumps(written))
        with torch.inference_mode():
            expected = model(torch.tensor([TOKENS])).logits[0]
        return Saved(tmp_path, matrices, expected, sum(tensor.numel() for tensor in model.state_dict().values()))

    return write


@pytest.mark.parametrize("format_", FORMATS.values(), ids=FORMATS)
def test_float32_logits_are_those_of_the_dequantised_model(save: Callable[[Format], Saved], format_: Format) -> None:
    saved = save(format_)
    assert (saved.logits(dtype="float32") - saved.expected).abs().max().item() < MAX_ERROR
    model = read_model(saved.folder)
    assert model.quantization == format_.name
    assert model.checkpoint.num_parameters == saved.num_parameters


@pytest.mark.parametrize("format_", FORMATS.values(), ids=FORMATS)
def test_the_parts_of_all_ranks_are_the_whole(save: Callable[[Format], Saved], format_: Format) -> None:
    saved = save(format_)
    checkpoint = read_checkpoint(saved.folder)
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    for role, module, dim in (
        ("q", f"{attention}.q_proj", 0),
        ("o", f"{attention}.o_proj", 1),
        ("gate", f"{mlp}.gate_proj", 0),
        ("down", f"{mlp}.down_proj", 1),
    ):
        expected = saved.matrices[module]
        for size in (1, 2, 4):
            sources = [WeightSource(checkpoint, on_progress=lambda *_: None, shard=Shard(r, size)) for r in range(size)]
            parts = [source.matrix(role, tuple(expected.shape), layer=1) for source in sources]  # type: ignore[arg-type] # roles are literals
            assert len({part.shape for part in parts}) == 1
            whole = torch.cat([part.dequantize(torch.float32, CPU) for part in parts], dim)
            torch.testing.assert_close(whole, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("format_", FORMATS.values(), ids=FORMATS)
def test_on_a_cpu_what_can_stay_quantised_does_and_is_planned_so_from_the_header(
    save: Callable[[Format], Saved], format_: Format
) -> None:
    saved, native = save(format_), format_.native
    plan = plan_for_cpu(read_model(saved.folder), saved.config(), processes=())
    assert plan.native is not None, "there is no library for this processor: install g++ and make venv"
    assert (plan.dtype == "int8") == (native is not None)
    loaded = load_runner(saved.config(), lambda *_: None).runner
    assert isinstance(loaded, ModelRunner)
    assert isinstance(loaded._steps, CpuDecoder)
    norms = 5 * 128 * 4
    assert loaded._steps.weight_bytes == plan.memory.weight_bytes - norms
    quantised = sum(tensor.numel() for tensor in saved.matrices.values())
    if native is not None:
        embeddings = 2 * 96 * 128 * 2
        per_number = {QuantType.Q4_1: 20 / 32, QuantType.Q8_0: 34 / 32}[native]
        assert loaded._steps.weight_bytes == embeddings + quantised * per_number
    # Rounding of inputs to int8, or of everything to bfloat16, as a share of the largest logit.
    error = (saved.logits() - saved.expected).abs().max() / saved.expected.abs().max()
    assert error.item() < MAX_SHARE


@pytest.mark.parametrize("name", ["gptq, groups of 32", "fp8, blocks"])
def test_none_dequantises(save: Callable[[Format], Saved], name: str) -> None:
    saved = save(FORMATS[name])
    plan = plan_for_cpu(read_model(saved.folder), saved.config(quantization="none"), processes=())
    assert plan.dtype != "int8"


def test_a_method_that_is_asked_for_must_be_that_of_the_model(save: Callable[[Format], Saved]) -> None:
    saved = save(FORMATS["awq"])
    assert saved.logits(quantization="awq").shape == (len(TOKENS), 96)
    with pytest.raises(ConfigError, match=r"--quantization gptq: the weights of .* are awq; use auto"):
        saved.logits(quantization="gptq")


def test_biases_of_zeros_beside_quantised_matrices_are_passed_over_and_others_refused(
    save: Callable[[Format], Saved],
) -> None:
    plain = FORMATS["gptq, groups of 32"]

    def biases(value: float) -> Callable[[dict[str, torch.Tensor]], Parts]:
        return lambda matrices: {f"{module}.bias": torch.full((len(m),), value) for module, m in matrices.items()}

    saved = save(replace(plain, beside=biases(0.0)))
    assert (saved.logits(dtype="float32") - saved.expected).abs().max().item() < MAX_ERROR
    with pytest.raises(ModelUnsupported, match=r"tensor model.layers.0.mlp.down_proj.bias"):
        save(replace(plain, beside=biases(0.5))).logits(dtype="float32")


def test_scales_of_a_quantised_cache_are_passed_over(save: Callable[[Format], Saved]) -> None:
    saved = save(replace(FORMATS["fp8, dynamic"], beside=lambda _: {"model.layers.0.self_attn.k_scale": torch.ones(1)}))
    assert saved.logits(dtype="float32").shape == (len(TOKENS), 96)


def test_a_checkpoint_that_transformers_quantised_is_read(save: Callable[[Format], Saved]) -> None:
    config = FineGrainedFP8Config(weight_block_size=(32, 64))
    tool = Fp8Quantize(SimpleNamespace(quantization_config=config))

    def quantise(weight: torch.Tensor) -> Quantised:
        made = tool.convert({"m.weight": weight})
        scales = made["m.weight_scale_inv"].repeat_interleave(32, 0).repeat_interleave(64, 1)
        parts = {name.removeprefix("m."): tensor for name, tensor in made.items()}
        return Quantised(parts, made["m.weight"].float() * scales)

    saved = save(Format(config.to_dict(), quantise, None))
    assert (saved.logits(dtype="float32") - saved.expected).abs().max().item() < MAX_ERROR
    assert read_model(saved.folder).quantization == "fp8"


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
COMPRESSED = FORMATS["compressed, groups of 32"].config
REFUSED = {
    "an unknown method": ({"quant_method": "bitsandbytes"}, r"quantization_config.quant_method is bitsandbytes; supp"),
    "three bits": (GPTQ | {"bits": 3}, "quantization_config.bits is 3; supported: 4, 8"),
    "another layout": (GPTQ | {"checkpoint_format": "marlin"}, "quantization_config.checkpoint_format is marlin"),
    "options for some modules": (GPTQ | {"dynamic": {"-:lm_head": {}}}, "quantization_config.dynamic"),
    "eight bits": (AWQ | {"bits": 8}, "quantization_config.bits is 8; supported: 4"),
    "another order": (AWQ | {"version": "gemv"}, "quantization_config.version is gemv"),
    "no zero points": (AWQ | {"zero_point": False}, "quantization_config.zero_point is False"),
    "unknown activations": (FP8 | {"activation_scheme": "token"}, "quantization_config.activation_scheme is token"),
    "another float": (FP8 | {"fmt": "e5m2"}, "quantization_config.fmt is e5m2"),
    "another compression": (COMPRESSED | {"format": "nvfp4-pack-quantized"}, "quantization_config.format is nvfp4"),
    "sparsity": (COMPRESSED | {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config.format is sparse-24"),
    "rotations": (COMPRESSED | {"transform_config": {"u": {}}}, "quantization_config.transform_config"),
    "two kinds": (
        COMPRESSED | {"config_groups": {"a": {}, "b": {}}},
        "quantization_config.config_groups does not have one group",
    ),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_computed_is_refused_by_its_key_from_the_header(
    save: Callable[[Format], Saved], config: dict[str, Any], message: str
) -> None:
    saved = save(replace(FORMATS["gptq, groups of 32"], config=config))
    with pytest.raises(ModelUnsupported, match=message):
        read_model(saved.folder)


def without(part: str) -> Callable[[torch.Tensor], Quantised]:
    def quantise(weight: torch.Tensor) -> Quantised:
        whole = gptq(4, 32, symmetric=False).quantise(weight)
        return Quantised({name: tensor for name, tensor in whole.parts.items() if name != part}, whole.numbers)

    return quantise


def test_parts_that_are_missing_or_contradict_the_configuration_are_named(save: Callable[[Format], Saved]) -> None:
    plain = FORMATS["gptq, groups of 32"]
    with pytest.raises(ModelInvalid, match=r"tensor model.layers.0.\S+_proj.qzeros is missing, beside \S+qweight"):
        read_model(save(replace(plain, quantise=without("qzeros"))).folder)
    with pytest.raises(ModelInvalid, match=r"_proj.\S+ has shape .* by config.json's quantization_config it should"):
        read_model(save(replace(plain, config=GPTQ | {"group_size": 64})).folder)
    with pytest.raises(ModelUnsupported, match=r"_proj.\S+ has type I32, but config.json has no quantization_config"):
        read_model(save(replace(plain, config=None)).folder)  # type: ignore[arg-type] # what is tested
    unordered = FORMATS["gptq, act-order"]
    with pytest.raises(ModelInvalid, match=r"groups in another order, but config.json does not say so \(desc_act\)"):
        save(replace(unordered, config=unordered.config | {"desc_act": False})).logits(dtype="float32")
    with pytest.raises(ModelInvalid, match=r"zero points other than 128, but .* \(sym\)"):
        save(replace(FORMATS["gptq, 8 bits with zero points"], config=GPTQ | {"bits": 8, "sym": True})).logits()
