"""A model on one GPU: loaded, measured, given the cache that there is memory for, and its graphs captured.

Called by runner.py once the plan is made. The plan was made from the header, so that what cannot fit is refused before
a weight is read. How many KV blocks there are follows from what is seen afterwards: the memory that is gone once the
weights are there, and the peak of the largest step that the options allow. Graphs are captured last: they are bound to
where the cache is.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from octavo_engine import device as devices
from octavo_engine import planning
from octavo_engine.attention.reference import ReferenceAttention
from octavo_engine.attention.triton import TritonAttention
from octavo_engine.draft import Drafter
from octavo_engine.gpu.graphs import graph_sizes
from octavo_engine.gpu.runner import AheadRunner
from octavo_engine.gpu.sampling import DeviceSampler
from octavo_engine.gpu.steps import GpuSteps
from octavo_engine.kernels.suite import LAUNCHED
from octavo_engine.plan import SamplingParams, ScheduledRequest, StepPlan
from octavo_engine.runner import Loaded, ModelRunner
from octavo_engine.sizing import Measured, Memory
from octavo_engine.steps import load_torch_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from octavo_engine.config import EngineConfig
    from octavo_engine.gpu.accelerator import Accelerator
    from octavo_engine.kernels.suite import Suite
    from octavo_engine.planning import Plan
    from octavo_engine.runner import OnProgress
    from octavo_engine.steps import MakeAttention

_log = logging.getLogger(__name__)


def load_on_gpu(
    plan: Plan,
    config: EngineConfig,
    accelerator: Accelerator,
    on_progress: OnProgress,
    kernels: Suite = LAUNCHED,
) -> Loaded:
    """Load the plan's model, and its draft model if there is one.

    Args:
        plan: of one device.
        config: the options.
        accelerator: the device.
        on_progress: told of what is loaded.
        kernels: what computes on it; the tests have their twins.

    Returns:
        The model, with the sizes that were measured in its plan.

    Raises:
        ModelDoesNotFit: what is left of the memory is too little for the cache; says how much is where.
        ModelInvalid, ModelUnsupported: as load_torch_model.
    """

    def loaded(phase: str, plan: Plan) -> GpuSteps:
        return _load_steps(plan, accelerator, kernels, lambda done, total: on_progress(phase, done, total))

    free = accelerator.free_bytes()
    steps = loaded("Loading", plan)
    draft = None if plan.draft is None else loaded("LoadingDraft", plan.draft)
    weight_bytes = free - accelerator.free_bytes()
    sampler = DeviceSampler(accelerator, kernels)
    drafter = None if draft is None else Drafter(draft)
    runner = ModelRunner(steps, seed=config.seed, drafter=drafter, sampler=sampler)
    peaks = [accelerator.peak_bytes(lambda step=step: runner.execute(step)) for step in _largest_steps(plan, config)]  # type: ignore[misc] # mypy knows no defaults of lambdas
    measured = Measured(weight_bytes=weight_bytes, work_bytes=sum(peaks), max_model_len=plan.memory.max_model_len)
    plan = _replanned(plan, config, measured)
    _log.info("as measured: %s", plan.describe())
    memory = plan.memory
    for model in (steps, draft):
        if model is not None:
            model.start(
                num_blocks=memory.num_blocks, max_model_len=memory.max_model_len, max_requests=config.max_num_seqs
            )
    if config.speculative_config is not None:  # what comes next depends on which guesses are right
        return Loaded(runner, steps, plan)
    ahead = AheadRunner(runner, steps, sampler, seed=config.seed, block_size=memory.block_size)
    return Loaded(ahead, steps, plan)


def _load_steps(
    plan: Plan, accelerator: Accelerator, kernels: Suite, on_progress: Callable[[int, int], None]
) -> GpuSteps:
    """Load a model with a cache of one block, which is enough to see what a step takes."""
    dtype = devices.torch_dtype(plan.dtype)
    make_attention: MakeAttention = ReferenceAttention
    if dtype in kernels.dtypes:
        make_attention = partial(TritonAttention, kernels=kernels)
    model, attention = load_torch_model(
        plan.model.checkpoint,
        replace(plan.memory, num_blocks=1),
        dtype=dtype,
        device=accelerator.device,
        make_attention=make_attention,
        on_progress=on_progress,
    )
    return GpuSteps(model, attention, accelerator, block_size=plan.memory.block_size)


def _largest_steps(plan: Plan, config: EngineConfig) -> tuple[StepPlan, StepPlan]:
    """As many tokens as a step may have, of as many requests as may run, as long as they may be; the largest graph's.

    Both are memory at the same time: graphs keep theirs. Every block is the only one that there is while they run.
    """
    longest = plan.memory.max_model_len
    blocks = (0,) * -(-longest // plan.memory.block_size)

    def step(lengths: list[int]) -> StepPlan:
        sampling = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9)
        return StepPlan(
            0,
            tuple(
                ScheduledRequest(f"measured-{row}", (0,) * length, longest - length, blocks, True, sampling)
                for row, length in enumerate(lengths)
            ),
        )

    lengths = [1] * config.max_num_seqs
    left = config.max_num_batched_tokens - config.max_num_seqs
    for row in range(config.max_num_seqs):
        more = min(left, longest - 1)
        lengths[row] += more
        left -= more
    return step(lengths), step([1] * graph_sizes(config.max_num_seqs)[-1])


def _replanned(plan: Plan, config: EngineConfig, measured: Measured) -> Plan:
    """The plan with what was measured in place of what was expected."""
    memory = Memory(
        device=plan.device,
        available_bytes=plan.memory.available_bytes,
        process_bytes=plan.memory.process_bytes,
        native=None,
    )
    return planning.make_plan(
        plan.model, config, device=plan.device, dtype=plan.dtype, memory=memory, measured=measured
    )
