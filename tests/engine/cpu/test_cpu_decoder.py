"""The C++ decoder against the torch one on small random models, and bit by bit against itself."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gguf
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo_engine.attention.base import AttentionRules, CacheShape
from octavo_engine.attention.reference import ReferenceAttention
from octavo_engine.cpu import library as libraries
from octavo_engine.cpu.compute import NATIVE_GROUP_BYTES, matrix_bytes
from octavo_engine.cpu.decoder import CpuDecoder
from octavo_engine.cpu.variants import VARIANTS, best_variant
from octavo_engine.models.decoder import TorchDecoder
from octavo_engine.models.spec import DecoderSpec, Rope
from octavo_engine.plan import SamplingParams, ScheduledRequest, StepPlan
from octavo_engine.steps import Steps, TorchSteps
from octavo_engine.weights.low_rank import LowRank
from octavo_engine.weights.quant_type import QuantType
from octavo_engine.weights.stored import StoredMatrix

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Sequence

    from octavo_engine.cpu.compute import Compute
    from octavo_engine.models.adapter import Place

SAMPLING = SamplingParams(max_tokens=1)


def spec_of(**changes: Any) -> DecoderSpec:
    """A Llama of two layers: 4 heads of 16 on 2 KV heads."""
    num_layers = changes.get("num_layers", 2)
    options: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": num_layers,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "ropes": (Rope(10_000.0),) * num_layers,
        "windows": (None,) * num_layers,
        "tied_embeddings": True,
        "max_context": 1024,
        "eos_token_ids": frozenset({2}),
        "attention_scale": 0.25,
    }
    return DecoderSpec(**options | changes)


@dataclass
class RandomWeights:
    """Stands in for a WeightSource: the same random tensor whenever it is asked for the same role."""

    quant_type: QuantType = QuantType.F32
    poisoned_row: int | None = None  # of the embedding: NaN

    def matrix(self, role: str, shape: tuple[int, int], *, layer: int | None = None) -> StoredMatrix:
        """[out, in] in the quantised type."""
        numbers = self._random(role, layer, shape) / math.sqrt(shape[1]) * (8 if role == "embedding" else 1)
        if role == "embedding" and self.poisoned_row is not None:
            numbers[self.poisoned_row] = math.nan
        packed = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType(self.quant_type)).view(np.uint8)
        return StoredMatrix(torch.from_numpy(packed.reshape(shape[0], -1)), self.quant_type, shape)

    def vector(self, role: str, size: int, *, layer: int | None = None) -> torch.Tensor:
        """About 1 for a norm, about 0 for a bias."""
        return torch.from_numpy(self._random(role, layer, (size,)) * 0.2 + (1.0 if role.endswith("norm") else 0.0))

    @staticmethod
    def _random(role: str, layer: int | None, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
        generator = np.random.default_rng([*role.encode(), (layer or 0) + 1])
        return generator.standard_normal(shape).astype(np.float32)


def in_cpp(
    library: ctypes.CDLL, spec: DecoderSpec, weights: RandomWeights, compute: Compute = "float32", **options: Any
) -> CpuDecoder:
    sizes = {"num_positions": 512, "num_blocks": 200, "block_size": 8, "num_threads": 2} | options
    return CpuDecoder(library, spec, weights, compute=compute, **sizes)  # type: ignore[arg-type] # stands in


def in_torch(spec: DecoderSpec, weights: RandomWeights, block_size: int = 8) -> Steps:
    device = torch.device("cpu")
    shape = CacheShape(
        num_layers=spec.num_layers,
        num_blocks=200,
        block_size=block_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
    )
    rules = AttentionRules(scale=spec.attention_scale, windows=spec.windows, softcap=spec.attention_softcap)
    attention = ReferenceAttention(shape, rules, dtype=torch.float32, device=device)
    model = TorchDecoder(spec, weights, attention, num_positions=512, dtype=torch.float32, device=device)  # type: ignore[arg-type] # stands in
    return TorchSteps(model, attention, block_size=block_size, device=device)


def tokens(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 100, length).tolist())


def piece(
    token_ids: Sequence[int], start: int, end: int, blocks: Sequence[int], name: str = "a", *, needs_token: bool = True
) -> ScheduledRequest:
    return ScheduledRequest(
        name, tuple(token_ids[start:end]), start, tuple(blocks), needs_token=needs_token, sampling=SAMPLING
    )


def logits_of(steps: Steps, *requests: ScheduledRequest) -> list[torch.Tensor]:
    """Logits after every token, request by request."""
    with torch.inference_mode():
        logits = steps.forward(StepPlan(0, requests), every_token=True)
    return list(logits.split([len(request.token_ids) for request in requests]))  # type: ignore[no-untyped-call] # torch


def relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error, as a share of the largest number."""
    return ((logits - expected).abs().max() / expected.abs().max()).item()


