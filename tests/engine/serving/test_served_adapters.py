"""LoRA adapters of the real model, served as users do it: beside the model, loaded and unloaded, in its int8."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from pathlib import Path

    from tests.engine.conftest import Serve, ServedModel

QUESTION = [{"role": "user", "content": "Where is the Eiffel Tower?"}]
SIZES = {"q_proj": (576, 576), "v_proj": (192, 576), "down_proj": (576, 1536)}  # of SmolLM2-135M


def write_adapter(folder: Path, size: float) -> Path:
    """Random numbers of a size in B; 0: an adapter that adds nothing."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": list(SIZES)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(0)
    tensors = {}
    for layer in range(30):
        for name, (outputs, inputs) in SIZES.items():
            block = "mlp" if name == "down_proj" else "self_attn"
            module = f"base_model.model.model.layers.{layer}.{block}.{name}"
            tensors[f"{module}.lora_A.weight"] = generator.standard_normal((8, inputs), np.float32)
            tensors[f"{module}.lora_B.weight"] = generator.standard_normal((outputs, 8), np.float32) * np.float32(size)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def ask(served: ServedModel, model: str) -> tuple[int, str]:
    body = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=120)
    told = answer.json()
    return answer.status_code, told["choices"][0]["message"]["content"] if "choices" in told else str(told["error"])


@pytest.mark.model
@pytest.mark.timeout(400)
def test_adapters_of_the_real_model_are_served_beside_it(serve: Serve, smollm2_path: Path, tmp_path: Path) -> None:
    nothing, noise = write_adapter(tmp_path / "nothing", 0.0), write_adapter(tmp_path / "noise", 0.1)
    options = ("--served-model-name", "base", "--enable-lora", "--lora-modules", f"nothing={nothing}")
    with serve(smollm2_path, tmp_path / "log", *options, "--max-loras", "2") as served:
        loaded = httpx.post(f"{served.url}/v1/load_lora_adapter", json={"lora_name": "noise", "lora_path": str(noise)})
        assert loaded.status_code == 200, loaded.text
        names = ["base", "noise", "nothing", "base"] * 2
        with ThreadPoolExecutor(len(names)) as pool:
            answers = list(pool.map(lambda name: ask(served, name), names))
        told = dict(zip(names, answers, strict=True))
        assert all(told[name] == answer for name, answer in zip(names, answers, strict=True))
        assert "Paris" in told["base"][1]
        assert told["nothing"] == told["base"]  # to the bit, so that greedy tokens are the same
        assert told["noise"][1] != told["base"][1]
        httpx.post(f"{served.url}/v1/unload_lora_adapter", json={"lora_name": "noise"})
        assert ask(served, "noise")[0] == 404
        assert ask(served, "base") == told["base"]
