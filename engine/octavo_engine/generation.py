"""A loaded model: an engine with the text model of the same file. Between the server or the terminal and the client.

What a prompt is and what its answers may hold is the text model's business (text/model.py); here they are generated.
Knows nothing of HTTP.
"""

from __future__ import annotations

import contextlib
import math
import sys
from array import array
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from octavo_engine.answer import Answer, PromptTokens
from octavo_engine.errors import GenerationFailed
from octavo_engine.plan import SamplingParams

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from octavo_engine.answer import TextDelta
    from octavo_engine.client import EngineClient
    from octavo_engine.messages import EngineFacts
    from octavo_engine.modelfile import Modelfile
    from octavo_engine.text.model import TextModel


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What to generate from, and how."""

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    stop: Sequence[str] = ()  # strings that end the text, from sampling.min_tokens tokens on
    include_stop: bool = False  # what ended the text (stop string or stop token) is part of it
    num_choices: int = 1  # answers to generate
    priority: int = 0  # lower goes first
    show_control: bool = False  # control tokens are part of the text
    shown_ids: frozenset[int] = frozenset()  # these control tokens are in any case


class LanguageModel:
    """An engine with the text model of the same file.

    Attributes:
        facts: what the engine said when it became ready.
        text: tokenizer, chat template and what a Modelfile says, for the context that the engine has.
        adapter: number of the LoRA adapter that computes the answers; 0: none does.
    """

    def __init__(self, client: EngineClient, facts: EngineFacts, text: TextModel, adapter: int = 0) -> None:
        self.facts = facts
        self.text = replace(text, max_model_len=facts.max_model_len)
        self.adapter = adapter
        self._client = client

    def with_modelfile(self, modelfile: Modelfile) -> LanguageModel:
        """Return another model of the same engine, which a Modelfile makes of this one. Raises as TextModel's."""
        return LanguageModel(self._client, self.facts, self.text.with_modelfile(modelfile), self.adapter)

    def with_adapter(self, adapter: int) -> LanguageModel:
        """Return the model that a LoRA adapter of the same engine makes of this one."""
        return LanguageModel(self._client, self.facts, self.text, adapter)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TextDelta, None]:
        """Yield the answers piece by piece, as they come. Leaving early aborts the request.

        Raises:
            GenerationFailed: the engine gave up on this request.
            EngineDead: the engine process ended.
        """
        answers = [
            Answer(
                self.text.tokenizer,
                choice,
                stop=request.stop,
                include_stop=request.include_stop,
                min_tokens=request.sampling.min_tokens,
                show_control=request.show_control,
                shown_ids=request.shown_ids,
            )
            for choice in range(request.num_choices)
        ]
        num_living = len(answers)
        tells_prompt = request.sampling.num_prompt_logprobs is not None
        prompt = PromptTokens(self.text.tokenizer, request.prompt_token_ids) if tells_prompt else None
        updates = self._client.generate(
            request.request_id,
            request.prompt_token_ids,
            request.sampling,
            request.num_choices,
            request.priority,
            adapter=self.adapter,
        )
        async with contextlib.aclosing(updates):
            async for update in updates:
                answer = answers[update.choice]
                if answer.has_ended:  # by a stop string, of which the engine had not heard yet
                    continue
                if update.finish_reason in {"error", "abort"}:
                    raise GenerationFailed(update.error or "the engine aborted the request")
                delta = answer.take(update)
                if prompt is not None and (told := prompt.take(update.prompt_logprobs)):
                    delta = replace(delta, prompt_logprobs=told)
                if delta.finish_reason is not None:
                    num_living -= 1
                    if update.finish_reason is None and num_living:
                        self._client.stop_choice(request.request_id, update.choice)
                yield delta
                if not num_living:
                    return

    async def embed(self, request_id: str, prompt: Sequence[int]) -> array[float]:
        """Return the last layer's output after the last token of a prompt, of length 1: float32 [H].

        Raises:
            GenerationFailed: the engine gave up on this request.
            EngineDead: the engine process ended.
        """
        sampling = SamplingParams(max_tokens=1, temperature=0, embed=True)
        state = array("f")
        async with contextlib.aclosing(
            self._client.generate(request_id, prompt, sampling, adapter=self.adapter)
        ) as updates:
            async for update in updates:
                if update.finish_reason != "stop":
                    raise GenerationFailed(update.error or "the engine aborted the request")
                state.frombytes(update.state)
        if sys.byteorder == "big":
            state.byteswap()
        length = math.sqrt(math.fsum(number * number for number in state)) or 1.0
        return array("f", (number / length for number in state))
