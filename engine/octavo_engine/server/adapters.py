"""The LoRA adapters that a server of one model serves, by the names of their models. Called by service.py and routes.

An adapter is loaded into the engine under a number that is used once: what was computed with it is never taken for
what another one computes, also not by the prefix cache. One that is unloaded is found by no further request; requests
that run keep it until they have ended, and then the engine forgets it.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo_engine.errors import RequestInvalid

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from octavo_engine.client import EngineClient
    from octavo_engine.config import EngineConfig
    from octavo_engine.generation import LanguageModel

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """One that can be asked for."""

    model: LanguageModel  # that it makes
    path: Path  # of its folder or file


class Adapters:
    """Those of one engine.

    Args:
        client: an engine that is ready, with the adapters of its options loaded.
        model: the model without any of them.
        config: the engine's options.
        names: what the server serves, adapters included.
    """

    def __init__(
        self, client: EngineClient, model: LanguageModel, config: EngineConfig, names: Callable[[], Collection[str]]
    ) -> None:
        self.most = config.num_adapter_slots
        self._client = client
        self._model = model
        self._names = names
        first = 1 + config.own_adapter
        self._loaded = {
            module.name: _Loaded(model.with_adapter(number), module.path)
            for number, module in enumerate(config.lora_modules, first)
        }
        self._next = first + len(self._loaded)
        self._one_at_a_time = asyncio.Lock()  # of two with one name the second one is refused

    @property
    def names(self) -> list[str]:
        """Of those that can be asked for."""
        return list(self._loaded)

    def get(self, name: str) -> LanguageModel | None:
        """Return the model that an adapter makes; None: there is no such adapter."""
        loaded = self._loaded.get(name)
        return None if loaded is None else loaded.model

    def path_of(self, name: str) -> Path | None:
        """Return where an adapter's files are, or were when it was loaded; None: there is no such adapter."""
        loaded = self._loaded.get(name)
        return None if loaded is None else loaded.path

    async def load(self, name: str, path: Path) -> None:
        """Load an adapter and serve it.

        Raises:
            RequestInvalid: the name is taken, or the adapter cannot be loaded.
            EngineDead: the engine process ended.
        """
        async with self._one_at_a_time:
            if name in self._names():
                raise RequestInvalid(
                    f"{name[:100]!r} is served already: unload it first, or load this adapter under another name",
                    param="lora_name",
                )
            number, self._next = self._next, self._next + 1
            await self._client.load_adapter(number, path)
            self._loaded[name] = _Loaded(self._model.with_adapter(number), path)
        _log.info("%s is served: the LoRA adapter at %s", name, path)

    def unload(self, name: str) -> None:
        """Serve an adapter no longer. Requests that run with it are answered to their end.

        Raises:
            RequestInvalid: there is no such adapter.
        """
        gone = self._loaded.pop(name, None)
        if gone is None:
            loaded = ", ".join(self._loaded) or "none"
            raise RequestInvalid(
                f"LoRA adapter {name[:100]!r} not found; loaded are: {loaded}",
                param="lora_name",
                code="model_not_found",
                status=404,
            )
        self._client.unload_adapter(gone.model.adapter)
        _log.info("%s is no longer served", name)

    def in_use(self) -> tuple[list[str], list[str]]:
        """Return the names of those that requests run with, and of those that requests wait for."""
        running, waiting = self._client.adapters_in_use()
        return (
            [name for name, loaded in self._loaded.items() if loaded.model.adapter in running],
            [name for name, loaded in self._loaded.items() if loaded.model.adapter in waiting],
        )