SPECS: dict[str, dict[str, Any]] = {
    "llama": {},
    "three heads a KV head, of 64": {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "hidden_size": 96},
    "eight heads a KV head, of 24": {"num_heads": 8, "num_kv_heads": 1, "head_dim": 24},
    "no groups, heads of 80": {"num_heads": 3, "num_kv_heads": 3, "head_dim": 80},
    "heads of 256": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 256},
    "sizes that fill no tile": {"hidden_size": 72, "intermediate_size": 82, "vocab_size": 117},
    "a window": {"windows": (37, None)},
    "biases": {"qkv_bias": True, "o_bias": True},
    "two ropes": {"ropes": (Rope(10_000.0), Rope(500.0))},
    "gemma": {
        "activation": "gelu_tanh",
        "embedding_scale": 8.0,
        "qk_norm": True,
        "post_norms": True,
        "attention_softcap": 5.0,
        "logit_softcap": 8.0,
        "windows": (20, None),
    },
    "an output matrix of its own": {"tied_embeddings": False},
}


@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS.keys())
def test_float32_equals_torch(library: ctypes.CDLL, changes: dict[str, Any]) -> None:
    spec, weights = spec_of(**changes), RandomWeights()
    token_ids = tokens(300)  # more than a partition of attention
    whole = piece(token_ids, 0, 300, range(3, 41))

    (logits,), (expected,) = logits_of(in_cpp(library, spec, weights), whole), logits_of(in_torch(spec, weights), whole)

    assert relative_error(logits, expected) < 3e-5


