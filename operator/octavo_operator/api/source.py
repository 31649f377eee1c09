"""Where a model's file is: the grammar of spec.model.source.

    pvc://CLAIM/PATH/FILE.gguf              a PersistentVolumeClaim of the same namespace, mounted read-only
    hf://ORG/REPO[@REVISION]:PATH/FILE.gguf a file of a Hugging Face repository
    https://HOST[:PORT]/PATH/FILE.gguf      any web server

Used by v1alpha1.py, whose rules these patterns are, and by desired/, which asks what has to be mounted or pulled. The
engine's `octavo pull` reads the same notation.
"""

import re
from dataclasses import dataclass
from typing import Final

from octavo_operator.api.base import DNS_SUBDOMAIN, Rule, matches

_SCHEMES: Final = ("pvc://", "hf://", "https://")
_DOT_SEGMENT: Final = "[/:][.][.]?(?:/|$)"
_PATH: Final = "(?:[-A-Za-z0-9._+]+/)*[-A-Za-z0-9._+]+[.]gguf"

_PVC: Final = f"pvc://({DNS_SUBDOMAIN})/({_PATH})"
_HF: Final = f"hf://[A-Za-z0-9][-A-Za-z0-9._]*/[A-Za-z0-9][-A-Za-z0-9._]*(?:@[A-Za-z0-9][-A-Za-z0-9._/]*)?:{_PATH}"
_HOST: Final = "[A-Za-z0-9](?:[-A-Za-z0-9.]*[A-Za-z0-9])?(?::[0-9]{1,5})?"
_HTTPS: Final = f"https://{_HOST}/(?:[-A-Za-z0-9._+~%]+/)*[-A-Za-z0-9._+~%]+[.]gguf"


def _of_scheme(scheme: str, pattern: str, message: str) -> Rule:
    """A rule that only looks at sources of one scheme."""
    rule = matches(pattern, message)
    return Rule(
        cel=f"!self.startsWith('{scheme}') || {rule.cel}",
        holds=lambda source: not source.startswith(scheme) or rule.holds(source),
        message=message,
    )


SOURCE_RULES: Final = (
    Rule(
        cel=" || ".join(f"self.startsWith('{scheme}')" for scheme in _SCHEMES),
        holds=lambda source: source.startswith(_SCHEMES),
        message="must start with pvc://, hf:// or https://, such as pvc://models/model.gguf",
    ),
    Rule(
        cel=f"!self.matches('{_DOT_SEGMENT}')",
        holds=lambda source: re.search(_DOT_SEGMENT, source) is None,
        message="must not contain the path segments '.' or '..': name the file by its full path",
    ),
    _of_scheme("pvc://", _PVC, "must have the form pvc://CLAIM/PATH/FILE.gguf, such as pvc://models/llama/model.gguf"),
    _of_scheme(
        "hf://", _HF, "must have the form hf://ORG/REPO[@REVISION]:FILE.gguf, such as hf://org/repo@main:model.gguf"
    ),
    _of_scheme(
        "https://",
        _HTTPS,
        "must have the form https://HOST/PATH/FILE.gguf, without user, query or fragment",
    ),
)


@dataclass(frozen=True, slots=True)
class ClaimFile:
    """A file in a volume: there is nothing to pull."""

    claim: str  # the PersistentVolumeClaim's name
    path: str  # relative to the root of the volume


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that `octavo pull` brings into the pod."""

    url: str  # hf:// or https://, as the user wrote it


def parse(source: str) -> ClaimFile | RemoteFile:
    """What a valid source points at."""
    if match := re.fullmatch(_PVC, source):
        return ClaimFile(claim=match[1], path=match[2])
    return RemoteFile(url=source)
