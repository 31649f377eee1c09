"""The kernels that a step is made of, as one thing: what attention, layers and sampling are built with.

On a device they are launched. A test that wants the whole GPU path without one gives their twins instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from octavo_engine.kernels import attention, cache, sampling

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from octavo_engine.kernels.attention import Scores, Tiles
    from octavo_engine.kernels.sampling import RowRules


class Attend(Protocol):
    """kernels.attention.attend."""

    def __call__(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        tables: torch.Tensor,
        requests: torch.Tensor,
        tiles: Tiles,
        scores: Scores,
        *,
        window: int | None,
    ) -> None:
        """Compute the rows of some tiles."""
        ...


@dataclass(frozen=True, slots=True)
class Suite:
    """Each as the function of its name; see there."""

    dtypes: tuple[torch.dtype, ...]  # of activations
    store_kv: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
    attend: Attend
    sample: Callable[[torch.Tensor, torch.Tensor, RowRules], tuple[torch.Tensor, torch.Tensor]]


LAUNCHED: Final = Suite(
    dtypes=attention.DTYPES, store_kv=cache.store_kv, attend=attention.attend, sample=sampling.sample
)
