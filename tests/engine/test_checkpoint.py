"""Folders of safetensors files: what config.json is read as, and every way in which a folder is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from octavo_engine.errors import ModelInvalid, ModelNotFound, ModelUnsupported, UserError
from octavo_engine.models.checkpoint import read_checkpoint, spec_from_config
from octavo_engine.models.family import windows_from_gguf
from octavo_engine.models.options import Options
from octavo_engine.models.rope import rope_from_gguf
from octavo_engine.models.spec import LinearScaling, Llama3Scaling, Rope, StoredFactors, YarnScaling
from octavo_engine.weights.safetensors import parse_tensors, read_tensors
from octavo_engine.weights.stored import WeightSource

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
QWEN = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
GEMMA3 = LLAMA | {"architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 12, "sliding_window": 4}

TENSORS = {
    "model.embed_tokens.weight": (12, 8),
    "model.norm.weight": (8,),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (4, 8),
    "model.layers.0.self_attn.v_proj.weight": (4, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.layers.0.post_attention_layernorm.weight": (8,),
    "model.layers.0.mlp.gate_proj.weight": (16, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 16),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama of one layer."""
    write_json(tmp_path / "config.json", LLAMA)
    save_file({name: torch.zeros(shape) for name, shape in TENSORS.items()}, tmp_path / "model.safetensors")
    return tmp_path


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def shard(folder: Path) -> None:
    """Split the folder's tensors over two files and an index."""
    tensors = {name: torch.zeros(shape) for name, shape in TENSORS.items()}
    file_of = {tensor: SHARDS[index % 2] for index, tensor in enumerate(tensors)}
    for name in SHARDS:
        save_file({tensor: tensors[tensor] for tensor in tensors if file_of[tensor] == name}, folder / name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": file_of})
    (folder / "model.safetensors").unlink()


def shard_and_lose_one(folder: Path) -> None:
    shard(folder)
    (folder / SHARDS[1]).unlink()


def shard_and_replace_one(folder: Path) -> None:
    shard(folder)
    save_file({"a": torch.ones(1)}, folder / SHARDS[1])


def test_end_of_turn_ids_are_those_of_both_files(folder: Path) -> None:
    assert read_checkpoint(folder).spec.eos_token_ids == {2}
    write_json(folder / "generation_config.json", {"eos_token_id": [3, 4]})
    assert read_checkpoint(folder).spec.eos_token_ids == {2, 3, 4}


@pytest.mark.parametrize("mode", ["lasttoken", "mean_tokens"])
def test_a_model_made_for_embeddings_makes_them_of_the_last_token(folder: Path, mode: str) -> None:
    (folder / "1_Pooling").mkdir()
    write_json(folder / "1_Pooling" / "config.json", {f"pooling_mode_{mode}": True})
    if mode == "lasttoken":
        assert read_checkpoint(folder).spec.vocab_size == 12
    else:
        with pytest.raises(ModelUnsupported, match="pooling_mode_lasttoken is not true"):
            read_checkpoint(folder)


def test_parameters_are_counted_once(folder: Path) -> None:
    count = sum(torch.Size(shape).numel() for shape in TENSORS.values())
    assert read_checkpoint(folder).num_parameters == count
    tensors = {name: torch.zeros(shape) for name, shape in TENSORS.items()}
    # Some files have a tied output matrix, and old ones the rotary frequencies.
    tensors |= {"lm_head.weight": torch.zeros(12, 8), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors")
    assert read_checkpoint(folder).num_parameters == count


SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def test_rotary_embeddings_are_read_from_old_and_new_keys_alike() -> None:
    expected = Rope(500_000.0, Llama3Scaling(8.0, 1.0, 4.0, 16))
    old = LLAMA | {"rope_scaling": {"rope_type": "llama3", **SCALING}}
    new = LLAMA | {"rope_theta": None, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **SCALING}}
    assert spec_from_config(old)[0].ropes == spec_from_config(new)[0].ropes == (expected,)
    oldest = LLAMA | {"rope_scaling": {"type": "linear", "factor": 4}}
    assert spec_from_config(oldest)[0].ropes == (Rope(500_000.0, LinearScaling(4.0)),)


def test_scalings_that_extend_the_context_do_so() -> None:
    assert spec_from_config(LLAMA | {"rope_scaling": {"type": "linear", "factor": 4}})[0].max_context == 256
    yarn = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32}
    spec, _ = spec_from_config(LLAMA | {"rope_scaling": yarn})
    assert spec.max_context == 128
    assert isinstance(spec.ropes[0].scaling, YarnScaling)
    assert spec.ropes[0].scaling.attention_factor == pytest.approx(1.1386, abs=1e-4)
    assert spec_from_config(LLAMA | {"rope_scaling": {"rope_type": "llama3", **SCALING}})[0].max_context == 64


