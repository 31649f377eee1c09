"""Ollama's model parameters: what a request's `options`, a Modelfile's PARAMETER and `/set parameter` mean here.

Called by server/ollama/, modelfile.py and terminal.py. Names and meanings are those of Ollama's Modelfile reference.
Every parameter works, asks for nothing at the value given, or is refused by name. Defaults are Ollama's, but for
repeat_penalty, which is off: Ollama's 1.1 looks at the last 64 tokens, this engine at all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from octavo_engine.errors import RequestInvalid
from octavo_engine.plan import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

ParameterValue = bool | int | float | str | tuple[str, ...]
Parameters = dict[str, ParameterValue]  # by name; only what was given

_MAX_STOP_STRINGS: Final = 64


@dataclass(frozen=True, slots=True)
class _Number:
    """A parameter that takes a number in a range."""

    least: float
    most: float
    is_whole: bool = False

    def read(self, value: object) -> int | float:
        kind = "a whole number" if self.is_whole else "a number"
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if not self.least <= number <= self.most or (self.is_whole and number != int(number)):
            raise ValueError(f"{kind} from {self.least:g} to {self.most:g}")
        return int(number) if self.is_whole else float(number)


_WORKING: Final[Mapping[str, _Number]] = {
    "temperature": _Number(0, 100),  # 0: greedy
    "top_p": _Number(0, 1),  # 0: the most likely token alone
    "top_k": _Number(-1, 2**31, is_whole=True),  # 0 and -1: all
    "min_p": _Number(0, 1),
    "repeat_penalty": _Number(0.01, 100),
    "presence_penalty": _Number(-100, 100),
    "frequency_penalty": _Number(-100, 100),
    "seed": _Number(-(2**63), 2**63 - 1, is_whole=True),  # negative: another one each time
    "num_predict": _Number(-2, 2**31, is_whole=True),  # up to 0: as many tokens as the context has room for
    "num_ctx": _Number(2, 2**31, is_whole=True),
    "num_keep": _Number(-1, 2**31, is_whole=True),  # what to keep when the context is shifted, which it never is here
}


def _one_of(*values: object) -> Callable[[object], bool]:
    return lambda value: any(value == neutral and type(value) is type(neutral) for neutral in values)


# Parameters that the engine lacks: the values at which they ask for nothing, and what to do instead.
_LACKING: Final[Mapping[str, tuple[Callable[[object], bool], str]]] = {
    "draft_num_predict": (_one_of(0), "guesses are set for a whole server: octavo serve --speculative-config"),
    "embedding_only": (_one_of(False), "use /api/embed"),
    "f16_kv": (_one_of(True), "--dtype of `octavo serve` sets the type of the KV cache"),
    "logits_all": (_one_of(False), "use logprobs"),
    "low_vram": (_one_of(False), "--gpu-memory-utilization of `octavo serve` bounds a GPU's memory"),
    "main_gpu": (_one_of(0), "CUDA_VISIBLE_DEVICES chooses the GPU of `octavo serve`"),
    "mirostat": (_one_of(0), "use temperature, top_p or min_p"),
    "mirostat_eta": (_one_of(0.1), "use temperature, top_p or min_p"),
    "mirostat_tau": (_one_of(5, 5.0), "use temperature, top_p or min_p"),
    "num_batch": (_one_of(), "--max-num-batched-tokens of `octavo serve` sets it"),
    "num_gpu": (_one_of(-1), "a model runs on one device as a whole, which --device of `octavo serve` chooses"),
    "num_thread": (_one_of(0), "the engine takes as many threads as the control group has CPUs"),
    "numa": (_one_of(False), "pin the process with numactl"),
    "penalize_newline": (_one_of(True), "penalties count every token"),
    "repeat_last_n": (_one_of(-1), "penalties look at all tokens, as -1 asks for; 0 turns them off"),
    "tfs_z": (_one_of(1, 1.0), "use top_p or min_p"),
    "typical_p": (_one_of(1, 1.0), "use top_p or min_p"),
    "use_mlock": (_one_of(False), "weights are read into memory once"),
    "use_mmap": (_one_of(), "the engine decides how it reads weights"),
    "vocab_only": (_one_of(False), "use /api/show"),
}
# Fields of SamplingParams, and of OpenAI's requests by the same name, and the parameter that each one is.
_OPENAIS: Final[Mapping[str, str]] = {
    name: name for name in ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed")
} | {"repetition_penalty": "repeat_penalty"}
NAMES: Final = frozenset({*_WORKING, *_LACKING, "stop"})


def check(name: str, value: object) -> Parameters:
    """Return what a parameter adds: itself, or nothing where it asks for nothing.

    Raises:
        RequestInvalid: there is no such parameter, it cannot have this value, or the engine lacks it; `param` is it.
    """
    if name == "stop":
        return {name: _stop_strings(value)}
    if name in _WORKING:
        try:
            return {name: _WORKING[name].read(value)}
        except ValueError as error:
            raise RequestInvalid(f"{name} is {_shown(value)}, not {error}", param=name) from None
    if name == "repeat_last_n" and _one_of(0)(value):
        return {"repeat_penalty": 1.0}  # a window of no tokens
    if name in _LACKING:
        is_neutral, way_out = _LACKING[name]
        if is_neutral(value):
            return {}
        raise RequestInvalid(f"{name} {_shown(value)} is not supported: {way_out}", param=name)
    raise RequestInvalid(f"there is no parameter {name[:50]!r}; known: {', '.join(sorted(NAMES))}", param=name[:50])


def check_all(values: Mapping[str, object]) -> Parameters:
    """Return what all of them add; null asks for nothing. Raises as `check` does."""
    checked: Parameters = {}
    for name in sorted(values, key=lambda name: name == "repeat_last_n"):  # which turns off what repeat_penalty says
        if values[name] is not None:
            checked |= check(name, values[name])
    return checked


def from_text(name: str, text: str) -> object:
    """Read a value as a Modelfile and a terminal write it, for `check` to look at. One of `stop` is one string."""
    if name == "stop":
        return [text]
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def sampling_params(
    parameters: Mapping[str, ParameterValue], max_tokens: int, num_logprobs: int | None = None
) -> SamplingParams:
    """Return how the engine chooses tokens; what is not given is Ollama's default."""

    def number(name: str, default: float) -> float:
        value = parameters.get(name, default)
        assert isinstance(value, int | float), name
        return value

    seed, top_p, top_k = int(number("seed", -1)), number("top_p", 0.9), max(int(number("top_k", 40)), 0)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=number("temperature", 0.8),
        top_p=top_p or 1.0,
        top_k=top_k if top_p else 1,
        min_p=number("min_p", 0.0),
        repetition_penalty=number("repeat_penalty", 1.0),
        presence_penalty=number("presence_penalty", 0.0),
        frequency_penalty=number("frequency_penalty", 0.0),
        seed=seed if seed >= 0 else None,
        num_logprobs=num_logprobs,
    )


