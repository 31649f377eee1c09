"""Every family that can be served. A new one is added here; docs/models.md says how. No torch here."""

from __future__ import annotations

from octavo_engine.models import gemma, llama, mistral, qwen

FAMILIES = (llama.FAMILY, mistral.FAMILY, qwen.FAMILY, gemma.FAMILY)
