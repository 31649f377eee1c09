"""Text on either side of the engine: chat template, tokenizer, detokenizer. Torch-free; for the API process only."""
