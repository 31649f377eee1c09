"""What an adapter's files say: scales and ranks, and every refusal by its key or tensor."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine.lora.conftest import ALL, write_adapter
from tests.engine.test_model_families import CASES, build

from octavo_engine.errors import ModelInvalid, ModelNotFound, ModelUnsupported
from octavo_engine.models.adapter import Adapter, most_elements, read_adapter
from octavo_engine.models.checkpoint import spec_from_config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from octavo_engine.models.spec import DecoderSpec


@pytest.fixture(scope="module")
def model() -> Any:
    return build(CASES["llama"])


@pytest.fixture(scope="module")
def spec(model: Any) -> DecoderSpec:
    return spec_from_config(model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})[0]


@pytest.fixture
def adapter(tmp_path: Path, model: Any) -> Path:
    return write_adapter(tmp_path / "adapter", model, target_modules="all-linear")


def scales(adapter: Adapter) -> dict[str, float]:
    return {role: pair.scale for (layer, role), pair in adapter.pairs.items() if layer == 1}


def test_every_matrix_of_every_layer_is_found(tmp_path: Path, model: Any, spec: DecoderSpec) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "a", model), spec)
    assert len(adapter.pairs) == 2 * 7
    assert adapter.rank == 4
    assert adapter.num_elements == most_elements(spec, 4)
    assert set(scales(adapter).values()) == {2.0}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"use_rslora": True}, {"q": 4.0, "v": 4.0}),
        ({"lora_alpha": 2.5}, {"q": 0.625, "v": 0.625}),
        ({"rank_pattern": {"v_proj": 8}}, {"q": 2.0, "v": 1.0}),
        ({"alpha_pattern": {r"layers\.1\..*q_proj": 16, "q_proj": 4}}, {"q": 4.0, "v": 2.0}),
        ({"alpha_pattern": {"^model.layers.1.self_attn.v_proj": 4}}, {"q": 2.0, "v": 1.0}),
        ({"alpha_pattern": {"roj": 4}}, {"q": 2.0, "v": 2.0}),  # no part of a name
        ({"target_modules": r".*\.[qv]_proj"}, {"q": 2.0, "v": 2.0}),
        ({"target_modules": "all-linear", "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}, {"q": 2.0, "v": 2.0}),
        ({"use_dora": False, "modules_to_save": None, "layer_replication": None}, {"q": 2.0, "v": 2.0}),
    ],
)
def test_scales_are_pefts(
    tmp_path: Path, model: Any, spec: DecoderSpec, config: Any, expected: dict[str, float]
) -> None:
    ranks = config.get("rank_pattern")
    folder = write_adapter(tmp_path / "a", model, targets=("q_proj", "v_proj"), ranks=ranks, **config)
    assert scales(read_adapter(folder, spec)) == pytest.approx(expected)


def test_an_adapter_of_a_model_that_sees_images_is_one_of_its_text_model(
    tmp_path: Path, model: Any, spec: DecoderSpec
) -> None:
    folder = write_adapter(tmp_path / "a", model, targets=("q_proj",))
    rename_tensors(folder, lambda name: name.replace("model.model.layers", "model.model.language_model.layers"))
    assert scales(read_adapter(folder, spec)) == {"q": 2.0}


UNSUPPORTED = {
    "DoRA": ({"use_dora": True}, "key use_dora is True"),
    "biases": ({"bias": "all"}, "key bias is all; supported: none"),
    "biases of its own": ({"lora_bias": True}, "key lora_bias is True"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "key modules_to_save is"),
    "another method": ({"peft_type": "IA3"}, "key peft_type is IA3; supported: LORA"),
    "transposed weights": ({"fan_in_fan_out": True}, "key fan_in_fan_out is True"),
    "weights taken off the model's": ({"init_lora_weights": "pissa"}, "key init_lora_weights is pissa"),
    "what nobody knows": ({"use_new_idea": 3}, "key use_new_idea is 3"),
}


@pytest.mark.parametrize(("config", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_what_is_not_computed_is_refused_by_its_key(
    tmp_path: Path, model: Any, spec: DecoderSpec, config: Any, message: str
) -> None:
    with pytest.raises(ModelUnsupported, match=f"adapter_config.json: {message}"):
        read_adapter(write_adapter(tmp_path / "a", model, **config), spec)


INVALID = {
    "no rank": ({"r": None}, "key r is missing"),
    "a rank of zero": ({"r": 0, "rank_pattern": dict.fromkeys(ALL, 4)}, "key r is 0, not positive"),
    "no alpha": ({"lora_alpha": None}, "key lora_alpha is missing"),
    "a pattern that is none": ({"alpha_pattern": {"(": 1}}, r"key alpha_pattern has .*no regular expression"),
    "targets that are none": ({"target_modules": 3}, "key target_modules is neither"),
    "a tensor that is no target": ({"target_modules": ["q_proj"]}, "is of none of the target_modules"),
    "another rank than it says": (
        {"rank_pattern": {"v_proj": 3}},
        r"self_attn.v_proj.lora_A.weight has shape \[4, 32\], but with rank 3 this model needs \[3, 32\]",
    ),
}


@pytest.mark.parametrize(("config", "message"), INVALID.values(), ids=INVALID.keys())
def test_a_contradiction_is_refused_by_name(
    tmp_path: Path, model: Any, spec: DecoderSpec, config: Any, message: str
) -> None:
    with pytest.raises(ModelInvalid, match=message):
        read_adapter(write_adapter(tmp_path / "a", model, **config), spec)


def rename_tensors(folder: Path, new_name: Callable[[str], str | None]) -> None:
    """Give tensors other names; None leaves one out."""
    tensors = {new_name(name): tensor for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file({name: tensor for name, tensor in tensors.items() if name}, folder / "adapter_model.safetensors")


OUT_OF_PLACE = {
    "half of a pair": (
        ("layers.0.self_attn.q_proj.lora_A", None), ModelInvalid, "layers.0.self_attn.q_proj.lora_B.* no counterpart"
    ),
    "a layer too many": (("layers.1.", "layers.7."), ModelUnsupported, "layers.7..* nothing else"),
    "the embedding": (
        ("layers.1.self_attn.q_proj", "embed_tokens"), ModelUnsupported, "embed_tokens.lora_A.weight: an adapter may"
    ),
    "a magnitude": (("lora_A.weight", "lora_magnitude_vector"), ModelUnsupported, "magnitude_vector: an adapter may"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), OUT_OF_PLACE.values(), ids=OUT_OF_PLACE.keys())
def test_a_tensor_that_has_no_place_is_refused_by_name(
    spec: DecoderSpec, adapter: Path, change: tuple[str, str | None], error: type[Exception], message: str
) -> None:
    old, new = change
    rename_tensors(adapter, lambda name: (None if new is None else name.replace(old, new)) if old in name else name)
    with pytest.raises(error, match=message):
        read_adapter(adapter, spec)


def test_an_adapter_of_another_model_is_refused_with_both_shapes(tmp_path: Path, spec: DecoderSpec) -> None:
    folder = write_adapter(tmp_path / "a", build(CASES["gemma2"]), targets=("q_proj",))
    with pytest.raises(ModelInvalid, match=r"q_proj.lora_B.weight has shape \[64, 4\], .* this model needs \[32, 4\]"):
        read_adapter(folder, spec)


def test_what_is_not_there_is_told(tmp_path: Path, model: Any, spec: DecoderSpec) -> None:
    with pytest.raises(ModelNotFound, match="there is no adapter at"):
        read_adapter(tmp_path / "none", spec)
    with pytest.raises(ModelNotFound, match=r"no adapter_config.json in the folder"):
        read_adapter(tmp_path, spec)
    folder = write_adapter(tmp_path / "a", model)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelNotFound, match=r"only adapter_model.bin.*save it as safetensors"):
        read_adapter(folder, spec)
    (folder / "adapter_config.json").write_text(json.dumps([]))
    with pytest.raises(ModelInvalid, match="not a JSON object"):
        read_adapter(folder, spec)


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({}, ModelInvalid, "it is no LoRA adapter"),
        ({"adapter.type": "lora"}, ModelInvalid, "metadata key adapter.lora.alpha is missing"),
        ({"adapter.type": "lora", "adapter.alora.tokens": "x"}, ModelUnsupported, "adapter.alora.tokens is not known"),
    ],
)
def test_a_gguf_file_that_is_something_else_is_refused(
    tmp_path: Path, spec: DecoderSpec, metadata: dict[str, str], error: type[Exception], message: str
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_type("adapter")
    for key, value in metadata.items():
        writer.add_string(key, value)
    writer.add_tensor("blk.0.attn_q.weight", torch.zeros(32, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(error, match=message):
        read_adapter(tmp_path / "model.gguf", spec)
