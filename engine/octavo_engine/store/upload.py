"""From the store to a registry: what `octavo push` and Ollama's /api/push do. Called by both.

It knows where a model goes and what may go there; artifacts.py knows what a registry is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import httpx

from octavo_engine.errors import ModelUnsupported
from octavo_engine.store.artifacts import push
from octavo_engine.store.source import RegistrySource, parse_source

if TYPE_CHECKING:
    from collections.abc import Mapping

    from octavo_engine.store.local import Location
    from octavo_engine.store.remote import Progress

_TIMEOUT: Final = httpx.Timeout(30.0, write=300.0, read=300.0)
_OLLAMA: Final = "ollama://"


def destination(name: str, location: Location) -> RegistrySource:
    """Return where a model goes whose name is this; with ollama:// or without.

    Raises:
        ModelNotFound: the name is none.
        ModelUnsupported: the model is none that can go there.
    """
    source = parse_source(name if name.startswith(_OLLAMA) else _OLLAMA + name)
    assert isinstance(source, RegistrySource)
    if location.model.is_dir():
        raise ModelUnsupported(f"{name}: only models of one GGUF file can be pushed")
    if location.own_modelfile().adapter:
        raise ModelUnsupported(f"{name}: a model with an ADAPTER cannot be pushed")
    return source


async def upload(
    source: RegistrySource, location: Location, details: Mapping[str, Any], *, on_progress: Progress
) -> None:
    """Upload a model with its Modelfile.

    Args:
        source: as `destination` gives it.
        location: of the model.
        details: what Ollama tells of a model (server/ollama/describe.py).
        on_progress: is told how much of the file has gone.

    Raises:
        SourceForbidden, SourceUnreachable, ModelNotFound: the registry does not take it.
    """
    told = {"model_family": "family", "model_type": "parameter_size", "file_type": "quantization_level"}
    config = {name: details[detail] for name, detail in told.items()}
    async with httpx.AsyncClient(timeout=_TIMEOUT) as client:
        modelfile = location.own_modelfile()
        await push(source, location.model, modelfile, config, client=client, on_progress=on_progress)
