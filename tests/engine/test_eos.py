from __future__ import annotations

from pathlib import Path

from octavo_engine.models.family import _gguf_eos_token_ids
from octavo_engine.weights.gguf import GGUFHeader


def test_the_end_of_a_chats_turn_is_found_by_its_text_where_the_file_names_only_that_of_a_document() -> None:
    metadata = {
        "tokenizer.ggml.tokens": ["<pad>", "<eos>", "<bos>", "a", "<end_of_turn>", "<|im_end|>"],
        "tokenizer.ggml.eos_token_id": 1,
    }
    header = GGUFHeader(Path("gemma.gguf"), metadata, {})  # type: ignore[arg-type] # a list of str is one of values
    assert _gguf_eos_token_ids(header) == {1, 4, 5}


def test_a_file_without_a_vocabulary_has_the_ends_that_it_names() -> None:
    header = GGUFHeader(Path("tiny.gguf"), {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 7}, {})
    assert _gguf_eos_token_ids(header) == {1, 7}
