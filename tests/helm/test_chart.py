"""What the chart renders, and what it refuses. Needs helm, which is built with the API server's programs."""

from __future__ import annotations

import functools
import json
import operator
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pytest
import yaml

from octavo_operator.resources import Key
from octavo_operator.settings import Settings

if TYPE_CHECKING:
    import subprocess

pytestmark = pytest.mark.apiserver

ROOT: Final = Path(__file__).parents[2]
CHART: Final = ROOT / "helm" / "octavo"
DIGEST: Final = "sha256:" + "0123456789abcdef" * 4

Manifest: TypeAlias = dict[str, Any]
Template: TypeAlias = Callable[..., list[Manifest]]
Helm: TypeAlias = "Callable[..., subprocess.CompletedProcess[str]]"


def of_kind(objects: list[Manifest], kind: str) -> list[Manifest]:
    return [one for one in objects if one["kind"] == kind]


def operator_pod(objects: list[Manifest]) -> Manifest:
    (deployment,) = of_kind(objects, "Deployment")
    pod: Manifest = deployment["spec"]["template"]
    return pod


def operator_container(objects: list[Manifest]) -> Manifest:
    (container,) = operator_pod(objects)["spec"]["containers"]
    result: Manifest = container
    return result


def settings(objects: list[Manifest]) -> Settings:
    """The operator's settings, as it parses them from the rendered arguments."""
    return Settings.parse(operator_container(objects)["args"])


def test_helm_finds_nothing_to_complain_about(helm: Helm) -> None:
    # The icon is what `helm lint` recommends and we leave out.
    printed = helm("lint", "--strict", CHART).stdout
    assert "1 chart(s) linted, 0 chart(s) failed" in printed
    assert "[WARNING]" not in printed


# Images


def test_images_are_those_of_the_charts_version(template: Template) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

    objects = template()

    assert operator_container(objects)["image"] == f"octavo/operator:{version}"
    assert settings(objects).engine_image == f"octavo/engine:{version}"


def test_a_tag_replaces_the_charts_version(template: Template) -> None:
    objects = template(
        {
            "image": {"repository": "registry.example:5000/team/operator", "tag": "1.2"},
            "engine": {"image": {"tag": "main"}},
        }
    )

    assert operator_container(objects)["image"] == "registry.example:5000/team/operator:1.2"
    assert settings(objects).engine_image == "octavo/engine:main"


def test_a_digest_goes_before_the_tag(template: Template) -> None:
    image = {"tag": "ignored", "digest": DIGEST}

    objects = template({"image": image, "engine": {"image": image}})

    assert operator_container(objects)["image"] == f"octavo/operator@{DIGEST}"
    assert settings(objects).engine_image == f"octavo/engine@{DIGEST}"


# The operator's command line and pod


def test_the_operator_understands_every_argument(template: Template) -> None:
    prometheus = "http://prometheus.monitoring.svc:9090"
    objects = template(
        {
            "watchNamespaces": ["team-a", "team-b"],
            "prometheus": {"url": prometheus},
            "log": {"level": "debug", "format": "text"},
        }
    )

    assert settings(objects) == Settings(
        engine_image=settings(objects).engine_image,
        namespaces=("team-a", "team-b"),
        prometheus_url=prometheus,
        lease=Key("octavo-system", "octavo-operator"),
        log_level="debug",
        log_format="text",
        health_port=8080,
        metrics_port=9090,
    )


def test_by_default_the_operator_serves_all_namespaces_and_logs_json(template: Template) -> None:
    parsed = settings(template())

    assert parsed.namespaces == ()
    assert parsed.prometheus_url is None
    assert (parsed.log_level, parsed.log_format) == ("info", "json")


def test_ports_and_probes_are_those_that_the_operator_serves(template: Template) -> None:
    objects = template()
    container = operator_container(objects)

    ports = {port["name"]: port["containerPort"] for port in container["ports"]}

    assert ports == {"health": settings(objects).health_port, "metrics": settings(objects).metrics_port}
    for probe in ("livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/healthz", "port": "health"}