def test_windows_of_qwen_are_off_unless_asked_for() -> None:
    windowed = QWEN | {"num_hidden_layers": 3, "sliding_window": 4, "max_window_layers": 2}
    assert spec_from_config(windowed)[0].windows == (None, None, None)
    assert spec_from_config(windowed | {"use_sliding_window": True})[0].windows == (None, None, 4)
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert spec_from_config(windowed | {"use_sliding_window": True, "layer_types": kinds})[0].windows == (4, None, None)


def test_a_window_of_mistral_is_the_default_and_null_is_none() -> None:
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"]}
    assert spec_from_config(mistral)[0].windows == (4096,)
    assert spec_from_config(mistral | {"sliding_window": None})[0].windows == (None,)


def test_layers_of_gemma_3_differ_in_window_and_rotary_embedding_from_old_and_new_keys_alike() -> None:
    old = GEMMA3 | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"type": "linear", "factor": 8}}
    new = GEMMA3 | {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    }
    spec, _ = spec_from_config(old)
    assert spec_from_config(new)[0] == spec
    assert spec.windows == (4, 4, 4, 4, 4, None) * 2
    assert [rope.theta for rope in spec.ropes] == [1e4, 1e4, 1e4, 1e4, 1e4, 1e6] * 2
    assert spec.max_context == 64  # the factor is part of it already


def test_what_a_published_gemma_3_leaves_out_is_what_transformers_assumes() -> None:
    text: dict[str, Any] = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    }
    text |= {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    published = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "text_config": text,
        "vision_config": {"hidden_size": 1152},
    }
    spec, _ = spec_from_config(published)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (8, 4, 256, 262208)
    assert spec.ropes[5] == Rope(1e6, LinearScaling(8.0))
    assert spec.ropes[0] == Rope(1e4)
    assert spec.windows[:6] == (1024, 1024, 1024, 1024, 1024, None)
    assert (spec.max_context, spec.attention_scale, spec.tied_embeddings) == (131072, 1 / 16, True)
    assert spec.eos_token_ids == {1, 106}


def metadata(**values: Any) -> Options:
    """Hyperparameters of a GGUF header; two underscores stand for a dot."""
    return Options("m.gguf", "metadata key x.", {key.replace("__", "."): value for key, value in values.items()})


def test_windows_in_a_gguf_header_follow_its_pattern_or_the_familys() -> None:
    def windows(**values: Any) -> tuple[int | None, ...]:
        return windows_from_gguf(metadata(**values), 4, period=2)

    assert windows() == windows(attention__sliding_window=0) == (None,) * 4
    assert windows(attention__sliding_window=8) == (8, None, 8, None)
    assert windows(attention__sliding_window=8, attention__sliding_window_pattern=3) == (8, 8, None, 8)
    pattern = [True, False, False, True]
    assert windows(attention__sliding_window=8, attention__sliding_window_pattern=pattern) == (8, None, None, 8)
    with pytest.raises(ModelInvalid, match=r"x.attention.sliding_window_pattern is not a list of 4 booleans"):
        windows(attention__sliding_window=8, attention__sliding_window_pattern=[True])


