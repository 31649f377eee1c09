"""A DecoderSpec computed in torch: on a GPU, as the truth for other decoders, and where there is no C++ library.

Built and run by runner.py. All tokens of all requests of a step come as one flat sequence; only attention knows which
belong together.

Where several ranks share the model, each has some of the heads, of the MLP's middle and of the vocabulary, and a
Communicator (parallel.py) joins what they computed. The source hands out a rank's part of each tensor, and is asked for
it by the shape of the whole.

Shapes: T tokens of the step, H hidden size, D head size, V vocabulary, S rows to get logits for; of this rank: N query
heads, K KV heads, M intermediate size.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from octavo_engine.layers.activation import gate_and_mul
from octavo_engine.layers.linear import Linear, PartialLinear
from octavo_engine.layers.lora import adapters_on
from octavo_engine.layers.norm import RMSNorm
from octavo_engine.layers.rotary import rotary_table, rotate
from octavo_engine.models.spec import StoredFactors
from octavo_engine.parallel import ALONE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from octavo_engine.attention.base import AttentionBackend
    from octavo_engine.layers.lora import Adapters
    from octavo_engine.models.family import LayerRole, ModelRole
    from octavo_engine.models.spec import DecoderSpec, Rope
    from octavo_engine.parallel import Communicator
    from octavo_engine.weights.stored import WeightSource


_ALL = slice(None)


def _columns(sizes: Mapping[LayerRole, int]) -> dict[LayerRole, slice]:
    """Where matrices that are multiplied as one have their outputs."""
    ends = dict(zip(sizes, itertools.accumulate(sizes.values()), strict=True))
    return {role: slice(end - sizes[role], end) for role, end in ends.items()}


class _Loader:
    """One rank's weights of a model, or of one of its layers, on their device and in the compute dtype."""

    def __init__(
        self,
        source: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
        ranks: Communicator,
        layer: int | None = None,
    ) -> None:
        self._source, self.dtype, self._device, self.ranks, self._layer = source, dtype, device, ranks, layer

    def of_layer(self, layer: int) -> _Loader:
        return _Loader(self._source, self.dtype, self._device, self.ranks, layer)

    def matrix(self, role: ModelRole | LayerRole, *shape: int) -> torch.Tensor:
        rows, columns = shape
        stored = self._source.matrix(role, (rows, columns), layer=self._layer)
        return stored.dequantize(self.dtype, self._device)

    def bias(self, role: LayerRole, size: int) -> torch.Tensor:
        return self._source.vector(role, size, layer=self._layer).to(self._device, self.dtype)

    def norm(self, role: ModelRole | LayerRole, size: int, eps: float, *, dtype: torch.dtype | None = None) -> RMSNorm:
        weight = self._source.vector(role, size, layer=self._layer).to(self._device)
        return RMSNorm(weight, eps, dtype or self.dtype)


class _Attention:
    """Grouped-query self-attention of one layer."""

    def __init__(
        self, spec: DecoderSpec, weights: _Loader, layer: int, backend: AttentionBackend, adapters: Adapters
    ) -> None:
        hidden, dim = spec.hidden_size, spec.head_dim
        self._layer, self._head_dim, self._backend, self._adapters = layer, dim, backend, adapters
        share = spec.share(weights.ranks.size)
        self._num_heads, self._num_kv_heads = share.num_heads, share.num_kv_heads
        sizes: dict[LayerRole, int] = {"q": spec.num_heads * dim, "k": spec.num_kv_heads * dim}
        sizes["v"] = sizes["k"]
        self._columns = _columns(sizes)
        bias = None
        if spec.qkv_bias:
            names: tuple[LayerRole, ...] = ("q_bias", "k_bias", "v_bias")
            bias = torch.cat([weights.bias(name, size) for name, size in zip(names, sizes.values(), strict=True)])
        self._qkv = Linear(*(weights.matrix(role, size, hidden) for role, size in sizes.items()), bias=bias)
        o_bias = weights.bias("o_bias", hidden) if spec.o_bias else None
        self._output = PartialLinear(weights.matrix("o", hidden, sizes["q"]), bias=o_bias, ranks=weights.ranks)
        self._norms: tuple[RMSNorm, RMSNorm] | None = None
        if spec.qk_norm:
            self._norms = (
                weights.norm("q_norm", dim, spec.rms_norm_eps, dtype=torch.float32),
                weights.norm("k_norm", dim, spec.rms_norm_eps, dtype=torch.float32),
            )

    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        qkv = self._adapters.add(self._qkv(x), x, self._layer, self._columns)
        qkv = qkv.view(len(x), -1, self._head_dim)  # [T, N + 2 K, D]
        qk, v = qkv[:, : -self._num_kv_heads], qkv[:, -self._num_kv_heads :]
        if self._norms is not None:
            heads = (qk[:, : self._num_heads], qk[:, self._num_heads :])
            qk = torch.cat([norm(part) for norm, part in zip(self._norms, heads, strict=True)], dim=1)
        qk = rotate(qk, cos, sin).to(x.dtype)
        self._backend.store(self._layer, qk[:, self._num_heads :], v)
        attended = self._backend.attend(self._layer, qk[:, : self._num_heads]).flatten(1)
        return self._adapters.add(self._output(attended), attended, self._layer, {"o": _ALL})


