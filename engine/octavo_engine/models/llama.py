"""The Llama architecture (Touvron et al. 2023), which SmolLM and others share: pre-norm, rotary, gated MLP.

Built and run by runner.py. All tokens of all requests of a step come as one flat sequence; only attention knows which
belong together.

Shapes: T tokens of the step, H hidden size, N query heads, K KV heads, D head size, M intermediate size, V vocabulary,
S rows to get logits for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - everyone's name for it

from octavo_engine.layers.activation import silu_and_mul
from octavo_engine.layers.linear import Linear
from octavo_engine.layers.norm import RMSNorm
from octavo_engine.layers.rotary import RotaryEmbedding, rotate

if TYPE_CHECKING:
    from octavo_engine.attention.base import AttentionBackend
    from octavo_engine.models.config import ModelConfig
    from octavo_engine.weights.loader import WeightLoader


class LlamaAttention:
    """Grouped-query self-attention of one layer."""

    def __init__(self, config: ModelConfig, weights: WeightLoader, layer: int, backend: AttentionBackend) -> None:
        prefix, hidden, dim = f"blk.{layer}.attn", config.hidden_size, config.head_dim
        self._layer, self._head_dim, self._backend = layer, dim, backend
        self._num_heads, self._num_kv_heads = config.num_heads, config.num_kv_heads
        self._qkv = Linear(
            _unpermute(weights.matrix(f"{prefix}_q.weight", (config.num_heads * dim, hidden)), dim),
            _unpermute(weights.matrix(f"{prefix}_k.weight", (config.num_kv_heads * dim, hidden)), dim),
            weights.matrix(f"{prefix}_v.weight", (config.num_kv_heads * dim, hidden)),
        )
        self._output = Linear(weights.matrix(f"{prefix}_output.weight", (hidden, config.num_heads * dim)))

    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        qkv = self._qkv(x).view(len(x), -1, self._head_dim)  # [T, N + 2 K, D]
        qk = rotate(qkv[:, : -self._num_kv_heads], cos, sin)
        self._backend.store(self._layer, qk[:, self._num_heads :], qkv[:, -self._num_kv_heads :])
        return self._output(self._backend.attend(self._layer, qk[:, : self._num_heads]).flatten(1))


class LlamaMLP:
    """The gated feed-forward network of one layer."""

    def __init__(self, config: ModelConfig, weights: WeightLoader, layer: int) -> None:
        prefix, hidden, middle = f"blk.{layer}.ffn", config.hidden_size, config.intermediate_size
        self._gate_up = Linear(
            weights.matrix(f"{prefix}_gate.weight", (middle, hidden)),
            weights.matrix(f"{prefix}_up.weight", (middle, hidden)),
        )
        self._down = Linear(weights.matrix(f"{prefix}_down.weight", (hidden, middle)))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        return self._down(silu_and_mul(self._gate_up(x)))


class LlamaLayer:
    """Attention and MLP, each after a norm and added to the residual, which stays float32."""

    def __init__(self, config: ModelConfig, weights: WeightLoader, layer: int, backend: AttentionBackend) -> None:
        def norm(name: str) -> RMSNorm:
            weight = weights.vector(f"blk.{layer}.{name}.weight", config.hidden_size)
            return RMSNorm(weight, config.rms_norm_eps, weights.dtype)

        self._attention_norm, self._mlp_norm = norm("attn_norm"), norm("ffn_norm")
        self._attention = LlamaAttention(config, weights, layer, backend)
        self._mlp = LlamaMLP(config, weights, layer)

    def __call__(self, residual: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Add this layer's part to the residual, float32 [T, H], in place."""
        residual += self._attention(self._attention_norm(residual), cos, sin)
        residual += self._mlp(self._mlp_norm(residual))


class LlamaModel:
    """The whole network, from token ids to logits."""

    def __init__(
        self, config: ModelConfig, weights: WeightLoader, backend: AttentionBackend, *, num_positions: int
    ) -> None:
        """Load every tensor.

        Raises:
            ModelInvalid: a tensor is missing or has another shape than `config` implies.
        """
        shape = (config.vocab_size, config.hidden_size)
        self._embedding = weights.matrix("token_embd.weight", shape)
        self._rotary = RotaryEmbedding(
            head_dim=config.head_dim, theta=config.rope_theta, num_positions=num_positions, device=weights.device
        )
        self._layers = [LlamaLayer(config, weights, layer, backend) for layer in range(config.num_layers)]
        final_weight = weights.vector("output_norm.weight", config.hidden_size)
        self._norm = RMSNorm(final_weight, config.rms_norm_eps, weights.dtype)
        self._head = Linear(self._embedding if config.tied_embeddings else weights.matrix("output.weight", shape))

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, logits_rows: torch.Tensor) -> torch.Tensor:
        """Compute a step, after the backend's `begin_step`.

        Args:
            input_ids: int64 [T].
            positions: int64 [T], each token's position in its request.
            logits_rows: int64 [S], the tokens to get logits after.

        Returns:
            Logits [S, V] in the compute dtype.
        """
        cos, sin = self._rotary.at(positions)
        residual = F.embedding(input_ids, self._embedding).float()
        for layer in self._layers:
            layer(residual, cos, sin)
        return self._head(self._norm(residual[logits_rows]))


def _unpermute(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Undo llama.cpp's order of the rows of a query or key matrix [heads * D, H].

    Its converter interleaves the two halves of a head for rotary embeddings on adjacent pairs; ours pair the halves.
    """
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
