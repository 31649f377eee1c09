"""What a launcher may ask for, and of which GPUs."""

from __future__ import annotations

import pytest
import torch

from octavo_engine.errors import DeviceMissing
from octavo_engine.kernels.activation import GATE_AND_MUL
from octavo_engine.kernels.launch import TARGETS, Variant, target_of


@pytest.mark.parametrize(
    ("capability", "target"), [((8, 0), 80), ((8, 6), 86), ((8, 9), 89), ((9, 0), 90), ((10, 0), 100), ((12, 0), 89)]
)
def test_a_gpu_has_the_target_of_its_capability(
    capability: tuple[int, int], target: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert target_of.__wrapped__(torch.device("cuda", 0)) == TARGETS[target]


def test_an_old_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(DeviceMissing, match=r"Tesla T4 has compute capability 7\.5; .* 8\.0"):
        target_of.__wrapped__(torch.device("cuda", 0))


def test_only_listed_variants_are_launched() -> None:
    (variant, *_) = GATE_AND_MUL.variants(TARGETS[90])
    other = Variant(variant.types, (("IS_SILU", True), ("BLOCK", 512)), variant.num_warps)
    numbers = torch.zeros(16, dtype=torch.float16)
    with pytest.raises(AssertionError, match="BLOCK"):
        GATE_AND_MUL.launch(other, (1,), numbers, numbers, 1)


def test_arguments_are_of_the_types_that_were_compiled() -> None:
    variant = next(each for each in GATE_AND_MUL.variants(TARGETS[90]) if each.types[0] == "*bf16")
    numbers = torch.zeros(16, dtype=torch.float16)
    with pytest.raises(AssertionError, match="fp16"):
        GATE_AND_MUL.launch(variant, (1,), numbers, numbers, 1)
