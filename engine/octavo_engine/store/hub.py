"""Which files of a repository of the Hugging Face hub a source means: the hub's own client asks it."""

from __future__ import annotations

import asyncio
import fnmatch
import re
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from octavo_engine.errors import ModelNotFound, ModelUnsupported, SourceForbidden, SourceUnreachable
from octavo_engine.store.remote import MODEL_SUFFIXES, Hub, Listing, RemoteFile
from octavo_engine.store.source import is_pattern
from octavo_engine.weights.gguf import part_paths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from huggingface_hub.hf_api import RepoSibling

    from octavo_engine.store.source import HubSource

_DEFAULT_QUANTISATION: Final = "Q4_K_M"  # Ollama's choice, of models that come in several
_QUANTISATION: Final = re.compile(
    r"[-._](?P<name>(?:I?Q\d|BF16|F16|F32|FP16|MXFP4)\w*)(?:-\d{5}-of-\d{5})?\.gguf", re.IGNORECASE
)
_ADAPTER_FILES: Final = ("adapter_config.json", "adapter_model.safetensors")  # PEFT's
_PART: Final = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")
_TIMEOUT_SECONDS: Final = 30.0


async def list_hub_files(source: HubSource, hub: Hub) -> Listing:
    """Return the files that `source` means, all parts of a split model among them.

    Raises:
        ModelNotFound: there is no such repository or revision, or nothing in it that is meant.
        ModelUnsupported: it holds several models, and `source` does not say which.
        SourceForbidden, SourceUnreachable: the hub does not tell.
    """
    if source.is_file:  # it need not be asked
        parts = part_paths(PurePosixPath(source.wanted))
        return Listing(
            files=tuple(replace(_file(source, hub, str(part)), name=PurePosixPath(part.name)) for part in parts)
        )
    siblings = {sibling.rfilename: sibling for sibling in await asyncio.to_thread(_ask, source, hub)}
    files = []
    for name in choose(list(siblings), source.wanted, source.text):
        sibling = siblings[name]
        file = replace(_file(source, hub, name), num_bytes=sibling.size)
        known = {"sha256": sibling.lfs.sha256} if sibling.lfs else {"git_sha1": sibling.blob_id}
        files.append(replace(file, **known))
    return Listing(files=tuple(files))


def choose(names: Sequence[str], wanted: str, what: str) -> list[str]:
    """Return the files that are meant by `wanted` out of all `names` of a repository; for errors it is called `what`.

    Nothing wanted: the folder of safetensors files at the top, or a LoRA adapter's, or else the GGUF model, of several
    that in Q4_K_M.

    Raises:
        ModelNotFound, ModelUnsupported: as list_hub_files.
    """
    if is_pattern(wanted):
        patterns = wanted.split(",")
        found = sorted(name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
        if not found:
            raise ModelNotFound(f"{what}: no file of the repository fits the patterns")
        return found
    top = [name for name in names if "/" not in name]
    if not wanted and "config.json" in top and any(name.endswith(".safetensors") for name in top):
        merged = any(name.startswith("model") and name.endswith(".safetensors") for name in top)
        return sorted(
            name
            for name in top
            if name.endswith(MODEL_SUFFIXES)
            and not name.endswith(".gguf")
            and not (merged and name.startswith("consolidated"))  # Mistral's own copy of the same weights
        )
    if not wanted and "config.json" not in top and set(top).issuperset(_ADAPTER_FILES):
        return list(_ADAPTER_FILES)
    return _choose_gguf(names, wanted, what)


def _choose_gguf(names: Sequence[str], wanted: str, what: str) -> list[str]:
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.endswith(".gguf") and not PurePosixPath(name).name.startswith("mmproj"):
            models.setdefault(_PART.sub("", name), []).append(name)
    if not models:
        raise ModelNotFound(f"{what}: the repository holds neither config.json with safetensors files nor GGUF files")
    found = [model for model in models if _quantisation(models[model][0]).upper() == wanted.upper()] if wanted else []
    if not wanted:
        found = list(models) if len(models) == 1 else []
        found = found or [m for m in models if _quantisation(models[m][0]).upper() == _DEFAULT_QUANTISATION]
    there_is = ", ".join(sorted({_quantisation(parts[0]) or model for model, parts in models.items()}))
    if not found and wanted:
        raise ModelNotFound(f"{what}: there is no {wanted} in the repository; there is {there_is}")
    if len(found) != 1:
        raise ModelUnsupported(
            f"{what}: the repository holds several models; say which, as hf://ORG/REPO:FILE.gguf or "
            f"hf://ORG/REPO:QUANTISATION; there is {there_is}"
        )
    return models[found[0]]


def _quantisation(name: str) -> str:
    match = _QUANTISATION.search(name)
    return match["name"] if match else ""


def _file(source: HubSource, hub: Hub, name: str) -> RemoteFile:
    headers = {"Authorization": f"Bearer {hub.token}"} if hub.token else {}
    return RemoteFile(name=PurePosixPath(name), url=source.url(hub.endpoint, name), what=source.text, headers=headers)


def _ask(source: HubSource, hub: Hub) -> list[RepoSibling]:
    from huggingface_hub import HfApi, errors  # noqa: PLC0415 - half a second, and most commands need it not

    api = HfApi(endpoint=hub.endpoint.rstrip("/"), token=hub.token or False)
    try:
        info = api.model_info(
            source.repository, revision=source.revision, files_metadata=True, timeout=_TIMEOUT_SECONDS
        )
    except errors.GatedRepoError as error:
        raise SourceForbidden(f"{source.text}: the repository is gated; accept its terms and set HF_TOKEN") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        # The hub tells who may not see a repository that there is none.
        way_out = "HF_TOKEN does not give access to it" if hub.token else "if it is private, set HF_TOKEN"
        raise ModelNotFound(f"{source.text}: the hub has no such repository or revision; {way_out}") from error
    except Exception as error:  # it lets errors of its HTTP library through, whichever that is
        raise SourceUnreachable(f"{source.text}: the hub at {hub.endpoint} does not tell its files: {error}") from error
    return info.siblings or []
