"""The Octavo operator: turns an InferenceService into the Kubernetes objects that serve a model."""

from importlib.metadata import version

__version__ = version("octavo")
