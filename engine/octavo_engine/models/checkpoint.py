"""A model on this machine before any weight is read: its spec, and where each tensor lies. No torch here.

Called by runner.py and by whoever plans memory. A model is a GGUF file or a folder as Hugging Face lays it out:
config.json, generation_config.json, and model.safetensors or the shards that model.safetensors.index.json lists.
All that can be wrong with a model but its numbers is found here, or when a tensor is asked for (weights/stored.py).
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from octavo_engine.errors import ModelInvalid, ModelNotFound, ModelUnsupported
from octavo_engine.models.family import GGUF_NAMES
from octavo_engine.models.options import Options
from octavo_engine.models.registry import FAMILIES
from octavo_engine.weights.gguf import GGUFHeader, read_header
from octavo_engine.weights.quantized import assemble, scheme_from_config
from octavo_engine.weights.safetensors import read_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from octavo_engine.models.family import Family, LayerRole, ModelRole
    from octavo_engine.models.spec import DecoderSpec
    from octavo_engine.weights.gguf import TensorInfo
    from octavo_engine.weights.quantized import QuantizedTensor
    from octavo_engine.weights.safetensors import RawTensor

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"  # what makes a folder a model
POOLING_FILE = "1_Pooling/config.json"  # sentence-transformers': how a model made for embeddings makes them
_GENERATION_FILE = "generation_config.json"
_INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"

# Where the text model of one that sees images keeps its tensors -> where a text model has them.
_TEXT_PREFIXES = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.": ""}
_IMAGE_PREFIXES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model's spec and its tensors."""

    path: Path  # the file or folder
    architecture: str  # as the model calls it
    spec: DecoderSpec
    tensors: Mapping[str, TensorInfo | QuantizedTensor]  # by their names in a text model
    names: Mapping[ModelRole | LayerRole, str]  # by role; `{layer}` is the layer's number
    norm_offset: float  # to be added to the weights of norms
    pairs_adjacent: bool  # rows of queries and keys have the pairs of a rotation side by side, not in halves of a head
    method: str | None = None  # of quantisation, as config.json calls it

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(tensor.num_elements for tensor in self.tensors.values())


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the description of the model at `path`, a GGUF file or a folder with a config.json.

    Raises:
        ModelNotFound: there is nothing, or a file of it is missing.
        ModelInvalid: a file is truncated or corrupt, or contradicts itself.
        ModelUnsupported: the architecture or one of its options is not computed by this engine; names the key.
    """
    return _from_folder(path) if path.is_dir() else checkpoint_from_gguf(read_header(path))


def checkpoint_from_gguf(header: GGUFHeader) -> Checkpoint:
    """The model that a GGUF header describes.

    Raises:
        ModelInvalid: a key is missing, of the wrong type or contradicts another.
        ModelUnsupported: the architecture or one of its options is not computed by this engine; names the key.
    """
    architecture = header.require("general.architecture", str)
    families = {name: family for family in FAMILIES for name in family.ggufs}
    if architecture not in families:
        raise ModelUnsupported(
            f"{header.path.name}: general.architecture is {architecture}; supported: {', '.join(sorted(families))}"
        )
    prefix = f"{architecture}."
    values = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    metadata = Options(header.path.name, f"metadata key {prefix}", values)
    family = families[architecture]
    spec = family.ggufs[architecture](metadata, header)
    metadata.require_known()
    return Checkpoint(
        path=header.path,
        architecture=architecture,
        spec=spec,
        tensors=header.tensors,
        names=GGUF_NAMES,
        norm_offset=0.0,
        pairs_adjacent=family.gguf_pairs_adjacent,
    )


def spec_from_config(config: Mapping[str, object]) -> tuple[DecoderSpec, Family]:
    """What a parsed config.json describes, and whose it is; without generation_config.json.

    Raises:
        ModelInvalid: a key is missing, of the wrong type or contradicts another.
        ModelUnsupported: the architecture or one of its options is not computed by this engine; names the key.
    """
    options = Options(CONFIG_FILE, "key ", config)
    families = {name: family for family in FAMILIES for name in family.configs}
    named = options.get("architectures")
    if not isinstance(named, list) or not named:
        options.invalid("architectures", "is not a list of names")
    architecture = next((name for name in named if name in families), None)
    if architecture is None:
        supported = ", ".join(sorted(families))
        options.unsupported("architectures", f"is {', '.join(map(str, named))}; supported: {supported}")
    family = families[architecture]
    spec = family.configs[architecture](options)
    return replace(spec, eos_token_ids=_eos_token_ids(options)), family


def _from_folder(folder: Path) -> Checkpoint:
    config = _read_json(folder / CONFIG_FILE)
    spec, family = spec_from_config(config)
    if (folder / _GENERATION_FILE).is_file():
        options = Options(_GENERATION_FILE, "key ", _read_json(folder / _GENERATION_FILE))
        spec = replace(spec, eos_token_ids=spec.eos_token_ids | _eos_token_ids(options))
    if (folder / POOLING_FILE).is_file():
        pooling = Options(POOLING_FILE, "key ", _read_json(folder / POOLING_FILE))
        if not pooling.get("pooling_mode_lasttoken"):
            pooling.unsupported("pooling_mode_lasttoken", "is not true: embeddings here are the last token's state")
    scheme = scheme_from_config(Options(CONFIG_FILE, "key ", config))
    tensors = assemble(_text_tensors(_folder_tensors(folder)), scheme)
    if spec.tied_embeddings:  # some files have the embedding a second time
        tensors.pop(family.config_names["output"], None)
    return Checkpoint(
        path=folder,
        architecture=str(config.get("model_type", "unnamed")),
        spec=spec,
        tensors=tensors,
        names=family.config_names,
        norm_offset=family.config_norm_offset,
        pairs_adjacent=False,
        method=None if scheme is None else scheme.method,
    )


def _folder_tensors(folder: Path) -> dict[str, TensorInfo | RawTensor]:
    """All tensors of a folder by their names in its files."""
    if not (folder / _INDEX_FILE).is_file():
        if not (folder / _SINGLE_FILE).is_file():
            raise ModelNotFound(f"{folder.name}: neither {_SINGLE_FILE} nor {_INDEX_FILE} is in the folder")
        return read_tensors(folder / _SINGLE_FILE)
    index = Options(_INDEX_FILE, "key ", _read_json(folder / _INDEX_FILE))
    file_of = index.get("weight_map")
    if not isinstance(file_of, dict) or not all(
        isinstance(name, str) and "/" not in name and name.endswith(".safetensors") for name in file_of.values()
    ):
        index.invalid("weight_map", "is not an object of file names")
    shards = {}
    for name in sorted(set(file_of.values())):
        if not (folder / name).is_file():
            raise ModelNotFound(f"{folder.name}: shard {name}, which {_INDEX_FILE} lists, is missing")
        shards[name] = read_tensors(folder / name)
    for tensor, name in file_of.items():
        if tensor not in shards[name]:
            raise ModelInvalid(f"{name}: tensor {tensor} is missing, though {_INDEX_FILE} says that it is here")
    return {tensor: shards[name][tensor] for tensor, name in file_of.items()}


def _text_tensors(tensors: Mapping[str, TensorInfo | RawTensor]) -> dict[str, TensorInfo | RawTensor]:
    """The text model's tensors under the names that they have in a text model.

    Left out are the image parts and the rotary frequencies, which old files have and which follow from the spec.
    """
    images = [name for name in tensors if name.startswith(_IMAGE_PREFIXES)]
    if images:
        logger.warning("only the text model is served: %d tensors such as %s are left out", len(images), images[0])
    text = {}
    for name, tensor in tensors.items():
        if name.startswith(_IMAGE_PREFIXES) or name.endswith(".rotary_emb.inv_freq"):
            continue
        text[text_name(name)] = tensor
    return text


def text_name(name: str) -> str:
    """The name that a tensor or module of a model that sees images has in a text model."""
    prefix = next((prefix for prefix in _TEXT_PREFIXES if name.startswith(prefix)), "")
    return _TEXT_PREFIXES.get(prefix, "") + name.removeprefix(prefix)


def _eos_token_ids(options: Options) -> frozenset[int]:
    value = options.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        options.invalid("eos_token_id", f"is {value!r}, neither a token id nor a list of them")
    return frozenset(ids)


def _read_json(path: Path) -> dict[str, object]:
    if not path.is_file():
        raise ModelNotFound(f"{path.parent.name}: there is no {path.name} in the folder")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelInvalid(f"{path.name}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelInvalid(f"{path.name}: not a JSON object")
    return value
