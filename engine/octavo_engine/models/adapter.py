"""A LoRA adapter on this machine before any of its weights is read: what it adds to which matrix. No torch here.

Called by planning.py and by weights/low_rank.py. An adapter is a folder as PEFT writes it (adapter_config.json and
adapter_model.safetensors), or a GGUF file as llama.cpp's converter makes of one. It adds scale * B A to a matrix of
the model (Hu et al. 2021). All that can be wrong with it but its numbers is found here, by name.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from octavo_engine.errors import ModelInvalid, ModelNotFound, ModelUnsupported
from octavo_engine.models.checkpoint import text_name
from octavo_engine.models.family import CONFIG_NAMES, GGUF_NAMES
from octavo_engine.models.options import Options
from octavo_engine.models.registry import FAMILIES
from octavo_engine.weights.gguf import TensorInfo, read_header
from octavo_engine.weights.safetensors import read_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from octavo_engine.models.family import LayerRole, ModelRole
    from octavo_engine.models.spec import DecoderSpec
    from octavo_engine.weights.safetensors import RawTensor

CONFIG_FILE: Final = "adapter_config.json"  # what makes a folder an adapter
WEIGHTS_FILE: Final = "adapter_model.safetensors"
ROLES: Final[tuple[LayerRole, ...]] = ("q", "k", "v", "o", "gate", "up", "down")  # the matrices that it may add to

# Keys of adapter_config.json that say nothing about what is computed, or say what the tensors' names say again.
_WITHOUT_EFFECT: Final = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
        "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version",
        "qalora_group_size", "revision", "runtime_config", "task_type",
    }
)  # fmt: skip
# The others start from weights that they take off the model's own: the file is not for the model as it is.
_INITIALISATIONS: Final = (True, False, "gaussian", "eva", "orthogonal")
_PEFT_TENSOR: Final = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_GGUF_KEYS: Final = frozenset(
    {"adapter.type", "adapter.lora.alpha", "adapter.lora.task_name", "adapter.lora.prompt_prefix"}
)
_GGUF_TENSOR: Final = re.compile(r"(?P<module>.+\.weight)\.lora_(?P<side>[ab])")

Place: TypeAlias = "tuple[int, LayerRole]"  # a layer, and the matrix in it


@dataclass(frozen=True, slots=True)
class StoredPair:
    """What is added to one matrix [out, in], as the file has it."""

    a: TensorInfo  # [rank, in]
    b: TensorInfo  # [out, rank]
    scale: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter adds, by place."""

    path: Path  # the folder or file
    pairs: Mapping[Place, StoredPair]
    pairs_adjacent: bool  # as in Checkpoint

    @property
    def rank(self) -> int:
        """The highest of all places."""
        return max(pair.a.shape[0] for pair in self.pairs.values())

    @property
    def num_elements(self) -> int:
        """Numbers in all tensors."""
        return sum(pair.a.num_elements + pair.b.num_elements for pair in self.pairs.values())


def read_adapter(path: Path, spec: DecoderSpec) -> Adapter:
    """Read the description of the adapter at `path` for a model.

    Raises:
        ModelNotFound: there is nothing, or a file of it is missing.
        ModelInvalid: a file is truncated or corrupt, contradicts itself, or is for a model of other shapes.
        ModelUnsupported: it adds to what this engine adds nothing to, or in another way; names the key or tensor.
    """
    try:
        if path.is_dir():
            return _from_folder(path, spec)
        if path.is_file():
            return _from_gguf(path, spec)
    except OSError as error:  # no permission, or no path at all
        raise ModelNotFound(f"the adapter at {path} cannot be read: {error.strerror}") from error
    raise ModelNotFound(f"there is no adapter at {path}: give a folder with {CONFIG_FILE}, or a .gguf file")


def most_elements(spec: DecoderSpec, rank: int) -> int:
    """Numbers in an adapter of that rank which adds to every matrix that it may."""
    return spec.num_layers * rank * sum(map(sum, spec.layer_matrices.values()))