def test_rotary_embeddings_in_a_gguf_header() -> None:
    def rope(*, has_factors: bool = False, **values: Any) -> Rope:
        return rope_from_gguf(metadata(context_length=64, **values), has_factors=has_factors)

    assert rope() == Rope(10_000.0)
    assert rope(rope__freq_base=5e5, has_factors=True) == Rope(5e5, StoredFactors())
    linear = Rope(10_000.0, LinearScaling(8.0))
    assert rope(rope__scaling__factor=8.0) == rope(rope__scale_linear=8.0) == linear  # linear where no type is given
    assert rope(rope__scaling__type="linear", rope__scaling__factor=8.0) == linear
    assert rope(rope__scaling__type="none", rope__scaling__factor=8.0) == Rope(10_000.0)
    yarn = rope(rope__scaling__type="yarn", rope__scaling__factor=4.0, rope__scaling__attn_factor=2.0).scaling
    assert isinstance(yarn, YarnScaling)
    assert yarn.original_context == 64
    assert yarn.attention_factor == pytest.approx(2 * 1.13863, abs=1e-4)
    with pytest.raises(ModelInvalid, match=r"x.rope.scaling.factor is missing"):
        rope(rope__scaling__type="yarn")
    with pytest.raises(ModelUnsupported, match=r"x.rope.scaling.type is yarn besides a tensor rope_freqs.weight"):
        rope(rope__scaling__type="yarn", rope__scaling__factor=4.0, has_factors=True)
    with pytest.raises(ModelUnsupported, match=r"x.rope.scaling.attn_factor is 2.0; supported: 1.0"):
        rope(rope__scaling__type="linear", rope__scaling__factor=4.0, rope__scaling__attn_factor=2.0)


REFUSED_OPTIONS = {
    "an unknown architecture": (LLAMA | {"architectures": ["MambaForCausalLM"]}, "architectures is MambaForCausalLM"),
    "another activation": (LLAMA | {"hidden_act": "relu"}, "hidden_act is relu; supported: silu"),
    "a rotation of half a head": (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "an unknown scaling": (LLAMA | {"rope_scaling": {"type": "mrope"}}, "rope_scaling.type is mrope"),
    "biases in the MLP": (LLAMA | {"mlp_bias": True}, "mlp_bias is True"),
    "split projections": (LLAMA | {"pretraining_tp": 2}, "pretraining_tp is 2"),
    "an unknown kind of layer": (
        QWEN | {"use_sliding_window": True, "layer_types": ["chunked_attention"]},
        "layer_types has chunked_attention",
    ),
    "attention in both directions": (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED_OPTIONS.values(), ids=REFUSED_OPTIONS.keys())
def test_an_option_that_is_not_computed_is_refused_by_its_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelUnsupported, match=message):
        spec_from_config(config)


WRONG_OPTIONS = {
    "no architecture": (LLAMA | {"architectures": None}, "key architectures is not a list"),
    "a missing size": ({**LLAMA, "hidden_size": None}, "key hidden_size is missing"),
    "a size that is a word": (LLAMA | {"vocab_size": "many"}, "key vocab_size is str, not int"),
    "a size of zero": (LLAMA | {"num_hidden_layers": 0}, "key num_hidden_layers is 0, not positive"),
    "uneven groups": (LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 3}, "4 query heads do not divide"),
    "an odd head": (LLAMA | {"head_dim": 5}, "key head_dim makes heads of 5, odd"),
    "a factor that is a word": (
        LLAMA | {"rope_scaling": {"type": "linear", "factor": "2"}},
        "key rope_scaling.factor is str",
    ),
    "factors of another length": (
        LLAMA | {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 1.0]}},
        "rope_scaling.short_factor is not a list of 2 numbers",
    ),
    "a scaling that is a list": (LLAMA | {"rope_scaling": []}, "rope_scaling is list, not an object"),
    "end of turn in words": (LLAMA | {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    "kinds of other layers": (
        QWEN | {"use_sliding_window": True, "layer_types": []},
        "layer_types is not a list of 1 kinds",
    ),
}


@pytest.mark.parametrize(("config", "message"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS.keys())
def test_an_option_that_cannot_be_is_refused_by_its_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelInvalid, match=message):
        spec_from_config(config)


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


BROKEN_FOLDERS: dict[str, tuple[Callable[[Path], object], type[UserError], str]] = {
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        ModelNotFound,
        "neither model.safetensors nor model.safetensors.index.json",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), ModelNotFound, "there is no config.json"),
    "a config that is cut": (lambda folder: cut(folder / "config.json", 20), ModelInvalid, "config.json: not JSON"),
    "a config that is a list": (
        lambda folder: write_json(folder / "config.json", []),
        ModelInvalid,
        "config.json: not a JSON object",
    ),
    "a missing shard": (
        shard_and_lose_one,
        ModelNotFound,
        "shard model-00002-of-00002.safetensors, which model.safetensors.index.json lists, is missing",
    ),
    "a shard without its tensor": (
        shard_and_replace_one,
        ModelInvalid,
        "model-00002-of-00002.safetensors: tensor .* is missing, though",
    ),
    "an index that leaves the folder": (
        lambda folder: write_json(
            folder / "model.safetensors.index.json", {"weight_map": {"a": "../other.safetensors"}}
        ),
        ModelInvalid,
        "weight_map is not an object of file names",
    ),
    "a file cut in its data": (
        lambda folder: cut(folder / "model.safetensors", 2000),
        ModelInvalid,
        "model.safetensors: tensor .*: data at bytes .* ends after the file, which has 2000 bytes: it is truncated",
    ),
    "a file cut in its header": (
        lambda folder: cut(folder / "model.safetensors", 100),
        ModelInvalid,
        "model.safetensors: its first bytes claim a header of",
    ),
    "a file of no length": (lambda folder: cut(folder / "model.safetensors", 0), ModelInvalid, "the file has 0"),
    "a type that is not read": (
        lambda folder: save_file({"a": torch.ones(1, dtype=torch.float64)}, folder / "model.safetensors"),
        ModelUnsupported,
        "tensor a has type F64; supported: F32 F16 BF16",
    ),
}


