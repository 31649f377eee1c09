"""Rotary embeddings as the two kinds of model files describe them. No torch here; called by the families.

config.json has them in `rope_parameters` (transformers 5) or in `rope_theta` and `rope_scaling` (before). GGUF has
`rope.freq_base` and `rope.scaling.*`, and for Llama 3.1 a tensor of divisors.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from octavo_engine.models.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    RopeScaling,
    StoredFactors,
    YarnScaling,
)

if TYPE_CHECKING:
    from octavo_engine.models.options import Options

DEFAULT_THETA = 10_000.0
_BETA_FAST, _BETA_SLOW = 32.0, 1.0  # the paper's


def rope_from_config(config: Options, head_dim: int) -> Rope:
    """The rotary embedding of a config.json that has one for all layers.

    Raises:
        ModelInvalid: a parameter is missing or no number.
        ModelUnsupported: a kind of scaling, or a rotation of part of a head, that is not computed.
    """
    theta = config.number("rope_theta", DEFAULT_THETA)
    parameters = config.section("rope_parameters") or config.section("rope_scaling")
    return rope_from_parameters(config, parameters, head_dim, theta=theta)


def rope_from_parameters(config: Options, parameters: Options | None, head_dim: int, *, theta: float) -> Rope:
    """As rope_from_config, for one section of parameters; `theta` is for a section that has none."""
    config.require("partial_rotary_factor", 1, 1.0)
    if parameters is None:
        return Rope(theta)
    parameters.require("partial_rotary_factor", 1, 1.0)
    theta = parameters.number("rope_theta", theta)
    return Rope(theta, _scaling_from_parameters(config, parameters, head_dim))


def _scaling_from_parameters(config: Options, parameters: Options, head_dim: int) -> RopeScaling | None:
    kind_key = "rope_type" if "rope_type" in parameters else "type"
    kind = parameters.text(kind_key, "default")
    context = config.size("max_position_embeddings")
    original = parameters.size(
        "original_max_position_embeddings", config.size("original_max_position_embeddings", context)
    )
    scaling: RopeScaling | None = None
    match kind:
        case "default":
            pass
        case "linear":
            scaling = LinearScaling(parameters.number("factor"))
        case "dynamic":
            scaling = DynamicScaling(parameters.number("factor"), context)
        case "llama3":
            scaling = _llama3_from_parameters(parameters, original)
        case "yarn":
            scaling = _yarn_from_parameters(parameters, original, default_factor=context / original)
        case "longrope" | "su":
            scaling = _longrope_from_parameters(parameters, original, head_dim, default_factor=context / original)
        case _:
            parameters.unsupported(kind_key, f"is {kind}; supported: default, linear, dynamic, llama3, yarn, longrope")
    return scaling


def context_from_config(config: Options, rope: Rope) -> int:
    """Positions that a model is made for: scalings that extend `max_position_embeddings` do so (as vLLM reads it)."""
    context = config.size("max_position_embeddings")
    match rope.scaling:
        case LinearScaling(factor) | DynamicScaling(factor):
            return int(context * factor)
        case YarnScaling(factor, original_context):
            return max(context, int(original_context * factor))
        case _:
            return context


def rope_from_gguf(metadata: Options, *, has_factors: bool) -> Rope:
    """The rotary embedding in a GGUF header; `has_factors` where there is a tensor rope_freqs.weight.

    Raises:
        ModelInvalid: a parameter is missing or no number.
        ModelUnsupported: a kind of scaling that is not computed.
    """
    theta = metadata.number("rope.freq_base", DEFAULT_THETA)
    has_factor = "rope.scaling.factor" in metadata or "rope.scale_linear" in metadata
    kind = metadata.text("rope.scaling.type", "linear" if has_factor else "none")
    for only_of_yarn in ("original_context_length", "finetuned", "yarn_beta_fast", "yarn_beta_slow"):
        metadata.get(f"rope.scaling.{only_of_yarn}")
    metadata.require("rope.scaling.yarn_log_multiplier", 0.0)
    metadata.require("rope.scaling.yarn_ext_factor", 1.0)
    if kind != "yarn":
        metadata.require("rope.scaling.attn_factor", 1.0)
        metadata.require("rope.scaling.yarn_attn_factor", 1.0)
    scaling: RopeScaling | None
    if kind == "none":
        scaling = StoredFactors() if has_factors else None
    elif has_factors:
        metadata.unsupported("rope.scaling.type", f"is {kind} besides a tensor rope_freqs.weight")
    elif kind == "linear":
        factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 1.0))
        scaling = LinearScaling(factor)
    elif kind == "yarn":
        factor = metadata.number("rope.scaling.factor")
        scaling = YarnScaling(
            factor=factor,
            original_context=metadata.size("rope.scaling.original_context_length", metadata.size("context_length")),
            beta_fast=metadata.number("rope.scaling.yarn_beta_fast", _BETA_FAST),
            beta_slow=metadata.number("rope.scaling.yarn_beta_slow", _BETA_SLOW),
            attention_factor=_yarn_magnitude(factor)
            * metadata.number("rope.scaling.attn_factor", metadata.number("rope.scaling.yarn_attn_factor", 1.0)),
            truncate=True,
        )
    else:
        metadata.unsupported("rope.scaling.type", f"is {kind}; supported: none, linear, yarn")
    return Rope(theta, scaling)


def _llama3_from_parameters(parameters: Options, original: int) -> Llama3Scaling:
    low, high = parameters.number("low_freq_factor"), parameters.number("high_freq_factor")
    if low >= high:
        parameters.invalid("low_freq_factor", f"is {low}, not less than high_freq_factor {high}")
    return Llama3Scaling(parameters.number("factor"), low, high, original)


def _yarn_from_parameters(parameters: Options, original: int, *, default_factor: float) -> YarnScaling:
    factor = parameters.number("factor", default_factor)
    if "mscale" in parameters and "mscale_all_dim" in parameters:
        magnitude = _yarn_magnitude(factor, parameters.number("mscale"))
        magnitude /= _yarn_magnitude(factor, parameters.number("mscale_all_dim"))
    else:
        magnitude = _yarn_magnitude(factor)
    return YarnScaling(
        factor=factor,
        original_context=original,
        beta_fast=parameters.number("beta_fast", _BETA_FAST),
        beta_slow=parameters.number("beta_slow", _BETA_SLOW),
        attention_factor=parameters.number("attention_factor", magnitude),
        truncate=parameters.flag("truncate", default=True),
    )


def _yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope_from_parameters(
    parameters: Options, original: int, head_dim: int, *, default_factor: float
) -> LongRopeScaling:
    factor = parameters.number("factor", default_factor)
    magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRopeScaling(
        short_factors=parameters.numbers("short_factor", head_dim // 2),
        long_factors=parameters.numbers("long_factor", head_dim // 2),
        original_context=original,
        attention_factor=parameters.number("attention_factor", magnitude),
    )
