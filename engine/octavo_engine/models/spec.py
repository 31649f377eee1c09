"""What a decoder-only transformer computes, as data. No torch here.

A family (llama.py and its neighbours) reads a DecoderSpec out of a model's own description; decoder.py (torch) and the
C++ decoder compute it; sizing.py does arithmetic on it. A spec holds no weights and knows no file format.

A layer computes, on a residual x that stays float32 (P: only with `post_norms`):
    x += P(o(attend(rope(qk_norm(q(norm(x)))), rope(qk_norm(k(norm(x)))), v(norm(x)))))
    x += P(down(activation(gate(norm(x))) * up(norm(x))))
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from octavo_engine.models.family import LayerRole

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every frequency divided by one number (position interpolation, Chen et al. 2023)."""

    factor: float


@dataclass(frozen=True, slots=True)
class DynamicScaling:
    """A larger base for a longer context (dynamic NTK).

    A table serves one length, as cached keys cannot be turned again: that of the longest context served.
    """

    factor: float
    original_context: int  # positions up to which nothing changes


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Long wavelengths divided by `factor`, short ones kept, a smooth passage between (Llama 3.1)."""

    factor: float
    low_freq_factor: float  # wavelengths over original_context / this are divided
    high_freq_factor: float  # wavelengths under original_context / this are kept
    original_context: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """A ramp over the dimensions from kept to divided frequencies (YaRN, Peng et al. 2023)."""

    factor: float
    original_context: int
    beta_fast: float  # rotations over the original context from which a frequency is kept
    beta_slow: float  # rotations up to which it is divided
    attention_factor: float  # on cosines and sines
    truncate: bool  # whether the ends of the ramp are rounded to whole dimensions


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """A divisor for every frequency, from one of two lists by the length of the context (LongRoPE, Ding et al. 2024).

    As with DynamicScaling, the longest context served decides.
    """

    short_factors: tuple[float, ...]  # [head_dim / 2]
    long_factors: tuple[float, ...]  # [head_dim / 2], beyond original_context
    original_context: int
    attention_factor: float  # on cosines and sines


@dataclass(frozen=True, slots=True)
class StoredFactors:
    """A divisor for every frequency from the weights (role "rope_factors"): how GGUF stores Llama3Scaling."""


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling | StoredFactors


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embeddings; the pairs are the two halves of a head. layers/rotary.py makes the table of it."""

    theta: float  # base of the frequencies
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """Everything that decides a forward pass but the weights.

    Norm weights are what the normalised value is multiplied with: Gemma's `1 + weight` is done when loading.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of the gated MLP
    num_layers: int
    num_heads: int  # query heads
    num_kv_heads: int  # each serves num_heads / num_kv_heads query heads
    head_dim: int
    rms_norm_eps: float
    ropes: tuple[Rope, ...]  # of each layer; equal ones share a table
    windows: tuple[int | None, ...]  # of each layer: tokens that a query sees, itself among them; None: all before it
    tied_embeddings: bool  # the output matrix is the embedding
    max_context: int  # positions that the model is made for
    eos_token_ids: frozenset[int]  # any of them ends a turn
    attention_scale: float  # on query-key products
    attention_softcap: float | None = None  # c: scaled scores become c * tanh(score / c), before the mask
    logit_softcap: float | None = None  # the same for logits
    activation: Activation = "silu"  # of the gate
    embedding_scale: float = 1.0  # on embeddings that are looked up, not on the output matrix
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each query and key head, before the rotation
    post_norms: bool = False  # RMSNorm after attention and after the MLP too, before they are added

    def __post_init__(self) -> None:
        assert len(self.ropes) == len(self.windows) == self.num_layers, "a rope and a window for every layer"

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers that the KV cache keeps for one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def layer_matrices(self) -> dict[LayerRole, tuple[int, int]]:
        """(outputs, inputs) of each matrix of a layer."""
        hidden, middle = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q": (queries, hidden),
            "k": (keys, hidden),
            "v": (keys, hidden),
            "o": (hidden, queries),
            "gate": (middle, hidden),
            "up": (middle, hidden),
            "down": (hidden, middle),
        }

    def share(self, ranks: int) -> DecoderSpec:
        """What one of so many ranks computes of attention and of the MLP.

        Where there are fewer KV heads than ranks, several have the same one. The vocabulary and the hidden size are
        those of the whole. sizing.tensor_parallel_sizes says which numbers divide a model.
        """
        return replace(
            self,
            num_heads=self.num_heads // ranks,
            num_kv_heads=max(1, self.num_kv_heads // ranks),
            intermediate_size=self.intermediate_size // ranks,
        )
