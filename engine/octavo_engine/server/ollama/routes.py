"""Ollama's API under /api, and the answer at / by which its clients know it.

Generates through the same service as OpenAI's routes do. A server of one model keeps that model loaded, whatever
`keep_alive` says. manage.py has the routes that change what models there are.
"""

import asyncio
import contextlib
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

import msgspec
from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.requests import Request

from octavo_engine.answer import TextDelta, TextLogprobs, TokenText
from octavo_engine.errors import ModelfileInvalid, OctavoError, RequestInvalid, UserError
from octavo_engine.generation import GenerationRequest, LanguageModel
from octavo_engine.modelfile import Modelfile
from octavo_engine.parameters import max_tokens_of, sampling_params, stop_strings
from octavo_engine.server.dependencies import Admission, CurrentService
from octavo_engine.server.disconnect import CLIENT_GONE, unless_gone
from octavo_engine.server.envelope import describe as describe_error
from octavo_engine.server.front import Served, Session
from octavo_engine.server.ollama.content_type import AnyContentType
from octavo_engine.server.ollama.describe import describe, model_info
from octavo_engine.server.ollama.protocol import ChatRequest, GenerateRequest, ShowRequest
from octavo_engine.store.local import Location
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
    return JSONResponse(
        {
            "license": "\n".join(modelfile.licenses) or description.license,
            "modelfile": modelfile.render(),
            "parameters": "\n".join(f"{name:30} {value}" for name, value in modelfile.parameter_lines()),
            "template": modelfile.template or description.template,
            "system": modelfile.system,
            "messages": messages,
            "details": description.details,
            "model_info": model_info(description, verbose=bool(body.verbose)),
            "capabilities": ["completion"],
            "modified_at": description.modified_at,
        }
    )


@router.post("/api/generate")
async def generate(body: GenerateRequest, request: Request, service: CurrentService, _admitted: Admission) -> Response:
    """Answer one prompt, or continue it."""
    answer = _Answer(body, lambda text: {"response": text})
    if not body.prompt and body.keep_alive == 0 and await service.unload(body.model):
        return JSONResponse(answer.loaded("unload"))
    model = await service.model_named(body.model, body.keep_alive)
    if not body.prompt:
        return JSONResponse(answer.loaded("load"))
    if body.raw or not (model.has_template or body.template):
        if body.system:
            raise RequestInvalid("this model has no template that a system message could be put into", param="system")
        prompt = await model.encode_prompt(body.prompt)
    else:
        system = [{"role": "system", "content": body.system}] if body.system else []
        template = _compiled(model, body.template) if body.template else None
        prompt = await model.encode_chat([*system, {"role": "user", "content": body.prompt}], template=template)
    return await _respond(request, service, model, prompt, answer)


@router.post("/api/chat")
async def chat(body: ChatRequest, request: Request, service: CurrentService, _admitted: Admission) -> Response:
    """Answer a conversation."""
    answer = _Answer(body, lambda text: {"message": {"role": "assistant", "content": text}})
    if not body.messages and body.keep_alive == 0 and await service.unload(body.model):
        return JSONResponse(answer.loaded("unload"))
    model = await service.model_named(body.model, body.keep_alive)
    if not body.messages:
        return JSONResponse(answer.loaded("load"))
    prompt = await model.encode_chat([message.for_template() for message in body.messages])
    return await _respond(request, service, model, prompt, answer)


def _compiled(model: LanguageModel, source: str) -> ChatTemplate:
    try:
        return model.compile_template(source)
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
        expires = _told(datetime.now(UTC) + timedelta(seconds=model.expires_in))
    return {
        "expires_at": expires,
        "size_vram": 0 if model.is_on_cpu else num_bytes,
        "context_length": model.max_model_len,
    }


def _told(time_of: datetime) -> str:
    return time_of.isoformat().replace("+00:00", "Z")


async def _respond(
    request: Request, service: Session, model: LanguageModel, prompt: list[int], answer: "_Answer"
) -> Response:
    grammar = await service.grammar(answer.wanted_output)
    deltas = service.generate(model, answer.begin(prompt, model, grammar))
    if answer.is_streamed:
        return StreamingResponse(answer.lines(deltas), media_type="application/x-ndjson")
    whole = await unless_gone(request, answer.whole(deltas))
    return Response(status_code=CLIENT_GONE) if whole is None else JSONResponse(whole)


