"""InferenceServices in a Git repository: what the tools that apply them see on a real API server.

kubectl plays those tools: it applies as they do, with their field managers. The kinds of Argo CD and Flux themselves
are in gitops/crds.yaml, written for these tests.
"""

import json
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from octavo_cluster import binaries, shell
from octavo_cluster.apiserver import ApiServer
from octavo_cluster.playground import Playground, eventually
from octavo_operator import names

pytestmark = pytest.mark.apiserver

Json = dict[str, Any]

ROOT: Final = Path(__file__).parents[2]
GOLDEN: Final = Path(__file__).parent / "golden"
GITOPS: Final = ROOT / "manifests" / "samples" / "gitops"
REPOSITORY: Final = "https://git.example.com/platform/octavo.git"
FLUX: Final = ("apply", "--server-side", "--field-manager=kustomize-controller", "--force-conflicts")


def inference_service(name: str = "llama", labels: Json | None = None, **spec: Any) -> Json:
    """A manifest as it lies in a repository."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name, "labels": labels or {}},
        "spec": {"model": {"source": "pvc://models/model.gguf"}, **spec},
    }


def committed() -> list[Json]:
    """Every InferenceService of the golden cases and of the samples, as somebody would commit it."""
    cases = sorted(path for path in GOLDEN.glob("*.yaml") if not path.name.endswith(".children.yaml"))
    documents = [yaml.safe_load(path.read_text()) for path in (*cases, *(ROOT / "manifests/samples").glob("*.yaml"))]
    for number, document in enumerate(documents):
        document["metadata"] = {"name": f"{document['metadata']['name']}-{number}"}
    return documents


def differences(playground: Playground, *arguments: str, document: Json) -> str:
    """What `kubectl diff` finds; it ends with 1 where it finds something."""
    answer = playground.server.kubectl(
        *("diff", f"--namespace={playground.namespace}", "--filename=-", *arguments),
        input=json.dumps(document),
        check=False,
    )
    assert answer.returncode in {0, 1}, answer.stderr
    return answer.stdout


def test_nothing_differs_from_the_repository_when_all_is_done_and_a_second_apply_changes_nothing(
    playground: Playground,
) -> None:
    documents = committed()
    everything = {"apiVersion": "v1", "kind": "List", "items": documents}
    with playground.operator() as operator:
        playground.kubectl("apply", "--filename=-", document=everything)
        for document in documents:
            name = document["metadata"]["name"]
            eventually(lambda: bool(playground.condition(name=name)), f"a status of {name}")  # noqa: B023 - called at once
        operator.rest(reconciles=len(documents))
        before = {each["metadata"]["name"]: playground.there("ois", each["metadata"]["name"]) for each in documents}
        written = len(playground.audit())

        assert differences(playground, document=everything) == ""
        playground.kubectl("apply", "--filename=-", document=everything)

        operator.rest(reconciles=len(documents))
        for name, body in before.items():
            assert playground.there("ois", name) == body
        assert playground.audit()[written:] == []
        plain = next(each for each in documents if not each["spec"].keys() & {"replicas", "autoscaling"})
        changed = {**plain, "spec": {**plain["spec"], "replicas": 3}}  # the counter-check: a difference would be seen
        assert "+  replicas: 3" in differences(playground, document=changed)


def managers(body: Json) -> set[tuple[str, str, str | None]]:
    """Who has written to an object: manager, operation, subresource."""
    return {
        (entry["manager"], entry["operation"], entry.get("subresource")) for entry in body["metadata"]["managedFields"]
    }


def test_flux_applies_the_spec_and_the_operator_the_status_and_neither_sees_the_other(playground: Playground) -> None:
    manifest = inference_service(labels={"team": "a"}, engine={"maxModelLen": 64}, replicas=1)
    with playground.operator() as operator:
        playground.kubectl(*FLUX, "--filename=-", document=manifest)
        playground.await_ready("Unknown", "Starting")
        operator.rest(reconciles=1)
        live = playground.there("ois")
        assert managers(live) == {("kustomize-controller", "Apply", None), ("octavo", "Apply", "status")}

        # What Flux does at each interval: a dry run, from which it learns whether somebody has changed something.
        seen = json.loads(
            playground.kubectl(
                *FLUX,
                *("--dry-run=server", "--output=json", "--show-managed-fields", "--filename=-"),
                document=manifest,
            )
        )
        assert seen == live
        as_flux = ("--server-side", "--field-manager=kustomize-controller")
        assert differences(playground, *as_flux, document=manifest) == ""
        written = len(playground.audit())
        playground.kubectl(*FLUX, "--filename=-", document=manifest)
        assert playground.there("ois") == live

        # It also labels objects that it finds, such as a child that somebody has put under its care.
        extra = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "llama", "annotations": {"example.com/owner": "team-a"}},
        }
        playground.kubectl(*FLUX, "--filename=-", document=extra)
        operator.rest(reconciles=2)
        assert playground.audit()[written:] == []
        assert playground.there("deployment")["metadata"]["annotations"]["example.com/owner"] == "team-a"

        # What leaves the repository leaves the spec, and from there the children.
        playground.kubectl(*FLUX, "--filename=-", document=inference_service(labels={"team": "b"}, replicas=2))
        eventually(lambda: playground.there("deployment")["spec"]["replicas"] == 2, "two replicas")
        assert "maxModelLen" not in playground.there("ois")["spec"].get("engine", {})
        assert "--max-model-len" not in json.dumps(playground.there("deployment")["spec"])
        assert playground.there("ois")["metadata"]["labels"] == {"team": "b"}


def test_what_is_pruned_goes_with_its_children_and_what_comes_back_gets_new_ones(playground: Playground) -> None:
    def sync(*services: str) -> None:
        documents = [inference_service(name, labels={"app-of": "test"}) for name in services]
        playground.kubectl(
            *("apply", "--prune", "--selector=app-of=test", "--filename=-"),
            f"--prune-allowlist={names.API_VERSION}/{names.KIND}",
            document={"apiVersion": "v1", "kind": "List", "items": documents},
        )

    with playground.operator():
        sync("llama", "gemma")
        playground.await_ready("Unknown", "Starting")
        playground.await_ready("Unknown", "Starting", name="gemma")
        kept, lost = playground.uid("deployment", "gemma"), playground.uid("ois")

        sync("gemma")
        for kind in ("ois", "deployment", "service", "networkpolicy", "poddisruptionbudget"):
            eventually(lambda: playground.get(kind) is None, f"no {kind} left")  # noqa: B023 - called at once
        assert playground.uid("deployment", "gemma") == kept

        sync("llama", "gemma")
        playground.await_ready("Unknown", "Starting")
        uid = playground.uid("ois")
        assert uid not in {lost, None}
        (owner,) = playground.there("deployment")["metadata"]["ownerReferences"]
        assert owner["uid"] == uid
        assert playground.uid("deployment", "gemma") == kept


# The samples for Argo CD and Flux


@pytest.fixture(scope="module")
def gitops_server(octavo_server: ApiServer) -> ApiServer:
    """The API server with the kinds of Argo CD and Flux, and the namespaces that they and the samples need."""
    kubectl = octavo_server.kubectl
    kubectl("apply", "--server-side", f"--filename={Path(__file__).parent / 'gitops/crds.yaml'}")
    kubectl("wait", "crd", "--all", "--for=condition=Established", "--timeout=30s")
    for namespace in ("argocd", "flux-system", "octavo-system", "models"):
        kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    return octavo_server


def apply(server: ApiServer, path: Path) -> list[Json]:
    """Apply a file or a folder for good, strictly, and return what is stored."""
    answer = server.kubectl("apply", "--server-side", "--validate=strict", f"--filename={path}", "--output=json")
    assert answer.stderr == ""
    found = json.loads(answer.stdout)
    items: list[Json] = found["items"] if found["kind"] == "List" else [found]
    return items


def would_take(server: ApiServer, namespace: str, manifests: str) -> str:
    """What the API server answers to manifests that a tool sends, which it forgets again."""
    answer = server.kubectl(
        *("apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "--filename=-"),
        f"--namespace={namespace}",
        input=manifests,
    )
    assert answer.stderr == ""
    return answer.stdout


def test_argo_cds_app_of_apps_leads_to_the_operator_and_the_models(gitops_server: ApiServer) -> None:
    (root,) = apply(gitops_server, GITOPS / "argocd" / "root.yaml")
    applications = {
        each["metadata"]["name"]: each for each in apply(gitops_server, ROOT / root["spec"]["source"]["path"])
    }
    assert applications.keys() == {"octavo-operator", "octavo-models"}
    for application in (root, *applications.values()):
        assert application["metadata"]["namespace"] == root["spec"]["destination"]["namespace"]
        assert application["spec"]["source"]["repoURL"] == REPOSITORY

    source = applications["octavo-operator"]["spec"]["source"]
    release, values = source["helm"]["releaseName"], json.dumps(source["helm"]["valuesObject"])
    namespace = applications["octavo-operator"]["spec"]["destination"]["namespace"]
    helm = binaries.ensure(["helm"]) / "helm"
    command = (
        helm,
        "template",
        release,
        ROOT / source["path"],
        f"--namespace={namespace}",
        "--values=-",
        "--skip-tests",
    )
    rendered = shell.run([*command, "--kube-version", binaries.KUBERNETES], stdin=values).stdout
    assert 'image: "registry.example.com/octavo/operator:' in rendered
    assert "--engine-image=registry.example.com/octavo/engine:" in rendered
    assert "deployment.apps/octavo-operator serverside-applied" in would_take(gitops_server, namespace, rendered)

    models = applications["octavo-models"]["spec"]
    for path in sorted((ROOT / models["source"]["path"]).glob("*.yaml")):
        taken = would_take(gitops_server, models["destination"]["namespace"], path.read_text())
        assert taken.startswith("inferenceservice.serving.octavo.dev/")


def test_fluxs_kustomizations_lead_to_the_operator_and_the_models(gitops_server: ApiServer, tmp_path: Path) -> None:
    objects = {(each["kind"], each["metadata"]["name"]): each for each in apply(gitops_server, GITOPS / "flux")}
    operator, models = objects["Kustomization", "octavo-operator"], objects["Kustomization", "octavo-models"]
    assert objects["GitRepository", "octavo"]["spec"]["url"] == REPOSITORY
    for kustomization in (operator, models):
        source = kustomization["spec"]["sourceRef"]
        assert (source["kind"], source["name"]) in objects
    assert [each["name"] for each in models["spec"]["dependsOn"]] == [operator["metadata"]["name"]]
    assert ("Namespace", models["spec"]["targetNamespace"]) in objects

    # Flux hands images and patches to kustomize as they are.
    (tmp_path / "path").symlink_to(ROOT / operator["spec"]["path"])
    overlay = {"resources": ["path"], "images": operator["spec"]["images"], "patches": operator["spec"]["patches"]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    rendered = gitops_server.kubectl("kustomize", "--load-restrictor=LoadRestrictionsNone", str(tmp_path)).stdout
    assert "image: registry.example.com/octavo/operator:" in rendered
    assert "--engine-image=registry.example.com/octavo/engine:" in rendered
    assert "deployment.apps/octavo-operator serverside-applied" in would_take(gitops_server, "octavo-system", rendered)

    for path in sorted((ROOT / models["spec"]["path"]).glob("*.yaml")):
        taken = would_take(gitops_server, models["spec"]["targetNamespace"], path.read_text())
        assert taken.startswith("inferenceservice.serving.octavo.dev/")
