"""What computes the tokens of a StepPlan, and torch's way to do it. Called by runner.py, ranks.py and worker.py.

cpu/decoder.py is the other way. Neither knows of sampling or scheduling.

Shapes: S rows to get logits for, V vocabulary, H hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import torch

from octavo_engine.attention.base import AttentionRules, CacheShape
from octavo_engine.attention.reference import ReferenceAttention
from octavo_engine.batch import build_step
from octavo_engine.models.decoder import TorchDecoder
from octavo_engine.parallel import ALONE
from octavo_engine.weights.shard import Shard
from octavo_engine.weights.stored import WeightSource

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from octavo_engine.attention.base import AttentionBackend
    from octavo_engine.models.adapter import Place
    from octavo_engine.models.checkpoint import Checkpoint
    from octavo_engine.parallel import Communicator
    from octavo_engine.plan import StepPlan
    from octavo_engine.sampler import Chooser
    from octavo_engine.sizing import MemoryPlan
    from octavo_engine.weights.low_rank import LowRank


class StepAdapters(Protocol):
    """What adds LoRA adapters to the products of a step."""

    def load(self, adapter: int, pairs: Mapping[Place, LowRank]) -> None:
        """Take an adapter under its number, which ScheduledRequest.adapter may name from then on."""
        ...

    def unload(self, adapter: int) -> None:
        """Forget it: no request names it any more."""
        ...


class MakeAttention(Protocol):
    """The class of a backend, or what calls it."""

    def __call__(
        self, shape: CacheShape, rules: AttentionRules, *, dtype: torch.dtype, device: torch.device
    ) -> AttentionBackend:
        """Reserve the cache."""
        ...


class Steps(Protocol):
    """A loaded model with its KV cache, which the plans' block ids alone address."""

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy the KV of whole blocks in every layer: (source, destination) block ids."""
        ...

    def forward(self, plan: StepPlan, *, every_token: bool = False, states: torch.Tensor | None = None) -> torch.Tensor:
        """Compute every token of the plan.

        Args:
            plan: of at least one request.
            every_token: get logits after every token of the plan, and not only after those of its logits_rows.
            states: float32 [S, H] on the CPU, to be filled with the normed output of the last layer in the same rows.

        Returns:
            Logits [S, V].
        """
        ...

    @property
    def hidden_size(self) -> int:
        """H."""
        ...

    @property
    def chooser(self) -> Chooser | None:
        """What chooses tokens faster than torch does, if there is something."""
        ...

    @property
    def adapters(self) -> StepAdapters | None:
        """Where LoRA adapters go; None: several devices share the model, and take none."""
        ...


class TorchSteps:
    """Steps in torch: a plan as tensors, through a model and the attention backend that it was built with."""

    chooser: Final = None

    def __init__(
        self, model: TorchDecoder, attention: AttentionBackend, *, block_size: int, device: torch.device
    ) -> None:
        self._model, self._attention, self._block_size, self._device = model, attention, block_size, device
        self.hidden_size = model.hidden_size
        self.adapters = model.adapters

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """See Steps."""
        self._attention.copy_blocks(copies)

    def forward(self, plan: StepPlan, *, every_token: bool = False, states: torch.Tensor | None = None) -> torch.Tensor:
        """See Steps; the logits are in the compute dtype."""
        step = build_step(plan, block_size=self._block_size, device=self._device)
        self._attention.begin_step(step.attention)
        self.adapters.begin_step(plan)
        rows = torch.arange(plan.num_tokens, device=self._device) if every_token else step.logits_rows
        return self._model.forward(step.input_ids, step.positions, rows, states)


def load_torch_steps(
    checkpoint: Checkpoint,
    memory: MemoryPlan,
    *,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[int, int], None],
    ranks: Communicator = ALONE,
) -> TorchSteps:
    """Load one rank's part of a model, with its part of the KV cache.

    Args:
        checkpoint: the whole model.
        memory: the plan of each rank.
        dtype: of computation and KV cache.
        device: where.
        on_progress: called with (bytes done, bytes in all tensors).
        ranks: who shares the model.

    Raises:
        ModelInvalid, ModelUnsupported: a tensor is missing, has another shape than the description says, or is unknown.
    """
    model, attention = load_torch_model(
        checkpoint,
        memory,
        dtype=dtype,
        device=device,
        make_attention=_attention_for(dtype, device),
        on_progress=on_progress,
        ranks=ranks,
    )
    return TorchSteps(model, attention, block_size=memory.block_size, device=device)


def load_torch_model(
    checkpoint: Checkpoint,
    memory: MemoryPlan,
    *,
    dtype: torch.dtype,
    device: torch.device,
    make_attention: MakeAttention,
    on_progress: Callable[[int, int], None],
    ranks: Communicator = ALONE,
) -> tuple[TorchDecoder, AttentionBackend]:
    """The parts of load_torch_steps, with the attention that is given.

    Raises:
        ModelInvalid, ModelUnsupported: see there.
    """
    spec = checkpoint.spec
    shape = CacheShape(
        num_layers=spec.num_layers,
        num_blocks=memory.num_blocks,
        block_size=memory.block_size,
        num_kv_heads=spec.share(ranks.size).num_kv_heads,
        head_dim=spec.head_dim,
    )
    rules = AttentionRules(scale=spec.attention_scale, windows=spec.windows, softcap=spec.attention_softcap)
    attention = make_attention(shape, rules, dtype=dtype, device=device)
    weights = WeightSource(checkpoint, on_progress=on_progress, shard=Shard(ranks.rank, ranks.size))
    model = TorchDecoder(
        spec, weights, attention, num_positions=memory.max_model_len, dtype=dtype, device=device, ranks=ranks
    )
    weights.check_all_read()
    return model, attention


def _attention_for(dtype: torch.dtype, device: torch.device) -> MakeAttention:
    """Kernels where there is a GPU; torch elsewhere, and for float32, whose promise of equal results only it keeps."""
    if device.type == "cuda" and dtype != torch.float32:
        from octavo_engine.attention.triton import TritonAttention  # noqa: PLC0415 - Triton is not there without a GPU

        return TritonAttention
    return ReferenceAttention