class _Answer:
    """The answer to one request, as one object or as a line for each piece.

    Args:
        body: of the request.
        piece: puts text where the endpoint has it.
    """

    def __init__(self, body: GenerateRequest | ChatRequest, piece: Callable[[str], dict[str, Any]]) -> None:
        self.is_streamed = body.stream is not False
        self.wanted_output = body.wanted_output
        self._body = body
        self._piece = piece
        self._started = time.monotonic_ns()
        self._begun = self._started
        self._num_prompt_tokens = 0

    def begin(self, prompt: list[int], model: LanguageModel, grammar: str | None) -> GenerationRequest:
        """Return what to generate, now that the model is there. What took time until now was not the model's work.

        `grammar` is what the engine takes for `wanted_output`.

        Raises:
            RequestInvalid: the options do not go with this prompt or model.
        """
        self._begun = time.monotonic_ns()
        self._num_prompt_tokens = len(prompt)
        parameters = model.parameters | self._body.parameters
        max_tokens = max_tokens_of(parameters, len(prompt), model.facts.max_model_len)
        return GenerationRequest(
            request_id=f"ollama-{uuid.uuid4().hex}",
            prompt_token_ids=prompt,
            sampling=replace(sampling_params(parameters, max_tokens, self._body.num_logprobs), grammar=grammar),
            stop=stop_strings(parameters),
        )

    def loaded(self, done_reason: Literal["load", "unload"]) -> dict[str, Any]:
        """The answer to a request that asks for nothing but the model in memory, or out of it."""
        return self._object("", ()) | {"done": True, "done_reason": done_reason}

    async def whole(self, deltas: AsyncGenerator[TextDelta, None]) -> dict[str, Any]:
        """The body of a response in one piece."""
        text = ""
        logprobs: list[TextLogprobs] = []
        ending: dict[str, Any] = {}
        async for delta, ending in self._pieces(deltas):  # noqa: B007 - the last one is what counts
            text += delta.text
            logprobs += delta.logprobs
        return self._object(text, logprobs) | ending

    async def lines(self, deltas: AsyncGenerator[TextDelta, None]) -> AsyncIterator[bytes]:
        """Lines of JSON. A failure after the 200 is a line with the error."""
        try:
            async for delta, ending in self._pieces(deltas):
                if delta.text or delta.logprobs:
                    yield _line(self._object(delta.text, delta.logprobs) | {"done": False})
                if ending:
                    yield _line(self._object("", ()) | ending)
        except OctavoError as error:
            yield _line({"error": describe_error(error)[1]["error"]["message"]})

    async def _pieces(self, deltas: AsyncGenerator[TextDelta, None]) -> AsyncIterator[tuple[TextDelta, dict[str, Any]]]:
        """Yield each piece with what the answer ends with, which is empty until the last one."""
        first = 0
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                first = first or time.monotonic_ns()
                yield delta, self._ending(delta, first) if delta.finish_reason is not None else {}

    def _object(self, text: str, logprobs: Sequence[TextLogprobs]) -> dict[str, Any]:
        body = {"model": self._body.model, "created_at": _told(datetime.now(UTC))} | self._piece(text)
        if self._body.num_logprobs is not None and logprobs:
            body["logprobs"] = [
                _token(entry.token) | {"top_logprobs": [_token(token) for token in entry.top]} for entry in logprobs
            ]
        return body

    def _ending(self, last: TextDelta, first: int) -> dict[str, Any]:
        now = time.monotonic_ns()
        return {
            "done": True,
            "done_reason": last.finish_reason,
            "total_duration": now - self._started,
            "load_duration": self._begun - self._started,
            "prompt_eval_count": self._num_prompt_tokens,
            "prompt_eval_duration": first - self._begun,
            "eval_count": last.num_tokens,
            "eval_duration": now - first,
        }


def _token(token: TokenText) -> dict[str, Any]:
    logprob = max(token.logprob, -9999.0)  # JSON has no minus infinity
    return {"token": token.text.decode(errors="replace"), "logprob": logprob, "bytes": list(token.text)}


def _line(body: dict[str, Any]) -> bytes:
    return msgspec.json.encode(body) + b"\n"
