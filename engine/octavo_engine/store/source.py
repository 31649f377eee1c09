"""What names a model somewhere else, read: sources with a scheme, and the short names that people type for them.

    hf://ORG/REPO[@REVISION][:WHAT]         a repository of the Hugging Face hub; the revision is a branch, tag or
                                            commit. WHAT is a file (FILE.gguf), a quantisation (Q4_K_M), or patterns
                                            (*.safetensors,*.json); without it, the model that the repository holds
    https://HOST/PATH/FILE.gguf             a file on a web server; http:// works too
    ollama://[HOST/][NAMESPACE/]MODEL[:TAG] a model of a registry that speaks Ollama's protocol (registry.ollama.ai)
    oci://HOST/REPOSITORY[:TAG|@DIGEST]     an OCI artifact or image that holds model files
    s3://BUCKET/KEY                         an object FILE.gguf, or a PREFIX/ under which a model's files are

`interpret` is what a MODEL argument means that is nothing on this machine. Called by local.py and the command line;
does no input or output.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final
from urllib.parse import quote, unquote, urlsplit

from octavo_engine.errors import ConfigError, ModelNotFound

HUB: Final = "https://huggingface.co"
OLLAMA: Final = "registry.ollama.ai"

_HUB_HOSTS: Final = ("hf.co", "huggingface.co")
_OLLAMA_PAGE: Final = "ollama.com"
_LIBRARY: Final = "library"  # the namespace of Ollama's models without one
_LATEST: Final = "latest"
_WHOLE: Final = "@all"  # ends the place of what shares a prefix in a bucket
_MAX_NAME: Final = 512
_HUB_SOURCE: Final = re.compile(
    r"hf://(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^:@\s]+))?(:(?P<wanted>[^:@?#\s]+))?", re.ASCII
)
_HUB_PAGE: Final = re.compile(r"/(?P<repository>[\w.-]+/[\w.-]+)(/(?:blob|resolve)/(?P<revision>[^/]+)/(?P<file>.+))?")
_PART: Final = r"[A-Za-z0-9_][\w.-]*"
_REGISTRY_NAME: Final = re.compile(
    rf"(?:(?P<host>{_PART}(?::\d+)?)/)??(?:(?P<namespace>{_PART}(?:/{_PART})*)/)?(?P<model>{_PART})"
    rf"(?:@(?P<digest>sha256:[0-9a-f]{{64}})|:(?P<tag>{_PART}))?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model somewhere else."""

    text: str  # with its scheme
    path: PurePosixPath  # where it lies in the local store; different sources never share a place
    name: str  # what clients call the model


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource(Source):
    """Files of a repository of the Hugging Face hub."""

    repository: str
    revision: str
    wanted: str  # a file, a quantisation or patterns; empty: the model that is there

    @property
    def is_file(self) -> bool:
        """Whether it names one file, by which its place is known before the hub is asked."""
        return self.wanted.endswith(".gguf") and not is_pattern(self.wanted)

    def url(self, hub: str, file: str) -> str:
        """Return the address of one of the files."""
        revision = quote(self.revision, safe="")
        return f"{hub.rstrip('/')}/{self.repository}/resolve/{revision}/{quote(file)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WebSource(Source):
    """A file on a web server."""

    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrySource(Source):
    """A model in a registry of OCI's distribution protocol; Ollama's manifests are a dialect of OCI's."""

    host: str
    repository: str
    reference: str  # a tag or a digest

    @property
    def is_ollama(self) -> bool:
        """Whether its layers are Ollama's."""
        return self.text.startswith("ollama://")


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketSource(Source):
    """An object, or those that share a prefix, in S3."""

    bucket: str
    key: str  # ends in a slash: a prefix


def is_source(model: str) -> bool:
    """Tell whether `model` is written as a source and not as a path or a name."""
    return "://" in model


def is_pattern(wanted: str) -> bool:
    """Tell whether the part of a hub source after the colon is patterns of file names."""
    return any(character in wanted for character in "*?,[")


