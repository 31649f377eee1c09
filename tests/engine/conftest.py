"""Fixtures for the engine's tests: the real model, a tiny one that is made on the spot, and both in transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from octavo_cluster.model import demo_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


class WriteGGUF(Protocol):
    """Writes the tiny model as a GGUF file, with other or more metadata and tensors; None leaves a tensor out."""

    def __call__(
        self, *, metadata: Mapping[str, Any] | None = None, tensors: Mapping[str, torch.Tensor | None] | None = None
    ) -> Path:
        """Write it and return where."""
        ...


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, downloaded at first use."""
    return demo_model()


@pytest.fixture(scope="session")
def smollm2_in_transformers(smollm2_path: Path) -> Any:
    """The same weights, dequantised to float32 by the gguf package, in transformers' model."""
    reader = gguf.GGUFReader(smollm2_path)

    def value(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    config = LlamaConfig(
        vocab_size=value("vocab_size"),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings=True,
    )
    stored = {tensor.name: tensor for tensor in reader.tensors}
    state = {}
    for ours, theirs in _names(config).items():
        if ours in stored:  # a tied output matrix is not
            numbers = gguf.quants.dequantize(stored[ours].data, stored[ours].tensor_type)
            state[theirs] = _reorder(torch.tensor(numbers), ours, config, to_gguf=False)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_llama() -> Any:
    """A Llama of two layers with random float32 weights: 4 query heads on 2 KV heads, its own output matrix."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval()


@pytest.fixture
def write_tiny_gguf(tmp_path: Path, tiny_llama: Any) -> WriteGGUF:
    """Writes `tiny_llama` to a file; see WriteGGUF."""
    config = tiny_llama.config
    state = tiny_llama.state_dict()
    own_metadata = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "tokenizer.ggml.eos_token_id": 2,
    }
    own_tensors = {ours: _reorder(state[theirs], ours, config, to_gguf=True) for ours, theirs in _names(config).items()}

    def write(
        *, metadata: Mapping[str, Any] | None = None, tensors: Mapping[str, torch.Tensor | None] | None = None
    ) -> Path:
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        add: dict[type, Callable[[str, Any], None]] = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        for key, value in (own_metadata | dict(metadata or {})).items():
            add[type(value)](key, value)
        for name, tensor in (own_tensors | dict(tensors or {})).items():
            if tensor is not None:
                writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _names(config: LlamaConfig) -> dict[str, str]:
    """GGUF's names of a Llama's tensors -> those of transformers."""
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    parts = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(config.num_hidden_layers):
        names |= {
            f"blk.{layer}.{ours}.weight": f"model.layers.{layer}.{theirs}.weight" for ours, theirs in parts.items()
        }
    return names


def _reorder(weight: torch.Tensor, name: str, config: LlamaConfig, *, to_gguf: bool) -> torch.Tensor:
    """Between the orders of the rows of queries and keys: halves of a head (transformers), or interleaved (GGUF)."""
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return weight
    head_dim = config.hidden_size // config.num_attention_heads
    split = (-1, 2, head_dim // 2) if to_gguf else (-1, head_dim // 2, 2)
    return weight.view(*split, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()
