"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them."""

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import PlainTextResponse
from pydantic import Field

from octavo_engine.errors import RequestInvalid
from octavo_engine.server.adapters import Adapters
from octavo_engine.server.body import Strict, Text
from octavo_engine.server.content_type import AnyContentType
from octavo_engine.server.dependencies import CurrentService

router = APIRouter(prefix="/v1", tags=["openai"], route_class=AnyContentType, default_response_class=PlainTextResponse)

Name = Annotated[Text, Field(min_length=1, max_length=200)]


class LoadLoraAdapter(Strict):
    """The body of POST /v1/load_lora_adapter."""

    lora_name: Name
    lora_path: Annotated[Text, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]  # where the server runs


class UnloadLoraAdapter(Strict):
    """The body of POST /v1/unload_lora_adapter."""

    lora_name: Name
    lora_int_id: int | None = None  # of no effect, as in vLLM: the name says which


def _adapters(service: CurrentService) -> Adapters:
    if service.adapters is None:
        raise RequestInvalid(
            "this server takes no LoRA adapters: start it for one model, with --enable-lora", code="lora_not_enabled"
        )
    return service.adapters


CurrentAdapters = Annotated[Adapters, Depends(_adapters)]


@router.post("/load_lora_adapter")
async def load_lora_adapter(body: LoadLoraAdapter, adapters: CurrentAdapters) -> str:
    """Serve an adapter under a name of its own, from now on."""
    await adapters.load(body.lora_name, Path(body.lora_path))
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadLoraAdapter, adapters: CurrentAdapters) -> str:
    """Serve it no longer; requests that run with it are answered to their end."""
    adapters.unload(body.lora_name)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."
