"""What the chart's Role lets the operator do: a real API server is asked about everything that it serves.

And with the ServiceAccount's own token what must fail is tried. The Deployment is left out: no pod runs here.
"""

from __future__ import annotations

import base64
import json
import ssl
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import httpx
import pytest
import yaml
from tests.helm.test_chart import ALLOWED, CHART

from octavo_cluster.shell import wait_until

if TYPE_CHECKING:
    from octavo_cluster.apiserver import ApiServer

pytestmark = pytest.mark.apiserver

Manifest: TypeAlias = dict[str, Any]
Template: TypeAlias = Callable[..., list[Manifest]]
Question: TypeAlias = tuple[str, str, str]  # group, resource (also resource/subresource), verb

NAMESPACE: Final = "security-system"
SERVED: Final = ("security-a", "security-b")  # the second only by an operator for all namespaces
NO_RIGHTS: Final = "default"  # a ServiceAccount that has what everybody has
RIGHTS_OVER_RIGHTS: Final[set[Question]] = {
    ("", "users", "impersonate"),
    ("", "serviceaccounts", "impersonate"),
    ("rbac.authorization.k8s.io", "clusterroles", "bind"),
    ("rbac.authorization.k8s.io", "roles", "escalate"),
}
OTHERS: Final[Manifest] = {"crds": {"enabled": False}, "userRoles": {"create": False}}


class Account:
    """A ServiceAccount and its token."""

    def __init__(self, server: ApiServer, name: str) -> None:
        token = server.kubectl("create", "token", name, f"--namespace={NAMESPACE}").stdout.strip()
        cluster = yaml.safe_load(server.kubeconfig.read_text())["clusters"][0]["cluster"]
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self.http = httpx.Client(
            base_url=cluster["server"],
            headers={"Authorization": f"Bearer {token}"},
            verify=ssl.create_default_context(cadata=authority),
            trust_env=False,
        )

    def may(self, question: Question, namespace: str) -> bool:
        """Whether the API server would let it."""
        group, resource, verb = question
        resource, _, subresource = resource.partition("/")
        attributes = {"namespace": namespace, "group": group, "resource": resource, "verb": verb}
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": {**attributes, "subresource": subresource}},
        }
        answer = self.http.post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", json=review)
        return bool(answer.raise_for_status().json()["status"]["allowed"])

    def tries(self, method: str, path: str, body: Manifest | None = None, headers: dict[str, str] | None = None) -> int:
        """The status of a real request."""
        return self.http.request(method, path, json=body, headers=headers).status_code


@pytest.fixture(scope="module")
def server(api_server: ApiServer) -> ApiServer:
    """The API server with the CRD and the namespaces."""
    api_server.kubectl("apply", "--server-side", f"--filename={CHART.parents[1] / 'crds'}")
    for name in (NAMESPACE, *SERVED):
        api_server.kubectl("create", "namespace", name)
        api_server.kubectl("wait", "serviceaccount/default", f"--namespace={name}", "--for=create", "--timeout=30s")
    return api_server


@pytest.fixture(scope="module")
def questions(server: ApiServer) -> set[Question]:
    """Every verb of every resource and subresource that the API server serves, and what the chart allows."""
    found = set(RIGHTS_OVER_RIGHTS)
    groups = json.loads(server.kubectl("get", "--raw=/apis").stdout)["groups"]
    versions = ["/api/v1", *(f"/apis/{version['groupVersion']}" for group in groups for version in group["versions"])]
    for version in versions:
        listed = json.loads(server.kubectl("get", f"--raw={version}").stdout)
        group = listed["groupVersion"].rpartition("/")[0]
        found |= {
            (resource.get("group", group), resource["name"], verb)
            for resource in listed["resources"]
            for verb in resource["verbs"]
        }
    return found | allowed()


def allowed() -> set[Question]:
    """What the chart's table allows."""
    return {(group, resource, verb) for (group, resource), verbs in ALLOWED.items() for verb in verbs}


@pytest.fixture(scope="module")
def everybodys(server: ApiServer, questions: set[Question]) -> set[Question]:
    """What every ServiceAccount may do, such as asking these questions."""
    account = Account(server, NO_RIGHTS)
    with account.http:
        return {question for question in questions if account.may(question, SERVED[0])}


@pytest.fixture
def account(server: ApiServer, template: Template, request: pytest.FixtureRequest) -> Iterator[Account]:
    """The operator's ServiceAccount with the rights that the chart gives it; the values are the parameter."""
    values = {**OTHERS, **getattr(request, "param", {})}
    objects = [one for one in template(values, release="security", namespace=NAMESPACE) if one["kind"] != "Deployment"]
    document = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    server.kubectl("apply", "--filename=-", input=document)
    account = Account(server, "security-octavo-operator")
    with account.http:
        # The API server learns by a watch of its own of this Role, and that the one of the test before is gone.
        await_right(account, SERVED[0], there=True)
        await_right(account, SERVED[1], there="watchNamespaces" not in values)
        yield account
    server.kubectl("delete", "--filename=-", input=document)


