"""POST /v1/embeddings: what the model makes of a text, as numbers.

The embedding is the last layer's output after the last token, of length 1: what vLLM makes of a generative model.
"""

import asyncio
import base64
import struct
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import ConfigDict, model_validator
from starlette.requests import Request

from octavo_engine.generation import LanguageModel
from octavo_engine.server.body import Neutral, Strict, describing, of_kind, only, without_neutral
from octavo_engine.server.content_type import AnyContentType
from octavo_engine.server.dependencies import Admission, CurrentService
from octavo_engine.server.disconnect import CLIENT_GONE, unless_gone
from octavo_engine.server.front import Session
from octavo_engine.server.openai.protocol import Prompts

router = APIRouter(prefix="/v1", tags=["openai"], route_class=AnyContentType)

NEUTRAL_FIELDS: Final[Mapping[str, Neutral]] = {
    "dimensions": only(instead="cut the embedding yourself, if the model was made for that"),
    "priority": only(0, instead="requests are served in the order in which they come"),
    "truncate_prompt_tokens": only(instead="nothing is ever cut from a text here: shorten it yourself"),
    "user": of_kind(str),
}


class EmbeddingRequest(Strict):
    """The body of POST /v1/embeddings."""

    model_config = ConfigDict(json_schema_extra=describing(NEUTRAL_FIELDS))

    model: str
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None  # None: float; base64: of float32, little-endian
    add_special_tokens: bool | None = None  # vLLM's: put around a text what the model wants there (default: true)

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: object) -> object:
        return without_neutral(body, NEUTRAL_FIELDS)


@router.post("/embeddings")
async def create_embeddings(
    body: EmbeddingRequest, request: Request, service: CurrentService, admit: Admission
) -> Response:
    """Embed a text, or several."""
    model = await service.model_named(body.model)
    service.check_num_prompts(len(body.input), "input")
    adds_special = body.add_special_tokens is not False
    prompts = [await model.text.encode_prompt(text, adds_special=adds_special, param="input") for text in body.input]
    admit(len(prompts) - 1)
    whole = await unless_gone(request, _embedded(body, service, model, prompts))
    return Response(status_code=CLIENT_GONE) if whole is None else JSONResponse(whole)


async def _embedded(
    body: EmbeddingRequest, service: Session, model: LanguageModel, prompts: Sequence[list[int]]
) -> dict[str, Any]:
    request_id = f"embd-{uuid.uuid4().hex}"
    embeddings = await embed_all(service, model, request_id, prompts)
    num_tokens = sum(map(len, prompts))
    return {
        "id": request_id,
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _written(embedding, body.encoding_format)}
            for index, embedding in enumerate(embeddings)
        ],
        "model": body.model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


async def embed_all(
    service: Session, model: LanguageModel, request_id: str, prompts: Sequence[list[int]]
) -> list[Sequence[float]]:
    """Embed all prompts at once, or none."""
    tasks = [
        asyncio.create_task(service.embed(model, f"{request_id}-{place}", prompt))
        for place, prompt in enumerate(prompts)
    ]
    try:
        return await asyncio.gather(*tasks)
    finally:  # where one fails, or the client leaves
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _written(embedding: Sequence[float], encoding_format: str | None) -> list[float] | str:
    if encoding_format != "base64":
        return list(embedding)
    return base64.b64encode(struct.pack(f"<{len(embedding)}f", *embedding)).decode()
