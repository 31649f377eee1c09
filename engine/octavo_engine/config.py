"""The options of one engine process, parsed once at the edge (cli.py) and never written back.

Names and meanings are vLLM's where vLLM has the option. What is derived from the options (how many KV blocks fit, the
longest context) is a separate object: sizing.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from octavo_engine.errors import ConfigError

DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
LogFormat = Literal["text", "json"]
Quantization = Literal["auto", "none", "gptq", "awq", "fp8", "compressed-tensors"]
SchedulingPolicy = Literal["fcfs", "priority"]

DEFAULT_MAX_LORA_RANK = 16  # vLLM's

# Who comes when so many wait would get the first token after about as many whole answers: better to go elsewhere.
DEFAULT_QUEUED_PER_RUNNING = 4


_DEFAULT_LOOKUP: Final = 5  # tokens; vLLM's
_MAX_LOOKUP: Final = 16  # tokens; each length has an index of its own
_LOOKUP_KEYS: Final = ("prompt_lookup_min", "prompt_lookup_max")
_SPECULATION: Final = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2, "prompt_lookup_max": 4}'


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculativeConfig:
    """Speculative decoding by guesses of a draft model, or of what followed the same tokens before: vLLM's "ngram"."""

    num_speculative_tokens: int  # most guesses that a request has in a step
    model: Path | None = None  # of the draft; None: prompt lookup
    prompt_lookup_min: int = _DEFAULT_LOOKUP  # the shortest run of tokens that is looked for
    prompt_lookup_max: int = _DEFAULT_LOOKUP  # the longest one, which is looked for first

    @classmethod
    def from_json(cls, text: str) -> SpeculativeConfig:
        """Read the value of --speculative-config; `model` is as the user wrote it.

        Raises:
            ConfigError: it is not as it must be; names the key.
        """
        try:
            given = json.loads(text)
        except ValueError:
            given = None
        if not isinstance(given, dict):
            raise ConfigError(f"{text!r} is not a JSON object such as {_SPECULATION}")
        method = given.get("method", "draft_model" if "model" in given else None)
        if method not in ("ngram", "[ngram]", "draft_model"):
            raise ConfigError(
                f'\'method\' is {method!r}: "ngram" and "draft_model" are supported, as in {_SPECULATION}'
            )
        is_draft = method == "draft_model"
        known = ("method", "num_speculative_tokens", *(("model",) if is_draft else _LOOKUP_KEYS))
        if unknown := sorted(given.keys() - set(known)):
            raise ConfigError(f"{unknown[0]!r} is not supported; with {method!r} there are {', '.join(known)}")
        num_guesses = _whole(given, "num_speculative_tokens", None)
        if is_draft:
            if not isinstance(given.get("model"), str) or not given["model"]:
                raise ConfigError("'model' must name the draft model: a file, a folder or a name from `octavo list`")
            return cls(num_speculative_tokens=num_guesses, model=Path(given["model"]))
        lengths = [_whole(given, key, _MAX_LOOKUP) for key in _LOOKUP_KEYS if key in given] or [_DEFAULT_LOOKUP]
        shortest, longest = lengths[0], lengths[-1]
        if shortest > longest:
            raise ConfigError(f"'prompt_lookup_min' {shortest} is more than 'prompt_lookup_max' {longest}")
        return cls(num_speculative_tokens=num_guesses, prompt_lookup_min=shortest, prompt_lookup_max=longest)


def _whole(given: dict[str, object], key: str, most: int | None) -> int:
    value = given.get(key)
    if type(value) is not int or value < 1 or (most is not None and value > most):
        bounds = "of at least 1" if most is None else f"from 1 to {most}"
        raise ConfigError(f"{key!r} must be a whole number {bounds}{f', not {value!r}' if key in given else ''}")
    return value


