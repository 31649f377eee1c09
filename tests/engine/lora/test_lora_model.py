"""Steps with several adapters: each request equals the model that its adapter is merged into, alone and in company.

Bound: float32 logits within 2e-5 of logits up to 5, as models without adapters keep to transformers' within 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tests.engine.lora.conftest import merged, write_adapter
from tests.engine.test_model_families import CASES, TOKENS, build, expected_logits, load, pairs_adjacent, write_gguf
from tests.engine.test_speculation import run

from octavo_engine.config import EngineConfig, LoraModule, SpeculativeConfig
from octavo_engine.cpu.decoder import CpuDecoder
from octavo_engine.cpu.library import best_library
from octavo_engine.draft import Drafter
from octavo_engine.errors import ConfigError, ModelNotFound
from octavo_engine.messages import AddRequest
from octavo_engine.models.adapter import read_adapter
from octavo_engine.models.checkpoint import read_checkpoint
from octavo_engine.plan import SamplingParams, ScheduledRequest, StepPlan
from octavo_engine.runner import ModelRunner, load_runner
from octavo_engine.speculation import DraftProposer, LookupProposer, Speculation
from octavo_engine.weights.low_rank import load_low_rank
from octavo_engine.weights.stored import WeightSource

if TYPE_CHECKING:
    from pathlib import Path

    from octavo_engine.steps import Steps

Way = Literal["torch", "cpp"]
WAYS: tuple[Way, ...] = ("torch", "cpp")
SAMPLING = SamplingParams(max_tokens=1)
MAX_ERROR = 2e-5
LENGTH = 40


def steps_of(way: Way, path: Path, *adapters: Path) -> Steps:
    """The model in float32 by one of the decoders, with adapters as numbers 1, 2 and so on."""
    checkpoint = read_checkpoint(path)
    if way == "torch":
        steps: Steps = load(path, num_blocks=50)._steps
    else:
        library = best_library()
        assert library is not None
        weights = WeightSource(checkpoint, on_progress=lambda *_: None)
        steps = CpuDecoder(
            library, checkpoint.spec, weights, compute="float32", num_positions=70, num_blocks=50, block_size=8,
            num_threads=2,
        )  # fmt: skip
    assert steps.adapters is not None
    for number, folder in enumerate(adapters, start=1):
        steps.adapters.load(number, load_low_rank(read_adapter(folder, checkpoint.spec), checkpoint.spec))
    return steps


def piece(adapter: int, start: int, end: int, place: int = 0) -> ScheduledRequest:
    """Positions start to end of TOKENS, in the blocks of a place."""
    blocks = tuple(range(place * 5, place * 5 + 5))
    return ScheduledRequest(
        f"{place}", TOKENS[start:end], start, blocks, needs_token=True, sampling=SAMPLING, adapter=adapter
    )


def logits_of(steps: Steps, *requests: ScheduledRequest) -> list[torch.Tensor]:
    with torch.inference_mode():
        logits = steps.forward(StepPlan(0, requests), every_token=True)
    return list(logits.split([len(request.token_ids) for request in requests]))  # type: ignore[no-untyped-call] # torch


@dataclass(frozen=True)
class Truth:
    """A model and two adapters of it, and what each gives."""

    model: Any
    path: Path
    adapters: tuple[Path, Path]
    logits: tuple[torch.Tensor, ...]  # of the model by itself and of either adapter, [LENGTH, V]


@pytest.fixture(scope="module", params=["llama", "llama with biases", "qwen2", "qwen3", "gemma3"])
def truth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    folder = tmp_path_factory.mktemp("model")
    model = build(CASES[request.param])
    model.save_pretrained(folder / "model")
    adapters = (
        write_adapter(folder / "all", model),
        write_adapter(
            folder / "some", model, seed=1, targets=("q_proj", "v_proj", "up_proj", "down_proj"), use_rslora=True, r=3,
            ranks={"v_proj": 9}, rank_pattern={"v_proj": 9}, alpha_pattern={r"layers\.1\.mlp\.up_proj": 2},
            dtype=torch.bfloat16,
        ),
    )  # fmt: skip
    models = (model, *(merged(model, adapter) for adapter in adapters))
    return Truth(model, folder / "model", adapters, tuple(expected_logits(one, LENGTH) for one in models))


def largest_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return (logits - expected).abs().max().item()


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_several_adapters_and_of_none_equal_the_merged_models(truth: Truth, way: Way) -> None:
    steps = steps_of(way, truth.path, *truth.adapters)
    whose = (1, 0, 2, 1)
    got = logits_of(steps, *(piece(adapter, 0, LENGTH, place) for place, adapter in enumerate(whose)))
    for adapter, logits in zip(whose, got, strict=True):
        assert largest_error(logits, truth.logits[adapter]) < MAX_ERROR
    for adapter in (1, 2):  # what is added is no rounding
        assert largest_error(truth.logits[adapter], truth.logits[0]) > 0.1


@pytest.mark.parametrize("way", WAYS)
def test_a_request_gets_the_same_bits_alone_and_in_company(truth: Truth, way: Way) -> None:
    steps = steps_of(way, truth.path, *truth.adapters)
    alone = [logits_of(steps, piece(adapter, 0, LENGTH, 9))[0] for adapter in (0, 1, 2)]
    for start, end in ((0, 17), (17, 18), (18, 19), (19, LENGTH)):  # pieces, and decodes of four rows
        whose = (2, 1, 0, 1)
        got = logits_of(steps, *(piece(adapter, start, end, place) for place, adapter in enumerate(whose)))
        for adapter, logits in zip(whose, got, strict=True):
            assert torch.equal(logits, alone[adapter][start:end])


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_that_was_unloaded_leaves_the_others(truth: Truth, way: Way) -> None:
    steps = steps_of(way, truth.path, *truth.adapters)
    assert steps.adapters is not None
    steps.adapters.unload(1)
    (logits,) = logits_of(steps, piece(2, 0, LENGTH))
    assert largest_error(logits, truth.logits[2]) < MAX_ERROR


def write_gguf_adapter(path: Path, model: Any, folder: Path, architecture: str) -> Path:
    """As llama.cpp's converter writes it: names of the model's tensors, and rows of queries and keys in its order."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, side, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        numbers = tensor
        if architecture == "llama" and side == "lora_B" and (count := heads.get(module.rpartition(".")[2])):
            numbers = pairs_adjacent(tensor, count)
        ours = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        writer.add_tensor(f"{ours}.{side.lower()}", numbers.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("case", ["llama", "qwen3"])
@pytest.mark.parametrize("way", WAYS)
def test_models_and_adapters_in_gguf_are_the_same(tmp_path: Path, way: Way, case: str) -> None:
    model, architecture = build(CASES[case]), CASES[case].architecture
    folder = write_adapter(tmp_path / "adapter", model)
    path = write_gguf(tmp_path / "model.gguf", model, architecture)
    adapter = write_gguf_adapter(tmp_path / "adapter.gguf", model, folder, architecture)
    expected = expected_logits(merged(model, folder), LENGTH)
    for one in logits_of(steps_of(way, path, folder, adapter), piece(1, 0, LENGTH), piece(2, 0, LENGTH, 1)):
        assert largest_error(one, expected) < MAX_ERROR


def config_of(truth: Truth, **options: Any) -> EngineConfig:
    return EngineConfig(
        model=truth.path, served_model_names=("m",), device="cpu", dtype="float32", kv_cache_memory_bytes=2**20,
        **{"enable_lora": True} | options,
    )  # fmt: skip


@pytest.mark.parametrize("truth", ["llama"], indirect=True)
def test_adapters_come_and_go_while_the_engine_runs(truth: Truth, tmp_path: Path) -> None:
    modules = (LoraModule("all", truth.adapters[0]),)
    loaded = load_runner(config_of(truth, lora_modules=modules, max_loras=2), lambda *_: None)
    adapters = loaded.adapters
    assert adapters is not None
    adapters.load(2, truth.adapters[1])
    with pytest.raises(ConfigError, match="--max-loras 2: so many adapters are loaded; unload one first"):
        adapters.load(3, truth.adapters[1])
    adapters.unload(1)
    with pytest.raises(ModelNotFound, match="there is no adapter at"):
        adapters.load(3, tmp_path / "none")
    with pytest.raises(ModelNotFound, match="cannot be read"):
        adapters.load(4, tmp_path / ("x" * 300))
    with pytest.raises(ConfigError, match="has rank 32, and --max-lora-rank is 16"):
        adapters.load(5, write_adapter(tmp_path / "wide", truth.model, r=32))
    adapters.load(6, truth.adapters[0])


@pytest.mark.parametrize("truth", ["llama"], indirect=True)
def test_what_cannot_be_is_refused_before_weights_are_read(truth: Truth, tmp_path: Path) -> None:
    wide = write_adapter(tmp_path / "wide", truth.model, r=32)
    with pytest.raises(ConfigError, match="has rank 32, and --max-lora-rank is 16"):
        load_runner(config_of(truth, lora_modules=(LoraModule("wide", wide),)), lambda *_: None)
    own = load_runner(config_of(truth, enable_lora=False, adapter=wide), lambda *_: None)  # a Modelfile's has its own
    assert own.adapters is not None
    assert load_runner(config_of(truth, enable_lora=False), lambda *_: None).adapters is None


def greedy_requests() -> list[AddRequest]:
    """Of the model, both adapters and the first again, with texts that repeat themselves."""
    sampling = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    return [
        AddRequest(
            request_id=f"r{number}", prompt_token_ids=(5, 9, 30, 41, 7 + number) * 3, sampling=sampling,
            adapter=adapter,
        )
        for number, adapter in enumerate((0, 1, 2, 1))
    ]  # fmt: skip


GUESSES = SpeculativeConfig(num_speculative_tokens=4, prompt_lookup_min=1, prompt_lookup_max=3)


@pytest.mark.parametrize("truth", ["llama"], indirect=True)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("has_draft", [False, True])
def test_guesses_change_no_token_of_a_request_with_an_adapter(truth: Truth, way: Way, *, has_draft: bool) -> None:
    steps = steps_of(way, truth.path, *truth.adapters)
    # The draft is the model without adapters, and has none: it would fail if it were asked for one.
    drafter = Drafter(steps_of(way, truth.path)) if has_draft else None
    speculation = Speculation(lambda: DraftProposer(GUESSES) if has_draft else LookupProposer(GUESSES))
    expected, _ = run(ModelRunner(steps, seed=0), greedy_requests(), None, num_blocks=50)
    answers, drafts = run(ModelRunner(steps, seed=0, drafter=drafter), greedy_requests(), speculation, num_blocks=50)
    assert answers == expected
    assert len({tuple(answer["tokens"]) for answer in answers.values()}) == 4, "each adapter says something else"
    assert drafts is not None
    assert 0 < sum(drafts.num_accepted_tokens_per_pos) <= drafts.num_draft_tokens