def test_operators_of_one_release_have_one_lease_whatever_their_number_and_the_next_is_ready_first(
    template: Template,
) -> None:
    for replicas in (1, 3):
        objects = template({"replicas": replicas}, release="prod", namespace="ops")
        (deployment,) = of_kind(objects, "Deployment")

        assert settings(objects).lease == ("ops", "prod-octavo-operator")
        assert deployment["spec"]["replicas"] == replicas
        assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_several_operators_are_spread_over_nodes_and_drained_one_by_one(template: Template) -> None:
    objects = template({"replicas": 2})
    (budget,) = of_kind(objects, "PodDisruptionBudget")
    (deployment,) = of_kind(objects, "Deployment")
    affinity = deployment["spec"]["template"]["spec"]["affinity"]["podAntiAffinity"]
    (spread,) = affinity["preferredDuringSchedulingIgnoredDuringExecution"]

    assert budget["spec"] == {"maxUnavailable": 1, "selector": deployment["spec"]["selector"]}
    assert spread["podAffinityTerm"] == {
        "topologyKey": "kubernetes.io/hostname",
        "labelSelector": deployment["spec"]["selector"],
    }
    assert not of_kind(template(), "PodDisruptionBudget")
    given = template({"replicas": 2, "affinity": PLACEMENT["affinity"]})
    assert operator_pod(given)["spec"]["affinity"] == PLACEMENT["affinity"]


def test_the_operator_writes_nowhere_but_to_tmp(template: Template) -> None:
    objects = template()
    container = operator_container(objects)

    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108 - the path in the pod
    assert operator_pod(objects)["spec"]["volumes"] == [{"name": "tmp", "emptyDir": {"sizeLimit": "16Mi"}}]


def test_only_the_operators_pod_gets_the_service_accounts_token(template: Template) -> None:
    objects = template()
    (account,) = of_kind(objects, "ServiceAccount")

    assert account["automountServiceAccountToken"] is False
    assert operator_pod(objects)["spec"]["automountServiceAccountToken"] is True
    assert operator_pod(objects)["spec"]["serviceAccountName"] == account["metadata"]["name"]


def test_the_selector_does_not_change_with_version_or_values(template: Template) -> None:
    (deployment,) = of_kind(template({"podLabels": {"team": "ml"}, "image": {"tag": "2"}}), "Deployment")
    selector = deployment["spec"]["selector"]["matchLabels"]

    assert selector == {
        "app.kubernetes.io/name": "octavo",
        "app.kubernetes.io/instance": "octavo",
        "app.kubernetes.io/component": "operator",
    }
    assert deployment["spec"]["template"]["metadata"]["labels"] == selector | {"team": "ml"}


def test_names_begin_with_the_release_and_fit(template: Template) -> None:
    (short,) = of_kind(template(release="prod"), "Deployment")
    (long,) = of_kind(template(release="r" * 53), "Deployment")
    (given,) = of_kind(template({"fullnameOverride": "llm"}), "Deployment")

    assert short["metadata"]["name"] == "prod-octavo-operator"
    assert long["metadata"]["name"] == "r" * 40 + "-operator"
    assert given["metadata"]["name"] == "llm-operator"


def test_names_that_look_like_numbers_stay_names(template: Template) -> None:
    objects = template(
        {
            "watchNamespaces": ["42"],
            "replicas": 2,
            "serviceAccount": {"name": "7"},
            "priorityClassName": "1e3",
            "nameOverride": "0",
        },
        release="1",
        namespace="5",
    )

    for one in objects:
        if one["kind"] != "CustomResourceDefinition":
            assert isinstance(one["metadata"]["name"], str)
            assert all(isinstance(value, str) for value in one["metadata"]["labels"].values())
    bindings = of_kind(objects, "RoleBinding")
    assert [binding["metadata"]["namespace"] for binding in bindings] == ["42", "5"]
    for binding in bindings:
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "7", "namespace": "5"}]
    assert operator_pod(objects)["spec"]["priorityClassName"] == "1e3"
    assert settings(objects).namespaces == ("42",)


