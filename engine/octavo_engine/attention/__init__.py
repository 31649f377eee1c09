"""Attention over a paged KV cache: the interface (base.py) and its backends."""
