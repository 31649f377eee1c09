"""The Octavo engine: paged attention and continuous batching behind OpenAI's HTTP API."""

from importlib.metadata import version

__version__ = version("octavo")