PLACEMENT: Final[Manifest] = {
    "imagePullSecrets": [{"name": "registry"}],
    "priorityClassName": "system-cluster-critical",
    "nodeSelector": {"kubernetes.io/arch": "amd64"},
    "tolerations": [{"key": "infra", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {
        "nodeAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 1, "preference": {"matchExpressions": [{"key": "infra", "operator": "Exists"}]}}
            ]
        }
    },
}


def test_placement_and_registry_are_the_operators_and_those_of_helm_test(template: Template) -> None:
    objects = template(PLACEMENT, tests=True)
    (pod,) = of_kind(objects, "Pod")

    for spec in (operator_pod(objects)["spec"], pod["spec"]):
        assert {field: spec[field] for field in PLACEMENT} == PLACEMENT
    for spec in (operator_pod(template())["spec"], of_kind(template(tests=True), "Pod")[0]["spec"]):
        assert not PLACEMENT.keys() & spec.keys()


def test_helm_test_asks_the_operators_service_and_is_not_taken_for_the_operator(template: Template) -> None:
    objects = template(tests=True)
    (pod,) = of_kind(objects, "Pod")
    (service,) = of_kind(objects, "Service")
    (container,) = pod["spec"]["containers"]
    host = f"{service['metadata']['name']}.octavo-system.svc"
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}

    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert (
        pod["metadata"]["labels"]["app.kubernetes.io/component"]
        != service["spec"]["selector"]["app.kubernetes.io/component"]
    )
    assert service["spec"]["selector"] == of_kind(objects, "Deployment")[0]["spec"]["selector"]["matchLabels"]
    assert container["image"] == operator_container(objects)["image"]
    assert container["args"] == [
        (CHART / "files" / "ask.py").read_text(),
        f"http://{host}:{ports['health']}/healthz",
        f"http://{host}:{ports['metrics']}/metrics",
    ]
    assert not of_kind(template(), "Pod")


# Permissions

READ: Final = frozenset({"get", "list", "watch"})
KEEP: Final = READ | {"create", "patch"}  # children that every service has go with their owner only
OWN: Final = KEEP | {"delete"}
ALLOWED: Final = {
    ("serving.octavo.dev", "inferenceservices"): READ,
    ("serving.octavo.dev", "inferenceservices/status"): {"patch"},
    ("serving.octavo.dev", "inferenceservices/finalizers"): {"update"},
    ("", "serviceaccounts"): KEEP,
    ("", "services"): KEEP,
    ("apps", "deployments"): KEEP,
    ("networking.k8s.io", "networkpolicies"): KEEP,
    ("policy", "poddisruptionbudgets"): KEEP,
    ("monitoring.coreos.com", "podmonitors"): KEEP,
    ("", "configmaps"): OWN,
    ("", "persistentvolumeclaims"): OWN,
    ("apps", "controllerrevisions"): OWN,
    ("keda.sh", "scaledobjects"): OWN,
    ("autoscaling", "horizontalpodautoscalers"): OWN,
    ("", "pods"): READ,
    ("events.k8s.io", "events"): {"create", "list"},
}


LEASE_RULES: Final = [  # in the operator's own namespace
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"]},
    {
        "apiGroups": ["coordination.k8s.io"],
        "resources": ["leases"],
        "resourceNames": ["octavo-operator"],
        "verbs": ["get", "update"],
    },
]


def permissions(role: Manifest) -> dict[tuple[str, str], set[str]]:
    allowed: dict[tuple[str, str], set[str]] = {}
    for rule in role["rules"]:
        assert rule.keys() == {"apiGroups", "resources", "verbs"}
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                allowed.setdefault((group, resource), set()).update(rule["verbs"])
    return allowed


