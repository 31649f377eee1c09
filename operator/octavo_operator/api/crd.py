"""The CustomResourceDefinition, made from the types of v1alpha1.py.

`python -m octavo_operator.api.crd` writes crds/ and the Helm chart's template; `--check` only compares.

Pydantic emits JSON Schema; the API server wants the subset of OpenAPI v3.0 that it calls structural
(https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/). What differs is
rewritten here: references are inlined, `T | None` becomes T, const becomes enum, defaults that default to nothing go. A
keyword that this module does not know is an error, never passed on. So is a string, list or map without a bound: CEL's
cost is estimated from them.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

from octavo_operator import names, yaml_text
from octavo_operator.api.base import CEL_KEYWORD
from octavo_operator.api.status import InferenceServiceStatus
from octavo_operator.api.v1alpha1 import InferenceService, InferenceServiceSpec

Schema: TypeAlias = dict[str, Any]

COMMAND: Final = "python -m octavo_operator.api.crd"
CRD_PATH: Final = Path("crds") / f"{names.PLURAL}.{names.GROUP}.yaml"
HELM_PATH: Final = Path("helm") / "octavo" / "templates" / "crd.yaml"

_INT_OR_STRING: Final = "x-kubernetes-int-or-string"
_PRESERVE: Final = "x-kubernetes-preserve-unknown-fields"
_LIST_TYPE: Final = "x-kubernetes-list-type"

# Keywords that mean the same on both sides, in the order in which they are written.
_KEYWORDS: Final = (
    "description",
    "type",
    "format",
    _INT_OR_STRING,
    "default",
    "enum",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    _LIST_TYPE,
    "x-kubernetes-list-map-keys",
    _PRESERVE,
    "properties",
    "required",
    "items",
    "additionalProperties",
    CEL_KEYWORD,
)


class SchemaError(Exception):
    """A type of v1alpha1.py has no structural schema; the message names the field and the keyword."""


def structural(schema: Schema) -> Schema:
    """The structural equivalent of a JSON Schema as pydantic emits it, `$defs` included.

    Raises:
        SchemaError: for recursion, an unknown keyword or a missing bound.
    """
    return _Converter(schema.get("$defs", {})).convert({k: v for k, v in schema.items() if k != "$defs"}, "", ())


class _Converter:
    """Rewrites one schema and, by recursion, what is within."""

    def __init__(self, definitions: Mapping[str, Schema]) -> None:
        self._definitions = definitions

    def convert(self, schema: Schema, path: str, seen: tuple[str, ...]) -> Schema:
        """Rewrite `schema`, which is the field at `path`, inside of the definitions `seen`."""
        schema, seen = self._inline(schema, path, seen)
        schema.pop("title", None)
        if "const" in schema:
            schema["enum"] = [schema.pop("const")]
        if schema.get("additionalProperties") is True:
            del schema["additionalProperties"]
            schema[_PRESERVE] = True
        if unknown := sorted(set(schema) - set(_KEYWORDS)):
            raise SchemaError(f"{path or 'the root'}: no structural equivalent is known for {', '.join(unknown)}")
        if "properties" in schema:
            schema["properties"] = {
                name: self.convert(child, f"{path}.{name}", seen) for name, child in schema["properties"].items()
            }
        for keyword in ("items", "additionalProperties"):
            if keyword in schema:
                schema[keyword] = self.convert(schema[keyword], f"{path}[]", seen)
        if "description" in schema:
            schema["description"] = " ".join(schema["description"].split())
        if CEL_KEYWORD in schema:  # pydantic sorts what it does not know; the rule reads better first
            schema[CEL_KEYWORD] = [{"rule": rule["rule"], "message": rule["message"]} for rule in schema[CEL_KEYWORD]]
        _settle_default(schema, path)
        _settle_list(schema, path)
        _require_bound(schema, path)
        return _in_order(schema)

    def _inline(self, schema: Schema, path: str, seen: tuple[str, ...]) -> tuple[Schema, tuple[str, ...]]:
        """Replace `$ref` and the `anyOf` of an optional field by what they stand for."""
        schema = dict(schema)
        if "anyOf" in schema:
            variants = [variant for variant in schema.pop("anyOf") if variant != {"type": "null"}]
            if len(variants) != 1:
                raise SchemaError(f"{path}: a union of types has no structural equivalent")
            schema = _beside(variants[0], schema)
        if "$ref" in schema:
            name = schema.pop("$ref").removeprefix("#/$defs/")
            if name in seen:
                raise SchemaError(f"{path}: {name} contains itself; a structural schema cannot")
            return self._inline(_beside(self._definitions[name], schema), path, (*seen, name))
        return schema, seen


def _in_order(schema: Schema) -> Schema:
    """The keywords in the order in which they are written; words that are so far to the right on one line."""
    ordered: Schema = {keyword: schema[keyword] for keyword in _KEYWORDS if keyword in schema}
    for keyword in ("enum", "required"):
        if keyword in ordered:
            ordered[keyword] = yaml_text.Inline(ordered[keyword])
    return ordered


def _beside(target: Schema, schema: Schema) -> Schema:
    """What a reference stands for together with the keywords beside it: those win, but rules add up."""
    merged = {**target, **schema}
    if rules := [*target.get(CEL_KEYWORD, []), *schema.get(CEL_KEYWORD, [])]:
        merged[CEL_KEYWORD] = rules
    return merged


def _settle_default(schema: Schema, path: str) -> None:
    """Keep a default only where it says something, so that stored objects carry no empty parts."""
    if "default" not in schema:
        return
    default = _without_nothing(schema.pop("default"))
    if "properties" in schema:
        parts = {name: child["default"] for name, child in schema["properties"].items() if "default" in child}
        if default not in (None, parts):
            raise SchemaError(f"{path}: its default must be made of the defaults within")
    if default not in (None, {}, []):
        schema["default"] = default


def _without_nothing(value: Any) -> Any:
    """A default without the parts of it that are null or empty."""
    if not isinstance(value, dict):
        return value
    parts = {name: _without_nothing(part) for name, part in value.items()}
    return {name: part for name, part in parts.items() if part not in (None, {}, [])}


def _settle_list(schema: Schema, path: str) -> None:
    if schema.get("type") != "array" or _LIST_TYPE in schema:
        return
    if "properties" in schema["items"]:
        raise SchemaError(f"{path}: a list of objects must say its {_LIST_TYPE}")
    schema[_LIST_TYPE] = "atomic"


def _require_bound(schema: Schema, path: str) -> None:
    bounds = {"string": ("maxLength", "enum"), "array": ("maxItems",)}.get(schema.get("type", ""), ())
    if "additionalProperties" in schema:
        bounds = ("maxProperties",)
    elif schema.get(_INT_OR_STRING):
        bounds = ("maxLength",)
    if bounds and not any(bound in schema for bound in bounds):
        raise SchemaError(f"{path}: must be bounded by {' or '.join(bounds)}")


def _root_schema() -> Schema:
    return {
        "description": InferenceService.__doc__,
        "type": "object",
        "properties": {
            "apiVersion": {"type": "string", "description": f"Always {names.API_VERSION}."},
            "kind": {"type": "string", "description": f"Always {names.KIND}."},
            "metadata": {"type": "object"},
            "spec": structural(InferenceServiceSpec.model_json_schema(mode="validation")),
            "status": structural(InferenceServiceStatus.model_json_schema(mode="validation")),
        },
        "required": ["spec"],
        CEL_KEYWORD: [rule.as_cel() for rule in InferenceService.rules],
    }


def _condition(field: str) -> str:
    return f'.status.conditions[?(@.type=="Ready")].{field}'


_COLUMNS: Final = (
    {"name": "Ready", "type": "string", "jsonPath": _condition("status")},
    {"name": "Reason", "type": "string", "jsonPath": _condition("reason")},
    {
        "name": "Serving",
        "type": "integer",
        "jsonPath": ".status.readyReplicas",
        "description": "Replicas that serve the model.",
    },
    {"name": "Replicas", "type": "integer", "jsonPath": ".status.replicas", "description": "Replicas that there are."},
    {
        "name": "TP",
        "type": "integer",
        "jsonPath": ".status.tensorParallelSize",
        "description": "GPUs that share the model in each replica.",
    },
    {"name": "Model", "type": "string", "jsonPath": ".spec.model.source"},
    {"name": "URL", "type": "string", "jsonPath": ".status.url", "priority": 1},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
)


def custom_resource_definition() -> Schema:
    """The CRD as an object."""
    version = {
        "name": names.VERSION,
        "served": True,
        "storage": True,
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.replicas",
                "statusReplicasPath": ".status.replicas",
                "labelSelectorPath": ".status.selector",
            },
        },
        "additionalPrinterColumns": list(_COLUMNS),
        "schema": {"openAPIV3Schema": _root_schema()},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": names.CRD_NAME},
        "spec": {
            "group": names.GROUP,
            "names": {
                "kind": names.KIND,
                "listKind": f"{names.KIND}List",
                "plural": names.PLURAL,
                "singular": names.SINGULAR,
                "shortNames": [names.SHORT_NAME],
                "categories": [names.CATEGORY],
            },
            "scope": "Namespaced",
            "versions": [version],
        },
    }


def as_yaml() -> str:
    """The content of crds/."""
    header = f"# Generated by `{COMMAND}` from octavo_operator/api/v1alpha1.py; do not edit.\n"
    return header + yaml_text.dump([custom_resource_definition()])


def as_helm_template(crd: str) -> str:
    """The same text as a template of the chart: installed if wanted, and kept when the chart is uninstalled."""
    body = crd.replace("{{", '{{ "{{" }}')
    name = f"  name: {names.CRD_NAME}\n"
    keep = (
        "  {{- if .Values.crds.keep }}\n"
        "  annotations:\n"
        "    helm.sh/resource-policy: keep\n"
        "  {{- end }}\n"
    )  # fmt: skip
    return "{{- if .Values.crds.enabled }}\n" + body.replace(name, name + keep, 1) + "{{- end }}\n"


def files() -> dict[Path, str]:
    """Every generated file, by its path in the repository."""
    return {CRD_PATH: as_yaml(), HELM_PATH: as_helm_template(as_yaml())}


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or compare them with what is there."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Writes the CRD and the Helm chart's template of it.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not up to date")
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(__file__).parents[3],
        metavar="FOLDER",
        help="the checkout to write to; default: the one that this module is in",
    )
    options = parser.parse_args(arguments)
    if not (options.root / "pyproject.toml").is_file():
        parser.error(f"{options.root} is not a checkout of Octavo: name one with --root")
    stale = []
    for path, text in files().items():
        target = options.root / path
        if target.is_file() and target.read_text(encoding="utf-8") == text:
            continue
        stale.append(path)
        if not options.check:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    for path in stale:
        sys.stdout.write(f"{path} is not up to date: run `{COMMAND}`\n" if options.check else f"wrote {path}\n")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
