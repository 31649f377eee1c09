"""What one request needs of a server of many models: the model that it names, loaded until the request has ended.

Made by shelf.py for each request; routes see a Session (front.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo_engine.errors import RequestInvalid

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from octavo_engine.answer import TextDelta
    from octavo_engine.config import ServerConfig
    from octavo_engine.generation import GenerationRequest, LanguageModel
    from octavo_engine.server.front import Served
    from octavo_engine.server.metrics import Metrics
    from octavo_engine.server.shelf import Shelf, ShelvedModel
    from octavo_engine.structured.checker import Wanted


class ShelfSession:
    """What one request needs of a shelf."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._model: ShelvedModel | None = None
        self._keep_alive: float | None = None

    @property
    def config(self) -> ServerConfig:
        """Of the server (Session)."""
        return self._shelf.config

    @property
    def metrics(self) -> Metrics:
        """Of the model (Session)."""
        assert self._model is not None, "a model was named before"
        return self._model.service.metrics

    @property
    def shelf(self) -> Shelf:
        """The server (Session)."""
        return self._shelf

    @property
    def adapters(self) -> None:
        """None: adapters are for a server of one model, and Modelfiles for one of many (Session)."""

    async def model_named(self, name: str | None, keep_alive: float | None = None) -> LanguageModel:
        """Return the model, loaded until the session ends (Session)."""
        if name is None:
            raise RequestInvalid("model is required: this server has many", param="model")
        self._keep_alive = keep_alive
        self.release()
        self._model = await self._shelf.acquire(name)
        return self._model.service.loaded_model()

    async def grammar(self, wanted: Wanted | None) -> str | None:
        """As the model's service has it (Session)."""
        assert self._model is not None, "a grammar is for a model"
        return await self._model.service.grammar(wanted)

    def generate(self, model: LanguageModel, request: GenerationRequest) -> AsyncGenerator[TextDelta, None]:
        """As the model's service does (Session)."""
        assert self._model is not None, "a model was named before"
        return self._model.service.generate(model, request)

    async def embed(self, model: LanguageModel, request_id: str, prompt: Sequence[int]) -> Sequence[float]:
        """As the model's service does (Session)."""
        assert self._model is not None, "a model was named before"
        return await self._model.service.embed(model, request_id, prompt)

    def check_num_prompts(self, count: int, param: str) -> None:
        """As the server does (Session)."""
        self._shelf.check_num_prompts(count, param)

    async def served(self) -> Sequence[Served]:
        """Return the models of the store (Session)."""
        return await self._shelf.served()

    async def loaded(self) -> Sequence[Served]:
        """Return the models in memory (Session)."""
        return await self._shelf.loaded()

    async def unload(self, name: str) -> bool:
        """Unload a model (Session)."""
        return await self._shelf.expire(name)

    def release(self) -> None:
        """Let go of the model."""
        if self._model is not None:
            self._shelf.release(self._model, self._keep_alive)
            self._model = None