def test_the_operator_may_do_this_and_nothing_else(template: Template) -> None:
    objects = template({"userRoles": {"create": False}})

    (role,) = of_kind(objects, "ClusterRole")
    (binding,) = of_kind(objects, "ClusterRoleBinding")
    (account,) = of_kind(objects, "ServiceAccount")

    assert permissions(role) == ALLOWED
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": account["metadata"]["name"], "namespace": "octavo-system"}
    ]
    (lease,) = of_kind(objects, "Role")
    (of_lease,) = of_kind(objects, "RoleBinding")
    assert lease["rules"] == LEASE_RULES
    assert lease["metadata"]["namespace"] == of_lease["metadata"]["namespace"] == "octavo-system"
    assert (of_lease["roleRef"]["name"], of_lease["subjects"]) == (lease["metadata"]["name"], binding["subjects"])


def test_with_namespaces_the_operator_may_do_the_same_in_these_only(template: Template) -> None:
    objects = template({"watchNamespaces": ["team-a", "team-b"], "userRoles": {"create": False}})

    roles = {role["metadata"]["namespace"]: role for role in of_kind(objects, "Role")}
    bindings = {binding["metadata"]["namespace"]: binding for binding in of_kind(objects, "RoleBinding")}
    assert roles.pop("octavo-system")["rules"] == LEASE_RULES
    assert bindings.pop("octavo-system")["roleRef"]["kind"] == "Role"

    assert roles.keys() == bindings.keys() == {"team-a", "team-b"}
    for namespace, role in roles.items():
        assert permissions(role) == ALLOWED
        assert bindings[namespace]["roleRef"]["name"] == role["metadata"]["name"]
        assert bindings[namespace]["roleRef"]["kind"] == "Role"
        assert bindings[namespace]["subjects"][0]["namespace"] == "octavo-system"
    assert not of_kind(objects, "ClusterRole")
    assert not of_kind(objects, "ClusterRoleBinding")


def test_nothing_of_the_whole_cluster_is_needed_when_an_administrator_has_installed_the_crd(template: Template) -> None:
    objects = template(
        {"watchNamespaces": ["team-a"], "crds": {"enabled": False}, "userRoles": {"create": False}},
        namespace="team-a",
    )

    assert {one["kind"] for one in objects} == {"ServiceAccount", "Role", "RoleBinding", "Service", "Deployment"}
    assert {one["metadata"]["namespace"] for one in objects} == {"team-a"}


def test_a_service_account_that_is_there_already_is_used(template: Template) -> None:
    objects = template({"serviceAccount": {"create": False, "name": "ours"}})

    assert not of_kind(objects, "ServiceAccount")
    assert operator_pod(objects)["spec"]["serviceAccountName"] == "ours"
    (binding,) = of_kind(objects, "ClusterRoleBinding")
    assert binding["subjects"][0]["name"] == "ours"


# The CRD


def committed_crd() -> Manifest:
    (path,) = (ROOT / "crds").glob("*.yaml")
    crd: Manifest = yaml.safe_load(path.read_text())
    return crd


