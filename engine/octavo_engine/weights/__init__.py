"""Reading model files: the GGUF header (gguf.py, no torch) and its tensors (gguf_quants.py, stored.py, with torch)."""
