"""Ollama's API over the same service as OpenAI's."""