def await_right(account: Account, namespace: str, *, there: bool) -> None:
    """Wait until the API server knows of the operator's Role in a namespace, or has forgotten it."""
    wait_until(
        lambda: None if account.may(("", "pods", "list"), namespace) == there else "not yet",
        what="the Role",
        seconds=20,
        poll=0.05,
    )


def test_for_all_namespaces_it_may_do_what_the_table_says_and_nothing_else(
    account: Account, questions: set[Question], everybodys: set[Question]
) -> None:
    assert len(questions) > 400
    for namespace in SERVED[1:]:
        assert {question for question in questions if account.may(question, namespace)} - everybodys == allowed()


@pytest.mark.parametrize("account", [{"watchNamespaces": [SERVED[0]]}], indirect=True)
def test_for_one_namespace_it_may_do_the_same_there_and_nothing_elsewhere(
    account: Account, questions: set[Question], everybodys: set[Question]
) -> None:
    assert {question for question in questions if account.may(question, SERVED[0])} - everybodys == allowed()
    for namespace in (SERVED[1], NAMESPACE, ""):
        assert not [question for question in allowed() if account.may(question, namespace)], namespace


POD: Final[Manifest] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "intruder"},
    "spec": {"containers": [{"name": "a", "image": "b"}]},
}
BINDING: Final[Manifest] = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "RoleBinding",
    "metadata": {"name": "more"},
    "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
    "subjects": [{"kind": "ServiceAccount", "name": "security-octavo-operator", "namespace": NAMESPACE}],
}
TOKEN: Final[Manifest] = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
CORE: Final = f"/api/v1/namespaces/{SERVED[0]}"
RBAC: Final = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{SERVED[0]}"
LEASES: Final = "/apis/coordination.k8s.io/v1/namespaces"
SERVICES: Final = f"/apis/serving.octavo.dev/v1alpha1/namespaces/{SERVED[0]}/inferenceservices"


@pytest.mark.parametrize("account", [{}, {"watchNamespaces": [SERVED[0]]}], indirect=True, ids=["cluster", "namespace"])
def test_what_an_intruder_would_try_with_the_operators_token_fails(server: ApiServer, account: Account) -> None:
    attempts: list[tuple[str, str, Manifest | None]] = [
        ("GET", f"{CORE}/secrets", None),
        ("GET", f"{CORE}/secrets/any", None),
        ("GET", "/api/v1/secrets?watch=true", None),
        ("DELETE", f"{CORE}/configmaps", None),
        ("POST", f"{CORE}/pods", POD),
        ("POST", f"{CORE}/pods/any/exec?command=sh", None),
        ("GET", f"{CORE}/pods/any/log", None),
        ("POST", f"{CORE}/serviceaccounts/default/token", TOKEN),
        ("DELETE", f"/apis/apps/v1/namespaces/{SERVED[0]}/deployments/any", None),
        ("DELETE", f"{CORE}/services/any", None),
        ("POST", f"{RBAC}/rolebindings", BINDING),
        ("DELETE", f"{RBAC}/roles/security-octavo-operator", None),
        ("PUT", f"{SERVICES}/any", {"apiVersion": "serving.octavo.dev/v1alpha1", "kind": "InferenceService"}),
        ("DELETE", f"{SERVICES}/any", None),
        ("GET", "/api/v1/nodes", None),
        ("GET", "/api/v1/namespaces", None),
        ("GET", f"{LEASES}/{NAMESPACE}/leases", None),
        ("GET", f"{LEASES}/{NAMESPACE}/leases/anothers", None),
        ("DELETE", f"{LEASES}/{NAMESPACE}/leases/security-octavo-operator", None),
        ("GET", f"{LEASES}/kube-system/leases/security-octavo-operator", None),
        ("POST", f"{LEASES}/{SERVED[0]}/leases", None),
    ]
    for method, path, body in attempts:
        assert account.tries(method, path, body) == 403, f"{method} {path}"
    assert account.tries("GET", f"{CORE}/pods", headers={"Impersonate-User": "system:admin"}) == 403

    # The counter-check. A kind that was installed this moment is answered with 429 at first.
    assert account.tries("GET", f"{CORE}/pods") == 200
    assert account.tries("GET", f"{LEASES}/{NAMESPACE}/leases/security-octavo-operator") == 404
    wait_until(
        lambda: None if account.tries("GET", SERVICES) == 200 else "not yet", what="InferenceServices", seconds=20
    )
