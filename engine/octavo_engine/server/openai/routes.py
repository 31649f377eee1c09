"""POST /v1/chat/completions, POST /v1/completions, GET /v1/models."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, Final

import msgspec
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import Request

from octavo_engine.errors import OctavoError
from octavo_engine.generation import GenerationRequest, LanguageModel, TextDelta
from octavo_engine.server.dependencies import Admission, CurrentService
from octavo_engine.server.envelope import describe
from octavo_engine.server.openai.protocol import ChatCompletionRequest, CompletionRequest
from octavo_engine.server.openai.replies import ChatReply, CompletionReply, Reply, Usage

router = APIRouter(prefix="/v1", tags=["openai"])

_CLIENT_GONE: Final = 499  # nginx's status for a client that left; nobody reads it
_STARTED: Final = int(time.time())


@router.post("/chat/completions", dependencies=[Admission])
async def create_chat_completion(body: ChatCompletionRequest, request: Request, service: CurrentService) -> Response:
    """Answer a conversation."""
    model = service.model_named(body.model)
    prompt = await model.encode_chat([message.for_template() for message in body.messages])
    wanted = body.max_completion_tokens
    param = "max_tokens" if wanted is None else "max_completion_tokens"
    max_tokens = model.resolve_max_tokens(len(prompt), body.max_tokens if wanted is None else wanted, param)
    request_id = f"chatcmpl-{uuid.uuid4().hex}"
    reply = ChatReply(request_id, int(time.time()), body.model)
    deltas = service.generate(model, _generation(model, body, request_id, prompt, max_tokens))
    return await _answer(request, body, deltas, reply, len(prompt))


@router.post("/completions", dependencies=[Admission])
async def create_completion(body: CompletionRequest, request: Request, service: CurrentService) -> Response:
    """Continue a prompt."""
    model = service.model_named(body.model)
    prompt = await model.encode_prompt(body.prompt)
    max_tokens = model.resolve_max_tokens(len(prompt), body.max_tokens, "max_tokens")
    request_id = f"cmpl-{uuid.uuid4().hex}"
    reply = CompletionReply(request_id, int(time.time()), body.model)
    deltas = service.generate(model, _generation(model, body, request_id, prompt, max_tokens))
    return await _answer(request, body, deltas, reply, len(prompt))


@router.get("/models")
async def list_models(service: CurrentService) -> JSONResponse:
    """The names under which the model is served."""
    model = service.loaded_model()
    names = service.config.engine.served_model_names
    return JSONResponse({"object": "list", "data": [_model_card(name, model) for name in names]})


@router.get("/models/{name:path}")
async def retrieve_model(name: str, service: CurrentService) -> JSONResponse:
    """One of them."""
    return JSONResponse(_model_card(name, service.model_named(name)))


def _model_card(name: str, model: LanguageModel) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "octavo",
        "max_model_len": model.facts.max_model_len,
    }


def _generation(
    model: LanguageModel,
    body: ChatCompletionRequest | CompletionRequest,
    request_id: str,
    prompt: list[int],
    max_tokens: int,
) -> GenerationRequest:
    model.check_token_ids(body.stop_token_ids or (), "stop_token_ids")
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=body.sampling(max_tokens),
        stop=body.stop or (),
    )


async def _answer(
    request: Request,
    body: ChatCompletionRequest | CompletionRequest,
    deltas: AsyncGenerator[TextDelta, None],
    reply: Reply,
    num_prompt_tokens: int,
) -> Response:
    if body.stream:
        events = _events(deltas, reply, num_prompt_tokens, include_usage=body.include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    whole = await _unless_gone(request, _whole(deltas, reply, num_prompt_tokens))
    return Response(status_code=_CLIENT_GONE) if whole is None else JSONResponse(whole)


async def _whole(deltas: AsyncGenerator[TextDelta, None], reply: Reply, num_prompt_tokens: int) -> dict[str, Any]:
    texts, last = [], TextDelta("", 0)
    async with contextlib.aclosing(deltas):
        async for last in deltas:
            texts.append(last.text)
    return reply.whole("".join(texts), last.finish_reason or "", Usage(num_prompt_tokens, last.num_tokens))


async def _events(
    deltas: AsyncGenerator[TextDelta, None], reply: Reply, num_prompt_tokens: int, *, include_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events. A failure after the 200 is an event with the envelope, and there is no [DONE] then."""
    last = TextDelta("", 0)
    try:
        for chunk in reply.opening():
            yield _event(chunk)
        async with contextlib.aclosing(deltas):
            async for last in deltas:
                if last.text:
                    yield _event(reply.piece(last.text))
    except OctavoError as error:
        yield _event(describe(error)[1])
        return
    yield _event(reply.closing(last.finish_reason or ""))
    if include_usage:
        yield _event(reply.usage(Usage(num_prompt_tokens, last.num_tokens)))
    yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any] | None:
    """Do the work, or give it up and return None when the client leaves."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