def stacked_rank(rank: int) -> int:
    """What a GPU's kernels fill a rank up to with zeros: a power of two from 16 to 128, or a multiple of 128."""
    return max(16, 1 << (rank - 1).bit_length()) if rank <= 128 else -(-rank // 128) * 128


# PEFT's folders


def _from_folder(folder: Path, spec: DecoderSpec) -> Adapter:
    options = Options(CONFIG_FILE, "key ", _read_config(folder))
    if not (folder / WEIGHTS_FILE).is_file():
        others = "only adapter_model.bin, which may hold code: save it as safetensors"
        what = others if (folder / "adapter_model.bin").is_file() else f"no {WEIGHTS_FILE}"
        raise ModelNotFound(f"{folder.name}: in the folder is {what}")
    rank_of = _by_pattern(options, "rank_pattern", options.size("r"))
    alpha_of = _by_pattern(options, "alpha_pattern", options.number("lora_alpha"))
    is_stabilised = options.flag("use_rslora", default=False)
    is_target = _targets(options)
    names = _places(CONFIG_NAMES, spec)
    halves: dict[Place, dict[str, TensorInfo]] = {}
    scales: dict[Place, float] = {}
    for name, tensor in read_tensors(folder / WEIGHTS_FILE).items():
        match = _PEFT_TENSOR.fullmatch(name)
        module = match["module"] if match else ""
        place = names.get(f"{text_name(module)}.weight")
        if match is None or place is None:
            raise ModelUnsupported(f"{WEIGHTS_FILE}: tensor {name}: {_what_can_be(CONFIG_NAMES)}")
        if not is_target(module):
            raise ModelInvalid(f"{WEIGHTS_FILE}: tensor {name} is of none of the target_modules in {CONFIG_FILE}")
        rank = int(rank_of(module))
        scales[place] = alpha_of(module) / (math.sqrt(rank) if is_stabilised else rank)
        side = match["side"].lower()
        halves.setdefault(place, {})[side] = _checked(WEIGHTS_FILE, tensor, side, rank, spec.layer_matrices[place[1]])
    return Adapter(folder, _joined(WEIGHTS_FILE, halves, scales), pairs_adjacent=False)


def _read_config(folder: Path) -> dict[str, object]:
    """The keys that decide something; refuses those that ask for what is not computed."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ModelNotFound(f"{folder.name}: there is no {CONFIG_FILE} in the folder: it is no adapter")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelInvalid(f"{CONFIG_FILE}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelInvalid(f"{CONFIG_FILE}: not a JSON object")
    options = Options(CONFIG_FILE, "key ", config)
    options.require("peft_type", "LORA")
    options.require("bias", "none")
    options.require("init_lora_weights", *_INITIALISATIONS)
    known = {"r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern"}
    for key in config.keys() - known - _WITHOUT_EFFECT - {"peft_type", "bias", "init_lora_weights"}:
        if config[key]:  # such as use_dora, modules_to_save, lora_bias: off they ask for nothing
            options.unsupported(
                key, f"is {str(config[key])[:80]}, and only plain LoRA is computed: merge this adapter into the model"
            )
    return {key: config[key] for key in known & config.keys()}


def _by_pattern(options: Options, key: str, usual: float) -> Callable[[str], float]:
    """What holds for a module: the value of the first pattern that fits the end of its name (PEFT's rule)."""
    patterns, listed = options.section(key), options.get(key)
    if patterns is None or not isinstance(listed, dict):
        return lambda _module: usual
    read = patterns.size if isinstance(usual, int) else patterns.number
    values = {_expression(options, key, rf"(.*\.)?({pattern})"): read(pattern) for pattern in listed}
    return lambda module: next((value for fits, value in values.items() if fits.fullmatch(module)), usual)


def _targets(options: Options) -> Callable[[str], bool]:
    """Whether a module is one of the targets: a name or the end of one, or a regular expression for the whole."""
    targets = options.get("target_modules")
    if isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        return lambda module: any(module == target or module.endswith(f".{target}") for target in targets)
    if targets is None or targets == "all-linear":
        return lambda _module: True
    if not isinstance(targets, str):
        options.invalid("target_modules", "is neither a list of names nor a regular expression")
    expression = _expression(options, "target_modules", targets)
    return lambda module: expression.fullmatch(module) is not None


def _expression(options: Options, key: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        options.invalid(key, f"has {text[:80]!r}, no regular expression: {error}")


# GGUF files


def _from_gguf(path: Path, spec: DecoderSpec) -> Adapter:
    """Alpha / rank is the scale; queries and keys are in the order in which llama.cpp has the model's."""
    header = read_header(path)
    if header.get("general.type", str, "model") != "adapter" or header.get("adapter.type", str, "") != "lora":
        raise ModelInvalid(f"{path.name}: it is no LoRA adapter: general.type is not adapter, or adapter.type not lora")
    architecture = header.require("general.architecture", str)
    family = next((family for family in FAMILIES if architecture in family.ggufs), None)
    if family is None:
        raise ModelUnsupported(f"{path.name}: general.architecture is {architecture}, which is not served")
    for key in header.metadata:
        if key.startswith("adapter.") and key not in _GGUF_KEYS:  # such as when it begins to count (aLoRA)
            raise ModelUnsupported(f"{path.name}: metadata key {key} is not known to this engine")
    alpha = header.require("adapter.lora.alpha", float)
    names = _places(GGUF_NAMES, spec)
    halves: dict[Place, dict[str, TensorInfo]] = {}
    scales: dict[Place, float] = {}
    for name, tensor in header.tensors.items():
        match = _GGUF_TENSOR.fullmatch(name)
        place = names.get(match["module"]) if match else None
        if match is None or place is None:
            raise ModelUnsupported(f"{path.name}: tensor {name}: {_what_can_be(GGUF_NAMES)}")
        side = match["side"]
        rank = tensor.shape[0 if side == "a" else -1]
        scales[place] = alpha / rank
        halves.setdefault(place, {})[side] = _checked(path.name, tensor, side, rank, spec.layer_matrices[place[1]])
    return Adapter(path, _joined(path.name, halves, scales), pairs_adjacent=family.gguf_pairs_adjacent)


# Both


def _places(names: Mapping[ModelRole | LayerRole, str], spec: DecoderSpec) -> dict[str, Place]:
    """The place of each matrix by its name."""
    return {names[role].format(layer=layer): (layer, role) for layer in range(spec.num_layers) for role in ROLES}


def _what_can_be(names: Mapping[ModelRole | LayerRole, str]) -> str:
    known = ", ".join(names[role].removesuffix(".weight").rpartition(".")[2] for role in ROLES)
    return f"an adapter may add to {known} of the model's layers, by a lora_A and a lora_B of each, and to nothing else"


def _checked(file: str, tensor: TensorInfo | RawTensor, side: str, rank: int, shape: tuple[int, int]) -> TensorInfo:
    if not isinstance(tensor, TensorInfo):
        raise ModelUnsupported(f"{file}: tensor {tensor.name} is not of F32, F16 or BF16")
    expected = (rank, shape[1]) if side == "a" else (shape[0], rank)
    if tensor.shape != expected:
        raise ModelInvalid(
            f"{file}: tensor {tensor.name} has shape {list(tensor.shape)}, but with rank {rank} this model needs "
            f"{list(expected)}: the adapter is for another model, or its description is wrong"
        )
    return tensor


def _joined(
    file: str, halves: Mapping[Place, Mapping[str, TensorInfo]], scales: Mapping[Place, float]
) -> dict[Place, StoredPair]:
    if not halves:
        raise ModelInvalid(f"{file}: it has no tensors")
    for tensors in halves.values():
        if len(tensors) == 1:
            (alone,) = tensors.values()
            raise ModelInvalid(f"{file}: tensor {alone.name} has no counterpart: lora_A and lora_B come together")
    return {place: StoredPair(tensors["a"], tensors["b"], scales[place]) for place, tensors in halves.items()}
