"""Whatever somebody writes into a string of the spec stays that string: no flag, variable or YAML comes of it.

Each string field of the CRD gets hostile text in place of, and inserted into, a good value. What the models refuse (the
API server refuses it too: test_samples.py) is refused. Of what they take, the children differ from those of the good
value in that one string and in nothing else.
"""

import copy
import json
import re
from collections.abc import Iterator
from typing import Any, Final

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.operator.test_command_line_border import parse

from octavo_operator import names, yaml_text
from octavo_operator.api.crd import custom_resource_definition
from octavo_operator.api.v1alpha1 import OWNED_FLAGS, InferenceService
from octavo_operator.desired import children
from octavo_operator.resources import OPTIONAL

Json = dict[str, Any]
Place = tuple[str | int, ...]  # the way to a value in a document; the last part of a map's key is KEY

KEY: Final = "(key)"
ENGINE_IMAGE: Final = "octavo/engine:1"
NODES: Final[Json] = {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["east"]}]}
PODS: Final[Json] = {"labelSelector": {"matchLabels": {"app": "web"}}, "topologyKey": "kubernetes.io/hostname"}
SELECTOR: Final[Json] = {
    "matchLabels": {"app": "chat"},
    "matchExpressions": [{"key": "team", "operator": "In", "values": ["a"]}],
}

# Together they give every string of the CRD a value.
SPECS: Final[tuple[Json, ...]] = (
    {
        "model": {
            "source": "hf://org/repo@main:folder/model.gguf",
            "name": "llama-3.1",
            "tokenSecret": {"name": "hub", "key": "token"},
            "cache": {"claimName": "shared"},
        },
        "accelerator": {"type": "nvidia", "count": 2, "product": "NVIDIA-H100"},
        "replicas": 2,
        "engine": {"image": "registry.example/engine:1", "gpuMemoryUtilization": "0.8", "extraArgs": ["--seed=7"]},
        "endpoint": {
            "apiKeySecret": {"name": "keys", "key": "all"},
            "allowFrom": [
                {"podSelector": SELECTOR, "namespaceSelector": SELECTOR},
                {"ipBlock": {"cidr": "10.0.0.0/8"}},
            ],
        },
        "resources": {
            "requests": {"cpu": "2", "memory": "8Gi", "ephemeral-storage": "20Gi"},
            "limits": {"cpu": "4", "memory": "16Gi", "ephemeral-storage": "40Gi"},
        },
        "pod": {
            "nodeSelector": {"disk": "fast"},
            "tolerations": [{"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}],
            "labels": {"team": "ml"},
            "annotations": {"example.com/note": "anything"},
            "imagePullSecrets": [{"name": "registry"}],
            "priorityClassName": "high",
            "runtimeClassName": "nvidia",
            "env": [
                {"name": "HF_ENDPOINT", "value": "https://hub.example"},
                {"name": "FROM_SECRET", "valueFrom": {"secretKeyRef": {"name": "some", "key": "one"}}},
                {"name": "FROM_MAP", "valueFrom": {"configMapKeyRef": {"name": "some", "key": "one"}}},
            ],
            "affinity": {
                "nodeAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [NODES]},
                    "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "preference": NODES}],
                },
                "podAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": [PODS],
                    "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "podAffinityTerm": PODS}],
                },
                "podAntiAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": [PODS],
                    "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "podAffinityTerm": PODS}],
                },
            },
            "topologySpreadConstraints": [{"topologyKey": "topology.kubernetes.io/zone"}],
        },
    },
    {
        "model": {
            "source": "https://models.example/folder/model.gguf",
            "cache": {"size": "40Gi", "storageClassName": "fast", "accessMode": "ReadWriteMany"},
        },
        "autoscaling": {"maxReplicas": 4, "metric": "queue", "target": "4"},
    },
    {"model": {"source": "pvc://models/folder/model.gguf"}},
    {
        "model": {"source": "s3://bucket/folder/model.gguf", "credentialsSecret": {"name": "bucket"}},
        "profiles": [
            {
                "name": "support",
                "system": "You answer as support.",
                "parameters": {
                    "temperature": "0.2",
                    "top_p": "0.9",
                    "min_p": "0.1",
                    "repeat_penalty": "1.1",
                    "presence_penalty": "0.3",
                    "frequency_penalty": "0.4",
                    "stop": ["###"],
                },
                "messages": [{"role": "user", "content": "Is Toronto in Canada?"}],
            }
        ],
        "adapters": [
            {"name": "sql", "source": "hf://org/sql-lora", "tokenSecret": {"name": "hub", "key": "token"}},
            {"name": "chess", "source": "oci://registry.example/chess", "credentialsSecret": {"name": "login"}},
        ],
    },
)
RESHAPED: Final = {
    "spec.model.source",
    "spec.adapters[].name",
    "spec.autoscaling.target",
}  # what becomes of them is not the same string