def test_the_crd_is_the_committed_one_and_is_kept(template: Template) -> None:
    (crd,) = of_kind(template(), "CustomResourceDefinition")

    assert crd["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert crd == committed_crd()


def test_the_crd_goes_with_the_release_when_it_is_not_to_be_kept(template: Template) -> None:
    (crd,) = of_kind(template({"crds": {"keep": False}}), "CustomResourceDefinition")

    assert crd == committed_crd()


def test_the_crd_can_be_left_to_others(template: Template) -> None:
    assert not of_kind(template({"crds": {"enabled": False}}), "CustomResourceDefinition")


# Values


def test_values_and_schema_name_the_same_things() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    del schema["properties"]["global"]  # Helm's own

    def check(path: str, part: Manifest, value: object) -> None:
        while "$ref" in part:
            part = functools.reduce(operator.getitem, part["$ref"].removeprefix("#/").split("/"), schema)
        if "properties" in part:
            assert isinstance(value, dict), path
            assert part["properties"].keys() == value.keys(), path
            assert part["additionalProperties"] is False, path
            for name, child in part["properties"].items():
                check(f"{path}.{name}", child, value[name])

    check("", schema, yaml.safe_load((CHART / "values.yaml").read_text()))


def test_every_value_says_what_it_does() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    undocumented = [
        line
        for number, line in enumerate(lines)
        if re.match(r" *[a-zA-Z]+: \S", line)
        and not any(part in line for part in ("cpu:", "memory:"))
        and not _comment_above(lines, number).startswith("# -- ")
    ]
    assert not undocumented


def _comment_above(lines: list[str], number: int) -> str:
    first = ""
    for line in reversed(lines[:number]):
        if not line.lstrip().startswith("#"):
            break
        first = line.lstrip()
    return first


WRONG: Final[list[tuple[Manifest, str]]] = [
    ({"replica": 2}, "additional properties 'replica' not allowed"),
    ({"replicas": 0}, "at '/replicas': minimum: got 0, want 1"),
    ({"imgae": {"tag": "1"}}, "additional properties 'imgae' not allowed"),
    ({"image": {"tga": "1"}}, "at '/image': additional properties 'tga' not allowed"),
    ({"image": {"tag": 1.1}}, "at '/image/tag': got number, want string"),
    ({"image": {"tag": "a b"}}, "at '/image/tag': 'a b' does not match pattern"),
    ({"image": {"digest": "sha256:12"}}, "at '/image/digest': 'sha256:12' does not match pattern"),
    ({"image": {"repository": "octavo/operator:1"}}, "at '/image/repository': 'octavo/operator:1' does not match"),
    ({"image": {"pullPolicy": "always"}}, "at '/image/pullPolicy': value must be one of 'Always'"),
    ({"engine": {"image": {"repository": ""}}}, "at '/engine/image/repository': '' does not match pattern"),
    ({"engine": None}, "missing property 'engine'"),
    ({"crds": {"keep": "yes"}}, "at '/crds/keep': got string, want boolean"),
    ({"watchNamespaces": "team-a"}, "at '/watchNamespaces': got string, want array"),
    ({"watchNamespaces": ["Team_A"]}, "at '/watchNamespaces/0': 'Team_A' does not match pattern"),
    ({"watchNamespaces": ["a", "a"]}, "at '/watchNamespaces': items at 0 and 1 are equal"),
    ({"monitoring": {"podMonitors": True}}, "at '/monitoring': additional properties 'podMonitors' not allowed"),
    ({"monitoring": {"alerts": "yes"}}, "at '/monitoring/alerts': got string, want boolean"),
    ({"prometheus": {"url": "prometheus:9090"}}, "at '/prometheus/url': 'prometheus:9090' does not match pattern"),
    ({"serviceAccount": {"create": False}}, "at '/serviceAccount/name': minLength: got 0, want 1"),
    ({"log": {"level": "trace"}}, "at '/log/level': value must be one of 'debug', 'info', 'warning', 'error'"),
    ({"log": {"format": "xml"}}, "at '/log/format': value must be one of 'json', 'text'"),
    ({"resources": {"request": {}}}, "at '/resources': additional properties 'request' not allowed"),
    ({"imagePullSecrets": ["regcred"]}, "at '/imagePullSecrets/0': got string, want object"),
    ({"podLabels": {"app.kubernetes.io/name": "x"}}, "invalid propertyName 'app.kubernetes.io/name'"),
    ({"podAnnotations": {"a": 1}}, "at '/podAnnotations/a': got number, want string"),
]


@pytest.mark.parametrize(("values", "says"), WRONG, ids=[json.dumps(values) for values, _ in WRONG])
def test_a_wrong_value_is_refused_by_name(helm: Helm, values: Manifest, says: str) -> None:
    answer = helm("template", "octavo", CHART, "--kube-version", "v1.34.0", values=values, check=False)

    assert answer.returncode != 0
    assert says in answer.stderr


def test_a_cluster_without_cel_is_refused(helm: Helm) -> None:
    answer = helm("template", "octavo", CHART, "--kube-version", "v1.28.9", check=False)

    assert answer.returncode != 0
    assert "chart requires kubeVersion: >=1.29.0-0" in answer.stderr
