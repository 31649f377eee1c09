"""Claims and what is in them: volumes on the node's disk, and putting a file into a claim."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from typing import TYPE_CHECKING, Any

from octavo_cluster import node, shell
from octavo_cluster.errors import CommandFailed, HarnessError
from octavo_cluster.progress import step

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from octavo_cluster.backend import Cluster

STORAGE_CLASS = "standard"
VOLUMES = 16
VOLUME_SIZE = "10Gi"
COPY_SECONDS = 300.0


def manifests(folder: Path) -> list[dict[str, Any]]:
    """A storage class and volumes that wait for claims; each volume is a folder of the node."""
    storage_class = {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {
            "name": STORAGE_CLASS,
            "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
        },
        "provisioner": "kubernetes.io/no-provisioner",
        "volumeBindingMode": "WaitForFirstConsumer",
        "reclaimPolicy": "Retain",
    }
    return [storage_class, *(_volume(number, folder) for number in range(VOLUMES))]


def _volume(number: int, folder: Path) -> dict[str, Any]:
    name = f"{node.NAME}-{number}"
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "storageClassName": STORAGE_CLASS,
            "capacity": {"storage": VOLUME_SIZE},
            "accessModes": ["ReadWriteOnce", "ReadWriteMany"],
            "persistentVolumeReclaimPolicy": "Retain",
            "hostPath": {"path": str(folder / name), "type": "Directory"},
        },
    }


def make_folders(folder: Path) -> None:
    """Make the volumes' folders, writable by every user: hostPath knows no fsGroup."""
    for number in range(VOLUMES):
        path = folder / f"{node.NAME}-{number}"
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o777)


def claim(name: str, storage_class: str, size: str = "1Gi") -> dict[str, Any]:
    """A claim on one volume."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {
            "storageClassName": storage_class,
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": size}},
        },
    }


def offer_volume(cluster: Cluster, storage_class: str) -> None:
    """Make a volume of a storage class for a claim that waits for one: a class that makes volumes, or a free volume."""
    volumes = cluster.kubectl.get("persistentvolumes")["items"]
    free = [
        each["metadata"]["name"]
        for each in volumes
        if each["status"]["phase"] == "Available" and each["spec"]["storageClassName"] == cluster.storage_class
    ]
    if free:
        patch = json.dumps({"spec": {"storageClassName": storage_class}})
        cluster.kubectl("patch", "persistentvolume", free[-1], f"--patch={patch}")
        return
    usual = cluster.kubectl.get("storageclass", cluster.storage_class)
    cluster.kubectl.apply({**usual, "metadata": {"name": storage_class}})


def put_file(cluster: Cluster, *, namespace: str, claim_name: str, source: Path, remote_name: str, image: str) -> None:
    """Copy a file into a claim, by a short-lived pod that mounts it; makes the claim when it is not there.

    A reader never sees half a file: it gets its name when it is whole. A file of that name and size stays as it is.

    Args:
        cluster: where.
        namespace: the claim's.
        claim_name: the claim's.
        source: the file on this machine.
        remote_name: its name in the volume.
        image: an image on the node that has `sh`, `cat` and `stat`.

    Raises:
        CommandFailed: the pod did not start, or the copy failed.
        HarnessError: what arrived has another size.
    """
    kubectl, where = cluster.kubectl, f"--namespace={namespace}"
    if kubectl("get", "persistentvolumeclaim", claim_name, where, check=False).returncode != 0:
        kubectl.apply(claim(claim_name, cluster.storage_class), namespace=namespace)
    pod = f"put-{secrets.token_hex(3)}"
    try:
        kubectl.apply(_copier(pod, claim_name, image), namespace=namespace)
        kubectl("wait", "--for=condition=Ready", f"pod/{pod}", where, "--timeout=60s")
        seen = kubectl("exec", pod, where, "--", "stat", "-c", "%s", f"/volume/{remote_name}", check=False)
        if seen.stdout.strip() != str(source.stat().st_size):
            _stream(cluster, pod, namespace, source, remote_name)
    finally:
        kubectl("delete", "pod", pod, where, "--ignore-not-found", "--now", "--wait=false", check=False)


def _stream(cluster: Cluster, pod: str, namespace: str, source: Path, remote_name: str) -> None:
    script = 'cat > "$0.partial" && stat -c %s "$0.partial" && mv "$0.partial" "$0"'
    target = f"/volume/{remote_name}"
    command = cluster.kubectl.command("exec", "-i", pod, f"--namespace={namespace}", "--", "sh", "-c", script, target)
    size = source.stat().st_size
    with source.open("rb") as file:

        def sent() -> str:  # kubectl reads through the same open file, so that its position is ours
            return f"{100 * os.lseek(file.fileno(), 0, os.SEEK_CUR) // size} %"

        with step(f"{source.name}: copying {size / 1e6:.0f} MB", detail=sent):
            done = subprocess.run(command, check=False, stdin=file, capture_output=True, timeout=COPY_SECONDS)
    if done.returncode != 0:
        raise CommandFailed(f"copying {source} into {namespace}/{pod} failed:\n{shell.tail(done.stderr.decode())}")
    arrived = done.stdout.decode().strip()
    if arrived != str(size):
        raise HarnessError(f"{remote_name}: {arrived} bytes arrived of {size}")


def file_server(name: str, claim_name: str, image: str) -> list[dict[str, Any]]:
    """A pod and its Service, which serve a claim's files on port 8080 as Hugging Face serves those of org/repo."""
    served = "/tmp/org/repo/resolve"  # noqa: S108 - in the pod
    script = f"mkdir -p {served} && ln -s /volume {served}/main && exec python3 -m http.server 8080 --directory /tmp"
    return _web_server(name, claim_name, image, ["sh", "-c", script])


