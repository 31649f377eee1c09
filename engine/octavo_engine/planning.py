"""From a model's header to a plan: what the model is, where the memory goes, what is refused. No torch here.

Called by `octavo plan`, by the engine process before it imports torch (core.py) and by runner.py where only torch can
tell the device. It reads the header and asks the machine; the arithmetic is sizing.py's.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from octavo_engine import resources, sizing
from octavo_engine.cpu.compute import NATIVE_GROUP_BYTES, cache_dtype
from octavo_engine.cpu.library import best_library
from octavo_engine.errors import ConfigError, HeadsNotDivisible, TensorParallelInvalid, UserError
from octavo_engine.models.adapter import most_elements, read_adapter, stacked_rank
from octavo_engine.models.checkpoint import read_checkpoint
from octavo_engine.sizing import DraftSizes, Measured, Memory, MemoryPlan, in_mib

if TYPE_CHECKING:
    from pathlib import Path

    from octavo_engine.config import EngineConfig
    from octavo_engine.cpu.compute import Compute
    from octavo_engine.errors import Facts
    from octavo_engine.models.adapter import Adapter
    from octavo_engine.models.checkpoint import Checkpoint
    from octavo_engine.models.spec import DecoderSpec
    from octavo_engine.weights.gguf import TensorInfo
    from octavo_engine.weights.quantized import QuantizedTensor

# What the inputs of matrix products are: a --dtype, or int8 where quantised weights stay as they are (docs/cpu.md).
ComputeDType = Literal["float32", "bfloat16", "float16", "int8"]

DEFAULT_GPU_MEMORY_UTILIZATION: Final = 0.9  # vLLM's


@dataclass(frozen=True, slots=True)
class Model:
    """What a model's header tells."""

    checkpoint: Checkpoint

    @property
    def name(self) -> str:
        """Of the file or folder."""
        return self.checkpoint.path.name

    @property
    def spec(self) -> DecoderSpec:
        """What it computes."""
        return self.checkpoint.spec

    @property
    def tensors(self) -> tuple[TensorInfo | QuantizedTensor, ...]:
        """Its weights."""
        return tuple(self.checkpoint.tensors.values())

    @property
    def quantization(self) -> str:
        """How most of its numbers are stored."""
        stored: Counter[str] = Counter()
        for tensor in self.tensors:
            stored[tensor.stored_as] += tensor.num_elements
        return stored.most_common(1)[0][0]

    @property
    def tensor_parallel_sizes(self) -> tuple[int, ...]:
        """The numbers of devices that it can be split over."""
        return sizing.tensor_parallel_sizes(self.spec, self.tensors)

    def facts(self) -> Facts:
        """For machines: the status of an InferenceService shows them as they are."""
        return {
            "architecture": self.checkpoint.architecture,
            "parameters": self.checkpoint.num_parameters,
            "quantization": self.quantization,
            "fileBytes": sum(tensor.num_bytes for tensor in self.tensors),
            "contextLength": self.spec.max_context,
            "layers": self.spec.num_layers,
            "tensorParallelSizes": list(self.tensor_parallel_sizes),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a model will be run."""

    model: Model
    device: str
    dtype: ComputeDType
    native: Compute | None  # what the C++ decoder computes in; None: torch computes
    num_devices: int
    memory: MemoryPlan  # of each device
    draft: Plan | None = None  # of a model that guesses for it; `memory` is of both

    @property
    def cache_dtype(self) -> str:
        """The type of cached keys and values."""
        return cache_dtype(self.native) if self.native else self.dtype

    def facts(self) -> Facts:
        """For machines."""
        memory = self.memory
        return self.model.facts() | {
            "device": self.device,
            "dtype": self.dtype,
            "cacheDtype": self.cache_dtype,
            "tensorParallelSize": self.num_devices,
            "availableBytes": memory.available_bytes,
            "processBytes": memory.process_bytes,
            "marginBytes": memory.margin_bytes,
            "weightBytes": memory.weight_bytes,
            "workBytes": memory.work_bytes,
            "kvBytes": memory.kv_bytes,
            "kvBytesPerToken": memory.kv_bytes_per_token,
            "blockSize": memory.block_size,
            "blocks": memory.num_blocks,
            "maxModelLen": memory.max_model_len,
            **({} if self.draft is None else {"draftModel": self.draft.model.name}),
        }

    def describe(self) -> str:
        """For people: several lines."""
        model, checkpoint, memory = self.model, self.model.checkpoint, self.memory
        parameters = checkpoint.num_parameters / 1e6
        tokens = memory.num_blocks * memory.block_size
        left = memory.available_bytes - (
            memory.process_bytes + memory.margin_bytes + memory.weight_bytes + memory.work_bytes + memory.kv_bytes
        )
        kv = f"{memory.num_blocks:,} blocks of {memory.block_size} tokens of {memory.kv_bytes_per_token:,} bytes"
        rows = [
            ("model", f"{checkpoint.architecture}, {parameters:,.1f} M parameters, {model.quantization}"),
            ("device", f"{_devices(self.device, self.num_devices)} in {self.dtype}, KV cache in {self.cache_dtype}"),
            ("available", in_mib(memory.available_bytes) + _each(self.num_devices)),
            ("  processes", in_mib(memory.process_bytes)),
            ("  margin", in_mib(memory.margin_bytes)),
            ("  weights", in_mib(memory.weight_bytes)),
            ("  working memory", in_mib(memory.work_bytes)),
            ("  KV cache", f"{in_mib(memory.kv_bytes)} = {kv}"),
            ("  free", in_mib(left)),
            ("longest context", f"{memory.max_model_len:,} tokens of {model.spec.max_context:,}"),
            ("cached at once", f"{tokens:,} tokens, {tokens / memory.max_model_len:.1f} of the longest requests"),
            ("tensor parallel", f"over {_sizes(model.tensor_parallel_sizes)} devices"),
        ]
        if self.draft is not None:
            checkpoint = self.draft.model.checkpoint
            told = (
                f"{self.draft.model.name}, {checkpoint.num_parameters / 1e6:,.1f} M parameters, in {self.draft.dtype}"
            )
            rows.append(("draft model", told))
        return "\n".join((model.name, *(f"  {name:16}  {value}" for name, value in rows)))


def read_model(path: Path) -> Model:
    """What the header of the model at `path` tells.

    Raises:
        ModelNotFound, ModelInvalid, ModelUnsupported: it is no model that this engine can run.
    """
    return Model(read_checkpoint(path))


def check_parallelism(model: Model, config: EngineConfig) -> None:
    """Check that tensor_parallel_size devices can share the model.

    Raises:
        TensorParallelInvalid: they cannot; the message lists the sizes that work, `facts` what is known of the model.
    """
    sizes = model.tensor_parallel_sizes
    if config.tensor_parallel_size not in sizes:
        spec = model.spec
        error = HeadsNotDivisible if spec.num_heads % config.tensor_parallel_size else TensorParallelInvalid
        raise error(
            f"{config.tensor_parallel_size} devices cannot share {model.name} evenly: {spec.num_heads} query heads, "
            f"{spec.num_kv_heads} KV heads, an intermediate size of {spec.intermediate_size}, weights in "
            f"{model.quantization}; use --tensor-parallel-size {_sizes(sizes)}",
            facts=model.facts(),
        )


def make_plan(
    model: Model,
    config: EngineConfig,
    *,
    device: str,
    dtype: ComputeDType,
    memory: Memory,
    measured: Measured | None = None,
) -> Plan:
    """Plan how `model` runs with these options on a device.

    Args:
        model: the model.
        config: the options.
        device: "cpu" or "cuda".
        dtype: what is computed in.
        memory: what there is of it.
        measured: what the model takes, if it is loaded.

    Raises:
        UserError: it cannot; `facts` has what is known of the model and the arithmetic.
    """
    try:
        check_parallelism(model, config)
        _refuse_contradictions(model, config, device)
        draft = _read_draft(model, config, dtype=dtype, native=memory.native)
        divided = sizing.plan_memory(
            model.spec,
            model.tensors,
            config,
            dtype=dtype,
            memory=memory,
            draft=None if draft is None else draft[1],
            adapter_elements=_adapter_elements(model, config, device),
            measured=measured,
        )
    except UserError as error:
        error.facts = model.facts() | error.facts
        raise
    plan = Plan(
        model=model,
        device=device,
        dtype=dtype,
        native=memory.native,
        num_devices=config.tensor_parallel_size,
        memory=divided,
    )
    if draft is None:
        return plan
    return replace(plan, draft=replace(plan, model=draft[0], dtype=draft[1].dtype, native=draft[1].native))


def plan_for_cpu(model: Model, config: EngineConfig, *, processes: tuple[int, ...]) -> Plan:
    """Plan how `model` runs on this machine's processors.

    Args:
        model: the model.
        config: the options.
        processes: ids of the living processes of this engine, whose memory is planned and so counts as available.

    Raises:
        UserError: as make_plan.
    """
    ranks = config.tensor_parallel_size
    has_library = ranks == 1 and best_library() is not None  # the library computes a model as a whole
    dtype = choose_cpu_dtype(model, config, has_library=has_library)
    available = resources.available_memory() + sum(resources.anonymous_memory(pid) for pid in processes)
    memory = Memory(
        device="cpu",
        available_bytes=available // ranks,  # they share the machine's
        process_bytes=sizing.API_PROCESS_BYTES // ranks + sizing.ENGINE_PROCESS_BYTES,
        native=dtype if has_library and dtype != "float16" else None,
    )
    return make_plan(model, config, device="cpu", dtype=dtype, memory=memory)


def plan_for_gpus(model: Model, config: EngineConfig, *, gpu_memory: int) -> Plan:
    """Plan how `model` would run on tensor_parallel_size GPUs of so many bytes each, of which this machine has none.

    Raises:
        UserError: as make_plan.
    """
    share = config.gpu_memory_utilization or DEFAULT_GPU_MEMORY_UTILIZATION
    memory = Memory(
        device="cuda", available_bytes=int(gpu_memory * share), process_bytes=sizing.CUDA_CONTEXT_BYTES, native=None
    )
    dtype: ComputeDType = "bfloat16" if config.dtype == "auto" else config.dtype
    return make_plan(model, config, device="cuda", dtype=dtype, memory=memory)


def plan_ahead(config: EngineConfig) -> Plan | None:
    """The plan of an engine process that has not imported torch yet, or None where only torch can tell the device.

    torch takes more memory than some limits leave: what cannot fit is refused before it is imported.

    Raises:
        UserError: as make_plan, and what read_model raises.
    """
    if config.device == "cuda" or (config.device == "auto" and resources.has_nvidia_driver()):
        return None
    return plan_for_cpu(read_model(config.model), config, processes=(os.getpid(), os.getppid()))


def choose_cpu_dtype(model: Model, config: EngineConfig, *, has_library: bool) -> ComputeDType:
    """What to compute in for `--dtype` on this machine's processors.

    auto is int8 where the library can take weights as they are, else bfloat16 where the processors multiply it, else
    float32. With the library all three are deterministic; torch's sums depend on the batch, and then in less than
    float32 the tokens do.

    Raises:
        ConfigError: --deterministic, and the dtype does not allow it.
    """
    deterministic_dtypes = {"auto", "float32"} | ({"bfloat16"} if has_library else set())
    if config.deterministic and config.dtype not in deterministic_dtypes:
        raise ConfigError(
            f"--deterministic: on this CPU a request's {config.dtype} results depend on its batch; use --dtype float32"
        )
    if config.dtype != "auto":
        return config.dtype
    stays_quantised = config.quantization != "none" and any(t.quant_type in NATIVE_GROUP_BYTES for t in model.tensors)
    if has_library and stays_quantised:
        return "int8"
    is_bfloat16_deterministic = has_library or not config.deterministic
    return "bfloat16" if resources.has_native_bfloat16() and is_bfloat16_deterministic else "float32"


def _refuse_contradictions(model: Model, config: EngineConfig, device: str) -> None:
    method = model.checkpoint.method
    if config.quantization not in ("auto", "none", method):
        raise ConfigError(
            f"--quantization {config.quantization}: the weights of {model.name} are "
            f"{model.quantization if method is None else method}; use auto"
        )
    if device == "cpu" and config.gpu_memory_utilization is not None:
        raise ConfigError(
            f"--gpu-memory-utilization {config.gpu_memory_utilization:g}: the device is a CPU; "
            "use --kv-cache-memory-bytes"
        )


def _read_draft(
    model: Model, config: EngineConfig, *, dtype: ComputeDType, native: Compute | None
) -> tuple[Model, DraftSizes] | None:
    """The draft model that the options ask for, if they do; dtype and native are those of `model`.

    Raises:
        ConfigError: it cannot guess for `model`.
        ModelNotFound, ModelInvalid, ModelUnsupported: it is no model that this engine can run.
    """
    path = None if config.speculative_config is None else config.speculative_config.model
    if path is None:
        return None
    if config.tensor_parallel_size > 1:
        raise ConfigError(
            f"--speculative-config: 'model': a draft model cannot be split over --tensor-parallel-size "
            f'{config.tensor_parallel_size} devices: use the method "ngram"'
        )
    draft = read_model(path)
    if draft.spec.vocab_size != model.spec.vocab_size or _tokens(draft) != _tokens(model):
        raise ConfigError(
            f"--speculative-config: 'model': the {draft.spec.vocab_size:,} tokens of {draft.name} are not the "
            f"{model.spec.vocab_size:,} of {model.name}: a draft model must have the same vocabulary"
        )
    if draft.spec.max_context < (config.max_model_len or model.spec.max_context):
        raise ConfigError(
            f"--speculative-config: 'model': {draft.name} was trained for {draft.spec.max_context} tokens: use "
            f"--max-model-len {draft.spec.max_context} or another one"
        )
    own = dtype if native is None else choose_cpu_dtype(draft, config, has_library=True)
    own_native = own if native is not None and own != "float16" else None
    return draft, DraftSizes(spec=draft.spec, tensors=draft.tensors, dtype=own, native=own_native)


def _tokens(model: Model) -> tuple[bytes, ...]:
    """What each token stands for."""
    from octavo_engine.text.load import load_tokenizer  # noqa: PLC0415 - for those who have a draft model

    return load_tokenizer(model.checkpoint.path).token_bytes


def check_rank(adapter: Adapter, config: EngineConfig) -> None:
    """Check that there is room for an adapter's rank.

    Raises:
        ConfigError: there is none.
    """
    if adapter.rank > config.max_lora_rank:
        raise ConfigError(
            f"the adapter at {adapter.path} has rank {adapter.rank}, and --max-lora-rank is {config.max_lora_rank}: "
            "raise it"
        )


def _adapter_elements(model: Model, config: EngineConfig, device: str) -> int:
    """Numbers in the adapters that there is to be room for: those that may be loaded, and the model's own.

    Raises:
        UserError: one of those that are loaded at the start cannot be.
    """
    for module in config.lora_modules:
        check_rank(read_adapter(module.path, model.spec), config)
    own = None if config.adapter is None else read_adapter(config.adapter, model.spec)
    if device == "cuda":  # there all have the highest rank of any
        highest = max(0 if own is None else own.rank, config.max_lora_rank if config.num_adapter_slots else 0)
        count = config.num_adapter_slots + config.own_adapter
        return count * most_elements(model.spec, stacked_rank(highest)) if count else 0
    elements = 0 if own is None else own.num_elements
    return elements + config.num_adapter_slots * most_elements(model.spec, config.max_lora_rank)


def _devices(device: str, number: int) -> str:
    return device if number == 1 else f"{number} x {device}"


def _each(number: int) -> str:
    return "" if number == 1 else " on each device"


def _sizes(sizes: tuple[int, ...]) -> str:
    return " or ".join((", ".join(map(str, sizes[:-1])), str(sizes[-1]))) if len(sizes) > 1 else str(sizes[0])
