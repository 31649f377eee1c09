"""POST /v1/chat/completions, POST /v1/completions, GET /v1/models."""

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Any, Final

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request

from octavo_engine.answer import FinishReason, TextDelta
from octavo_engine.errors import RequestInvalid
from octavo_engine.generation import GenerationRequest, LanguageModel
from octavo_engine.parameters import stop_strings, with_defaults
from octavo_engine.server.content_type import AnyContentType
from octavo_engine.server.dependencies import Admission, CurrentService
from octavo_engine.server.front import Served, Session
from octavo_engine.server.openai.answers import answer
from octavo_engine.server.openai.protocol import ChatCompletionRequest, CompletionRequest
from octavo_engine.server.openai.replies import ChatReply, CompletionReply
from octavo_engine.text.message import MessageFormat

router = APIRouter(prefix="/v1", tags=["openai"], route_class=AnyContentType)

_STARTED: Final = int(time.time())


@router.post("/chat/completions")
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, service: CurrentService, _admit: Admission
) -> Response:
    """Answer a conversation."""
    request_id = f"chatcmpl-{uuid.uuid4().hex}"
    chat = await begin_chat(body, service, request_id)
    reply = ChatReply(
        _shown_id(body, request_id), int(time.time()), body.model, as_ids=bool(body.return_tokens_as_token_ids)
    )
    return await answer(request, body, [chat.deltas], reply, chat.num_prompt_tokens, message_format=chat.message_format)


@dataclass(frozen=True, slots=True)
class BegunChat:
    """An answer that can be waited for."""

    deltas: AsyncGenerator[TextDelta, None]
    message_format: MessageFormat  # what is in its text
    num_prompt_tokens: int


async def begin_chat(body: ChatCompletionRequest, service: Session, request_id: str) -> BegunChat:
    """Do what a chat takes, whatever its answers will be written like.

    Raises:
        RequestInvalid, NotServing: it cannot be answered.
    """
    model = await service.model_named(body.model)
    _check_scheduling(body, service)
    choice = body.tools_to_call
    prompt = await model.text.encode_chat(
        [message.for_template() for message in body.messages],
        tools=choice.tools if choice is not None else (),
        arguments=body.template_arguments,
    )
    wanted = body.max_completion_tokens
    param = "max_tokens" if wanted is None else "max_completion_tokens"
    max_tokens = model.text.resolve_max_tokens(len(prompt), body.max_tokens if wanted is None else wanted, param)
    if choice is not None:
        service.metrics.on_tools_looked_for(body.n or 1)
    form = replace(model.text.message_format(prompt, choice), tells_thoughts=body.include_reasoning is not False)
    grammar = await service.grammar(model.text.wanted_of_chat(body.wanted_output, choice, form))
    generation = _generation(model, body, request_id, prompt, max_tokens, grammar=grammar)
    deltas = service.generate(model, replace(generation, shown_ids=model.text.shown_ids(form)))
    return BegunChat(deltas, form, len(prompt))


@router.post("/completions")
async def create_completion(
    body: CompletionRequest, request: Request, service: CurrentService, admit: Admission
) -> Response:
    """Continue a prompt, or several."""
    model = await service.model_named(body.model)
    _check_scheduling(body, service)
    service.check_num_prompts(len(body.prompt), "prompt")
    request_id = f"cmpl-{uuid.uuid4().hex}"
    grammar = await service.grammar(body.wanted_output)
    generations = []
    wanted = 1 if body.max_tokens == 0 else body.max_tokens  # a prompt alone is computed by asking for more
    for place, text in enumerate(body.prompt):
        prompt = await model.text.encode_prompt(text)
        max_tokens = model.text.resolve_max_tokens(len(prompt), wanted, "max_tokens")
        generations.append(_generation(model, body, f"{request_id}-{place}", prompt, max_tokens, grammar=grammar))
    admit(len(generations) - 1)
    texts = [one if isinstance(one, str) else model.text.text_of(one) for one in body.prompt] if body.echo else []
    reply = CompletionReply(
        _shown_id(body, request_id),
        int(time.time()),
        body.model,
        as_ids=bool(body.return_tokens_as_token_ids),
        echoes=[text for text in texts for _ in range(body.n or 1)],
        tells_prompts=body.prompt_logprobs is not None,
    )
    streams = [service.generate(model, generation) for generation in generations]
    if body.max_tokens == 0:
        streams = [_prompt_alone(stream) for stream in streams]
    num_prompt_tokens = sum(len(generation.prompt_token_ids) for generation in generations)
    return await answer(request, body, streams, reply, num_prompt_tokens)


async def _prompt_alone(stream: AsyncGenerator[TextDelta, None]) -> AsyncGenerator[TextDelta, None]:
    """Leave out what was generated after the prompt."""
    async with contextlib.aclosing(stream) as deltas:
        async for delta in deltas:
            reason: FinishReason | None = "length" if delta.finish_reason is not None else None
            yield replace(delta, text="", num_tokens=0, logprobs=(), finish_reason=reason)


def _shown_id(body: ChatCompletionRequest | CompletionRequest, request_id: str) -> str:
    """The id in the response; the engine's own is another, as clients may send the same twice."""
    return request_id if body.request_id is None else f"{request_id.split('-', maxsplit=1)[0]}-{body.request_id}"


@router.get("/models")
async def list_models(service: CurrentService) -> JSONResponse:
    """The names under which the model is served."""
    return JSONResponse({"object": "list", "data": [_model_card(one) for one in await service.served()]})


@router.get("/models/{name:path}")
async def retrieve_model(name: str, service: CurrentService) -> JSONResponse:
    """One of them."""
    found = [one for one in await service.served() if one.name == name]
    if not found:
        raise RequestInvalid(
            f"there is no model {name[:100]!r} here", param="model", code="model_not_found", status=404
        )
    return JSONResponse(_model_card(found[0]))


def _model_card(model: Served) -> dict[str, Any]:
    card = {"id": model.name, "object": "model", "created": _STARTED, "owned_by": "octavo"}
    card |= {} if model.parent is None else {"parent": model.parent}
    return card if model.max_model_len is None else card | {"max_model_len": model.max_model_len}


def _generation(
    model: LanguageModel,
    body: ChatCompletionRequest | CompletionRequest,
    request_id: str,
    prompt: list[int],
    max_tokens: int,
    *,
    grammar: str | None,
) -> GenerationRequest:
    model.text.check_token_ids(body.stop_token_ids or (), "stop_token_ids")
    model.text.check_token_ids(tuple(body.logit_bias or ()), "logit_bias")
    given = {name for name in body.model_fields_set if getattr(body, name) is not None}
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=with_defaults(body.sampling(max_tokens, grammar), model.text.parameters, given),
        stop=stop_strings(model.text.parameters) if body.stop is None else body.stop,
        include_stop=bool(body.include_stop_str_in_output),
        num_choices=body.n or 1,
        priority=body.priority or 0,
        show_control=body.skip_special_tokens is False,
    )


def _check_scheduling(body: ChatCompletionRequest | CompletionRequest, service: Session) -> None:
    most = service.config.engine.max_num_seqs
    if (body.n or 1) > most:
        raise RequestInvalid(f"n is {body.n}, and --max-num-seqs lets {most} answers be generated at once", param="n")
    if body.priority and service.config.scheduling_policy == "fcfs":
        raise RequestInvalid(
            f"priority is {body.priority}, and requests are served here in the order in which they come; leave it out, "
            "or have the server started with --scheduling-policy priority",
            param="priority",
        )