class _MLP:
    """The gated feed-forward network of one layer."""

    def __init__(self, spec: DecoderSpec, weights: _Loader, layer: int, adapters: Adapters) -> None:
        hidden, middle = spec.hidden_size, spec.intermediate_size
        self._layer, self._adapters = layer, adapters
        self._activation = spec.activation
        self._columns = _columns({"gate": middle, "up": middle})
        self._gate_up = Linear(weights.matrix("gate", middle, hidden), weights.matrix("up", middle, hidden))
        self._down = PartialLinear(weights.matrix("down", hidden, middle), ranks=weights.ranks)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        gate_up = self._adapters.add(self._gate_up(x), x, self._layer, self._columns)
        gated = gate_and_mul(gate_up, self._activation)
        return self._adapters.add(self._down(gated), gated, self._layer, {"down": _ALL})


class _Layer:
    """Attention and MLP, each after a norm and added to the residual, which stays float32."""

    def __init__(
        self, spec: DecoderSpec, weights: _Loader, layer: int, backend: AttentionBackend, adapters: Adapters
    ) -> None:
        def norm(role: LayerRole, dtype: torch.dtype) -> RMSNorm:
            return weights.norm(role, spec.hidden_size, spec.rms_norm_eps, dtype=dtype)

        self._attention_norm = norm("attention_norm", weights.dtype)
        self._attention = _Attention(spec, weights, layer, backend, adapters)
        self._attention_post_norm = norm("attention_post_norm", torch.float32) if spec.post_norms else None
        self._mlp_norm = norm("mlp_norm", weights.dtype)
        self._mlp = _MLP(spec, weights, layer, adapters)
        self._mlp_post_norm = norm("mlp_post_norm", torch.float32) if spec.post_norms else None

    def __call__(self, residual: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Add this layer's part to the residual, float32 [T, H], in place."""
        attended = self._attention(self._attention_norm(residual), cos, sin)
        residual += attended if self._attention_post_norm is None else self._attention_post_norm(attended)
        computed = self._mlp(self._mlp_norm(residual))
        residual += computed if self._mlp_post_norm is None else self._mlp_post_norm(computed)


class TorchDecoder:
    """The whole network, from token ids to logits."""

    def __init__(
        self,
        spec: DecoderSpec,
        source: WeightSource,
        backend: AttentionBackend,
        *,
        num_positions: int,
        dtype: torch.dtype,
        device: torch.device,
        ranks: Communicator = ALONE,
    ) -> None:
        """Load every tensor.

        Args:
            spec: the whole model.
            source: of this rank's weights.
            backend: with the KV heads of this rank.
            num_positions: longest context that will be served.
            dtype: what is computed in.
            device: where.
            ranks: the others that share the model.

        Raises:
            ModelInvalid: a tensor is missing or has another shape than `spec` implies.
        """
        weights = _Loader(source, dtype, device, ranks)
        self._ranks, self._vocab_size = ranks, spec.vocab_size
        self._embedding_scale, self._softcap = spec.embedding_scale, spec.logit_softcap
        self.hidden_size = spec.hidden_size
        self._embedding = weights.matrix("embedding", spec.vocab_size, spec.hidden_size)
        tables = rotary_tables(spec, source, num_positions=num_positions)
        self._tables = [(cos.to(device), sin.to(device)) for cos, sin in tables.values()]
        self._table_of_layer = [list(tables).index(rope) for rope in spec.ropes]
        self.adapters = adapters_on(device, dtype)  # of a model on one device: the others' rows would miss them
        self._layers = [
            _Layer(spec, weights.of_layer(layer), layer, backend, self.adapters) for layer in range(spec.num_layers)
        ]
        self._norm = weights.norm("final_norm", spec.hidden_size, spec.rms_norm_eps)
        self._head = Linear(
            self._embedding if spec.tied_embeddings else weights.matrix("output", spec.vocab_size, spec.hidden_size)
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        logits_rows: torch.Tensor,
        states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute a step, after the backend's `begin_step`.

        Args:
            input_ids: int64 [T].
            positions: int64 [T], each token's position in its request.
            logits_rows: int64 [S], the tokens to get logits after.
            states: float32 [S, H], filled with what the logits are computed of.

        Returns:
            Logits [S, V] in the compute dtype, on rank 0 alone.
        """
        turns = [(cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)) for cos, sin in self._tables]
        residual = self._ranks.embed(input_ids, self._embedding).float() * self._embedding_scale
        for layer, table in zip(self._layers, self._table_of_layer, strict=True):
            layer(residual, *turns[table])
        normed = self._norm(residual[logits_rows])
        if states is not None:
            states.copy_(normed)
        logits = self._ranks.join(self._head(normed), self._vocab_size)
        if self._softcap is not None:
            return logits.div_(self._softcap).tanh_().mul_(self._softcap)
        return logits


def rotary_tables(
    spec: DecoderSpec, source: WeightSource, *, num_positions: int
) -> dict[Rope, tuple[torch.Tensor, torch.Tensor]]:
    """The table of every different rope of a model: cosines and sines, float32 [num_positions, D / 2] on the CPU."""
    stored = None
    if any(isinstance(rope.scaling, StoredFactors) for rope in spec.ropes):
        stored = source.vector("rope_factors", spec.head_dim // 2)
    return {
        rope: rotary_table(rope, head_dim=spec.head_dim, num_positions=num_positions, stored_factors=stored)
        for rope in dict.fromkeys(spec.ropes)
    }
