"""Which class runs which architecture. Called by runner.py; a new family is added here and in config.ARCHITECTURES."""

from __future__ import annotations

from octavo_engine.models.llama import LlamaModel

MODELS = {"llama": LlamaModel}  # by GGUF general.architecture
