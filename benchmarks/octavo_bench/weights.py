"""Make every form of the demo model that some engine wants from the one file that Octavo serves.

    python -m octavo_bench.weights MODEL.gguf FOLDER

The folder then holds `hf/` (config, tokenizer and float32 safetensors, for transformers and vLLM) and `f32.gguf` (for
llama-quantize). Both hold exactly the numbers of the file, dequantised by the gguf package and not by Octavo, so that
what an engine loses to the reference is its own arithmetic and its own quantisation. Run by peers.py in a process of
its own, because torch and gigabytes of weights have no place beside the load generator. The engine's tests compare with
the same model of transformers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

_LAYER_NAMES = {
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


def main() -> None:
    """Write both forms."""
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    reader = gguf.GGUFReader(source)
    write_gguf(reader, folder / "f32.gguf")
    in_transformers(reader).save_pretrained(folder / "hf")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    tokenizer.save_pretrained(folder / "hf")


def write_gguf(reader: gguf.GGUFReader, path: Path) -> None:
    """The same metadata with float32 tensors."""
    writer = gguf.GGUFWriter(path, _value(reader, "general.architecture"))
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in {"general.architecture", "general.file_type"}:
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type)
    for name, values in _tensors(reader).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_transformers(reader: gguf.GGUFReader) -> Any:
    """Return transformers' model with the numbers of the file, in float32 and ready for inference."""

    def value(key: str) -> Any:
        return _value(reader, f"llama.{key}")

    tensors = _tensors(reader)
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
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=_value(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_value(reader, "tokenizer.ggml.eos_token_id"),
    )
    state = {
        theirs: reorder(torch.tensor(tensors[ours]), ours, config, to_gguf=False)
        for ours, theirs in names(config).items()
        if ours in tensors
    }
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def names(config: LlamaConfig) -> dict[str, str]:
    """GGUF's names of a Llama's tensors -> those of transformers."""
    found = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    for layer in range(config.num_hidden_layers):
        found |= {
            f"blk.{layer}.{ours}.weight": f"model.layers.{layer}.{theirs}.weight"
            for ours, theirs in _LAYER_NAMES.items()
        }
    return found


def reorder(weight: torch.Tensor, name: str, config: LlamaConfig, *, to_gguf: bool) -> torch.Tensor:
    """Between the orders of the rows of queries and keys: halves of a head (transformers), or interleaved (GGUF)."""
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return weight
    head_dim = config.hidden_size // config.num_attention_heads
    split = (-1, 2, head_dim // 2) if to_gguf else (-1, head_dim // 2, 2)
    return weight.view(*split, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()


def _tensors(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {
        tensor.name: np.ascontiguousarray(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1].tolist()),
            dtype=np.float32,
        )
        for tensor in reader.tensors
    }


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


if __name__ == "__main__":
    main()
