"""A DecoderSpec computed by the C++ library: packs the weights, owns the KV cache, computes steps.

Built and run by runner.py, on a CPU where the library is there. One call computes a whole step; the library's threads
are its own. What a request gets does not depend on the other requests of the step, in any of the three ways to compute:

- float32: weights dequantised to float32;
- bfloat16: weights and the inputs of products in bfloat16, sums in float32;
- int8: quantised weights as the file has them, the inputs of products rounded to int8 with a scale for 32, as llama.cpp
  does; matrices of other types as in bfloat16.

Keys and values are float32 for float32, otherwise float16: as many bytes as bfloat16, three bits more, and every
processor that runs the library converts them in hardware. The residual is float32 in all.

Shapes: T tokens of the step, R requests, S rows to get logits for, V vocabulary.
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from typing import TYPE_CHECKING

import numpy as np
import torch

from octavo_engine.cpu.compute import NATIVE_GROUP_BYTES
from octavo_engine.cpu.library import LAYER_MATRICES, PHASES, Choices, Config, LowRank, Role, Step, Vector
from octavo_engine.models.decoder import rotary_tables
from octavo_engine.weights.quant_type import QuantType

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from octavo_engine.cpu.compute import Compute
    from octavo_engine.models.adapter import Place
    from octavo_engine.models.family import LayerRole, ModelRole
    from octavo_engine.models.spec import DecoderSpec
    from octavo_engine.plan import StepPlan
    from octavo_engine.sampler import RowRules
    from octavo_engine.weights import low_rank
    from octavo_engine.weights.stored import Matrix, WeightSource

_STORED = {torch.float32: QuantType.F32, torch.bfloat16: QuantType.BF16}


class CpuAdapters:
    """LoRA adapters as the library takes them: float32, in memory that is this object's."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._loaded: dict[int, tuple[ctypes.Array[LowRank], list[torch.Tensor]]] = {}

    def load(self, adapter: int, pairs: Mapping[Place, low_rank.LowRank]) -> None:
        """See StepAdapters."""
        table = (LowRank * (self._num_layers * LAYER_MATRICES))()
        tensors = []
        for (layer, role), pair in pairs.items():
            a, b = pair.a, pair.b.T.contiguous()
            tensors += [a, b]
            table[layer * LAYER_MATRICES + Role[role.upper()]] = LowRank(len(a), a.data_ptr(), b.data_ptr())
        self._loaded[adapter] = (table, tensors)

    def unload(self, adapter: int) -> None:
        """See StepAdapters."""
        del self._loaded[adapter]

    def of_step(self, plan: StepPlan) -> tuple[ctypes.Array[ctypes.c_void_p] | None, int]:
        """The table of each request's adapter, and the highest rank in them; None: no request has one."""
        if not any(request.adapter for request in plan.requests):
            return None, 0
        used = {number: self._loaded[number][0] for number in {request.adapter for request in plan.requests} - {0}}
        tables = [ctypes.addressof(used[request.adapter]) if request.adapter else None for request in plan.requests]
        max_rank = max(one.rank for table in used.values() for one in table)
        return (ctypes.c_void_p * len(tables))(*tables), max_rank


