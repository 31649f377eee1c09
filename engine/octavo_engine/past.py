"""What the sampler must know of the tokens that one request has had.

Made and appended to with its Request (request.py), by the scheduler; read by sampler.py, to which the plan hands it by
reference. So a step costs O(1) for it in the scheduler, and in the sampler a copy of the distinct tokens.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


class PastTokens:
    """The distinct tokens of a request, and how often it has generated each.

    Args:
        prompt_token_ids: none of them generated.
        stop_token_ids: what would end the request.

    Attributes:
        num_generated: tokens generated so far.
        stop_token_ids: as given.
    """

    def __init__(self, prompt_token_ids: Sequence[int], stop_token_ids: Sequence[int]) -> None:
        self.num_generated = 0
        self.stop_token_ids = stop_token_ids
        self._places = {token_id: place for place, token_id in enumerate(dict.fromkeys(prompt_token_ids))}
        self._token_ids = array("q", self._places)
        self._counts = array("q", bytes(8 * len(self._places)))

    def add(self, token_id: int) -> None:
        """Count a generated token."""
        self.num_generated += 1
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._token_ids):
            self._token_ids.append(token_id)
            self._counts.append(0)
        self._counts[place] += 1

    def as_arrays(self, granted: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Return the distinct token ids of prompt and output, and how often each was generated: int64, copied.

        Those in `granted` count as generated too.
        """
        new = array("q", [token_id for token_id in dict.fromkeys(granted) if token_id not in self._places])
        token_ids, counts = np.array(self._token_ids + new), np.array(self._counts + array("q", bytes(8 * len(new))))
        for token_id in granted:
            counts[token_ids == token_id] += 1
        return token_ids, counts
