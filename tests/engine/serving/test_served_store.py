"""`octavo serve` without a model, over a store with the real one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from ollama import Client

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.engine.conftest import Serve

QUESTION = [{"role": "user", "content": "Where is the Eiffel Tower?"}]
GREEDY = {"temperature": 0, "num_predict": 24}


@pytest.mark.model
def test_ollamas_client_finds_loads_and_unloads_the_models_of_the_store(
    serve: Serve,
    smollm2_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wait_until: Callable[..., None],
) -> None:
    store = tmp_path / "octavo" / "models"
    store.mkdir(parents=True)
    (store / smollm2_path.name).symlink_to(smollm2_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with serve(None, tmp_path / "log", "--max-model-len", "512") as server, Client(host=server.url) as client:
        assert [model.model for model in client.list().models] == ["smollm2"]
        assert client.ps().models == []
        answer = client.chat("smollm2:latest", QUESTION, options=GREEDY)
        assert "Paris" in (answer.message.content or "")
        (loaded,) = client.ps().models
        assert (loaded.model, loaded.context_length) == ("smollm2", 512)
        client.create("short", from_="smollm2", parameters={"num_predict": 1, "temperature": 0})
        assert client.chat("short", QUESTION).eval_count == 1
        assert {model.model for model in client.ps().models} == {"smollm2", "short"}
        for name in ("smollm2", "short"):
            assert client.generate(name, keep_alive=0).done_reason == "unload"
        wait_until(lambda: client.ps().models == [])
