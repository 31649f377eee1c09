"""Ollama's embeddings: /api/embed, and /api/embeddings as it was before. All have the length 1."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request

from octavo_engine.generation import LanguageModel
from octavo_engine.server.content_type import AnyContentType
from octavo_engine.server.dependencies import Admission, CurrentService
from octavo_engine.server.disconnect import CLIENT_GONE, unless_gone
from octavo_engine.server.front import Session
from octavo_engine.server.ollama.protocol import EmbeddingsRequest, EmbedRequest
from octavo_engine.server.openai.embeddings import embed_all

router = APIRouter(prefix="/api", tags=["ollama"], route_class=AnyContentType)


@router.post("/embed")
async def embed(body: EmbedRequest, request: Request, service: CurrentService, admit: Admission) -> Response:
    """Embed a text, or several."""
    started = time.monotonic_ns()
    model = await service.model_named(body.model, body.keep_alive)
    loaded = time.monotonic_ns()
    texts = [body.input] if isinstance(body.input, str) else body.input
    service.check_num_prompts(len(texts), "input")
    prompts = [await model.text.encode_prompt(text, param="input") for text in texts]
    admit(max(0, len(prompts) - 1))

    async def work() -> dict[str, Any]:
        return {
            "model": body.model,
            "embeddings": await _embeddings(service, model, prompts),
            "total_duration": time.monotonic_ns() - started,
            "load_duration": loaded - started,
            "prompt_eval_count": sum(map(len, prompts)),
        }

    whole = await unless_gone(request, work())
    return Response(status_code=CLIENT_GONE) if whole is None else JSONResponse(whole)


@router.post("/embeddings")
async def embed_one(
    body: EmbeddingsRequest, request: Request, service: CurrentService, _admitted: Admission
) -> Response:
    """Embed a text."""
    model = await service.model_named(body.model, body.keep_alive)
    prompt = await model.text.encode_prompt(body.prompt)

    async def work() -> dict[str, Any]:
        (embedding,) = await _embeddings(service, model, [prompt])
        return {"embedding": embedding}

    whole = await unless_gone(request, work())
    return Response(status_code=CLIENT_GONE) if whole is None else JSONResponse(whole)


async def _embeddings(service: Session, model: LanguageModel, prompts: Sequence[list[int]]) -> list[list[float]]:
    return [list(one) for one in await embed_all(service, model, f"ollama-{uuid.uuid4().hex}", prompts)]