@pytest.mark.parametrize("block_size", [1, 5, 16, 24, 300])
def test_float32_equals_torch_with_any_block_size(native: ctypes.CDLL, block_size: int) -> None:
    spec, weights = spec_of(windows=(50, None)), RandomWeights()
    whole = piece(tokens(150), 0, 150, range(-(-150 // block_size)))

    (logits,) = logits_of(in_cpp(native, spec, weights, block_size=block_size), whole)

    (expected,) = logits_of(in_torch(spec, weights, block_size), whole)
    assert relative_error(logits, expected) < 3e-5


CLOSE = [("bfloat16", QuantType.F32, 0.03), *(("int8", quant_type, 0.06) for quant_type in sorted(NATIVE_GROUP_BYTES))]


@pytest.mark.parametrize(("compute", "quant_type", "share"), CLOSE)
def test_rounded_inputs_stay_close_to_float32(
    library: ctypes.CDLL, compute: Compute, quant_type: QuantType, share: float
) -> None:
    spec, weights = spec_of(), RandomWeights(quant_type)
    whole = piece(tokens(40), 0, 40, range(5))

    (logits,) = logits_of(in_cpp(library, spec, weights, compute), whole)

    (expected,) = logits_of(in_torch(spec, weights), whole)
    assert 0 < relative_error(logits, expected) < share


@pytest.mark.parametrize("quant_type", sorted(NATIVE_GROUP_BYTES))
@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 8, 13, 67])
def test_products_of_quantised_weights_are_exact_but_for_the_rounding_of_their_input(
    library: ctypes.CDLL, quant_type: QuantType, num_rows: int
) -> None:
    # A model without layers is a norm and a product with the output matrix.
    spec, weights = spec_of(num_layers=0, tied_embeddings=False, hidden_size=160), RandomWeights(quant_type)
    token_ids = tokens(num_rows)

    (logits,) = logits_of(in_cpp(library, spec, weights, "int8"), piece(token_ids, 0, num_rows, range(10)))

    def numbers(role: str) -> torch.Tensor:
        return weights.matrix(role, (100, 160)).dequantize(torch.float32, torch.device("cpu"))

    x = numbers("embedding")[list(token_ids)]
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weights.vector("final_norm", 160)
    groups = x.view(num_rows, -1, 32)
    scales = groups.abs().amax(-1, keepdim=True) / 127
    rounded = ((groups / scales).round() * scales).view(num_rows, 160)
    assert relative_error(logits, rounded @ numbers("output").T) < 2e-3  # a tie may be rounded to the other side
    torch.testing.assert_close(logits, rounded @ numbers("output").T, atol=5e-2, rtol=0)


WAYS: list[tuple[Compute, QuantType]] = [
    ("float32", QuantType.F32),
    ("bfloat16", QuantType.BF16),
    ("int8", QuantType.Q4_0),
    ("int8", QuantType.Q4_1),
    ("int8", QuantType.Q8_0),
]


@pytest.mark.parametrize(("compute", "quant_type"), WAYS)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_request_gets_the_same_bits_in_any_company_and_any_pieces(
    library: ctypes.CDLL, compute: Compute, quant_type: QuantType, data: st.DataObject
) -> None:
    length, other_length = 280, 60
    token_ids, other_ids = tokens(length), tokens(other_length, seed=1)
    decoder = in_cpp(library, spec_of(windows=(None, 100)), RandomWeights(quant_type), compute)
    (whole,) = logits_of(decoder, piece(token_ids, 0, length, range(36)))
    own_blocks = data.draw(st.permutations(range(50, 90)))
    done, other_done, pieces = 0, 0, []
    while done < length:
        end = min(length, done + data.draw(st.sampled_from([1, 1, 2, 17, 100])))
        other_end = min(other_length, other_done + data.draw(st.integers(0, 20)))
        requests = [piece(token_ids, done, end, own_blocks)]
        if other_end > other_done:
            at = data.draw(st.integers(0, 1))
            requests.insert(at, piece(other_ids, other_done, other_end, range(100, 110), name="other"))
        index = next(index for index, request in enumerate(requests) if request.request_id == "a")
        pieces.append(logits_of(decoder, *requests)[index])
        done, other_done = end, other_end

    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("compute", ["float32", "int8"])
def test_the_number_of_threads_changes_no_bit(native: ctypes.CDLL, compute: Compute) -> None:
    spec, weights = spec_of(), RandomWeights(QuantType.Q4_1)
    requests = [piece(tokens(270), 0, 269, range(40)), piece(tokens(9, seed=1), 0, 9, (50, 51), name="b")]
    last = piece(tokens(270), 269, 270, range(40))  # a lone decode, over two partitions
    alone, three = (in_cpp(native, spec, weights, compute, num_threads=number) for number in (1, 3))

    for step in (requests, [last]):
        assert all(
            torch.equal(one, other) for one, other in zip(logits_of(alone, *step), logits_of(three, *step), strict=True)
        )


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("quant_type", [QuantType.F32, *sorted(NATIVE_GROUP_BYTES)])
def test_the_bytes_of_packed_weights_are_known_beforehand(
    native: ctypes.CDLL, compute: Compute, quant_type: QuantType
) -> None:
    decoder = in_cpp(native, spec_of(), RandomWeights(quant_type), compute)

    layer = [
        (64, 64),
        (32, 64),
        (32, 64),
        (64, 64),
        (96, 64),
        (96, 64),
        (64, 96),
    ]  # the vocabulary of 100 fills no tile
    expected = sum(matrix_bytes(compute, quant_type, shape) for shape in (*layer * 2, (100, 64)))
    assert decoder.weight_bytes == expected


ADAPTED: dict[str, tuple[Compute, QuantType, dict[str, Any], float]] = {
    "float32": ("float32", QuantType.F32, {}, 3e-5),
    "float32, sizes that fill no tile": ("float32", QuantType.F32, SPECS["sizes that fill no tile"], 3e-5),
    "float32, heads of 80": ("float32", QuantType.F32, SPECS["no groups, heads of 80"], 3e-5),
    "float32, gemma with biases": ("float32", QuantType.F32, SPECS["gemma"] | SPECS["biases"], 3e-5),
    "bfloat16": ("bfloat16", QuantType.BF16, {}, 0.03),
    "int8": ("int8", QuantType.Q8_0, {}, 0.03),
    "int8 of 4 bits": ("int8", QuantType.Q4_1, {}, 0.06),
}


@pytest.mark.parametrize(("compute", "quant_type", "changes", "share"), ADAPTED.values(), ids=ADAPTED.keys())
def test_adapters_are_added_as_torch_adds_them_and_change_nobody_elses_bits(
    library: ctypes.CDLL, compute: Compute, quant_type: QuantType, changes: dict[str, Any], share: float
) -> None:
    spec, weights = spec_of(**changes), RandomWeights(quant_type)
    decoder, in_float32 = in_cpp(library, spec, weights, compute), in_torch(spec, weights)
    for number, rank in ((1, 8), (2, 3)):
        pairs = random_pairs(spec, rank)
        decoder.adapters.load(number, pairs)
        assert in_float32.adapters is not None
        in_float32.adapters.load(number, pairs)
    requests = [
        msgspec.structs.replace(
            piece(tokens(40, seed=place), 0, 40, range(place * 5, place * 5 + 5), name=str(place)), adapter=adapter
        )
        for place, adapter in enumerate((1, 0, 2, 1))
    ]

    together, expected = logits_of(decoder, *requests), logits_of(in_float32, *requests)

    for request, logits, truth in zip(requests, together, expected, strict=True):
        assert relative_error(logits, truth) < share
        assert torch.equal(logits, logits_of(decoder, request)[0])
        if request.adapter:
            (bare,) = logits_of(decoder, msgspec.structs.replace(request, adapter=0))
            assert relative_error(bare, truth) > 0.1
    last = [
        msgspec.structs.replace(one, token_ids=one.token_ids[39:], num_computed_tokens=39) for one in requests
    ]  # decodes: keys are stored while they are attended to
    logits_of(decoder, *requests)
    assert all(torch.equal(one, whole[39:]) for one, whole in zip(logits_of(decoder, *last), together, strict=True))


def random_pairs(spec: DecoderSpec, rank: int) -> dict[Place, LowRank]:
    generator = torch.Generator().manual_seed(rank)
    return {
        (layer, role): LowRank(
            torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs),
            torch.randn(outputs, rank, generator=generator) / math.sqrt(4 * rank),
        )
        for layer in range(spec.num_layers)
        for role, (outputs, inputs) in spec.layer_matrices.items()
        if rank > 3 or role in ("k", "o", "up")
    }


