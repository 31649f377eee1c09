"""The model on its device: loads it, computes a step's tokens, samples. Called by the engine loop (core.py).

It joins the parts (weights, model, KV cache, sampler) and keeps no state of any request: all that it must know
comes with each plan. It knows nothing of scheduling or text.

Shapes: S rows to get logits for, V vocabulary.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from octavo_engine import device as devices
from octavo_engine import planning, resources, sizing
from octavo_engine.cpu.decoder import CpuDecoder
from octavo_engine.cpu.library import best_library
from octavo_engine.draft import Drafter
from octavo_engine.errors import ConfigError, ModelInvalid
from octavo_engine.messages import EngineFacts
from octavo_engine.models.adapter import read_adapter
from octavo_engine.plan import (
    LoadedModel,
    RequestResult,
    SamplingParams,
    ScheduledRequest,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from octavo_engine.ranks import Ranks
from octavo_engine.sampler import Chosen, TorchSampler, draws_for, prompt_logprobs
from octavo_engine.steps import load_torch_steps
from octavo_engine.weights.low_rank import load_low_rank
from octavo_engine.weights.stored import WeightSource

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from octavo_engine.config import EngineConfig
    from octavo_engine.models.adapter import Adapter
    from octavo_engine.models.spec import DecoderSpec
    from octavo_engine.plan import Runner
    from octavo_engine.planning import Model, Plan
    from octavo_engine.sampler import Draw, Draws, Sampler
    from octavo_engine.sizing import MemoryPlan
    from octavo_engine.steps import StepAdapters, Steps

    OnProgress = Callable[[str, int, int], None]  # phase, bytes done, bytes in all

_log = logging.getLogger(__name__)

_WARM_UP_TOKENS = 64  # enough to use every kernel


@dataclass(frozen=True, slots=True)
class Launched:
    """A step whose tokens are being drawn."""

    plan: StepPlan
    draws: Draws
    states: torch.Tensor | None  # float32 [S, H], if any request asks for its state
    drafted: tuple[tuple[int, ...], ...]
    prompt_logprobs: tuple[tuple[TokenLogprobs, ...], ...]

    def result(self) -> StepResult:
        """What came of it; may wait for the device."""
        results = self.draws.results()
        if self.states is not None:
            results = _with_states(results, self.plan, self.states)
        return StepResult(self.plan.step, tuple(results), self.drafted, self.prompt_logprobs)


class ModelRunner:
    """Computes StepPlans. The KV cache inside is addressed by the plans' block ids alone."""

    def __init__(
        self, steps: Steps, *, seed: int, drafter: Drafter | None = None, sampler: Sampler | None = None
    ) -> None:
        """Take a loaded model.

        Args:
            steps: what computes it.
            seed: of requests that bring none.
            drafter: a draft model, if plans want its guesses.
            sampler: what chooses tokens; None: torch, or the chooser of the steps.
        """
        self._steps = steps
        self._seed = seed
        self._drafter = drafter
        self._sampler = sampler or TorchSampler(steps.chooser)

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute every token of the plan and draw the tokens that it asks for."""
        return self.launch(plan).result()

    def launch(self, plan: StepPlan) -> Launched:
        """The same, but for waiting until the tokens are drawn, where the steps and the sampler need not wait."""
        drafted: tuple[tuple[int, ...], ...] = ()
        if self._drafter is not None:
            plan, drafted = self._drafter.complete(plan)
        draws = [draw for request in plan.requests if request.needs_token for draw in draws_for(request, self._seed)]
        states: torch.Tensor | None = None
        if any(draw.sampling.embed for draw in draws):
            states = torch.empty(sum(request.num_logits for request in plan.requests), self._steps.hidden_size)
        logits = self.forward(plan, states=states)
        told = self._prompt_logprobs(plan, logits)
        logits = _drawn_from(plan, logits)
        try:
            chosen = self._sample(logits, draws)
        except Exception:  # noqa: BLE001 - whatever it is, it shall not be the end of all requests
            _log.exception("sampling %d rows failed: sampling each by itself", len(draws))
            # Writes the same KV again; the sampler may have changed the first ones.
            logits = _drawn_from(plan, self.forward(plan, states=states))
            chosen = Chosen([self._sample_alone(logits[row : row + 1], draw) for row, draw in enumerate(draws)])
        return Launched(plan, chosen, states, drafted, told)

    @torch.inference_mode()
    def _prompt_logprobs(self, plan: StepPlan, logits: torch.Tensor) -> tuple[tuple[TokenLogprobs, ...], ...]:
        """Return the logprobs of each request's prompt_targets, which the sampler does not choose."""
        told = []
        end = 0
        for request in plan.requests:
            begin, end = end, end + request.num_logits
            if targets := request.prompt_targets:
                rows = logits[begin : begin + len(targets)]
                told.append(tuple(prompt_logprobs(rows, targets, request.sampling.num_prompt_logprobs or 0)))
        return tuple(told)

    @torch.inference_mode()
    def _sample(self, logits: torch.Tensor, draws: list[Draw]) -> Draws:
        """Draw a token for each row."""
        return self._sampler.begin(logits, draws) if draws else Chosen([])

    def _sample_alone(self, logits: torch.Tensor, draw: Draw) -> RequestResult:
        """Draw for one row of a batch of which some row makes the sampler fail."""
        try:
            (result,) = self._sample(logits, [draw]).results()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this request's alone
            problem = f"{type(error).__name__}: {error}"
            return RequestResult(error=f"no token can be chosen by the request's rules: {problem}")
        return result

    @torch.inference_mode()
    def forward(self, plan: StepPlan, *, every_token: bool = False, states: torch.Tensor | None = None) -> torch.Tensor:
        """Copy blocks and compute every token of the plan, without sampling: as Steps.forward."""
        if plan.copies:
            self._steps.copy_blocks(plan.copies)
        return self._steps.forward(plan, every_token=every_token, states=states)


