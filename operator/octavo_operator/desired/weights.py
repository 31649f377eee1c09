"""What the engine loads, and how it comes into the pod: the model, and LoRA adapters beside it.

What is in a volume is mounted; what is elsewhere is pulled by an init container of its own, which alone gets the
credentials for it. Used by deployment.py, and by diagnosis.py to tell which source a container pulls; pure.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from octavo_operator import names
from octavo_operator.api import source
from octavo_operator.api.adapters import Adapter
from octavo_operator.api.model import AWS_KEYS, ModelSpec
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired.containers import TERMINATION_LOG, TMP_DIR, TMP_MOUNT, container, environment, resources
from octavo_operator.desired.metadata import Manifest

MODEL_DIR: Final = "/models"
MODEL_MOUNT: Final[Manifest] = {"name": "model", "mountPath": MODEL_DIR}
PULLED_FILE: Final = "model.gguf"
PULLED_MODEL: Final = "model"  # of what may be a file or a folder
ADAPTERS_DIR: Final = "/adapters"
ADAPTERS_MOUNT: Final[Manifest] = {"name": "adapters", "mountPath": ADAPTERS_DIR}
CLAIMS_DIR: Final = "/adapter-claims"  # not below /adapters: what is in a read-only volume cannot be mounted on
DOCKER_CONFIG_DIR: Final = f"{TMP_DIR}/.docker"  # in the home of the image's user


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Where the engine finds what it loads, and what the pod needs for that."""

    model: str  # its path in the engine's container
    adapters: Mapping[str, str]  # the path of each, by its name
    init_containers: tuple[Manifest, ...]  # in the order in which they run
    volumes: tuple[Manifest, ...]
    mounts: tuple[Manifest, ...]  # of the engine's container