def test_only_requests_that_need_a_token_get_logits(native: ctypes.CDLL) -> None:
    decoder = in_cpp(native, spec_of(), RandomWeights())
    needy, other = piece(tokens(9), 0, 9, (0, 1)), piece(tokens(5), 0, 5, (2,), name="b", needs_token=False)

    every = logits_of(decoder, other, needy)[1]

    assert torch.equal(decoder.forward(StepPlan(0, (other, needy))), every[-1:])
    assert decoder.forward(StepPlan(0, (other,))).shape == (0, 100)


@pytest.mark.parametrize("num_guesses", [1, 3, 7])
def test_logits_after_guesses_are_bit_for_bit_those_of_one_token_at_a_time(
    native: ctypes.CDLL, num_guesses: int
) -> None:
    decoder = in_cpp(native, spec_of(), RandomWeights())
    token_ids = tokens(30 + num_guesses)
    blocks = tuple(range(6))
    decoder.forward(StepPlan(0, (piece(token_ids, 0, 29, blocks),)))
    guesses = msgspec.structs.replace(piece(token_ids, 29, 30 + num_guesses, blocks), num_proposed=num_guesses)

    together = decoder.forward(StepPlan(0, (guesses, piece(tokens(5), 0, 5, (9,), name="b"))))[:-1]

    alone = [
        decoder.forward(StepPlan(0, (piece(token_ids, at, at + 1, blocks),))) for at in range(29, 30 + num_guesses)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_a_copied_block_holds_what_the_original_holds(library: ctypes.CDLL) -> None:
    decoder = in_cpp(library, spec_of(), RandomWeights())
    token_ids = tokens(13)
    logits_of(decoder, piece(token_ids, 0, 12, (0, 1)))
    (expected,) = logits_of(decoder, piece(token_ids, 12, 13, (0, 1)))

    decoder.copy_blocks([(0, 7), (1, 5)])

    logits_of(decoder, piece(tokens(13, seed=2), 0, 12, (0, 1)))  # others take the old blocks
    (copied,) = logits_of(decoder, piece(token_ids, 12, 13, (7, 5)))
    assert torch.equal(copied, expected)


@pytest.mark.parametrize(("compute", "quant_type"), [("float32", QuantType.F32), ("bfloat16", QuantType.BF16)])
def test_a_poisoned_request_reaches_no_other_nor_who_gets_its_blocks(
    library: ctypes.CDLL, compute: Compute, quant_type: QuantType
) -> None:
    spec = spec_of(tied_embeddings=False)
    decoder = in_cpp(library, spec, RandomWeights(quant_type, poisoned_row=50), compute)
    healthy = piece((1, 2, 3, 4, 5), 0, 5, (0,))
    (expected,) = logits_of(decoder, healthy)

    sick, beside = logits_of(decoder, piece((1, 50, 3), 0, 3, (1,), name="sick"), healthy)
    assert sick[1:].isnan().all()
    assert torch.equal(beside, expected)

    (later,) = logits_of(decoder, replace_blocks(healthy, (1,)))
    assert torch.equal(later, expected)


def replace_blocks(request: ScheduledRequest, blocks: tuple[int, ...]) -> ScheduledRequest:
    return piece(request.token_ids, 0, len(request.token_ids), blocks)


def test_a_nan_passes_through_the_rounding_to_int8(library: ctypes.CDLL) -> None:
    class Poisoned(RandomWeights):
        def vector(self, role: str, size: int, *, layer: int | None = None) -> torch.Tensor:
            vector = super().vector(role, size, layer=layer)
            if role == "mlp_norm":
                vector[3] = math.nan
            return vector

    (logits,) = logits_of(in_cpp(library, spec_of(), Poisoned(QuantType.Q4_0), "int8"), piece((1, 2), 0, 2, (0,)))
    assert logits.isnan().all()


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        (set(), "avx512_bf16"),
        ({"avx512_bf16"}, "avx512"),
        ({"avx512_bf16", "avx512_vnni"}, "avx_vnni"),
        ({"avx512f", "avx512_bf16", "avx_vnni"}, "avx2"),
        ({"f16c"}, None),
    ],
)
def test_a_processor_gets_the_best_library_that_it_runs(missing: set[str], expected: str | None) -> None:
    everything = frozenset[str]().union(*(variant.needs for variant in VARIANTS))
    best = best_variant(everything - missing)
    assert (best.name if best else None) == expected


def test_without_a_library_the_engine_says_so_once_and_goes_on(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(libraries, "_FOLDER", tmp_path)
    libraries.best_library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert libraries.best_library() is None
            assert libraries.best_library() is None
    finally:
        libraries.best_library.cache_clear()
    assert len(caplog.records) == 1
    assert "C++ compiler" in caplog.text
