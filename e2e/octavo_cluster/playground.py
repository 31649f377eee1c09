"""An operator's process, and a namespace for it on an API server without nodes: for tests of what it does there.

Nothing makes pods on such a server: `Playground` also plays the Deployment's controller and the kubelet.
"""

import base64
import json
import os
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import httpx
import yaml

from octavo_cluster.apiserver import ApiServer
from octavo_cluster.shell import wait_until
from octavo_operator import names

USER: Final = "octavo-operator-under-test"  # has the rights of the chart's ClusterRole and no others
ENGINE_IMAGE: Final = "octavo-engine:test"
HEALTH_PORT: Final = 18080
METRICS_PORT: Final = 19090
PATIENCE: Final = 20.0  # seconds; far more than anything here needs

PATHS: Final = {  # by the kind's name for kubectl
    "ois": f"apis/{names.API_VERSION}/namespaces/{{}}/{names.PLURAL}",
    "deployment": "apis/apps/v1/namespaces/{}/deployments",
    "service": "api/v1/namespaces/{}/services",
    "networkpolicy": "apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
    "poddisruptionbudget": "apis/policy/v1/namespaces/{}/poddisruptionbudgets",
    "serviceaccount": "api/v1/namespaces/{}/serviceaccounts",
    "persistentvolumeclaim": "api/v1/namespaces/{}/persistentvolumeclaims",
    "configmap": "api/v1/namespaces/{}/configmaps",
    "podmonitor": "apis/monitoring.coreos.com/v1/namespaces/{}/podmonitors",
    "scaledobject": "apis/keda.sh/v1alpha1/namespaces/{}/scaledobjects",
    "hpa": "apis/autoscaling/v2/namespaces/{}/horizontalpodautoscalers",
    "pod": "api/v1/namespaces/{}/pods",
}

Json = dict[str, Any]


class OperatorProcess:
    """`python -m octavo_operator` in a `with` block, which checks that it ends well.

    `number` tells apart those that run at the same time.
    """

    def __init__(self, kubeconfig: Path, log: Path, *arguments: str, number: int = 0) -> None:
        self.health = f"http://127.0.0.1:{HEALTH_PORT + number}/healthz"
        self.metrics = f"http://127.0.0.1:{METRICS_PORT + number}/metrics"
        self._command = [
            *(sys.executable, "-m", "octavo_operator", f"--engine-image={ENGINE_IMAGE}", "--log-level=debug"),
            *(f"--health-port={HEALTH_PORT + number}", f"--metrics-port={METRICS_PORT + number}", *arguments),
        ]
        self._environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "PYTHONWARNINGS": "default"}
        self.log = log

    def __enter__(self) -> Self:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.stop()

    def kill(self) -> None:
        """Let it end in the middle of what it does."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Let it end as the kubelet would, and see that it does so well."""
        self.process.terminate()
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        text = self.log.read_text()
        if status != 0 or "Traceback" in text:
            raise AssertionError(f"the operator ended with status {status}; its log:\n{text}")

    def metric(self, sample: str) -> float:
        """A sample of /metrics by its name and labels; 0 while there is none."""
        try:
            with urllib.request.urlopen(self.metrics, timeout=5) as answer:  # noqa: S310 - ours
                lines = answer.read().decode().splitlines()
        except OSError:
            return 0.0
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{sample} ")), 0.0)

    def rest(self, reconciles: int) -> None:
        """Wait until so many reconciles have ended well, and then until there is nothing more to do."""
        sample = 'octavo_reconciles_total{result="ok"}'
        eventually(lambda: self.metric(sample) >= reconciles, f"{reconciles} reconciles")
        seen = -1.0
        while seen != self.metric(sample):
            seen = self.metric(sample)
            time.sleep(0.5)  # not to wait for something, but to see that it does not come