def render(spec: Json) -> list[Json]:
    """The children of a service with this spec, on a cluster that has every kind.

    Raises:
        ValidationError: the spec is refused.
    """
    service = InferenceService.model_validate(
        {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": "llama", "namespace": "team-a", "uid": "u"},
            "spec": spec,
        },
        extra="forbid",
    )
    prometheus = "http://prometheus.monitoring.svc:9090"
    made = children(service, engine_image=ENGINE_IMAGE, offered=list(OPTIONAL), prometheus_url=prometheus)
    return [unfolded(child) for child in made]


def unfolded(child: Json) -> Json:
    """A child with the files of a ConfigMap as their reader has them: they are YAML within YAML."""
    if child["kind"] != "ConfigMap":
        return child
    return {**child, "data": {name: yaml.safe_load(text) for name, text in child["data"].items()}}


GOOD: Final = [render(spec) for spec in SPECS]


# The strings of the CRD


def string_fields(schema: Json, path: str) -> Iterator[str]:
    """Every string below a schema that is not one of a few words; also the keys of maps."""
    if "enum" in schema:
        return
    if schema.get("type") == "string" or schema.get("x-kubernetes-int-or-string"):
        yield path
    for name, child in schema.get("properties", {}).items():
        yield from string_fields(child, f"{path}.{name}")
    if "items" in schema:
        yield from string_fields(schema["items"], f"{path}[]")
    if "additionalProperties" in schema:
        yield f"{path}.{KEY}"
        yield from string_fields(schema["additionalProperties"], f"{path}.*")


(_VERSION,) = custom_resource_definition()["spec"]["versions"]
SCHEMA: Final[Json] = _VERSION["schema"]["openAPIV3Schema"]["properties"]["spec"]
FIELDS: Final = set(string_fields(SCHEMA, "spec"))


def strings(schema: Json, value: Any, place: Place, field: str) -> Iterator[tuple[Place, str]]:
    """Every string of a document that is not one of a few words, keys included, and the field of the CRD that it is."""
    if "enum" in schema:
        return
    if isinstance(value, str):
        yield place, field
    for name, child in schema.get("properties", {}).items():
        if name in value:
            yield from strings(child, value[name], (*place, name), f"{field}.{name}")
    if "items" in schema:
        for number, item in enumerate(value):
            yield from strings(schema["items"], item, (*place, number), f"{field}[]")
    if "additionalProperties" in schema:
        for name, child in value.items():
            yield (*place, name, KEY), f"{field}.{KEY}"
            yield from strings(schema["additionalProperties"], child, (*place, name), f"{field}.*")


FIELD_OF: Final = {
    (number, place): field for number, spec in enumerate(SPECS) for place, field in strings(SCHEMA, spec, (), "spec")
}
PLACES: Final = list(FIELD_OF)


def test_every_string_of_the_crd_is_put_to_the_test() -> None:
    assert set(FIELD_OF.values()) == FIELDS
    assert len(FIELDS) > 50


def there(spec: Json, place: Place) -> str:
    """The string at a place."""
    value: Any = spec
    for part in place[:-2] if place[-1] == KEY else place:
        value = value[part]
    return str(place[-2] if place[-1] == KEY else value)


def changed(spec: Json, place: Place, text: str) -> Json:
    """The spec with another string at a place."""
    result = copy.deepcopy(spec)
    value: Any = result
    path = place[:-2] if place[-1] == KEY else place[:-1]
    for part in path:
        value = value[part]
    if place[-1] == KEY:
        value[text] = value.pop(place[-2])
    else:
        value[place[-1]] = text
    return result


# What must not become of them


def leaves(good: Any, now: Any, old: str, new: str) -> Iterator[tuple[Any, Any]]:
    """The values in which two documents of the same shape differ; `old` may be called `new` where it is a key."""
    assert type(good) is type(now), (good, now)
    if isinstance(good, dict):
        assert now.keys() == good.keys() or now.keys() ^ good.keys() == {old, new}, (good, now)
        for name, value in good.items():
            yield from leaves(value, now[name] if name in now else now[new], old, new)
    elif isinstance(good, list):
        assert len(good) == len(now), (good, now)
        for value, other in zip(good, now, strict=True):
            yield from leaves(value, other, old, new)
    elif good != now:
        yield good, now


def engine_options(manifests: list[Json]) -> dict[str, Any] | None:
    """What the engine makes of its command line; None if it refuses it."""
    (deployment,) = (each for each in manifests if each["kind"] == "Deployment")
    (engine,) = deployment["spec"]["template"]["spec"]["containers"]
    try:
        options = vars(parse(engine["args"]))
    except SystemExit:
        return None
    del options["command"]  # what is called, which is no option
    return options


