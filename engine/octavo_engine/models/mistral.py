"""Mistral (Jiang et al. 2023): a Llama whose layers may all have a sliding window.

Its GGUF files say that they are Llama's (models/llama.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from octavo_engine.models.family import CONFIG_NAMES, Family, plain_from_config, windows_from_config

if TYPE_CHECKING:
    from octavo_engine.models.options import Options
    from octavo_engine.models.spec import DecoderSpec

# What a config.json that leaves the key out means; `null` means no window.
_DEFAULTS = {"sliding_window": 4096, "max_position_embeddings": 131072}


def _from_config(config: Options) -> DecoderSpec:
    config = config.with_defaults(_DEFAULTS)
    spec = plain_from_config(config)
    return replace(spec, windows=windows_from_config(config, spec.num_layers, is_windowed=lambda _: True))


FAMILY = Family(configs={"MistralForCausalLM": _from_config}, ggufs={}, config_names=CONFIG_NAMES)
