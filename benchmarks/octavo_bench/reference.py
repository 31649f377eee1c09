"""What float32 says of the fixed text: log probabilities of every token after every position, by transformers.

    python -m octavo_bench.reference HF_FOLDER OUTPUT.npy

Writes float32 [WINDOWS, WINDOW - 1, V], and beside it the windows' token ids as int64 [WINDOWS, WINDOW]. Run in a
process of its own by quality.py, which says what it is for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from octavo_bench.quality import TEXT, WINDOW, WINDOWS


def main() -> None:
    """Compute and write them."""
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    token_ids = AutoTokenizer.from_pretrained(folder)(TEXT.read_text(encoding="utf-8"))["input_ids"]
    if len(token_ids) < WINDOWS * WINDOW:
        raise SystemExit(f"{TEXT} has {len(token_ids)} tokens, fewer than {WINDOWS * WINDOW}")
    windows = torch.tensor(token_ids[: WINDOWS * WINDOW]).view(WINDOWS, WINDOW)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(windows).logits[:, :-1]
    np.save(output.with_suffix(".tokens.npy"), windows.numpy())
    np.save(output, logits.log_softmax(dim=-1).numpy())


if __name__ == "__main__":
    main()
