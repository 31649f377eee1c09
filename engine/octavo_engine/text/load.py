"""The tokenizer of a model, whichever kind of files it has. Called by generation.py, in the API process: no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo_engine.text.gguf_tokenizer import tokenizer_from_gguf
from octavo_engine.text.hf_tokenizer import tokenizer_from_folder
from octavo_engine.weights.gguf import read_header

if TYPE_CHECKING:
    from pathlib import Path

    from octavo_engine.text.tokenizer import Tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Build the tokenizer of a GGUF file (any part of a split one), or of a folder with a tokenizer.json.

    Raises:
        ModelNotFound: there is no such file or folder, or the folder has no tokenizer.json.
        ModelInvalid: a file is corrupt, or contradicts itself.
        ModelUnsupported: a kind of tokenizer that cannot be built; names it.
    """
    return tokenizer_from_folder(path) if path.is_dir() else tokenizer_from_gguf(read_header(path))
