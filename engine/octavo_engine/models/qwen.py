"""Qwen 2, 2.5 and 3 (Yang et al. 2024, 2025), the dense text models.

Qwen 2 and 2.5 are Llamas with biases on queries, keys and values; Qwen 3 has none and normalises each query and key
head instead. Sliding windows are off unless `use_sliding_window` says otherwise, and then only in the upper layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from octavo_engine.models.family import CONFIG_NAMES, Family, plain_from_config, plain_from_gguf, windows_from_config

if TYPE_CHECKING:
    from octavo_engine.models.options import Options
    from octavo_engine.models.spec import DecoderSpec
    from octavo_engine.weights.gguf import GGUFHeader

# What a config.json that leaves the key out means.
_DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768}


def _from_config(config: Options) -> DecoderSpec:
    config = config.with_defaults(_DEFAULTS)
    spec = plain_from_config(config)
    if not config.flag("use_sliding_window", default=False):
        return spec
    first_windowed = config.count("max_window_layers")
    windows = windows_from_config(config, spec.num_layers, is_windowed=lambda layer: layer >= first_windowed)
    return replace(spec, windows=windows)


def _qwen2_from_config(config: Options) -> DecoderSpec:
    return replace(_from_config(config), qkv_bias=True)


def _qwen3_from_config(config: Options) -> DecoderSpec:
    config = config.with_defaults({"head_dim": 128})
    bias = config.flag("attention_bias", default=False)
    return replace(_from_config(config), qk_norm=True, qkv_bias=bias, o_bias=bias)


def _qwen3_from_gguf(metadata: Options, header: GGUFHeader) -> DecoderSpec:
    return replace(plain_from_gguf(metadata, header), qk_norm=True)


FAMILY = Family(
    configs={"Qwen2ForCausalLM": _qwen2_from_config, "Qwen3ForCausalLM": _qwen3_from_config},
    ggufs={"qwen2": plain_from_gguf, "qwen3": _qwen3_from_gguf},
    config_names=CONFIG_NAMES,
)