def slow_server(name: str, claim_name: str, image: str, bytes_per_second: int) -> list[dict[str, Any]]:
    """A pod and its Service, which serve a claim's files on port 8080, each no faster than that."""
    script = f"""
import os, time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
class Handler(SimpleHTTPRequestHandler):
    def copyfile(self, source, outputfile):
        while data := source.read({bytes_per_second} // 10):
            outputfile.write(data)
            time.sleep(0.1)
os.chdir("/volume")
ThreadingHTTPServer(("", 8080), Handler).serve_forever()
"""
    return _web_server(name, claim_name, image, ["python3", "-c", script])


def _web_server(name: str, claim_name: str, image: str, command: Sequence[str]) -> list[dict[str, Any]]:
    pod = _copier(name, claim_name, image, command=command)
    pod["metadata"]["labels"] = {"serves": name}
    pod["spec"]["volumes"].append({"name": "tmp", "emptyDir": {}})
    (container,) = pod["spec"]["containers"]
    container["volumeMounts"].append({"name": "tmp", "mountPath": "/tmp"})  # noqa: S108 - in the pod
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"selector": {"serves": name}, "ports": [{"port": 8080}]},
    }
    return [pod, service]


def _copier(name: str, claim_name: str, image: str, command: Sequence[str] = ("sleep", "infinity")) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "runAsGroup": 65532,
                "fsGroup": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "copy",
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    "command": list(command),
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [{"name": "volume", "mountPath": "/volume"}],
                }
            ],
            "volumes": [{"name": "volume", "persistentVolumeClaim": {"claimName": claim_name}}],
        },
    }


def pretend_gpus(cluster: Cluster, count: int, product: str = "NVIDIA-H100-80GB-HBM3") -> None:
    """Make the node claim GPUs that are not there; the scheduler counts them as if they were.

    The kubelet leaves a resource alone that it did not set itself, and drops it when it restarts.
    """
    numbers = {"nvidia.com/gpu": str(count)}
    patch = json.dumps({"status": {"capacity": numbers, "allocatable": numbers}})
    cluster.kubectl("patch", "node", cluster.node, "--subresource=status", "--type=merge", f"--patch={patch}")
    cluster.kubectl("label", "node", cluster.node, f"nvidia.com/gpu.product={product}", "--overwrite")
