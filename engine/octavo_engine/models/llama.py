"""Llama 2 and 3 (Touvron et al. 2023; Grattafiori et al. 2024) and what shares their arithmetic, such as SmolLM.

The plain decoder: grouped-query attention over everything before, rotary embeddings of any scaling, SwiGLU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from octavo_engine.models.family import CONFIG_NAMES, Family, plain_from_config, plain_from_gguf

if TYPE_CHECKING:
    from octavo_engine.models.options import Options
    from octavo_engine.models.spec import DecoderSpec
    from octavo_engine.weights.gguf import GGUFHeader


def _from_config(config: Options) -> DecoderSpec:
    config = config.with_defaults({"max_position_embeddings": 2048})
    bias = config.flag("attention_bias", default=False)
    return replace(plain_from_config(config), qkv_bias=bias, o_bias=bias)


def _from_gguf(metadata: Options, header: GGUFHeader) -> DecoderSpec:
    """GGUF files of Mistral models say llama too; some of them have a window, on all layers."""
    spec = plain_from_gguf(metadata, header)
    window = metadata.size("attention.sliding_window") if metadata.count("attention.sliding_window") else None
    return replace(spec, windows=(window,) * spec.num_layers)


FAMILY = Family(
    configs={"LlamaForCausalLM": _from_config},
    ggufs={"llama": _from_gguf},
    config_names=CONFIG_NAMES,
    gguf_pairs_adjacent=True,
)