def _drawn_from(plan: StepPlan, logits: torch.Tensor) -> torch.Tensor:
    """Return a row of the plan's logits for each token to draw."""
    rows = _rows_to_draw_from(plan)
    if rows == list(range(len(logits))):
        return logits
    return logits.index_select(0, torch.tensor(rows, dtype=torch.int64).to(logits.device, non_blocking=True))


def _rows_to_draw_from(plan: StepPlan) -> list[int]:
    """The row of logits that each result is drawn from: choices that begin have one row together."""
    rows: list[int] = []
    end = 0
    for request in plan.requests:
        end += request.num_logits
        if request.num_choices > 1:
            rows += [end - 1] * request.num_results
        else:
            rows += range(end - request.num_results, end)
    return rows


class AdapterLoader:
    """The LoRA adapters of a model: read, checked and handed to what computes its steps. See plan.Adapters."""

    def __init__(self, steps: StepAdapters, spec: DecoderSpec, config: EngineConfig) -> None:
        """Load those of the options, from number 1 on.

        Raises:
            UserError: as `load`.
        """
        self._steps, self._spec, self._config = steps, spec, config
        self._loaded: set[int] = set()
        self._num_slots = config.num_adapter_slots + config.own_adapter
        for number, path in enumerate(config.adapters, start=1):
            self._take(number, read_adapter(path, spec))

    def load(self, adapter: int, path: Path) -> None:
        """Read an adapter, which ScheduledRequest.adapter may name from then on.

        Raises:
            UserError: it is not for this model, is not what this engine computes, or there is no room for it.
        """
        if len(self._loaded) >= self._num_slots:
            most = self._config.num_adapter_slots
            raise ConfigError(f"--max-loras {most}: so many adapters are loaded; unload one first, or raise it")
        described = read_adapter(path, self._spec)
        planning.check_rank(described, self._config)
        try:
            self._take(adapter, described)
        except OSError as error:  # of a disk, or a network in its place
            raise ModelInvalid(f"the adapter at {path} cannot be read: {error.strerror}") from error

    def unload(self, adapter: int) -> None:
        """Forget an adapter that no request names any more."""
        self._steps.unload(adapter)
        self._loaded.discard(adapter)

    def _take(self, number: int, adapter: Adapter) -> None:
        self._steps.load(number, load_low_rank(adapter, self._spec))
        self._loaded.add(number)
        _log.info("LoRA adapter %d: %s, rank %d, %d matrices", number, adapter.path, adapter.rank, len(adapter.pairs))


def _with_states(results: list[RequestResult], plan: StepPlan, states: torch.Tensor) -> list[RequestResult]:
    """Put the state in place of the token of each request that asks for it and has not failed."""
    asking = [request for request in plan.requests for _ in range(request.num_results)]
    return [
        RequestResult(state=states[row].numpy().astype("<f4").tobytes())
        if request.sampling.embed and result.error is None
        else result
        for request, row, result in zip(asking, _rows_to_draw_from(plan), results, strict=True)
    ]