@pytest.mark.parametrize(("harm", "error", "message"), BROKEN_FOLDERS.values(), ids=BROKEN_FOLDERS.keys())
def test_a_broken_folder_is_refused_by_file_and_tensor(
    folder: Path, harm: Callable[[Path], object], error: type[UserError], message: str
) -> None:
    read_checkpoint(folder)
    harm(folder)
    with pytest.raises(error, match=message):
        read_checkpoint(folder)


def test_shards_are_read_as_one(folder: Path) -> None:
    whole = read_checkpoint(folder)
    shard(folder)
    sharded = read_checkpoint(folder)
    assert sharded.spec == whole.spec
    assert sharded.tensors.keys() == whole.tensors.keys()
    assert len({tensor.path for tensor in sharded.tensors.values()}) == 2
    weights = WeightSource(sharded, on_progress=lambda *_: None)
    assert weights.matrix("down", (8, 16), layer=0).packed.shape == (8, 64)
    with pytest.raises(ModelInvalid, match=r"of-00002.safetensors: tensor model.layers.0.mlp.up_proj.weight has shape"):
        weights.matrix("up", (8, 16), layer=0)


SMALL_FILE = save({name: torch.zeros(shape) for name, shape in list(TENSORS.items())[:3]})


@given(position=st.integers(0, len(SMALL_FILE) - 1), value=st.integers(0, 255))
@settings(deadline=None)
def test_a_damaged_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    data = bytearray(SMALL_FILE)
    data[position] = value
    path.write_bytes(data)
    try:
        tensors = read_tensors(path)
    except (ModelInvalid, ModelUnsupported):
        return
    assert all(tensor.offset + tensor.num_bytes <= len(data) for tensor in tensors.values())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner),
)


@given(header=JSON)
@settings(deadline=None)
def test_any_json_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, header: object) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    with pytest.raises((ModelInvalid, ModelUnsupported)):
        parse_tensors(path, json.dumps({"tensor": header}).encode(), 100)
