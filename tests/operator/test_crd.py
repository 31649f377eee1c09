"""The generated CRD, and the generator's refusals. What the API server makes of it: test_crd_on_api_server.py."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import pytest
from pydantic import Field

from octavo_operator.api import crd
from octavo_operator.api.base import Model, Rule

ROOT: Final = Path(__file__).parents[2]


class Part(Model):
    """A part."""

    word: Annotated[str, Field(max_length=8)] = "yes"
    none: Annotated[int, Field(ge=1)] | None = None


class Plain(Model):
    """Its fields show what is rewritten."""

    part: Part = Field(default=Part(), description="What it\n    is for.")
    absent: Part | None = None
    constant: Literal["only"] = "only"
    free: dict[str, Any] | None = None


class Inner(Model):
    """A type with a rule."""

    rules = (Rule(cel="inner", holds=lambda _: True, message="of the type"),)


OUTER: Final = Rule(cel="outer", holds=lambda _: True, message="of the field")


class Ruled(Model):
    """Fields of that type with a rule of their own."""

    must: Annotated[Inner, OUTER]
    may: Annotated[Inner, OUTER] | None = None


class Recursive(Model):
    """Contains itself."""

    inner: "Recursive | None" = None


class Union(Model):
    """Two types at once."""

    value: Annotated[str, Field(max_length=3)] | int


class Exclusive(Model):
    """A keyword of JSON Schema that OpenAPI v3.0 means otherwise."""

    value: Annotated[int, Field(gt=0)]


class UnboundedText(Model):
    """A string of any length."""

    text: str


class UnboundedList(Model):
    """A list of any length."""

    numbers: list[int]


class UnboundedMap(Model):
    """A map of any size."""

    pairs: dict[str, int]


class OtherDefault(Model):
    """A default that nobody sees who sets another field of the part."""

    part: Part = Part(word="no")


class ListOfParts(Model):
    """A list of objects that does not say how it merges."""

    parts: Annotated[list[Part], Field(max_length=3)]


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            yield from nodes(schema[keyword], f"{path}[]")


@pytest.fixture(scope="module")
def root() -> dict[str, Any]:
    (version,) = crd.custom_resource_definition()["spec"]["versions"]
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return schema


def test_the_committed_files_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert crd.main(["--check"]) == 0, capsys.readouterr().out


def test_a_check_of_stale_files_fails_and_names_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pyproject.toml").touch()
    assert crd.main([f"--root={tmp_path}"]) == 0
    assert crd.main([f"--root={tmp_path}", "--check"]) == 0
    (tmp_path / crd.CRD_PATH).write_text("old")
    capsys.readouterr()
    assert crd.main([f"--root={tmp_path}", "--check"]) == 1
    assert "run `python -m octavo_operator.api.crd`" in capsys.readouterr().out
    assert (tmp_path / crd.CRD_PATH).read_text() == "old"


def test_nothing_is_written_outside_of_a_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        crd.main([f"--root={tmp_path}"])
    assert "is not a checkout of Octavo" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", ["1", "2"])
def test_the_output_does_not_depend_on_the_hash_seed(seed: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import sys; from octavo_operator.api import crd; sys.stdout.write(crd.as_yaml())"],
        env=os.environ | {"PYTHONHASHSEED": seed},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    assert run.stdout == crd.as_yaml()


def test_the_crd_is_small_enough_for_client_side_apply_and_for_helm() -> None:
    assert len(crd.as_yaml().encode()) < 100_000


def test_the_schema_is_structural(root: dict[str, Any]) -> None:
    for path, node in nodes(root):
        typed = "type" in node or node.get("x-kubernetes-int-or-string")
        assert typed, path
        assert not ({"properties", "additionalProperties"} <= node.keys()), path
        assert not ({"$ref", "$defs", "anyOf", "oneOf", "allOf", "const", "title"} & node.keys()), path


def test_kubectl_explain_has_a_sentence_for_every_field(root: dict[str, Any]) -> None:
    for path, node in nodes(root):
        named = path and path != ".metadata" and not path.endswith("[]")
        assert not named or node.get("description", "").endswith("."), path


def test_every_rule_has_a_message_for_its_reader(root: dict[str, Any]) -> None:
    rules = [rule for _, node in nodes(root) for rule in node.get("x-kubernetes-validations", [])]
    assert len(rules) > 20
    for rule in rules:
        assert set(rule) == {"rule", "message"}
        assert "\n" not in rule["message"]


def test_replicas_have_no_default_because_it_would_collide_with_autoscaling(root: dict[str, Any]) -> None:
    spec = root["properties"]["spec"]["properties"]
    assert "default" not in spec["replicas"]
    assert "default" not in spec["autoscaling"]


def test_what_pydantic_emits_is_rewritten() -> None:
    word = {"type": "string", "default": "yes", "maxLength": 8}
    part = {
        "description": "A part.",
        "type": "object",
        "properties": {"word": word, "none": {"type": "integer", "minimum": 1}},
    }
    assert crd.structural(Plain.model_json_schema()) == {
        "description": "Its fields show what is rewritten.",
        "type": "object",
        "properties": {
            "part": {**part, "description": "What it is for.", "default": {"word": "yes"}},
            "absent": part,
            "constant": {"type": "string", "default": "only", "enum": ["only"]},
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        },
    }


def test_the_rules_of_a_field_join_those_of_its_type() -> None:
    for ruled in crd.structural(Ruled.model_json_schema())["properties"].values():
        assert [rule["rule"] for rule in ruled["x-kubernetes-validations"]] == ["inner", "outer"]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Recursive, ".inner: Recursive contains itself"),
        (Union, ".value: a union of types"),
        (Exclusive, ".value: no structural equivalent is known for exclusiveMinimum"),
        (OtherDefault, ".part: its default must be made of the defaults within"),
        (UnboundedText, ".text: must be bounded by maxLength or enum"),
        (UnboundedList, ".numbers: must be bounded by maxItems"),
        (UnboundedMap, ".pairs: must be bounded by maxProperties"),
        (ListOfParts, ".parts: a list of objects must say its x-kubernetes-list-type"),
    ],
)
def test_what_has_no_structural_equivalent_is_refused(model: type[Model], says: str) -> None:
    with pytest.raises(crd.SchemaError) as refusal:
        crd.structural(model.model_json_schema())
    assert says in str(refusal.value)


def test_the_charts_template_is_the_crd_between_two_switches() -> None:
    lines = crd.as_helm_template(crd.as_yaml()).splitlines()
    assert (lines[0], lines[-1]) == ("{{- if .Values.crds.enabled }}", "{{- end }}")
    assert lines[6:10] == [
        "  {{- if .Values.crds.keep }}",
        "  annotations:",
        "    helm.sh/resource-policy: keep",
        "  {{- end }}",
    ]
    assert "\n".join([*lines[1:6], *lines[10:-1], ""]) == crd.as_yaml()


def test_braces_in_the_crd_are_no_template_for_helm() -> None:
    assert '\nmessage: write {{ "{{" }} x }}\n' in crd.as_helm_template("\nmessage: write {{ x }}\n")