def with_defaults(sampling: SamplingParams, parameters: Parameters, given: Collection[str]) -> SamplingParams:
    """Return how the engine chooses tokens for a request of OpenAI's API: what it does not give is the Modelfile's."""
    defaults = sampling_params(parameters, sampling.max_tokens)
    changed = {
        name: getattr(defaults, name)
        for name, parameter in _OPENAIS.items()
        if parameter in parameters and name not in given
    }
    return replace(sampling, **changed)


def max_tokens_of(parameters: Mapping[str, ParameterValue], num_prompt_tokens: int, max_model_len: int) -> int:
    """Return how many tokens may be generated. Nothing of a prompt is ever cut off.

    Raises:
        RequestInvalid: the context asked for is longer than the engine's, or the prompt is too long for it.
    """
    context = parameters.get("num_ctx", max_model_len)
    num_predict = parameters.get("num_predict", -1)
    assert isinstance(context, int)
    assert isinstance(num_predict, int)
    if context > max_model_len:
        raise RequestInvalid(
            f"num_ctx is {context}, and the context of this engine is {max_model_len} tokens: lower it, or start the "
            "engine with a larger --max-model-len",
            param="num_ctx",
        )
    if num_prompt_tokens >= context:
        raise RequestInvalid(
            f"the prompt has {num_prompt_tokens} tokens, and num_ctx is {context}, of which the answer needs at least "
            "one: raise it or shorten the prompt",
            param="num_ctx",
            code="context_length_exceeded",
        )
    room = context - num_prompt_tokens
    return min(num_predict, room) if num_predict > 0 else room


def stop_strings(parameters: Mapping[str, ParameterValue]) -> tuple[str, ...]:
    """Return the strings that end an answer."""
    stop = parameters.get("stop", ())
    assert isinstance(stop, tuple)
    return stop


def _stop_strings(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) and text for text in value):
        raise RequestInvalid(f"stop is {_shown(value)}, not a list of strings that are not empty", param="stop")
    if len(value) > _MAX_STOP_STRINGS:
        raise RequestInvalid(f"stop has {len(value)} strings; {_MAX_STOP_STRINGS} are the most", param="stop")
    return tuple(value)


def _shown(value: object) -> str:
    return repr(value)[:50]