@dataclass(frozen=True, slots=True)
class LoraModule:
    """A LoRA adapter that is served from the start."""

    name: str  # what clients call it
    path: Path  # a folder as PEFT writes it, or a GGUF file


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What the engine core needs to load a model and schedule requests."""

    model: Path  # a GGUF file on this machine
    served_model_names: tuple[str, ...]  # names that clients may use; the first one is reported
    dtype: DType = "auto"  # of computation and KV cache; auto: planning.choose_cpu_dtype, device.choose_gpu_dtype
    quantization: Quantization = "auto"  # auto: as the model's files say; none: dequantised; else what it must be
    tokenizer: Path | None = None  # file with tokenizer and chat template; None: the model's own
    device: Device = "auto"  # auto: cuda where there is a usable GPU, else cpu; an explicit device is never replaced
    tensor_parallel_size: int = 1  # ranks that share the model
    max_model_len: int | None = None  # longest prompt + output in tokens; None: what the model and the KV budget allow
    max_num_seqs: int = 64  # requests that may run in one step
    max_num_batched_tokens: int = 512  # token budget of one step, decodes and prefill chunks together
    block_size: int | None = None  # KV slots in a block; None: 8 on CPU, 16 on GPU
    kv_cache_memory_bytes: int | None = None  # for KV blocks; None: a share of what the cgroup or the GPU has free
    gpu_memory_utilization: float | None = None  # share of a GPU's memory to use in all; None: 0.9; not for a CPU
    enable_prefix_caching: bool = True  # keep KV of ended requests while memory lasts, for prompts that begin alike
    speculative_config: SpeculativeConfig | None = None  # guess tokens ahead and verify several in a step; None: do not
    deterministic: bool = False  # a request's tokens may not depend on the other requests; refused where they would
    log_format: LogFormat = "text"  # of the lines that this process writes while it runs
    seed: int = 0  # seeds the sampling of requests that bring no seed of their own
    enable_lora: bool = False  # requests may name LoRA adapters, those of lora_modules and such as are loaded later
    lora_modules: tuple[LoraModule, ...] = ()
    max_loras: int | None = None  # adapters that may be loaded at once; None: as many as lora_modules has, at least one
    max_lora_rank: int = DEFAULT_MAX_LORA_RANK  # of any of them
    adapter: Path | None = None  # of the model itself, as its Modelfile says: for every request that names no other

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens {self.max_num_batched_tokens} is less than --max-num-seqs "
                f"{self.max_num_seqs}, but each running request needs a token in every step: raise the first or lower "
                "the second"
            )
        guesses = self.num_speculative_tokens
        if guesses >= self.max_num_batched_tokens:
            raise ConfigError(
                f"--speculative-config: 'num_speculative_tokens' {guesses} and the token before them are more than a "
                f"step has room for: --max-num-batched-tokens is {self.max_num_batched_tokens}"
            )

        self._check_adapters()

    @property
    def num_speculative_tokens(self) -> int:
        """Most guesses that a request has in a step; 0 without speculation."""
        return 0 if self.speculative_config is None else self.speculative_config.num_speculative_tokens

    @property
    def adapters(self) -> tuple[Path, ...]:
        """Those that are loaded with the model; the number of the first is 1."""
        own = () if self.adapter is None else (self.adapter,)
        return (*own, *(module.path for module in self.lora_modules))

    @property
    def own_adapter(self) -> int:
        """The number of the model's own adapter; 0: it has none."""
        return int(self.adapter is not None)

    @property
    def num_adapter_slots(self) -> int:
        """How many adapters requests may name; the model's own is none of them."""
        return (self.max_loras or max(1, len(self.lora_modules))) if self.enable_lora else 0

    def _check_adapters(self) -> None:
        given = {
            "--lora-modules": bool(self.lora_modules),
            "--max-loras": self.max_loras is not None,
            "--max-lora-rank": self.max_lora_rank != DEFAULT_MAX_LORA_RANK,
        }
        if not self.enable_lora and (option := next((name for name, is_given in given.items() if is_given), None)):
            raise ConfigError(f"{option} has no effect without --enable-lora: give it too")
        if self.tensor_parallel_size > 1 and (self.enable_lora or self.adapter is not None):
            what = "--enable-lora" if self.enable_lora else "the ADAPTER of this model's Modelfile"
            raise ConfigError(f"{what}: LoRA adapters are not split over devices yet; use --tensor-parallel-size 1")
        if len(self.lora_modules) > self.num_adapter_slots:
            raise ConfigError(
                f"--max-loras {self.max_loras} is less than the {len(self.lora_modules)} of --lora-modules: raise it"
            )
        names = [*self.served_model_names, *(module.name for module in self.lora_modules)]
        if twice := next((module.name for module in self.lora_modules if names.count(module.name) > 1), None):
            raise ConfigError(f"--lora-modules: {twice} would be the name of two: give each another one")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """What the API process needs besides the engine."""

    engine: EngineConfig
    host: str = "0.0.0.0"  # noqa: S104 - a server in a pod listens on every address
    port: int = 8000
    profiles: Path | None = None  # a file of further names for the model; read again when it changes
    max_num_queued_reqs: int | None = None  # requests that may wait to be scheduled; None: four for each running one
    scheduling_policy: SchedulingPolicy = "fcfs"  # priority: requests may say that they go before others, or after
    shutdown_timeout: float = 300.0  # seconds that running requests get to finish after SIGTERM
    termination_log: Path | None = None  # where a refusal to start is written as JSON for the operator
    api_key: tuple[str, ...] = field(default=(), repr=False)  # any of them is accepted; with those of the file
    api_key_file: Path | None = None  # one key a line; read again when it changes. No keys at all: none is needed
    api_key_for_all: bool = False  # /health, /ready, /metrics and /version need a key too
    allowed_origins: tuple[str, ...] = ()  # of web pages that may call this server (CORS); "*": any
    otlp_traces_endpoint: str | None = None  # address of a collector of traces (OTLP over HTTP); None: no traces
    old_metrics: bool = False  # /metrics has vLLM's older names too
    chat_template: Path | None = None  # a file with a template in jinja2; None: the model's own
    ssl_keyfile: Path | None = None  # PEM, like the other two; with ssl_certfile: HTTPS
    ssl_certfile: Path | None = None
    ssl_ca_certs: Path | None = None  # clients must present a certificate of one of these authorities

    def __post_init__(self) -> None:
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            raise ConfigError("--ssl-keyfile and --ssl-ca-certs have no effect without --ssl-certfile: give it too")
        if self.api_key_for_all and not self.api_key and self.api_key_file is None:
            raise ConfigError("--api-key-for-all has no effect without a key: give --api-key or --api-key-file too")

    @property
    def queue_limit(self) -> int:
        """How many requests may wait."""
        if self.max_num_queued_reqs is not None:
            return self.max_num_queued_reqs
        return DEFAULT_QUEUED_PER_RUNNING * self.engine.max_num_seqs