def owned(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the operator sets."""
    return {flag: options[flag.removeprefix("--").replace("-", "_")] for flag in OWNED_FLAGS}


FRAGMENTS: Final = (
    *("--device=cuda", "--api-key=x", " --host=evil", ",", " ", "=", "\n", "\t", "\r\n", "\x00", "\u2028", "\x85"),
    *("- name: HF_TOKEN", ": ", "#", "'", '"', "{", "}", "[", "&a", "*a", "!!python/object:os.system", "|", ">", "%"),
    *("$(HF_TOKEN)", "$HF_TOKEN", "`id`", ";", "&&", "{{ .Values }}", "../", "..", "/", "\\", "@", ":", "~", "null"),
    *("serving.octavo.dev/service", "app.kubernetes.io/component", "HF_TOKEN", "kube-system/", "0", "a", "-", "_", "é"),
)


@st.composite
def hostile(draw: st.DrawFn) -> tuple[int, Place, str]:
    """A place, and what to write there: fragments, alone or within what is good there."""
    number, place = draw(st.sampled_from(PLACES))
    good = there(SPECS[number], place)
    text = "".join(draw(st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=5)), min_size=1, max_size=4)))
    at = draw(st.integers(0, len(good)))
    return number, place, draw(st.sampled_from((text, good[:at] + text + good[at:])))


def at(number: int, *place: str | int) -> tuple[int, Place]:
    return number, place


@given(hostile())
@example((*at(0, "engine", "extraArgs", 0), "--served-model-name=other"))
@example((*at(0, "engine", "extraArgs", 0), "--seed=7 --device=cpu"))
@example((*at(0, "engine", "extraArgs", 0), "--devic=cpu"))
@example((*at(0, "engine", "extraArgs", 0), "--seed=$(HF_TOKEN)"))
@example((*at(0, "pod", "env", 0, "name"), "HF_TOKEN"))
@example((*at(0, "pod", "env", 0, "value"), "a\n- name: HF_TOKEN\n  value: b"))
@example((*at(0, "pod", "labels", "team", KEY), "serving.octavo.dev/service"))
@example((*at(0, "pod", "annotations", "example.com/note"), 'a: {b: "c"}\u2028# d'))
@example((*at(3, "adapters", 0, "name"), "sql=/etc --device=cuda"))
@example((*at(3, "adapters", 0, "name"), "team/sql:v2"))
@example((*at(3, "adapters", 0, "source"), "hf://org/sql-lora,--device=cuda"))
@example((*at(2, "model", "source"), "pvc://models/../../etc/model.gguf"))
@settings(max_examples=150, deadline=None)
def test_a_string_stays_a_string(case: tuple[int, Place, str]) -> None:
    number, place, text = case
    old = there(SPECS[number], place)
    try:
        now = render(changed(SPECS[number], place, text))
    except ValidationError:
        return
    field = FIELD_OF[number, place]
    for good, value in leaves(GOOD[number], now, old, text):
        if field not in RESHAPED:
            assert value == good.replace(old, text), (good, value)
    assert list(yaml.safe_load_all(yaml_text.dump(now))) == now
    assert json.loads(json.dumps(now)) == now

    options, usual = engine_options(now), engine_options(GOOD[number])
    assert usual is not None
    if options is None:
        assert field == "spec.engine.extraArgs[]"  # a flag that the engine does not have
        return
    differing = {name for name in usual if options[name] != usual[name]}
    assert len(differing) <= (2 if field == "spec.engine.extraArgs[]" else 1), differing
    if field == "spec.engine.extraArgs[]":
        assert owned(options) == owned(usual)
    path = options["model"]
    assert path.startswith("/models/")
    assert ".." not in path.split("/")


def test_no_field_names_a_namespace() -> None:
    properties = {part for field in FIELDS for part in re.split(r"[.\[\]]+", field)}

    assert not [part for part in properties if "namespace" in part.lower() and part != "namespaceSelector"]


def references(value: Any) -> Iterator[tuple[str, Any]]:
    """Every member of every map in a document."""
    if isinstance(value, dict):
        yield from value.items()
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from references(child)


@pytest.mark.parametrize("number", range(len(SPECS)))
def test_every_child_is_in_the_services_namespace_and_refers_to_no_other(number: int) -> None:
    for child in GOOD[number]:
        assert child["metadata"]["namespace"] == "team-a"
        assert {value for name, value in references(child) if name == "namespace"} == {"team-a"}
        assert "hostPath" not in dict(references(child))


def test_images_are_taken_by_digest() -> None:
    image = f"registry.example:5000/octavo/engine@sha256:{'0123456789abcdef' * 4}"

    (deployment,) = (each for each in render({**SPECS[0], "engine": {"image": image}}) if each["kind"] == "Deployment")

    pod = deployment["spec"]["template"]["spec"]
    assert {container["image"] for container in (*pod["initContainers"], *pod["containers"])} == {image}
