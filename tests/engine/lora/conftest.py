"""Adapters as PEFT writes them, with random numbers, and the models that they are merged into: the truth here."""

from __future__ import annotations

import copy
import json
import math
import re
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(
    folder: Path, model: Any, *, seed: int = 0, targets: Sequence[str] = ALL, ranks: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32, **config: Any,
) -> Path:  # fmt: skip
    """Write one for a model of transformers; `ranks` are those of modules that have another one than r = 4."""
    folder.mkdir(parents=True)
    usual = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(targets), "bias": "none"}
    options: dict[str, Any] = usual | config
    (folder / "adapter_config.json").write_text(json.dumps(options))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in model.named_parameters():
        module = name.removesuffix(".weight")
        end = module.rpartition(".")[2]
        if end not in targets:
            continue
        rank = (ranks or {}).get(end, options["r"] or 4)
        outputs, inputs = weight.shape
        a = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
        b = torch.randn(outputs, rank, generator=generator) * 0.2
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.to(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged(model: Any, folder: Path) -> Any:
    """A copy of the model whose weights are W + scale B A, by PEFT's own rules for the scale."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    model = copy.deepcopy(model)
    for name, weight in model.named_parameters():
        module = name.removesuffix(".weight")
        key = f"base_model.model.{module}.lora_A.weight"
        if key not in tensors:
            continue
        alpha, rank = (
            next((value for end, value in config.get(key, {}).items() if re.match(rf"(.*\.)?({end})$", module)), usual)
            for key, usual in (("alpha_pattern", config["lora_alpha"]), ("rank_pattern", config["r"]))
        )
        scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        b = tensors[key.replace("lora_A", "lora_B")].float()
        weight.data += scale * (b @ tensors[key].float())
    return model
