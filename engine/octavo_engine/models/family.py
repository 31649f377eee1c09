"""What a family of models is: how its description is read and what its tensors are called. No torch here.

Each neighbour (llama.py, mistral.py, ...) is one Family; registry.py lists them. `plain_from_config` and
`plain_from_gguf` read what all families share: a Llama; a family changes in it what it computes otherwise.
docs/models.md says how to add one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from octavo_engine.errors import ModelInvalid
from octavo_engine.models.rope import context_from_config, rope_from_config, rope_from_gguf
from octavo_engine.models.spec import DecoderSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from octavo_engine.models.options import Options
    from octavo_engine.models.spec import Activation
    from octavo_engine.weights.gguf import GGUFHeader

# What a tensor is for. Those of LayerRole exist once a layer.
ModelRole = Literal["embedding", "output", "final_norm", "rope_factors"]
LayerRole = Literal[
    "attention_norm",
    "q",
    "k",
    "v",
    "o",
    "q_bias",
    "k_bias",
    "v_bias",
    "o_bias",
    "q_norm",
    "k_norm",
    "attention_post_norm",
    "mlp_norm",
    "gate",
    "up",
    "down",
    "mlp_post_norm",
]

# Names in safetensors files, as transformers has them; `{layer}` is the layer's number.
CONFIG_NAMES: Final[Mapping[ModelRole | LayerRole, str]] = {
    "embedding": "model.embed_tokens.weight",
    "output": "lm_head.weight",
    "final_norm": "model.norm.weight",
    "attention_norm": "model.layers.{layer}.input_layernorm.weight",
    "q": "model.layers.{layer}.self_attn.q_proj.weight",
    "k": "model.layers.{layer}.self_attn.k_proj.weight",
    "v": "model.layers.{layer}.self_attn.v_proj.weight",
    "o": "model.layers.{layer}.self_attn.o_proj.weight",
    "q_bias": "model.layers.{layer}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{layer}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{layer}.self_attn.v_proj.bias",
    "o_bias": "model.layers.{layer}.self_attn.o_proj.bias",
    "q_norm": "model.layers.{layer}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{layer}.self_attn.k_norm.weight",
    "mlp_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "up": "model.layers.{layer}.mlp.up_proj.weight",
    "down": "model.layers.{layer}.mlp.down_proj.weight",
}

# Names in GGUF files, the same for all families (llama.cpp's gguf-py constants).
GGUF_NAMES: Final[Mapping[ModelRole | LayerRole, str]] = {
    "embedding": "token_embd.weight",
    "output": "output.weight",
    "final_norm": "output_norm.weight",
    "rope_factors": "rope_freqs.weight",
    "attention_norm": "blk.{layer}.attn_norm.weight",
    "q": "blk.{layer}.attn_q.weight",
    "k": "blk.{layer}.attn_k.weight",
    "v": "blk.{layer}.attn_v.weight",
    "o": "blk.{layer}.attn_output.weight",
    "q_bias": "blk.{layer}.attn_q.bias",
    "k_bias": "blk.{layer}.attn_k.bias",
    "v_bias": "blk.{layer}.attn_v.bias",
    "o_bias": "blk.{layer}.attn_output.bias",
    "q_norm": "blk.{layer}.attn_q_norm.weight",
    "k_norm": "blk.{layer}.attn_k_norm.weight",
    "attention_post_norm": "blk.{layer}.post_attention_norm.weight",
    "mlp_norm": "blk.{layer}.ffn_norm.weight",
    "gate": "blk.{layer}.ffn_gate.weight",
    "up": "blk.{layer}.ffn_up.weight",
    "down": "blk.{layer}.ffn_down.weight",
    "mlp_post_norm": "blk.{layer}.post_ffw_norm.weight",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family, from both kinds of files. What a file asks for and no spec can say is refused by its key."""

    configs: Mapping[str, Callable[[Options], DecoderSpec]]  # by an entry of config.json's `architectures`
    ggufs: Mapping[str, Callable[[Options, GGUFHeader], DecoderSpec]]  # by general.architecture
    config_names: Mapping[ModelRole | LayerRole, str]  # tensors in safetensors files
    config_norm_offset: float = 0.0  # what safetensors files leave out of norm weights
    gguf_pairs_adjacent: bool = False  # llama.cpp's converter has put the pairs that a rotation turns side by side


