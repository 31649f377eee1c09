"""Where a model is, or an adapter: the grammar of spec.model.source.

    pvc://CLAIM/PATH/FILE.gguf, pvc://CLAIM/[PATH/]     a PersistentVolumeClaim of the same namespace, mounted read-only
    hf://ORG/REPO[@REVISION][:WHAT]                     Hugging Face; WHAT: FILE.gguf, a quantisation, or patterns
    https://HOST[:PORT]/PATH/FILE.gguf, http://         any web server
    s3://BUCKET/PATH/FILE.gguf, s3://BUCKET/PREFIX/     an object, or a folder of objects
    oci://HOST[:PORT]/REPOSITORY[:TAG|@sha256:DIGEST]   an OCI artifact or image
    ollama://[HOST[:PORT]/][NAMESPACE/]MODEL[:TAG]      a registry that speaks Ollama's protocol

LoRA adapters (spec.adapters) have the same, but for Ollama's, which come as part of a model.

Used by model.py and adapters.py, whose rules these patterns are, and by desired/, which asks what has to be mounted or
pulled. The engine's `octavo pull` reads the same notation (a test holds the two together).
"""

import re
from dataclasses import dataclass
from typing import Final

from octavo_operator.api.base import DNS_SUBDOMAIN, Rule, matches

_SCHEMES: Final = ("pvc://", "hf://", "https://", "http://", "s3://", "oci://", "ollama://")
_DOT_SEGMENT: Final = "[/:][.][.]?(?:[/:]|$)"
_FOLDERS: Final = "(?:[-A-Za-z0-9._+]+/)*"
_FILE: Final = "[-A-Za-z0-9._+]+[.]gguf"

_PVC: Final = f"pvc://({DNS_SUBDOMAIN})/({_FOLDERS}(?:{_FILE})?)"
_REVISION: Final = "[A-Za-z0-9](?:[.]?[-A-Za-z0-9_/])*"
_WHAT: Final = "[.]?[-A-Za-z0-9_+,*](?:[.]?[-A-Za-z0-9_+/,*])*"
_HUB_NAME: Final = "[A-Za-z0-9](?:[.]?[-A-Za-z0-9_])*"
_HF: Final = f"hf://{_HUB_NAME}/{_HUB_NAME}(?:@{_REVISION})?(?::{_WHAT})?"
_HOST: Final = "[A-Za-z0-9](?:[-A-Za-z0-9.]*[A-Za-z0-9])?(?::[0-9]{1,5})?"
_WEB: Final = f"https?://{_HOST}/(?:[-A-Za-z0-9._+~%]+/)*[-A-Za-z0-9._+~%]+[.]gguf"
_S3: Final = "s3://[a-z0-9][-a-z0-9.]*[a-z0-9]/(?:[-A-Za-z0-9._+=@]+/)*(?:[-A-Za-z0-9._+=@]+(?:/|[.]gguf))"
_PART: Final = "[A-Za-z0-9_](?:[.]?[-A-Za-z0-9_])*"
_DIGEST: Final = "@sha256:[0-9a-f]{64}"
_OCI: Final = f"oci://{_PART}(?::[0-9]{{1,5}})?(?:/{_PART})+(?::{_PART}|{_DIGEST})?"
_OLLAMA: Final = f"ollama://(?:{_PART}(?::[0-9]{{1,5}})?/)?(?:{_PART}/)*{_PART}(?::{_PART}|{_DIGEST})?"


def _of_scheme(scheme: str, pattern: str, message: str) -> Rule:
    """A rule that only looks at sources of one scheme."""
    rule = matches(pattern, message)
    return Rule(
        cel=f"!self.startsWith('{scheme}') || {rule.cel}",
        holds=lambda source: not source.startswith(scheme) or rule.holds(source),
        message=message,
    )


_NO_DOT_SEGMENT: Final = Rule(
    cel=f"!self.matches('{_DOT_SEGMENT}')",
    holds=lambda source: re.search(_DOT_SEGMENT, source) is None,
    message="must not contain the path segments '.' or '..': name the file by its full path",
)

# Of spec.model.source.
SOURCE_RULES: Final = (
    Rule(
        cel=" || ".join(f"self.startsWith('{scheme}')" for scheme in _SCHEMES),
        holds=lambda source: source.startswith(_SCHEMES),
        message=f"must start with {', '.join(_SCHEMES[:-1])} or {_SCHEMES[-1]}, such as pvc://models/model.gguf",
    ),
    _NO_DOT_SEGMENT,
    _of_scheme(
        "pvc://",
        _PVC,
        "must have the form pvc://CLAIM/PATH/FILE.gguf, such as pvc://models/llama/model.gguf, or pvc://CLAIM/FOLDER/ "
        "with a slash at its end",
    ),
    _of_scheme(
        "hf://",
        _HF,
        "must have the form hf://ORG/REPO[@REVISION][:WHAT], where WHAT is FILE.gguf, a quantisation such as Q4_K_M, "
        "or patterns such as *.safetensors,*.json",
    ),
    _of_scheme(
        "http",
        _WEB,
        "must have the form https://HOST/PATH/FILE.gguf (or http://), without user, query or fragment",
    ),
    _of_scheme(
        "s3://",
        _S3,
        "must have the form s3://BUCKET/PATH/FILE.gguf, or s3://BUCKET/PREFIX/ with a slash at its end",
    ),
    _of_scheme(
        "oci://",
        _OCI,
        "must have the form oci://HOST/REPOSITORY[:TAG] or oci://HOST/REPOSITORY@sha256:DIGEST",
    ),
    _of_scheme(
        "ollama://",
        _OLLAMA,
        "must have the form ollama://[HOST/][NAMESPACE/]MODEL[:TAG], such as ollama://qwen3:0.6b",
    ),
)

# Of spec.adapters[].source: one sentence for all schemes, because there the CRD has no room for one each.
ADAPTER_RULES: Final = (
    _NO_DOT_SEGMENT,
    matches(
        f"{_PVC}|{_HF}|{_WEB}|{_S3}|{_OCI}",
        "must have the form hf://ORG/REPO[@REVISION][:FILE.gguf], pvc://CLAIM/FOLDER/, s3://BUCKET/PREFIX/ (or a "
        "FILE.gguf there), https://HOST/PATH/FILE.gguf (or http://), or oci://HOST/REPOSITORY[:TAG|@DIGEST]",
    ),
)


@dataclass(frozen=True, slots=True)
class ClaimPath:
    """A file or folder in a volume: there is nothing to pull."""

    claim: str  # the PersistentVolumeClaim's name
    path: str  # relative to the root of the volume; empty: the root


@dataclass(frozen=True, slots=True)
class Remote:
    """What `octavo pull` brings into the pod."""

    url: str  # as the user wrote it

    @property
    def scheme(self) -> str:
        """Such as hf."""
        return self.url.partition("://")[0]


def parse(source: str) -> ClaimPath | Remote:
    """What a valid source points at."""
    if match := re.fullmatch(_PVC, source):
        return ClaimPath(claim=match[1], path=match[2].removesuffix("/"))
    return Remote(url=source)
