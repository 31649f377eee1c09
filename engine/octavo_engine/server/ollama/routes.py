"""Ollama's API under /api, and the answer at / by which its clients know it.

Generates through the same service as OpenAI's routes do. A server of one model keeps that model loaded, whatever
`keep_alive` says. manage.py has the routes that change what models there are.
"""

import asyncio
import math
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.requests import Request

from octavo_engine.errors import ModelfileInvalid, RequestInvalid, UserError
from octavo_engine.generation import GenerationRequest, LanguageModel
from octavo_engine.modelfile import Modelfile
from octavo_engine.server.content_type import AnyContentType
from octavo_engine.server.dependencies import Admission, CurrentService
from octavo_engine.server.disconnect import CLIENT_GONE, unless_gone
from octavo_engine.server.front import Served, Session
from octavo_engine.server.ollama.answers import Answer, as_message, as_response, told
from octavo_engine.server.ollama.describe import capabilities, describe, model_info
from octavo_engine.server.ollama.protocol import ChatRequest, GenerateRequest, ShowRequest
from octavo_engine.store.local import Location
from octavo_engine.text.message import MessageFormat
from octavo_engine.text.template import ChatTemplate

# The release of Ollama whose API this is: clients look at the number before they use what came with it.
_OLLAMA_VERSION: Final = "0.12.11"
_LATEST: Final = ":latest"  # the tag of a name without one
_NEVER: Final = "9999-12-31T23:59:59Z"  # when a model is unloaded that stays


router = APIRouter(tags=["ollama"], route_class=AnyContentType)


@router.api_route("/", methods=["GET", "HEAD"])
async def probe() -> PlainTextResponse:
    """Ollama's own words, which its clients compare."""
    return PlainTextResponse("Ollama is running")


@router.api_route("/api/version", methods=["GET", "HEAD"])
async def version() -> JSONResponse:
    """The release of Ollama that a client may take this server for; /version has Octavo's."""
    return JSONResponse({"version": _OLLAMA_VERSION})


@router.api_route("/api/tags", methods=["GET", "HEAD"])
async def list_models(service: CurrentService) -> JSONResponse:
    """The models that can be asked for."""
    return JSONResponse({"models": [card for model in await service.served() if (card := await _card(model))]})


@router.get("/api/ps")
async def list_loaded(service: CurrentService) -> JSONResponse:
    """The models that are in memory."""
    models = [card | _loaded(model, card["size"]) for model in await service.loaded() if (card := await _card(model))]
    return JSONResponse({"models": models})


@router.post("/api/show")
async def show(body: ShowRequest, service: CurrentService) -> JSONResponse:
    """What is known of a model."""
    location = await _location_of(service, body.which)
    description = await asyncio.to_thread(describe, location.model)
    modelfile = location.modelfile or Modelfile(source=str(location.path))
    messages = [{"role": role, "content": content} for role, content in modelfile.messages]
    own = service.config.chat_template
    chat_template = "" if own is None else await asyncio.to_thread(own.read_text, encoding="utf-8")
    return JSONResponse(
        {
            "license": "\n".join(modelfile.licenses) or description.license,
            "modelfile": modelfile.render(),
            "parameters": "\n".join(f"{name:30} {value}" for name, value in modelfile.parameter_lines()),
            "template": chat_template or modelfile.template or description.template,
            "system": modelfile.system,
            "messages": messages,
            "details": description.details,
            "model_info": model_info(description, verbose=bool(body.verbose)),
            "capabilities": await asyncio.to_thread(
                capabilities, location.model, template=modelfile.template, chat_template=chat_template
            ),
            "modified_at": description.modified_at,
        }
    )


@router.post("/api/generate")
async def generate(body: GenerateRequest, request: Request, service: CurrentService, _admitted: Admission) -> Response:
    """Answer one prompt, or continue it."""
    answer = Answer(body, as_response)
    if not body.prompt and body.keep_alive == 0 and await service.unload(body.model):
        return JSONResponse(answer.loaded("unload"))
    model = await service.model_named(body.model, body.keep_alive)
    if not body.prompt:
        return JSONResponse(answer.loaded("load"))
    form = MessageFormat()
    if body.raw or (model.text.template is None and not body.template):
        if body.system:
            raise RequestInvalid("this model has no template that a system message could be put into", param="system")
        prompt = await model.text.encode_prompt(body.prompt)
    else:
        system = [{"role": "system", "content": body.system}] if body.system else []
        template = _compiled(model, body.template) if body.template else None
        prompt = await model.text.encode_chat(
            [*system, {"role": "user", "content": body.prompt}],
            arguments=model.text.thinking(body.think, template),
            template=template,
        )
        form = model.text.message_format(prompt, template=template)
    grammar = await service.grammar(model.text.wanted_of_chat(body.wanted_output, None, form))
    return await _respond(request, service, model, answer.begin(prompt, model, form, grammar), answer)


@router.post("/api/chat")
async def chat(body: ChatRequest, request: Request, service: CurrentService, _admitted: Admission) -> Response:
    """Answer a conversation."""
    answer = Answer(body, as_message)
    if not body.messages and body.keep_alive == 0 and await service.unload(body.model):
        return JSONResponse(answer.loaded("unload"))
    model = await service.model_named(body.model, body.keep_alive)
    if not body.messages:
        return JSONResponse(answer.loaded("load"))
    choice = body.tools_to_call
    prompt = await model.text.encode_chat(
        [message.for_template() for message in body.messages],
        tools=choice.tools if choice is not None else (),
        arguments=model.text.thinking(body.think),
    )
    if choice is not None:
        service.metrics.on_tools_looked_for(1)
    form = model.text.message_format(prompt, choice)
    grammar = await service.grammar(model.text.wanted_of_chat(body.wanted_output, choice, form))
    return await _respond(request, service, model, answer.begin(prompt, model, form, grammar), answer)


def _compiled(model: LanguageModel, source: str) -> ChatTemplate:
    try:
        return model.text.compile_template(source)
    except ModelfileInvalid as error:
        raise RequestInvalid(f"template: {error}", param="template") from None


async def _location_of(service: Session, name: str) -> Location:
    short = name.removesuffix(_LATEST)
    found = [model.location for model in await service.served() if model.name in {name, short}]
    if not found:
        raise RequestInvalid(f"model {name[:100]!r} not found", param="model", status=404)
    return found[0]


async def _card(model: Served) -> dict[str, Any] | None:
    """What lists tell of a model; None: it cannot be run, or has just gone."""
    try:
        description = await asyncio.to_thread(describe, model.location.model)
    except UserError:
        return None
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": description.modified_at,
        "size": description.num_bytes,
        "digest": description.digest,
        "details": description.details,
    }


def _loaded(model: Served, num_bytes: int) -> dict[str, Any]:
    """What /api/ps tells of a model besides."""
    expires = _NEVER
    if model.expires_in is not None and math.isfinite(model.expires_in):
        expires = told(datetime.now(UTC) + timedelta(seconds=model.expires_in))
    return {
        "expires_at": expires,
        "size_vram": 0 if model.is_on_cpu else num_bytes,
        "context_length": model.max_model_len,
    }


async def _respond(
    request: Request, service: Session, model: LanguageModel, generation: GenerationRequest, answer: Answer
) -> Response:
    deltas = service.generate(model, generation)
    if answer.is_streamed:
        return StreamingResponse(answer.lines(deltas), media_type="application/x-ndjson")
    whole = await unless_gone(request, answer.whole(deltas))
    return Response(status_code=CLIENT_GONE) if whole is None else JSONResponse(whole)