def plain_from_config(config: Options, *, activation: Activation = "silu") -> DecoderSpec:
    """A Llama's spec from config.json, but for end-of-turn ids: checkpoint.py adds them.

    Raises:
        ModelInvalid: a key is missing, of the wrong type or contradicts another.
        ModelUnsupported: an option is not computed.
    """
    hidden_size, num_heads = config.size("hidden_size"), config.size("num_attention_heads")
    head_dim = config.size("head_dim", max(1, hidden_size // num_heads))
    num_layers = config.size("num_hidden_layers")
    for key in ("hidden_act", "hidden_activation"):
        config.require(key, {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[activation])
    config.require("mlp_bias", False)
    config.require("pretraining_tp", 1)
    rope = rope_from_config(config, head_dim)
    return _checked(
        config,
        DecoderSpec(
            vocab_size=config.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=config.size("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=config.size("num_key_value_heads", num_heads),
            head_dim=head_dim,
            rms_norm_eps=config.number("rms_norm_eps"),
            ropes=(rope,) * num_layers,
            windows=(None,) * num_layers,
            tied_embeddings=config.flag("tie_word_embeddings", default=False),
            max_context=context_from_config(config, rope),
            eos_token_ids=frozenset(),
            attention_scale=head_dim**-0.5,
            activation=activation,
        ),
        heads_key="num_attention_heads",
        head_dim_key="head_dim",
    )


def plain_from_gguf(metadata: Options, header: GGUFHeader) -> DecoderSpec:
    """A Llama's spec from a GGUF header.

    Args:
        metadata: what stands under the architecture's prefix.
        header: for what the tensors say.

    Raises:
        ModelInvalid: a key is missing, of the wrong type or contradicts another.
        ModelUnsupported: an option is not computed.
    """
    hidden_size, num_heads = metadata.size("embedding_length"), metadata.size("attention.head_count")
    head_dim = metadata.size("attention.key_length", max(1, hidden_size // num_heads))
    for size in (
        "rope.dimension_count",
        "attention.value_length",
        "attention.key_length_swa",
        "attention.value_length_swa",
    ):
        metadata.require(size, head_dim)
    for count in ("expert_count", "expert_used_count"):
        metadata.require(count, 0)
    metadata.require("attention.causal", True)
    metadata.require("pooling_type", _LAST_TOKEN)
    for informative in ("vocab_size", "tensor_data_layout"):
        metadata.get(informative)
    num_layers = metadata.size("block_count")
    embedding = header.tensors.get(GGUF_NAMES["embedding"])
    if embedding is None or len(embedding.shape) != 2:
        raise ModelInvalid(f"{header.path.name}: tensor {GGUF_NAMES['embedding']} is missing or no matrix")
    rope = rope_from_gguf(metadata, has_factors=GGUF_NAMES["rope_factors"] in header.tensors)
    return _checked(
        metadata,
        DecoderSpec(
            vocab_size=embedding.shape[0],
            hidden_size=hidden_size,
            intermediate_size=metadata.size("feed_forward_length"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=metadata.size("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rms_norm_eps=metadata.number("attention.layer_norm_rms_epsilon"),
            ropes=(rope,) * num_layers,
            windows=(None,) * num_layers,
            tied_embeddings=GGUF_NAMES["output"] not in header.tensors,
            max_context=metadata.size("context_length"),
            eos_token_ids=_gguf_eos_token_ids(header),
            attention_scale=head_dim**-0.5,
            qkv_bias=GGUF_NAMES["q_bias"].format(layer=0) in header.tensors,
            o_bias=GGUF_NAMES["o_bias"].format(layer=0) in header.tensors,
        ),
        heads_key="attention.head_count",
        head_dim_key="attention.key_length",
    )


def windows_from_config(
    config: Options, num_layers: int, *, is_windowed: Callable[[int], bool]
) -> tuple[int | None, ...]:
    """The window of each layer: `layer_types` says which have one (transformers 5), else `is_windowed(layer)` does."""
    if config.get("sliding_window") is None:
        return (None,) * num_layers
    window = config.size("sliding_window")
    kinds = config.get("layer_types")
    if kinds is None:
        return tuple(window if is_windowed(layer) else None for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        config.invalid("layer_types", f"is not a list of {num_layers} kinds, one for every layer")
    if unknown := next((kind for kind in kinds if kind not in ("sliding_attention", "full_attention")), None):
        config.unsupported("layer_types", f"has {unknown}; supported: sliding_attention, full_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def windows_from_gguf(metadata: Options, num_layers: int, *, period: int) -> tuple[int | None, ...]:
    """The window of each layer: `attention.sliding_window_pattern` says which have none, else every `period`th."""
    if metadata.get("attention.sliding_window") in (None, 0):
        return (None,) * num_layers
    window = metadata.size("attention.sliding_window")
    pattern = metadata.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        if len(pattern) != num_layers or not all(isinstance(item, bool) for item in pattern):
            metadata.invalid("attention.sliding_window_pattern", f"is not a list of {num_layers} booleans")
        return tuple(window if is_windowed else None for is_windowed in pattern)
    period = metadata.size("attention.sliding_window_pattern", period)
    return tuple(None if (layer + 1) % period == 0 else window for layer in range(num_layers))


def _checked(options: Options, spec: DecoderSpec, *, heads_key: str, head_dim_key: str) -> DecoderSpec:
    if spec.num_heads % spec.num_kv_heads:
        options.invalid(
            heads_key, f"contradicts: {spec.num_heads} query heads do not divide into {spec.num_kv_heads} KV heads"
        )
    if spec.head_dim % 2:
        options.invalid(head_dim_key, f"makes heads of {spec.head_dim}, odd: rotary embeddings have no pairs")
    return spec


_LAST_TOKEN: Final = 3  # llama.cpp's name for embeddings that are the last token's state

# Files name one token only, often that which ends a document, where chats end their turns with another; llama.cpp finds
# these by their text too.
_ENDS_OF_TURN: Final = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<end_of_turn>",
)


def _gguf_eos_token_ids(header: GGUFHeader) -> frozenset[int]:
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    named = frozenset(header.require(key, int) for key in keys if key in header.metadata)
    tokens = enumerate(header.get("tokenizer.ggml.tokens", list, []))
    return named | {token_id for token_id, token in tokens if token in _ENDS_OF_TURN}