def at_revision(text: str, revision: str) -> str:
    """Return the hub source `text` with a revision, which it must not name itself.

    Raises:
        ConfigError: it is no hub source, or names another revision.
    """
    source = interpret(text)
    if not isinstance(source, HubSource):
        raise ConfigError(f"--revision {revision}: only hf:// models have revisions, and {text} is none: leave it out")
    repository, colon, wanted = source.text.removeprefix("hf://").partition(":")
    name, _, named = repository.partition("@")
    if named and named != revision:
        raise ConfigError(f"--revision {revision}: {text} names the revision {named} itself: leave one of them out")
    return f"hf://{name}@{revision}{colon}{wanted}"


def interpret(model: str) -> Source | None:
    """Return what `model` names that is not on this machine; None: it is written as a path.

        llama3.2, qwen3:0.6b, user/model:tag       Ollama's
        Qwen/Qwen3-0.6B                            a repository of the Hugging Face hub, as vLLM has it
        hf.co/ORG/REPO[:QUANTISATION]              the same, as Ollama has it
        HOST/NAMESPACE/MODEL:TAG                   a registry that speaks Ollama's protocol
        SCHEME://...                               as the module says

    Raises:
        ModelNotFound: it has a scheme, and is not what goes with it.
    """
    if is_source(model):
        return parse_source(model)
    host, slash, rest = model.partition("/")
    if slash and host.lower() in _HUB_HOSTS:
        return _parse_hub(f"hf://{rest}")
    if model.startswith(("/", "./", "../", "~")) or model.endswith(".gguf") or len(model) > _MAX_NAME:
        return None
    match = _REGISTRY_NAME.fullmatch(model)
    if match is None:
        return None
    if model.count("/") == 1 and ":" not in model and "@" not in model:
        return _parse_hub(f"hf://{model}")
    return _parse_ollama(f"ollama://{model}")


def parse_source(text: str) -> Source:
    """Read a source.

    Raises:
        ModelNotFound: it is none of the kinds above.
    """
    scheme = text.partition("://")[0]
    readers = {
        "hf": _parse_hub,
        "http": _parse_web,
        "https": _parse_web,
        "ollama": _parse_ollama,
        "oci": _parse_oci,
        "s3": _parse_bucket,
    }
    if scheme == "pvc":
        raise ModelNotFound(
            f"{text}: a pvc:// source is a volume that the operator mounts into a pod; "
            "here, give the path under which the volume is mounted"
        )
    if scheme not in readers:
        known = ", ".join(f"{name}://" for name in readers)
        raise ModelNotFound(f"{text}: {scheme}:// is not a known kind of source; known: {known}")
    return readers[scheme](text)


def _parse_hub(text: str) -> HubSource:
    match = _HUB_SOURCE.fullmatch(text)
    if match is None or ".." in text or "/" in f"{match['wanted']}"[:1]:
        raise ModelNotFound(
            f"{text} is not of the form hf://ORG/REPO[@REVISION][:WHAT], "
            "where WHAT is FILE.gguf, a quantisation such as Q4_K_M, or patterns such as *.safetensors,*.json"
        )
    repository, revision, wanted = match["repository"], match["revision"] or "main", match["wanted"] or ""
    if wanted.endswith(".gguf") and not is_pattern(wanted):
        path = PurePosixPath("hf", repository, revision.replace("/", "--"), wanted)
        name = path.stem
    else:  # a folder, which no folder of single files is called
        path = PurePosixPath("hf", f"{repository}@{_quoted(revision)}" + (f":{_quoted(wanted)}" if wanted else ""))
        name = f"hf.co/{repository}:{wanted}" if wanted and not is_pattern(wanted) else repository
    return HubSource(text=text, path=path, name=name, repository=repository, revision=revision, wanted=wanted)


def _parse_web(text: str) -> Source:
    parts = urlsplit(text)
    host = parts.netloc.rpartition("@")[2]
    if host in _HUB_HOSTS and (page := _HUB_PAGE.fullmatch(unquote(parts.path).rstrip("/"))):
        at, colon = (f"@{page['revision']}", f":{page['file']}") if page["file"] else ("", "")
        return _parse_hub(f"hf://{page['repository']}{at}{colon}")
    segments = [unquote(segment) for segment in parts.path.split("/") if segment]
    if host == _OLLAMA_PAGE and 1 <= len(segments) <= 2:
        return _parse_ollama(f"ollama://{'/'.join(segments)}")
    if not parts.hostname or not segments or not segments[-1].endswith(".gguf"):
        raise ModelNotFound(f"{text} does not name a file that ends in .gguf")
    if any(segment in {".", ".."} or "/" in segment for segment in segments):
        raise ModelNotFound(f"{text}: the path may not contain . or ..")
    path = PurePosixPath(parts.scheme, host.replace(":", "_"), *segments)
    return WebSource(text=text, path=path, name=path.stem, url=text)