def load_runner(config: EngineConfig, on_progress: OnProgress, plan: Plan | None = None) -> LoadedModel:
    """Check that the model can run here, load it and compute a first step.

    Args:
        config: the options.
        on_progress: called with (phase, bytes done, bytes in all) while it loads.
        plan: planning.plan_ahead's; without one it is made here, where torch knows the device.

    Raises:
        UserError: the model, the device or an option cannot work; before any weight is read, except where a tensor
            contradicts the metadata.
    """
    if plan is None:
        model = planning.read_model(config.model)
        planning.check_parallelism(model, config)  # what the model rules out is told before what the machine lacks
        plan = _plan(model, config, devices.choose_device(config.device))
    device = torch.device(plan.device)
    if device.type == "cuda":
        devices.require_gpus(plan.num_devices)
    _log.info("%s", plan.describe())
    num_threads = max(1, resources.num_threads() // plan.num_devices)
    torch.set_num_threads(num_threads)
    loaded = _load(plan, config, num_threads, on_progress)
    memory, spec, ranks = loaded.plan.memory, plan.model.spec, loaded.ranks
    on_progress("Warmup", 0, 1)
    _warm_up(loaded.runner, config, memory)
    on_progress("Warmup", 1, 1)
    facts = EngineFacts(
        max_model_len=memory.max_model_len,
        block_size=memory.block_size,
        num_blocks=memory.num_blocks,
        dtype=plan.dtype,
        cache_dtype=plan.cache_dtype,
        device=device.type,
        num_parameters=plan.model.checkpoint.num_parameters,
        rank_pids=() if ranks is None else ranks.pids,
    )
    adapters = None
    if config.num_adapter_slots or config.adapters:
        assert loaded.steps.adapters is not None, "what takes none is refused with the options"
        adapters = AdapterLoader(loaded.steps.adapters, spec, config)
    period = sizing.positions_a_token(spec, memory.max_model_len) if device.type == "cpu" else None
    served = LoadedModel(loaded.runner, facts, spec.eos_token_ids, spec.vocab_size, period, adapters)
    return served if ranks is None else replace(served, check=ranks.check)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that can run plans."""

    runner: Runner
    steps: Steps
    plan: Plan  # with the sizes that it has
    ranks: Ranks | None = None  # that share it, if there are several


def _load(plan: Plan, config: EngineConfig, num_threads: int, on_progress: OnProgress) -> Loaded:
    """Load the model of a plan in the way that its devices need."""
    if plan.num_devices == 1 and plan.device == "cuda":
        from octavo_engine.gpu.accelerator import Cuda  # noqa: PLC0415 - what comes with it is not there without a GPU
        from octavo_engine.gpu.load import load_on_gpu  # noqa: PLC0415 - the same

        return load_on_gpu(plan, config, Cuda(torch.device(plan.device)), on_progress)

    def loading(phase: str) -> Callable[[int, int], None]:
        return lambda done, total: on_progress(phase, done, total)

    ranks: Ranks | None = None
    if plan.num_devices > 1:
        ranks = Ranks(plan.num_devices, devices.of_rank(plan.device, 0))
        dtype, load = devices.torch_dtype(plan.dtype), loading("Loading")
        steps: Steps = ranks.load(
            plan.model.checkpoint, plan.memory, dtype=dtype, num_threads=num_threads, on_progress=load
        )
    else:
        steps = _load_steps(plan, num_threads, loading("Loading"))
    drafter = Drafter(_load_steps(plan.draft, num_threads, loading("LoadingDraft"))) if plan.draft else None
    return Loaded(ModelRunner(steps, seed=config.seed, drafter=drafter), steps, plan, ranks)


def _plan(model: Model, config: EngineConfig, device: torch.device) -> Plan:
    if device.type == "cpu":
        return planning.plan_for_cpu(model, config, processes=(os.getpid(), os.getppid()))
    memory = devices.gpu_memory(device, config.gpu_memory_utilization)
    return planning.make_plan(model, config, device=device.type, dtype=devices.choose_gpu_dtype(config), memory=memory)


def _load_steps(plan: Plan, num_threads: int, on_progress: Callable[[int, int], None]) -> Steps:
    """Load the plan's model on one device."""
    checkpoint, memory = plan.model.checkpoint, plan.memory
    if plan.native is None:
        dtype, device = devices.torch_dtype(plan.dtype), torch.device(plan.device)
        return load_torch_steps(checkpoint, memory, dtype=dtype, device=device, on_progress=on_progress)
    library = best_library()
    assert library is not None, "the plan is for it"
    weights = WeightSource(checkpoint, on_progress=on_progress)
    decoder = CpuDecoder(
        library,
        checkpoint.spec,
        weights,
        compute=plan.native,
        num_positions=memory.max_model_len,
        num_blocks=memory.num_blocks,
        block_size=memory.block_size,
        num_threads=num_threads,
    )
    weights.check_all_read()
    # The library has its own threads. Those of torch spin for milliseconds after a product, on the same processors.
    torch.set_num_threads(1)
    return decoder


def _warm_up(runner: Runner, config: EngineConfig, plan: MemoryPlan) -> None:
    """Compute one prefill and one decode, so that kernels are built and memory is touched before the first request."""
    num_tokens = min(_WARM_UP_TOKENS, config.max_num_batched_tokens, plan.max_model_len - 1)
    num_blocks = -(-(num_tokens + 1) // plan.block_size)
    blocks = tuple(range(num_blocks))
    sampling = SamplingParams(max_tokens=1)
    prefill = ScheduledRequest("warm-up", (0,) * num_tokens, 0, blocks, needs_token=True, sampling=sampling)
    decode = ScheduledRequest("warm-up", (0,), num_tokens, blocks, needs_token=True, sampling=sampling)
    for request in (prefill, decode):
        runner.execute(StepPlan(0, (request,)))
