"""POST /tokenize, POST /detokenize, GET /load: vLLM's additions to OpenAI's routes, with its bodies."""

from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from octavo_engine.errors import RequestInvalid
from octavo_engine.server.body import Strict, Text
from octavo_engine.server.content_type import AnyContentType
from octavo_engine.server.dependencies import CurrentFront, CurrentService
from octavo_engine.server.openai.protocol import ChatMessage, is_token_ids

router = APIRouter(tags=["vllm"], route_class=AnyContentType)


class TokenizeRequest(Strict):
    """A prompt, or the messages of a chat."""

    model: str | None = None  # None: the one that is served
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None  # with `prompt`: put around it what the model wants there (default: true)
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise RequestInvalid("give either prompt or messages", param="prompt")
        if self.messages is not None and self.add_special_tokens:
            raise RequestInvalid("the chat template alone adds them to messages", param="add_special_tokens")
        return self


def _token_ids(tokens: Any) -> list[int]:
    if not is_token_ids(tokens):
        raise RequestInvalid("tokens must be a list of token ids")
    return tokens


class DetokenizeRequest(Strict):
    """Tokens to read."""

    model: str | None = None
    # list[int]; pydantic is slow at telling what is wrong in it
    tokens: Annotated[Any, AfterValidator(_token_ids), WithJsonSchema({"type": "array", "items": {"type": "integer"}})]


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, service: CurrentService) -> JSONResponse:
    """Tell the tokens of a text. One that exceeds the context is counted too."""
    model = await service.model_named(body.model)
    if body.messages is not None:
        ids = await model.text.encode_chat([message.for_template() for message in body.messages], must_fit=False)
    else:
        adds_special = body.add_special_tokens is not False
        ids = await model.text.encode_prompt(body.prompt or "", adds_special=adds_special, must_fit=False)
    strings = [model.text.text_of([token_id]) for token_id in ids] if body.return_token_strs else None
    limit = model.facts.max_model_len
    return JSONResponse({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": strings})


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, service: CurrentService) -> JSONResponse:
    """Tell the text of tokens."""
    model = await service.model_named(body.model)
    model.text.check_token_ids(body.tokens, "tokens")
    return JSONResponse({"prompt": model.text.text_of(body.tokens)})


@router.get("/load")
async def load(front: CurrentFront) -> JSONResponse:
    """Tell how many requests for generation are in the house, waiting ones included."""
    return JSONResponse({"server_load": front.num_admitted})
