"""POST /v1/chat/completions, POST /v1/completions, GET /v1/models."""

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Final

import msgspec
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import Request

from octavo_engine.answer import TextDelta
from octavo_engine.errors import OctavoError, RequestInvalid
from octavo_engine.generation import GenerationRequest, LanguageModel
from octavo_engine.server.dependencies import Admission, CurrentService
from octavo_engine.server.disconnect import unless_gone
from octavo_engine.server.envelope import describe
from octavo_engine.server.openai.protocol import ChatCompletionRequest, CompletionRequest
from octavo_engine.server.openai.replies import ChatReply, Choice, CompletionReply, Reply, Usage
from octavo_engine.server.service import Service

router = APIRouter(prefix="/v1", tags=["openai"])

_CLIENT_GONE: Final = 499  # nginx's status for a client that left; nobody reads it
_STARTED: Final = int(time.time())


@router.post("/chat/completions", dependencies=[Admission])
async def create_chat_completion(body: ChatCompletionRequest, request: Request, service: CurrentService) -> Response:
    """Answer a conversation."""
    model = service.model_named(body.model)
    _check_num_choices(body, service)
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
    _check_num_choices(body, service)
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
    model.check_token_ids(tuple(body.logit_bias or ()), "logit_bias")
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=body.sampling(max_tokens),
        stop=body.stop or (),
        include_stop=bool(body.include_stop_str_in_output),
        num_choices=body.n or 1,
    )


def _check_num_choices(body: ChatCompletionRequest | CompletionRequest, service: Service) -> None:
    most = service.config.engine.max_num_seqs
    if (body.n or 1) > most:
        raise RequestInvalid(f"n is {body.n}, and --max-num-seqs lets {most} answers be generated at once", param="n")


async def _answer(
    request: Request,
    body: ChatCompletionRequest | CompletionRequest,
    deltas: AsyncGenerator[TextDelta, None],
    reply: Reply,
    num_prompt_tokens: int,
) -> Response:
    answers = _Answers(deltas, reply, num_prompt_tokens, body)
    if body.stream:
        return StreamingResponse(
            answers.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
    whole = await unless_gone(request, answers.whole())
    return Response(status_code=_CLIENT_GONE) if whole is None else JSONResponse(whole)


class _Answers:
    """The choices of one request, as one body or as a stream of them."""

    def __init__(
        self,
        deltas: AsyncGenerator[TextDelta, None],
        reply: Reply,
        num_prompt_tokens: int,
        body: ChatCompletionRequest | CompletionRequest,
    ) -> None:
        self._deltas = deltas
        self._reply = reply
        self._num_prompt_tokens = num_prompt_tokens
        self._indices = range(body.n or 1)
        self._has_logprobs = body.num_logprobs is not None
        self._include_usage = body.include_usage
        self._last: dict[int, TextDelta] = {}  # by choice

    async def whole(self) -> dict[str, Any]:
        """The body of a response in one piece."""
        pieces: dict[int, list[TextDelta]] = {index: [] for index in self._indices}
        async with contextlib.aclosing(self._deltas) as deltas:
            async for delta in deltas:
                pieces[delta.choice].append(delta)
                self._last[delta.choice] = delta
        choices = [
            Choice(
                index,
                "".join(delta.text for delta in pieces[index]),
                [entry for delta in pieces[index] for entry in delta.logprobs] if self._has_logprobs else None,
                self._last[index].finish_reason,
            )
            for index in self._indices
        ]
        return self._reply.whole(choices, self._usage())

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events. A failure after the 200 is an event with the envelope, and there is no [DONE] then."""
        try:
            for index in self._indices:
                for chunk in self._reply.opening(index):
                    yield _event(chunk)
            async with contextlib.aclosing(self._deltas) as deltas:
                async for delta in deltas:
                    self._last[delta.choice] = delta
                    if delta.text or delta.logprobs:
                        logprobs = delta.logprobs if self._has_logprobs else None
                        yield _event(self._reply.piece(Choice(delta.choice, delta.text, logprobs)))
                    if delta.finish_reason is not None:
                        ended = Choice(delta.choice, "", finish_reason=delta.finish_reason)
                        yield _event(self._reply.closing(ended))
        except OctavoError as error:
            yield _event(describe(error)[1])
            return
        if self._include_usage:
            yield _event(self._reply.usage(self._usage()))
        yield b"data: [DONE]\n\n"

    def _usage(self) -> Usage:
        return Usage(
            self._num_prompt_tokens,
            sum(delta.num_tokens for delta in self._last.values()),
            max(delta.num_cached_tokens for delta in self._last.values()),
        )


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
