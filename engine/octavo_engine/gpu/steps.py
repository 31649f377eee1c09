"""Steps on a GPU: decodes by graphs, everything else launch by launch. See steps.Steps; called by runner.py.

Graphs take plans in which every request computes one token, of no LoRA adapter. Prefills, guesses to be verified,
adapters, embeddings and logits after every token are computed launch by launch, and so is all with `--dtype float32`,
whose attention is reference.py's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from octavo_engine.attention.triton import TritonAttention
from octavo_engine.batch import send_step
from octavo_engine.gpu.accelerator import send
from octavo_engine.gpu.graphs import DecodeGraphs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo_engine.attention.base import AttentionBackend
    from octavo_engine.gpu.accelerator import Accelerator
    from octavo_engine.gpu.graphs import Drawn
    from octavo_engine.models.decoder import TorchDecoder
    from octavo_engine.plan import StepPlan


class GpuSteps:
    """A model on one GPU. Its cache is as large as its backend's until `start` gives it another one."""

    chooser: Final = None

    def __init__(
        self, model: TorchDecoder, attention: AttentionBackend, accelerator: Accelerator, *, block_size: int
    ) -> None:
        self._model, self._attention, self._accelerator = model, attention, accelerator
        self._block_size = block_size
        self._graphs: DecodeGraphs | None = None
        self.hidden_size = model.hidden_size
        self.adapters = model.adapters

    @torch.inference_mode()
    def start(self, *, num_blocks: int, max_model_len: int, max_requests: int) -> None:
        """Reserve the cache and capture the graphs, once it is known what there is memory for."""
        self._attention.reserve(num_blocks)
        if isinstance(self._attention, TritonAttention):
            self._graphs = DecodeGraphs(
                self._model,
                self._attention,
                self._accelerator,
                max_requests=max_requests,
                max_blocks=-(-max_model_len // self._block_size),
                block_size=self._block_size,
            )

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """See Steps."""
        self._attention.copy_blocks(copies)

    def forward(
        self,
        plan: StepPlan,
        *,
        every_token: bool = False,
        states: torch.Tensor | None = None,
        drawn: Drawn | None = None,
    ) -> torch.Tensor:
        """See Steps; logits in the compute dtype, good until the next step.

        Args:
            plan: see Steps.
            every_token: see Steps.
            states: see Steps; they are awaited.
            drawn: the tokens of a plan whose requests have one each, if they are on the device.
        """
        if self._graphs is not None and states is None and self._graphs.take(plan):
            logits = self._graphs.forward(plan, drawn)
            rows = plan.logits_rows
            if every_token or len(rows) == len(plan.requests):
                return logits
            return logits.index_select(0, self._send([np.array(rows, dtype=np.int64)])[0])
        step = send_step(plan, block_size=self._block_size, send=self._send)
        self._attention.begin_step(step.attention)
        self.adapters.begin_step(plan)
        input_ids = step.input_ids
        if drawn is not None:
            input_ids = drawn.take(self._send([np.array(drawn.sources)])[0])
        rows_on_device = torch.arange(plan.num_tokens, device=input_ids.device) if every_token else step.logits_rows
        return self._model.forward(input_ids, step.positions, rows_on_device, states)

    def _send(self, pieces: Sequence[np.ndarray]) -> list[torch.Tensor]:
        return send(self._accelerator, pieces)
