"""A Qwen3 with random weights, for measurements in which only the shapes count. Used by gpu_acceptance.py."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path


def write_qwen3(folder: Path, dtype: torch.dtype, config: dict[str, Any]) -> None:
    """Write it as transformers would, without a tokenizer.

    Args:
        folder: is made.
        dtype: of the weights.
        config: the sizes, by the keys of config.json; the embedding is tied.
    """
    folder.mkdir(parents=True)
    said = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    dtype_name = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(said | {"torch_dtype": dtype_name} | config), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in _shapes(config).items():
        numbers = torch.empty(shape, dtype=dtype)
        tensors[name] = numbers.fill_(1.0) if len(shape) == 1 else numbers.normal_(0, 0.02, generator=generator)
    save_file(tensors, folder / "model.safetensors")


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model."""
    hidden, middle, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    of_layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (head_dim,),
        "self_attn.k_norm": (head_dim,),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
    }
    layers = range(config["num_hidden_layers"])
    return {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        **{f"model.layers.{layer}.{name}.weight": shape for layer in layers for name, shape in of_layer.items()},
    }