@dataclass
class Playground:
    """A namespace of a test's own, where an operator may run."""

    server: ApiServer
    kubeconfig: Path  # the operator's
    namespace: str
    folder: Path
    _started: list[OperatorProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._http = http_client(self.server.kubeconfig, self.folder)  # answers faster than kubectl starts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def _path(self, kind: str, name: str) -> str:
        return f"{PATHS[kind].format(self.namespace)}/{name}"

    def operator(self, *arguments: str, kubeconfig: Path | None = None, number: int = 0) -> OperatorProcess:
        """An operator for this namespace, to be entered with `with`."""
        log = self.folder / f"operator-{len(self._started)}.log"
        scope = arguments or (f"--namespace={self.namespace}",)
        process = OperatorProcess(kubeconfig or self.kubeconfig, log, *scope, number=number)
        self._started.append(process)
        return process

    def kubectl(self, *arguments: str, document: Json | None = None) -> str:
        """Run kubectl in this namespace."""
        text = None if document is None else json.dumps(document)
        return self.server.kubectl(f"--namespace={self.namespace}", *arguments, input=text).stdout

    def apply(self, name: str = "llama", **spec: Any) -> None:
        """Apply an InferenceService as its user would."""
        document = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": name},
            "spec": {"model": {"source": "pvc://models/model.gguf"}, **spec},
        }
        self.kubectl("apply", "--filename=-", document=document)

    def get(self, kind: str, name: str = "llama") -> Json | None:
        """An object, or None."""
        answer = self._http.get(self._path(kind, name))
        if answer.status_code == 404:
            return None
        found: Json = answer.raise_for_status().json()
        return found

    def there(self, kind: str, name: str = "llama") -> Json:
        """An object that must be there."""
        found = self.get(kind, name)
        if found is None:
            raise AssertionError(f"no {kind} {name}")
        return found

    def uid(self, kind: str, name: str = "llama") -> str | None:
        """Which object of that name it is, or None."""
        found = self.get(kind, name)
        return None if found is None else str(found["metadata"]["uid"])

    def patch(self, kind: str, change: Json, name: str = "llama", subresource: str | None = None) -> None:
        """Merge a change into an object, as a person or a controller would."""
        path = self._path(kind, name) + (f"/{subresource}" if subresource else "")
        answer = self._http.patch(path, json=change, headers={"Content-Type": "application/merge-patch+json"})
        if answer.is_error:
            raise AssertionError(answer.text)

    def condition(self, type_: str = "Ready", name: str = "llama") -> Json:
        """A condition of an InferenceService, or nothing."""
        conditions = (self.get("ois", name) or {}).get("status", {}).get("conditions", ())
        return next((each for each in conditions if each["type"] == type_), {})

    def await_ready(self, status: str, reason: str, name: str = "llama") -> Json:
        """Wait until Ready has this status and reason, and return it."""
        eventually(
            lambda: (
                (self.condition(name=name).get("status"), self.condition(name=name).get("reason")) == (status, reason)
            ),
            f"Ready={status} {reason}",
            lambda: json.dumps(self.condition(name=name)),
        )
        return self.condition(name=name)

    def play_deployment_controller(self, replicas: int, ready: int, name: str = "llama", **more: Any) -> None:
        """Set the status of the Deployment, which no controller does here."""
        generation = self.there("deployment", name)["metadata"]["generation"]
        counts = {"replicas": replicas, "updatedReplicas": replicas, "readyReplicas": ready}
        status = {"observedGeneration": generation, **counts, **more}
        self.patch("deployment", {"status": status}, name, subresource="status")

    def play_pod(self, pod: str, status: Json, name: str = "llama") -> None:
        """Make a pod of the engine in some state, which neither a controller nor a kubelet does here."""
        labels = {**names.labels(name), "pod-template-hash": "1"}
        container = {"name": names.ENGINE_CONTAINER, "image": ENGINE_IMAGE}
        document = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": pod, "labels": labels},
            "spec": {"containers": [container]},
        }
        if self.get("pod", pod) is None:
            self._http.post(PATHS["pod"].format(self.namespace), json=document).raise_for_status()
        self.patch("pod", {"status": status}, pod, subresource="status")

    def audit(self, user: str = USER) -> list[Json]:
        """What the operator has written in this namespace so far: audit.k8s.io/v1 Events."""
        lines = [json.loads(line) for line in self.server.audit_log.read_text().splitlines()]
        return [
            line
            for line in lines
            if line["user"]["username"] == user and line["objectRef"].get("namespace") == self.namespace
        ]


def eventually(
    holds: Callable[[], bool], what: str, seen: Callable[[], str] = lambda: "not yet", seconds: float = PATIENCE
) -> None:
    """Wait until a condition holds."""
    wait_until(lambda: None if holds() else seen(), what=what, seconds=seconds, poll=0.05)


def http_client(kubeconfig: Path, folder: Path) -> httpx.Client:
    """A plain client of the API server; `folder` gets the certificates, which have to be files."""
    server, context = tls(kubeconfig, folder)
    return httpx.Client(base_url=server, verify=context, trust_env=False, timeout=30)


def tls(kubeconfig: Path, folder: Path) -> tuple[str, ssl.SSLContext]:
    """Where a kubeconfig's API server is, and what a client of it presents and trusts."""
    document = yaml.safe_load(kubeconfig.read_text())
    user, cluster = document["users"][0]["user"], document["clusters"][0]["cluster"]
    parts = {
        "ca": cluster["certificate-authority-data"],
        "certificate": user["client-certificate-data"],
        "key": user["client-key-data"],
    }
    for part, data in parts.items():
        (folder / part).touch(mode=0o600)
        (folder / part).write_bytes(base64.b64decode(data))
    context = ssl.create_default_context(cafile=folder / "ca")
    context.load_cert_chain(folder / "certificate", folder / "key")
    return cluster["server"], context