@dataclass(frozen=True, slots=True, kw_only=True)
class _Credentials:
    """What a container that pulls gets of Secrets: the kubelet reads them, nobody else."""

    env: tuple[Manifest, ...] = ()
    volumes: tuple[Manifest, ...] = ()
    mounts: tuple[Manifest, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pull:
    """What one init container brings."""

    container: str
    args: tuple[str, ...]
    mount: Manifest  # of the volume that it writes to
    credentials: _Credentials


def build(service: InferenceService, image: str) -> Weights:
    """What the pods of a service load; `image` is the engine's."""
    path, volume = _place_of_model(service)
    pulls, claims = list(_pulls(service, path)), _more_claims(service)
    volumes: list[Manifest] = [{"name": "model", **volume}, {"name": "tmp", "emptyDir": {}}]
    mounts: list[Manifest] = [{**MODEL_MOUNT, "readOnly": True}, TMP_MOUNT]
    volumes += [each for pull in pulls for each in pull.credentials.volumes]
    if any(pull.mount == ADAPTERS_MOUNT for pull in pulls):
        volumes.append({"name": ADAPTERS_MOUNT["name"], "emptyDir": {}})
        mounts.append({**ADAPTERS_MOUNT, "readOnly": True})
    for number, claim in enumerate(claims):
        name = f"adapter-claim-{number}"
        volumes.append({"name": name, **_read_only(claim)})
        mounts.append({"name": name, "mountPath": f"{CLAIMS_DIR}/{number}", "readOnly": True})
    return Weights(
        model=path,
        adapters={
            adapter.name: _place_of_adapter(number, adapter, claims)
            for number, adapter in enumerate(service.spec.adapters)
        },
        init_containers=tuple(_container(service, image, pull) for pull in pulls),
        volumes=tuple(volumes),
        mounts=tuple(mounts),
    )


def pulled_by(service: InferenceService) -> dict[str, tuple[str, str]]:
    """What each init container pulls, in words, and from where; by the container's name."""
    spec = service.spec
    adapters = {
        f"{names.ADAPTER_CONTAINER}{number}": (f"the adapter {each.name}", each.source)
        for number, each in enumerate(spec.adapters)
    }
    return {names.PULL_CONTAINER: ("the model", spec.model.source), **adapters}


def _place_of_model(service: InferenceService) -> tuple[str, Manifest]:
    """The model's path in the engine's container, and the volume that is mounted at MODEL_DIR."""
    model = service.spec.model
    match source.parse(model.source):
        case source.ClaimPath(claim, path):
            return f"{MODEL_DIR}/{path}".rstrip("/"), _read_only(claim)
        case source.Remote(url):
            if model.cache is None:
                return f"{MODEL_DIR}/{_pulled_name(url)}", {"emptyDir": {}}
            # Several models may come to be in one cache, one after the other or of services that share it.
            folder = hashlib.sha256(url.encode()).hexdigest()[:16]
            claim = model.cache.claim_name or names.volume_claim(service.name)
            return f"{MODEL_DIR}/{folder}/{_pulled_name(url)}", {"persistentVolumeClaim": {"claimName": claim}}


def _pulled_name(url: str) -> str:
    """What the model is called once it is pulled: a part of a split one by its own name, which tells of the others."""
    if not url.endswith(".gguf"):
        return PULLED_MODEL
    part = re.search("[^/:]+-[0-9]{5}-of-[0-9]{5}[.]gguf$", url)
    return PULLED_FILE if part is None else part[0]


def _place_of_adapter(number: int, adapter: Adapter, claims: Sequence[str]) -> str:
    """An adapter's path in the engine's container; where it is pulled its name is part of it, for messages."""
    match source.parse(adapter.source):
        case source.ClaimPath(claim, path):
            folder = f"{CLAIMS_DIR}/{claims.index(claim)}" if claim in claims else MODEL_DIR
            return f"{folder}/{path}".rstrip("/")
        case source.Remote():
            return f"{ADAPTERS_DIR}/{number}-{re.sub('[/:]', '-', adapter.name)}"


def _more_claims(service: InferenceService) -> list[str]:
    """The claims that adapters are in, but for the one that is mounted for the model."""
    model = source.parse(service.spec.model.source)
    places = [source.parse(adapter.source) for adapter in service.spec.adapters]
    claims = [place.claim for place in places if isinstance(place, source.ClaimPath)]
    of_model = model.claim if isinstance(model, source.ClaimPath) else None
    return list(dict.fromkeys(claim for claim in claims if claim != of_model))


def _pulls(service: InferenceService, model_path: str) -> Iterator[_Pull]:
    """What has to be pulled, in the order in which it is."""
    model = service.spec.model
    remote = source.parse(model.source)
    if isinstance(remote, source.Remote):
        yield _Pull(
            container=names.PULL_CONTAINER,
            args=(remote.url, f"--output={model_path}"),
            mount=MODEL_MOUNT,
            credentials=_credentials(model, remote, names.CREDENTIALS_VOLUME),
        )
    for number, adapter in enumerate(service.spec.adapters):
        remote = source.parse(adapter.source)
        if isinstance(remote, source.Remote):
            yield _Pull(
                container=f"{names.ADAPTER_CONTAINER}{number}",
                args=(remote.url, "--adapter", f"--output={_place_of_adapter(number, adapter, ())}"),
                mount=ADAPTERS_MOUNT,
                credentials=_credentials(adapter, remote, f"{names.CREDENTIALS_VOLUME}-{number}"),
            )


def _container(service: InferenceService, image: str, pull: _Pull) -> Manifest:
    # Its /ready says how far it is, on the port that the engine has after it.
    args = ["pull", *pull.args, "--host=0.0.0.0", f"--port={names.HTTP_PORT}", f"--termination-log={TERMINATION_LOG}"]
    return {
        **container(pull.container, image, args),
        **environment(service, *pull.credentials.env),
        "resources": resources(service, gpus=False),
        "volumeMounts": [pull.mount, TMP_MOUNT, *pull.credentials.mounts],
    }


def _credentials(wants: ModelSpec | Adapter, remote: source.Remote, volume: str) -> _Credentials:
    """What of Secrets a pull gets; `volume` is the name of one that is mounted for it."""
    if (token := wants.token_secret) is not None:
        return _Credentials(env=(_from_secret("HF_TOKEN", token.name, token.key),))
    if (secret := wants.credentials_secret) is None:
        return _Credentials()
    if remote.scheme == "s3":
        optional = {"AWS_SESSION_TOKEN"}
        return _Credentials(
            env=tuple(_from_secret(key, secret.name, key, optional=key in optional) for key in AWS_KEYS)
        )
    items = [{"key": ".dockerconfigjson", "path": "config.json"}]
    return _Credentials(
        volumes=({"name": volume, "secret": {"secretName": secret.name, "defaultMode": 0o440, "items": items}},),
        mounts=({"name": volume, "mountPath": DOCKER_CONFIG_DIR, "readOnly": True},),
    )


def _from_secret(variable: str, secret: str, key: str, *, optional: bool = False) -> Manifest:
    reference: Manifest = {"name": secret, "key": key, **({"optional": True} if optional else {})}
    return {"name": variable, "valueFrom": {"secretKeyRef": reference}}


def _read_only(claim: str) -> Manifest:
    return {"persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
