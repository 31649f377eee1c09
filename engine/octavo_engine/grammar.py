"""What scheduler and sampler know of a grammar that an answer keeps to. structured/compiler.py has the real one.

Like PastTokens it belongs to a Request: the scheduler tells it every token, the plan hands it to the sampler by
reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np


class Grammar(Protocol):
    """Where one answer is in its grammar."""

    def mask(self) -> np.ndarray:
        """Return which tokens may come next: uint8, a bit a token, the lowest bit first.

        Once the answer is whole, and nothing can follow, these are the tokens that end it.

        Raises:
            GenerationFailed: the grammar is too costly from here on.
        """

    def accept(self, token_id: int) -> None:
        """Take the token that came next, one of those in `mask`."""

    def fork(self) -> Grammar:
        """Return another one at the same place."""
