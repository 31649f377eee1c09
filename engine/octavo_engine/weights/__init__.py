"""Reading model files: the GGUF header (gguf.py, no torch) and its tensors (gguf_quants.py, loader.py, with torch)."""