class CpuDecoder:
    """The whole network, from a StepPlan to logits."""

    def __init__(
        self,
        library: ctypes.CDLL,
        spec: DecoderSpec,
        source: WeightSource,
        *,
        compute: Compute,
        num_positions: int,
        num_blocks: int,
        block_size: int,
        num_threads: int,
    ) -> None:
        """Load and pack every tensor.

        Raises:
            ModelInvalid: a tensor is missing or has another shape than `spec` implies.
            MemoryError: the KV cache or a matrix cannot be allocated.
        """
        self._library, self._spec, self._compute = library, spec, compute
        tables = rotary_tables(spec, source, num_positions=num_positions)
        config = Config(
            vocab_size=spec.vocab_size,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            num_layers=spec.num_layers,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            num_blocks=num_blocks,
            block_size=block_size,
            kv_float32=compute == "float32",
            num_positions=num_positions,
            num_ropes=len(tables),
            num_threads=num_threads,
            gate={"silu": 0, "gelu_tanh": 1}[spec.activation],
            rms_norm_eps=spec.rms_norm_eps,
            embedding_scale=spec.embedding_scale,
            attention_scale=spec.attention_scale,
            attention_softcap=spec.attention_softcap or 0.0,
            logit_softcap=spec.logit_softcap or 0.0,
        )
        self._decoder = library.octavo_decoder_new(ctypes.byref(config))
        if not self._decoder:
            raise MemoryError("no memory for the KV cache")
        weakref.finalize(self, library.octavo_decoder_free, self._decoder)
        for index, (cos, sin) in enumerate(tables.values()):
            cos, sin = cos.contiguous(), sin.contiguous()  # noqa: PLW2901 - alive until the call is over
            self._check(library.octavo_decoder_set_rope(self._decoder, index, cos.data_ptr(), sin.data_ptr()))
        for layer in range(spec.num_layers):
            rope = list(tables).index(spec.ropes[layer])
            library.octavo_decoder_set_layer(self._decoder, layer, spec.windows[layer] or 0, rope)
            self._load_layer(source, layer)
        self._load_matrix(source, "embedding", (spec.vocab_size, spec.hidden_size))
        if not spec.tied_embeddings:
            self._load_matrix(source, "output", (spec.vocab_size, spec.hidden_size))
        self._load_vector(source, "final_norm", spec.hidden_size)
        self._block_size = block_size
        self.adapters = CpuAdapters(spec.num_layers)

    @property
    def hidden_size(self) -> int:
        """See Steps."""
        return self._spec.hidden_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed matrices."""
        return int(self._library.octavo_decoder_weight_bytes(self._decoder))

    def phase_seconds(self) -> dict[str, float]:
        """Seconds spent in each phase of all steps so far; their sum is the time in `forward` but for Python's part."""
        seconds = self._library.octavo_decoder_phase_seconds(self._decoder)
        return {phase: seconds[index] for index, phase in enumerate(PHASES)}

    @property
    def chooser(self) -> CpuDecoder:
        """See Steps."""
        return self

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy the KV of whole blocks in every layer: (source, destination) block ids."""
        pairs = np.array(copies, dtype=np.int32)
        self._library.octavo_decoder_copy_blocks(self._decoder, pairs.ctypes.data, len(copies))

    def forward(self, plan: StepPlan, *, every_token: bool = False, states: torch.Tensor | None = None) -> torch.Tensor:
        """See Steps; the logits are float32."""
        requests = plan.requests
        query_starts = _starts([len(request.token_ids) for request in requests])
        num_tokens = int(query_starts[-1])
        rows = np.array(range(num_tokens) if every_token else plan.logits_rows, dtype=np.int32)
        logits = torch.empty(len(rows), self._spec.vocab_size)
        token_ids = _flat([request.token_ids for request in requests], num_tokens)
        computed = np.array([request.num_computed_tokens for request in requests], dtype=np.int32)
        table_starts = _starts([len(request.block_ids) for request in requests])
        block_tables = _flat([request.block_ids for request in requests], int(table_starts[-1]))
        contexts = computed + np.diff(query_starts)
        assert np.all(np.diff(table_starts) * self._block_size >= contexts), "a block table is too short for the tokens"
        adapters, max_rank = self.adapters.of_step(plan)
        step = Step(
            num_tokens=num_tokens,
            num_requests=len(requests),
            num_logits=len(rows),
            token_ids=token_ids.ctypes.data,
            query_starts=query_starts.ctypes.data,
            computed=computed.ctypes.data,
            table_starts=table_starts.ctypes.data,
            block_tables=block_tables.ctypes.data,
            logits_rows=rows.ctypes.data,
            logits=logits.data_ptr(),
            states=states.data_ptr() if states is not None else None,
            adapters=ctypes.addressof(adapters) if adapters is not None else None,
            max_rank=max_rank,
        )
        self._check(self._library.octavo_decoder_forward(self._decoder, ctypes.byref(step)))
        return logits

    def choose(self, logits: torch.Tensor, rows: np.ndarray, rules: RowRules) -> np.ndarray:
        """See sampler.Chooser."""
        assert logits.dtype == torch.float32
        assert logits.is_contiguous()
        tokens = np.empty(len(rows), dtype=np.int32)
        choices = Choices(
            vocab_size=logits.shape[1],
            num_rows=len(rows),
            logits=logits.data_ptr(),
            rows=rows.ctypes.data,
            inverse_temperatures=rules.inverse_temperatures.ctypes.data,
            min_ps=rules.min_ps.ctypes.data,
            top_ps=rules.top_ps.ctypes.data,
            uniforms=rules.uniforms.ctypes.data,
            bounds=rules.bounds.ctypes.data,
            tokens=tokens.ctypes.data,
        )
        self._check(self._library.octavo_decoder_choose(self._decoder, ctypes.byref(choices)))
        return tokens

    def _load_layer(self, source: WeightSource, layer: int) -> None:
        for role, size in self._vector_sizes().items():
            self._load_vector(source, role, size, layer)
        for role, shape in self._spec.layer_matrices.items():
            self._load_matrix(source, role, shape, layer)

    def _vector_sizes(self) -> Mapping[LayerRole, int]:
        """The norms and biases that a layer has."""
        spec = self._spec
        hidden, queries, keys = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        sizes: dict[LayerRole, int] = {"attention_norm": hidden, "mlp_norm": hidden}
        if spec.post_norms:
            sizes |= {"attention_post_norm": hidden, "mlp_post_norm": hidden}
        if spec.qk_norm:
            sizes |= {"q_norm": spec.head_dim, "k_norm": spec.head_dim}
        if spec.qkv_bias:
            sizes |= {"q_bias": queries, "k_bias": keys, "v_bias": keys}
        if spec.o_bias:
            sizes["o_bias"] = hidden
        return sizes

    def _load_matrix(
        self, source: WeightSource, role: ModelRole | LayerRole, shape: tuple[int, int], layer: int | None = None
    ) -> None:
        stored = source.matrix(role, shape, layer=layer)
        quant_type, rows = self._rows(stored)
        outputs, inputs = shape
        self._check(
            self._library.octavo_decoder_set_matrix(
                self._decoder, layer or 0, Role[role.upper()], quant_type, outputs, inputs, rows.data_ptr()
            )
        )

    def _rows(self, stored: Matrix) -> tuple[QuantType, torch.Tensor]:
        """The matrix in a type that the library takes: as stored if it multiplies that, otherwise dequantised."""
        if self._compute == "int8" and stored.quant_type in NATIVE_GROUP_BYTES:
            return stored.quant_type, stored.packed
        dtype = torch.float32 if self._compute == "float32" else torch.bfloat16
        return _STORED[dtype], stored.dequantize(dtype, torch.device("cpu"))

    def _load_vector(
        self, source: WeightSource, role: ModelRole | LayerRole, size: int, layer: int | None = None
    ) -> None:
        numbers = source.vector(role, size, layer=layer)
        self._check(
            self._library.octavo_decoder_set_vector(
                self._decoder, layer or 0, Vector[role.upper()], numbers.data_ptr(), size
            )
        )

    @staticmethod
    def _check(result: int) -> None:
        if result != 0:
            raise MemoryError("no memory for weights or activations")


def _starts(lengths: list[int]) -> np.ndarray:
    """Where each of several adjacent lists begins, and the end of the last: int32 [len(lengths) + 1]."""
    starts = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=starts[1:])
    return starts


def _flat(lists: list[tuple[int, ...]], size: int) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(lists), dtype=np.int32, count=size)
