"""Good and bad InferenceServices, judged three times: by the models, by the schema, by a real API server.

The models run in `kubectl octavo render` and in the operator, the schema and its CEL rules in the API server. They come
from one source (octavo_operator/api), and here it shows that they agree. The samples are in samples/.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import pytest
import yaml
from jsonschema import Draft4Validator

from octavo_cluster.apiserver import ApiServer
from octavo_operator import names
from octavo_operator.api.crd import custom_resource_definition
from octavo_operator.cli import read
from octavo_operator.errors import SpecInvalid

ROOT: Final = Path(__file__).parents[2]
SAMPLES: Final = Path(__file__).parent / "samples"

Document = dict[str, Any]

MINIMUM: Final[Document] = {
    "apiVersion": names.API_VERSION,
    "kind": names.KIND,
    "metadata": {"name": "llama"},
    "spec": {"model": {"source": "pvc://models/llama.gguf"}},
}


def manifest(sample: Document) -> Document:
    """The InferenceService of a sample: the least that is good, with the sample's fields in place of its own."""
    metadata, spec = sample.get("metadata", {}), sample.get("spec", {})
    return {
        **MINIMUM,
        "metadata": {**MINIMUM["metadata"], **metadata},
        "spec": {**MINIMUM["spec"], **spec} if spec is not None else None,
    }


@dataclass(frozen=True)
class Bad:
    """A manifest that must be refused."""

    what: str
    document: Document
    says: str  # part of the API server's sentence
    field: str | None = None  # which is said to be wrong; None: the sentence names it itself
    by: Literal["schema", "rule"] = "rule"  # rule: plain OpenAPI would let it pass, only CEL refuses it
    model_says: str | None = None  # part of pydantic's sentence, where that is its own


def read_samples(path: Path) -> list[Document]:
    """The samples of a file."""
    samples: list[Document] = yaml.safe_load(path.read_text())
    return samples


def read_bad(sample: Document) -> Bad:
    """A bad sample of a file."""
    told = {key: value for key, value in sample.items() if key not in {"metadata", "spec"}}
    return Bad(document=manifest(sample), **told)


GOOD: Final = {
    **{sample["what"]: manifest(sample) for sample in read_samples(SAMPLES / "good.yaml")},
    "the longest name": manifest({"metadata": {"name": "a" * names.MAX_NAME_LENGTH}}),
}
BAD: Final = (
    *(read_bad(sample) for path in sorted(SAMPLES.glob("bad-*.yaml")) for sample in read_samples(path)),
    Bad(
        "an endless source",
        manifest({"spec": {"model": {"source": f"pvc://models/{'a' * 1024}.gguf"}}}),
        "may not be more than 1024",
        "spec.model.source",
        by="schema",
        model_says="at most 1024 characters",
    ),
    Bad(
        "a crowd of flags",
        manifest({"spec": {"engine": {"extraArgs": ["--seed=1"] * 33}}}),
        "must have at most 32 items",
        "spec.engine.extraArgs",
        by="schema",
        model_says="should have at most 32 items",
    ),
)


def test_no_sample_is_lost_and_there_are_enough() -> None:
    assert len({bad.what for bad in BAD}) == len(BAD) > 130


def by_name(bad: Bad) -> str:
    return bad.what


@pytest.fixture(params=GOOD.values(), ids=list(GOOD))
def good(request: pytest.FixtureRequest) -> Document:
    document: Document = request.param
    return document


@pytest.fixture(params=BAD, ids=by_name)
def bad(request: pytest.FixtureRequest) -> Bad:
    sample: Bad = request.param
    return sample


# The models


def test_the_models_take_what_is_good(good: Document) -> None:
    assert read(good).name == good["metadata"]["name"]


def test_the_models_refuse_what_is_bad_and_name_the_field(bad: Bad) -> None:
    with pytest.raises(SpecInvalid) as refusal:
        read(bad.document)
    findings = str(refusal.value).splitlines()[1:]
    says = bad.says if bad.model_says is None else bad.model_says
    path = "" if bad.field is None else re.escape(bad.field) + "[:.[]"
    assert any(re.match(f"  {path}", finding) and says in finding for finding in findings), findings


# The schema


def strict_json_schema(schema: Document) -> Document:
    """Plain JSON Schema for what OpenAPI and strict field validation say together; CEL is left out."""
    strict = {key: value for key, value in schema.items() if not key.startswith("x-")}
    if schema.get("x-kubernetes-int-or-string"):
        strict["type"] = ["integer", "string"]
    if "properties" in schema:
        children = {name: strict_json_schema(child) for name, child in schema["properties"].items()}
        optional = children.keys() - schema.get("required", [])
        strict["properties"] = children | {name: {"anyOf": [children[name], {"type": "null"}]} for name in optional}
        strict["additionalProperties"] = False
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            strict[keyword] = strict_json_schema(schema[keyword])
    return strict


@pytest.fixture(scope="module")
def schema() -> Draft4Validator:
    version = custom_resource_definition()["spec"]["versions"][0]
    root = version["schema"]["openAPIV3Schema"]
    return Draft4Validator(strict_json_schema(root))


def test_the_schema_takes_what_is_good(schema: Draft4Validator, good: Document) -> None:
    assert [error.message for error in schema.iter_errors(good)] == []


def test_the_schema_refuses_what_needs_no_rule(schema: Draft4Validator, bad: Bad) -> None:
    refused = not schema.is_valid(bad.document)
    assert refused == (bad.by == "schema")


# The API server


@pytest.fixture(scope="module")
def server(api_server: ApiServer) -> ApiServer:
    api_server.kubectl("apply", "--server-side", f"--filename={ROOT / 'crds'}")
    api_server.kubectl("wait", "crd", names.CRD_NAME, "--for=condition=Established", "--timeout=30s")
    return api_server


def dry_run(server: ApiServer, document: Document) -> str:
    """What the API server's strict validation says of a manifest; nothing, if it takes it."""
    answer = server.kubectl(
        "create", "--dry-run=server", "--validate=strict", "--filename=-", input=json.dumps(document), check=False
    )
    return "" if answer.returncode == 0 else answer.stderr


@pytest.mark.apiserver
def test_the_api_server_takes_what_is_good(server: ApiServer, good: Document) -> None:
    assert dry_run(server, good) == ""


@pytest.mark.apiserver
def test_the_api_server_refuses_what_is_bad_and_names_the_field(server: ApiServer, bad: Bad) -> None:
    answer = dry_run(server, bad.document)
    assert bad.says in answer
    assert bad.field is None or bad.field in answer
    assert answer != ""


@pytest.mark.apiserver
@pytest.mark.parametrize("path", sorted((ROOT / "manifests/samples").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_api_server_takes_the_shipped_samples(server: ApiServer, path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        assert dry_run(server, document) == ""
