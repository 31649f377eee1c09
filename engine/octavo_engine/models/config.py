"""A model's hyperparameters, read from a GGUF header. No torch here.

Called by sizing.py and runner.py; models/ is built from it. What the metadata asks for and this engine does not compute
is refused here, by the name of its key, before any weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo_engine.errors import ModelInvalid, ModelUnsupported

if TYPE_CHECKING:
    from octavo_engine.weights.gguf import GGUFHeader

ARCHITECTURES = ("llama",)  # values of general.architecture; models/registry.py has the class of each


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The sizes and constants of a decoder-only transformer."""

    architecture: str  # general.architecture
    num_layers: int
    hidden_size: int
    intermediate_size: int  # of the gated MLP
    num_heads: int  # query heads
    num_kv_heads: int  # each serves num_heads / num_kv_heads query heads
    head_dim: int
    vocab_size: int
    max_context: int  # positions the model was trained for
    rope_theta: float  # base of the rotary frequencies
    rms_norm_eps: float
    tied_embeddings: bool  # the output matrix is the embedding
    eos_token_ids: frozenset[int]  # any of them ends a turn

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers that the KV cache keeps for one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def read_config(header: GGUFHeader) -> ModelConfig:
    """The hyperparameters in a GGUF header.

    Raises:
        ModelInvalid: a key is missing, of the wrong type or contradicts another.
        ModelUnsupported: the architecture or one of its options is not computed by this engine; names the key.
    """
    name = header.path.name
    architecture = header.require("general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise ModelUnsupported(f"{name}: general.architecture is {architecture}; supported: {', '.join(ARCHITECTURES)}")
    _refuse_unsupported_options(header, architecture)

    def size(key: str, default: int | None = None) -> int:
        full = f"{architecture}.{key}"
        value = header.require(full, int) if default is None else header.get(full, int, default)
        if value <= 0:
            raise ModelInvalid(f"{name}: metadata key {full} is {value}, not positive")
        return value

    hidden_size, num_heads = size("embedding_length"), size("attention.head_count")
    num_kv_heads = size("attention.head_count_kv", default=num_heads)
    if num_heads % num_kv_heads:
        raise ModelInvalid(f"{name}: {num_heads} query heads do not divide into {num_kv_heads} KV heads")
    head_dim = size("attention.key_length", default=hidden_size // num_heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if size(key, default=head_dim) != head_dim:
            raise ModelUnsupported(f"{name}: metadata key {architecture}.{key} differs from the head size {head_dim}")
    if head_dim % 2:
        raise ModelInvalid(f"{name}: the head size {head_dim} is odd, so rotary embeddings have no pairs")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelInvalid(f"{name}: tensor token_embd.weight is missing or no matrix")
    return ModelConfig(
        architecture=architecture,
        num_layers=size("block_count"),
        hidden_size=hidden_size,
        intermediate_size=size("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=embedding.shape[0],
        max_context=size("context_length"),
        rope_theta=header.get(f"{architecture}.rope.freq_base", float, 10_000.0),
        rms_norm_eps=header.require(f"{architecture}.attention.layer_norm_rms_epsilon", float),
        tied_embeddings="output.weight" not in header.tensors,
        eos_token_ids=_eos_token_ids(header),
    )


def _refuse_unsupported_options(header: GGUFHeader, architecture: str) -> None:
    """Options of the llama family that change the arithmetic, at any value but the neutral one."""
    scaling = header.get(f"{architecture}.rope.scaling.type", str, "none")
    if scaling != "none":
        raise ModelUnsupported(
            f"{header.path.name}: metadata key {architecture}.rope.scaling.type is {scaling}; "
            "only models without rope scaling are supported"
        )
    if "rope_freqs.weight" in header.tensors:
        raise ModelUnsupported(
            f"{header.path.name}: tensor rope_freqs.weight (llama3 rope scaling); "
            "only models without rope scaling are supported"
        )
    for key in ("expert_count", "attention.sliding_window"):
        if header.get(f"{architecture}.{key}", int, 0) != 0:
            raise ModelUnsupported(f"{header.path.name}: metadata key {architecture}.{key} is not supported yet")


def _eos_token_ids(header: GGUFHeader) -> frozenset[int]:
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    return frozenset(header.require(key, int) for key in keys if key in header.metadata)