def _parse_ollama(text: str) -> RegistrySource:
    match = _REGISTRY_NAME.fullmatch(text.removeprefix("ollama://"))
    if match is None or ".." in text:
        raise ModelNotFound(f"{text} is not of the form ollama://[HOST/][NAMESPACE/]MODEL[:TAG]")
    parts = [part for part in (match["host"], *(match["namespace"] or "").split("/"), match["model"]) if part]
    host, rest = OLLAMA, parts
    if len(parts) > 2 or ":" in parts[0]:
        host, *rest = parts
    repository = "/".join(rest if len(rest) > 1 else (_LIBRARY, *rest))
    reference = match["digest"] or match["tag"] or _LATEST
    short = repository.removeprefix(f"{_LIBRARY}/") if host == OLLAMA else f"{host}/{repository}"
    return RegistrySource(
        text=f"ollama://{host}/{repository}{_reference(reference)}",
        path=PurePosixPath("ollama", _quoted(host), f"{repository}@{_quoted(reference)}"),
        name=short if reference == _LATEST else f"{short}{_reference(reference)}",
        host=host,
        repository=repository,
        reference=reference,
    )


def _parse_oci(text: str) -> RegistrySource:
    match = _REGISTRY_NAME.fullmatch(text.removeprefix("oci://"))
    parts = [match["host"], *(match["namespace"] or "").split("/"), match["model"]] if match else []
    parts = [part for part in parts if part]
    if match is None or ".." in text or len(parts) < 2:
        raise ModelNotFound(f"{text} is not of the form oci://HOST/REPOSITORY[:TAG] or oci://HOST/REPOSITORY@DIGEST")
    host, *rest = parts
    reference = match["digest"] or match["tag"] or _LATEST
    return RegistrySource(
        text=text,
        path=PurePosixPath("oci", _quoted(host), f"{'/'.join(rest)}@{_quoted(reference)}"),
        name=rest[-1],
        host=host,
        repository="/".join(rest),
        reference=reference,
    )


def _parse_bucket(text: str) -> BucketSource:
    bucket, _, key = text.removeprefix("s3://").partition("/")
    segments = key.rstrip("/").split("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]+", bucket) or any(part in {"", ".", ".."} for part in segments):
        raise ModelNotFound(f"{text} is not of the form s3://BUCKET/KEY, where KEY is FILE.gguf or a PREFIX/")
    is_file = key.endswith(".gguf")
    path = PurePosixPath("s3", bucket, key if is_file else f"{key.rstrip('/')}{_WHOLE}")
    name = PurePosixPath(key).stem if is_file else segments[-1]
    return BucketSource(text=text, path=path, name=name, bucket=bucket, key=key if is_file else f"{key.rstrip('/')}/")


def source_at(place: PurePosixPath) -> Source | None:
    """Return the source whose place in the store this is, if it is the place of a folder: the inverse of `path`."""
    match place.parts:
        case ["hf", organisation, repository] if "@" in repository:
            name, _, rest = repository.partition("@")
            revision, colon, wanted = rest.partition(":")
            return _parse_hub(f"hf://{organisation}/{name}@{unquote(revision)}{colon}{unquote(wanted)}")
        case ["ollama" | "oci" as scheme, host, *repository] if "@" in place.name:
            name, _, reference = "/".join(repository).partition("@")
            return parse_source(f"{scheme}://{unquote(host)}/{name}{_reference(unquote(reference))}")
        case ["s3", bucket, *parts] if parts and parts[-1].endswith(_WHOLE):
            return _parse_bucket(f"s3://{bucket}/{'/'.join(parts).removesuffix(_WHOLE)}/")
        case _:
            return None


def short_name(source: Source) -> str:
    """Return the shortest text by which `interpret` knows the source."""
    known = interpret(source.name)
    return source.name if known is not None and known.path == source.path else source.text


def _quoted(text: str) -> str:
    return quote(text, safe="")


def _reference(reference: str) -> str:
    return f"@{reference}" if reference.startswith("sha256:") else f":{reference}"
