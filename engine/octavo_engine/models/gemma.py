"""Gemma 2 and 3 (Gemma Team 2024, 2025), the text models.

Unlike a Llama: embeddings are scaled by sqrt(hidden size), the gate is a GELU, attention and MLP are normed after too,
norm weights are stored less one, windows alternate with full layers. Gemma 2 has soft caps; Gemma 3 normalises query
and key heads instead, and its windowed layers have a rotary embedding of their own. Of a Gemma 3 that sees images only
the text model is served.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from octavo_engine.models.family import (
    CONFIG_NAMES,
    Family,
    plain_from_config,
    plain_from_gguf,
    windows_from_config,
    windows_from_gguf,
)
from octavo_engine.models.rope import DEFAULT_THETA, rope_from_parameters
from octavo_engine.models.spec import Rope

if TYPE_CHECKING:
    from octavo_engine.models.options import Options
    from octavo_engine.models.spec import DecoderSpec
    from octavo_engine.weights.gguf import GGUFHeader

# Full attention in every second layer of Gemma 2 and every sixth of Gemma 3.
_PERIOD_2, _PERIOD_3 = 2, 6

# What a config.json that leaves the key out means: Gemma's own often do.
_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}
_DEFAULTS_2 = {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_DEFAULTS_3 = {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_local_base_freq": DEFAULT_THETA,
    "sliding_window_pattern": _PERIOD_3,
}

# The models whose queries are scaled by another size than the head's; GGUF does not say so, only how deep they are.
_DEPTH_OF_GEMMA_2_27B, _DEPTH_OF_GEMMA_3_27B = 46, 62


def _from_config(config: Options, *, period: int) -> DecoderSpec:
    spec = plain_from_config(config, activation="gelu_tanh")
    config.require("use_bidirectional_attention", False)
    bias = config.flag("attention_bias", default=False)
    return replace(
        _gemma(spec),
        windows=windows_from_config(config, spec.num_layers, is_windowed=lambda layer: (layer + 1) % period != 0),
        attention_scale=config.number("query_pre_attn_scalar") ** -0.5,
        attention_softcap=config.optional_number("attn_logit_softcapping"),
        logit_softcap=config.optional_number("final_logit_softcapping"),
        qkv_bias=bias,
        o_bias=bias,
    )


def _gemma2_from_config(config: Options) -> DecoderSpec:
    return _from_config(config.with_defaults(_DEFAULTS | _DEFAULTS_2), period=_PERIOD_2)


def _gemma3_from_config(config: Options) -> DecoderSpec:
    config = (config.section("text_config") or config).with_defaults(_DEFAULTS | _DEFAULTS_3)
    period_key = "_sliding_window_pattern" if "_sliding_window_pattern" in config else "sliding_window_pattern"
    by_kind = config.section("rope_parameters")
    if by_kind is None or "full_attention" not in by_kind:  # before transformers 5: the scaling is of full layers
        spec = _from_config(config, period=config.size(period_key))
        full, local = spec.ropes[0], Rope(config.number("rope_local_base_freq"))
    else:
        spec = _from_config(config.without("rope_parameters"), period=config.size(period_key))
        sections = [by_kind.section(kind) for kind in ("full_attention", "sliding_attention")]
        full, local = (
            rope_from_parameters(config, section, spec.head_dim, theta=DEFAULT_THETA) for section in sections
        )
    return replace(
        spec, ropes=_ropes(spec, full, local), max_context=config.size("max_position_embeddings"), qk_norm=True
    )


def _gemma2_from_gguf(metadata: Options, header: GGUFHeader) -> DecoderSpec:
    spec = _gemma(plain_from_gguf(metadata, header))
    return replace(
        spec,
        windows=windows_from_gguf(metadata, spec.num_layers, period=_PERIOD_2),
        attention_scale=_scale(spec, _DEPTH_OF_GEMMA_2_27B),
        attention_softcap=metadata.number("attn_logit_softcapping", _DEFAULTS_2["attn_logit_softcapping"]),
        logit_softcap=metadata.number("final_logit_softcapping", _DEFAULTS_2["final_logit_softcapping"]),
    )


def _gemma3_from_gguf(metadata: Options, header: GGUFHeader) -> DecoderSpec:
    spec = _gemma(plain_from_gguf(metadata, header))
    spec = replace(spec, windows=windows_from_gguf(metadata, spec.num_layers, period=_PERIOD_3))
    return replace(
        spec,
        ropes=_ropes(spec, spec.ropes[0], Rope(metadata.number("rope.freq_base_swa", DEFAULT_THETA))),
        attention_scale=_scale(spec, _DEPTH_OF_GEMMA_3_27B),
        attention_softcap=metadata.optional_number("attn_logit_softcapping"),
        logit_softcap=metadata.optional_number("final_logit_softcapping"),
        qk_norm=True,
    )


def _gemma(spec: DecoderSpec) -> DecoderSpec:
    return replace(spec, activation="gelu_tanh", embedding_scale=spec.hidden_size**0.5, post_norms=True)


def _ropes(spec: DecoderSpec, full: Rope, local: Rope) -> tuple[Rope, ...]:
    return tuple(full if window is None else local for window in spec.windows)


def _scale(spec: DecoderSpec, depth_of_27b: int) -> float:
    size = spec.hidden_size // spec.num_heads if spec.num_layers == depth_of_27b else spec.head_dim
    return float(size**-0.5)


FAMILY = Family(
    configs={
        "Gemma2ForCausalLM": _gemma2_from_config,
        "Gemma3ForCausalLM": _gemma3_from_config,
        "Gemma3ForConditionalGeneration": _gemma3_from_config,
    },
    ggufs={"gemma2": _gemma2_from_gguf, "gemma3": _gemma3_from_gguf},
    config_names={
        **CONFIG_NAMES,
        "attention_post_norm": "model.layers.{layer}.post_attention_layernorm.weight",
        "mlp_norm": "model.layers.{layer}.pre_feedforward_layernorm.weight",
        "mlp_post_norm": "model.layers.{layer}.post_feedforward_layernorm.weight",
    },
    config_norm_offset=1.0,
)
