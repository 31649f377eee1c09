"""What an InferenceService becomes.

Whole cases stand in golden/, for people to read: CASE.yaml goes in, CASE.children.yaml comes out. After a change on
purpose the command in REGENERATE writes them anew, and the diff is reviewed.
"""

import re
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from octavo_operator import cli
from octavo_operator.api.v1alpha1 import OWNED_FLAGS, InferenceService
from octavo_operator.desired import children
from octavo_operator.desired import service as cluster_service

GOLDEN: Final = Path(__file__).parent / "golden"
CASES: Final = sorted(path for path in GOLDEN.glob("*.yaml") if not path.name.endswith(".children.yaml"))
REGENERATE: Final = (
    "for case in adapters cpu nvidia autoscaling custom cached profiles; do kubectl-octavo render -f "
    "tests/operator/golden/$case.yaml --engine-image=octavo-engine:golden > tests/operator/golden/$case.children.yaml; "
    "done"
)

Manifest = dict[str, Any]


def service(**spec: Any) -> InferenceService:
    return InferenceService.model_validate(
        {
            "apiVersion": "serving.octavo.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": "llama", "namespace": "team-a", "uid": "1234"},
            "spec": {"model": {"source": "pvc://models/llama.gguf"}, **spec},
        }
    )


def rendered(**spec: Any) -> dict[str, Manifest]:
    return {child["kind"]: child for child in children(service(**spec), engine_image="octavo-engine:test")}


def pod(**spec: Any) -> Manifest:
    pod_spec: Manifest = rendered(**spec)["Deployment"]["spec"]["template"]["spec"]
    return pod_spec


def engine(**spec: Any) -> Manifest:
    (container,) = pod(**spec)["containers"]
    return dict(container)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_the_children_are_those_that_were_reviewed(path: Path) -> None:
    expected = path.with_suffix(".children.yaml").read_text()
    assert cli.render(str(path), engine_image="octavo-engine:golden") == expected, f"if on purpose: {REGENERATE}"


def test_every_reviewed_case_is_named_in_the_command_that_renders_it() -> None:
    command = re.search("case in ([a-z ]+);", REGENERATE)
    assert command is not None
    assert sorted(command[1].split()) == [path.stem for path in CASES]


def test_the_same_service_renders_the_same_children() -> None:
    assert rendered(replicas=2) == rendered(replicas=2)


def test_every_child_carries_its_owner_its_labels_and_its_namespace() -> None:
    for child in rendered(autoscaling={"maxReplicas": 2}, resources={"requests": {"cpu": "1"}}).values():
        metadata = child["metadata"]
        (owner,) = metadata["ownerReferences"]
        assert owner["uid"] == "1234"
        assert owner["controller"]
        assert metadata["labels"]["serving.octavo.dev/service"] == "llama"
        assert metadata["namespace"] == "team-a"


def test_deployment_and_service_select_the_same_pods() -> None:
    spec = rendered(pod={"labels": {"team": "a"}})
    selector = spec["Service"]["spec"]["selector"]
    assert selector == spec["Deployment"]["spec"]["selector"]["matchLabels"]
    assert selector.items() <= spec["Deployment"]["spec"]["template"]["metadata"]["labels"].items()


def test_every_child_that_selects_pods_selects_those_of_the_deployment_and_no_others() -> None:
    spec = rendered(pod={"labels": {"team": "a"}})
    selector = spec["Deployment"]["spec"]["selector"]["matchLabels"]
    assert spec["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == selector
    assert spec["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == selector


def test_the_pods_run_as_an_account_of_their_own_and_get_no_token() -> None:
    children = rendered()
    assert pod()["serviceAccountName"] == children["ServiceAccount"]["metadata"]["name"]
    assert (pod()["automountServiceAccountToken"], children["ServiceAccount"]["automountServiceAccountToken"]) == (
        False,
        False,
    )


def test_a_drain_takes_one_pod_at_a_time_and_any_that_does_not_serve() -> None:
    spec = rendered(replicas=3)["PodDisruptionBudget"]["spec"]
    assert (spec["maxUnavailable"], spec["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")


def test_without_autoscaling_there_is_no_autoscaler_and_one_replica() -> None:
    manifests = rendered()
    assert "HorizontalPodAutoscaler" not in manifests
    assert manifests["Deployment"]["spec"]["replicas"] == 1


ADAPTERS: Final = [
    {"name": "sql", "source": "hf://org/sql-lora"},
    {"name": "poet", "source": "pvc://models/poet/"},
    {"name": "a/b", "source": "oci://registry.example/a", "credentialsSecret": {"name": "login"}},
]


def test_each_adapter_is_pulled_by_a_container_that_alone_has_its_credentials() -> None:
    spec = pod(model={"source": "hf://org/repo:m.gguf", "tokenSecret": {"name": "hub"}}, adapters=ADAPTERS)
    of_model, sql, registry = spec["initContainers"]
    assert [each["name"] for each in spec["initContainers"]] == ["pull", "pull-adapter-0", "pull-adapter-2"]
    assert [each["name"] for each in of_model["env"]] == ["HF_TOKEN"]
    assert "env" not in sql
    assert [mount["name"] for mount in registry["volumeMounts"]] == ["adapters", "tmp", "credentials-2"]
    (serving,) = spec["containers"]
    assert not any("credentials" in mount["name"] for mount in serving["volumeMounts"])
    assert "env" not in serving
    assert all(mount["readOnly"] for mount in serving["volumeMounts"] if mount["name"] != "tmp")


def test_what_is_mounted_is_a_volume_of_the_pod_and_each_once() -> None:
    both = [*ADAPTERS, {"name": "other", "source": "pvc://models/other.gguf"}]
    spec = pod(adapters=both)
    volumes = [volume["name"] for volume in spec["volumes"]]
    assert len(volumes) == len(set(volumes))
    for container in (*spec["initContainers"], *spec["containers"]):
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
    claims = [
        volume["persistentVolumeClaim"]["claimName"] for volume in spec["volumes"] if "persistentVolumeClaim" in volume
    ]
    assert claims == ["models"]  # the model's own, in which two adapters are


def test_without_adapters_the_engine_keeps_no_memory_for_them() -> None:
    assert "--enable-lora" not in engine()["args"]
    assert "--enable-lora" in engine(adapters=ADAPTERS[1:2])["args"]


def test_the_number_that_an_autoscaler_has_left_stays_until_the_spec_gives_one() -> None:
    def number(**spec: Any) -> Any:
        manifests = children(service(**spec), engine_image="octavo-engine:test", keep_count=True)
        return next(child["spec"].get("replicas") for child in manifests if child["kind"] == "Deployment")

    assert number() is None
    assert number(replicas=2) == 2
    assert number(replicas=0) == 0


def test_zero_replicas_are_zero() -> None:
    assert rendered(replicas=0)["Deployment"]["spec"]["replicas"] == 0


def test_with_autoscaling_the_deployment_leaves_the_number_to_the_autoscaler() -> None:
    manifests = rendered(autoscaling={"maxReplicas": 2}, resources={"requests": {"cpu": "1"}})
    assert "replicas" not in manifests["Deployment"]["spec"]
    assert manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "llama"


@pytest.mark.parametrize("count", [1, 2, 16])
def test_the_gpu_count_is_limit_and_tensor_parallel_size(count: int) -> None:
    container = engine(accelerator={"type": "nvidia", "count": count})
    assert container["resources"]["limits"] == {"nvidia.com/gpu": str(count)}
    assert f"--tensor-parallel-size={count}" in container["args"]
    assert "--device=cuda" in container["args"]


def test_the_init_container_takes_no_gpu() -> None:
    spec = pod(accelerator={"type": "nvidia", "count": 2}, model={"source": "hf://org/repo:model.gguf"})
    (pull,) = spec["initContainers"]
    assert pull["resources"] == {}


def test_only_ranks_that_talk_to_each_other_get_shared_memory() -> None:
    def volumes(count: int) -> dict[str, Manifest]:
        found = pod(accelerator={"type": "nvidia", "count": count})["volumes"]
        return {volume["name"]: volume for volume in found}

    assert "shm" not in volumes(1)
    assert volumes(2)["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}
    assert volumes(8)["shm"]["emptyDir"]["sizeLimit"] == "8Gi"


def test_on_cpu_nothing_speaks_of_gpus() -> None:
    spec = pod()
    assert "tolerations" not in spec
    assert engine()["resources"] == {}
    assert {"--device=cpu", "--tensor-parallel-size=1"} <= set(engine()["args"])


def test_a_volume_is_mounted_read_only_and_nothing_is_pulled() -> None:
    spec = pod(model={"source": "pvc://my-claim/a/b.gguf"})
    assert "initContainers" not in spec
    assert {
        "name": "model",
        "persistentVolumeClaim": {"claimName": "my-claim", "readOnly": True},
    } in spec["volumes"]
    assert {"name": "model", "mountPath": "/models", "readOnly": True} in spec["containers"][0]["volumeMounts"]
    assert spec["containers"][0]["args"][:2] == ["serve", "/models/a/b.gguf"]


@pytest.mark.parametrize("source", ["hf://org/repo:model.gguf", "https://models.example/model.gguf"])
def test_a_remote_file_is_pulled_to_where_the_engine_reads_it(source: str) -> None:
    spec = pod(model={"source": source})
    (pull,) = spec["initContainers"]
    assert pull["args"][:3] == ["pull", source, "--output=/models/model.gguf"]
    assert spec["containers"][0]["args"][:2] == ["serve", "/models/model.gguf"]


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("s3://bucket/a/model.gguf", "/models/model.gguf"),
        (
            "http://models.svc:8080/big-00001-of-00003.gguf",
            "/models/big-00001-of-00003.gguf",
        ),  # by its name it is found
        ("hf://org/repo:big-00001-of-00003.gguf", "/models/big-00001-of-00003.gguf"),
        ("hf://org/repo", "/models/model"),  # a file or a folder: the hub knows
        ("hf://org/repo:Q4_K_M", "/models/model"),
        ("s3://bucket/folder/", "/models/model"),
        ("oci://registry.example/llama:v1", "/models/model"),
        ("ollama://qwen3:0.6b", "/models/model"),
    ],
)
def test_whatever_is_pulled_has_a_place_that_is_known_before(source: str, path: str) -> None:
    spec = pod(model={"source": source})
    assert spec["initContainers"][0]["args"][:3] == ["pull", source, f"--output={path}"]
    assert spec["containers"][0]["args"][:2] == ["serve", path]


@pytest.mark.parametrize(("source", "path"), [("pvc://claim/a/b/", "/models/a/b"), ("pvc://claim/", "/models")])
def test_a_model_may_be_a_folder_of_a_volume(source: str, path: str) -> None:
    assert engine(model={"source": source})["args"][:2] == ["serve", path]


def test_a_pull_says_how_far_it_is_where_the_engine_does_it_after_it() -> None:
    spec = pod(model={"source": "hf://org/repo"})
    (pull,), (container,) = spec["initContainers"], spec["containers"]
    (port,) = container["ports"]
    assert {"--host=0.0.0.0", f"--port={port['containerPort']}"} <= set(pull["args"]) & set(container["args"])


CACHED: Final[Manifest] = {"source": "hf://org/repo:model.gguf", "cache": {"size": "1Gi"}}


def test_a_cache_is_a_claim_that_is_written_by_the_pull_and_read_by_the_engine() -> None:
    children = rendered(model=CACHED)
    claim = children["PersistentVolumeClaim"]
    assert claim["spec"] == {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    spec = children["Deployment"]["spec"]["template"]["spec"]
    assert {"name": "model", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}} in spec["volumes"]
    (pull,), (container,) = spec["initContainers"], spec["containers"]
    assert {"name": "model", "mountPath": "/models"} in pull["volumeMounts"]
    assert {"name": "model", "mountPath": "/models", "readOnly": True} in container["volumeMounts"]
    assert pull["args"][2] == f"--output={container['args'][1]}"


def test_a_claim_of_somebody_else_is_used_and_none_is_made() -> None:
    children = rendered(model={**CACHED, "cache": {"claimName": "shared"}})
    assert "PersistentVolumeClaim" not in children
    volumes = children["Deployment"]["spec"]["template"]["spec"]["volumes"]
    assert {"name": "model", "persistentVolumeClaim": {"claimName": "shared"}} in volumes


def test_two_models_in_one_cache_do_not_meet() -> None:
    one, other = (engine(model={**CACHED, "source": f"hf://org/repo@{revision}:model.gguf"}) for revision in ("a", "b"))
    assert one["args"][1] != other["args"][1]


@pytest.mark.parametrize(
    ("ends_first", "expected"),
    [(False, {"maxSurge": 1, "maxUnavailable": 0}), (True, {"maxSurge": 0, "maxUnavailable": 1})],
)
def test_the_order_of_a_rollout_is_in_the_deployments_strategy(ends_first: bool, expected: Manifest) -> None:  # noqa: FBT001 - a parameter
    manifests = children(service(), engine_image="octavo-engine:test", ends_first=ends_first)
    (deployment,) = (child for child in manifests if child["kind"] == "Deployment")
    assert deployment["spec"]["strategy"] == {"type": "RollingUpdate", "rollingUpdate": expected}


def test_only_the_pull_gets_the_token_and_the_operator_never_sees_it() -> None:
    spec = pod(model={"source": "hf://org/repo:model.gguf", "tokenSecret": {"name": "hub"}})
    (pull,), (container,) = spec["initContainers"], spec["containers"]
    assert pull["env"] == [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}]
    assert "env" not in container


def test_only_the_pull_gets_the_keys_of_a_bucket() -> None:
    spec = pod(model={"source": "s3://bucket/folder/", "credentialsSecret": {"name": "s3"}})
    (pull,), (container,) = spec["initContainers"], spec["containers"]
    references = {each["name"]: each["valueFrom"]["secretKeyRef"] for each in pull["env"]}
    assert references == {
        "AWS_ACCESS_KEY_ID": {"name": "s3", "key": "AWS_ACCESS_KEY_ID"},
        "AWS_SECRET_ACCESS_KEY": {"name": "s3", "key": "AWS_SECRET_ACCESS_KEY"},
        "AWS_SESSION_TOKEN": {"name": "s3", "key": "AWS_SESSION_TOKEN", "optional": True},
    }
    assert "env" not in container


@pytest.mark.parametrize("source", ["oci://registry.example/llama:v1", "ollama://registry.example/team/llama"])
def test_only_the_pull_gets_the_login_of_a_registry_where_docker_has_it(source: str) -> None:
    spec = pod(model={"source": source, "credentialsSecret": {"name": "registry"}})
    (pull,), (container,) = spec["initContainers"], spec["containers"]
    (volume,) = (each for each in spec["volumes"] if each["name"] == "credentials")
    assert volume["secret"]["secretName"] == "registry"
    assert volume["secret"]["items"] == [{"key": ".dockerconfigjson", "path": "config.json"}]
    home = re.search("^ENV HOME=([^ ]+)", (GOLDEN.parents[2] / "Dockerfile.engine").read_text(), re.MULTILINE)
    assert home is not None
    mount = {"name": "credentials", "mountPath": f"{home[1]}/.docker", "readOnly": True}
    assert mount in pull["volumeMounts"]
    assert mount not in container["volumeMounts"]


def test_another_text_of_a_profile_makes_no_other_pod() -> None:
    def with_profile(system: str) -> dict[str, Manifest]:
        return rendered(profiles=[{"name": "support", "system": system}])

    one, other = with_profile("You are kind."), with_profile("You are brief.")
    assert one["Deployment"] == other["Deployment"]
    assert one["ConfigMap"] != other["ConfigMap"]
    template = one["Deployment"]["spec"]["template"]["spec"]
    (volume,) = (each for each in template["volumes"] if each["name"] == "profiles")
    assert volume["configMap"]["name"] == one["ConfigMap"]["metadata"]["name"]
    (container,) = template["containers"]
    (mount,) = (each for each in container["volumeMounts"] if each["name"] == "profiles")
    (file,) = one["ConfigMap"]["data"]
    assert f"--profiles={mount['mountPath']}/{file}" in container["args"]
    assert "subPath" not in mount  # which the kubelet would never renew


def test_without_profiles_nothing_speaks_of_them() -> None:
    assert "ConfigMap" not in rendered()
    assert "profiles" not in str(pod())


ELASTIC: Final[Manifest] = {"autoscaling": {"maxReplicas": 3}, "resources": {"requests": {"cpu": "1"}}}


def test_optional_kinds_are_made_where_the_cluster_has_them() -> None:
    def kinds(*offered: str, **spec: Any) -> set[str]:
        manifests = children(service(**spec), engine_image="octavo-engine:test", offered=offered)
        return {child["kind"] for child in manifests}

    assert kinds("PodMonitor") - kinds() == {"PodMonitor"}
    assert kinds("ScaledObject") == kinds()
    assert kinds("ScaledObject", **ELASTIC) ^ kinds(**ELASTIC) == {"ScaledObject", "HorizontalPodAutoscaler"}


def test_keda_gets_the_same_bounds_and_target_as_the_autoscaler() -> None:
    manifests = children(service(**ELASTIC), engine_image="octavo-engine:test", offered=["ScaledObject"])
    (spec,) = (child["spec"] for child in manifests if child["kind"] == "ScaledObject")
    hpa = rendered(**ELASTIC)["HorizontalPodAutoscaler"]["spec"]
    assert spec["scaleTargetRef"] == hpa["scaleTargetRef"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (hpa["minReplicas"], hpa["maxReplicas"])
    (trigger,) = spec["triggers"]
    (metric,) = hpa["metrics"]
    assert trigger["type"] == metric["resource"]["name"]
    assert trigger["metricType"] == metric["resource"]["target"]["type"]
    assert int(trigger["metadata"]["value"]) == metric["resource"]["target"]["averageUtilization"]


def test_prometheus_finds_the_port_and_path_that_the_engine_serves() -> None:
    manifests = {child["kind"]: child for child in children(service(), engine_image="e", offered=["PodMonitor"])}
    monitor = manifests["PodMonitor"]["spec"]
    deployment = manifests["Deployment"]["spec"]
    assert monitor["selector"] == deployment["selector"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    (port,) = deployment["template"]["spec"]["containers"][0]["ports"]
    assert (endpoint["port"], endpoint["path"]) == (port["name"], "/metrics")


def test_the_grace_period_covers_the_announcement_and_the_whole_drain() -> None:
    spec = pod(rollout={"drainSeconds": 60})
    before = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert "--shutdown-timeout=60" in spec["containers"][0]["args"]
    assert spec["terminationGracePeriodSeconds"] > before + 60


def test_a_load_may_take_as_long_as_it_goes_on() -> None:
    (container,) = pod()["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    # What kills asks /health, which fails where a load is stuck.
    assert {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe")} == {"/health"}


def test_the_service_has_its_own_image_if_it_names_one() -> None:
    assert engine()["image"] == "octavo-engine:test"
    assert engine(engine={"image": "mine:1"})["image"] == "mine:1"


def test_every_flag_that_the_operator_renders_is_refused_among_extra_args() -> None:
    args = engine(
        accelerator={"type": "nvidia", "count": 1},
        engine={"maxModelLen": 1, "maxNumSeqs": 1, "gpuMemoryUtilization": "0.5", "quantization": "none"},
        endpoint={"apiKeySecret": {"name": "keys"}},
        profiles=[{"name": "support"}],
        adapters=ADAPTERS,
    )["args"][2:]
    flags = {arg.partition("=")[0] for arg in args if arg.startswith("--")}
    # Anybody may say --enable-lora, too: without adapters of its own, a service may take some at run time.
    assert flags - {"--enable-lora"} == set(OWNED_FLAGS) - {"--api-key", "--api-key-for-all"}


def test_the_engine_may_be_told_to_compute_on_the_cpu_beside_gpus() -> None:
    container = engine(accelerator={"type": "nvidia", "count": 2}, engine={"device": "cpu"})
    assert {"--device=cpu", "--tensor-parallel-size=2"} <= set(container["args"])
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "2"}


def test_api_keys_are_mounted_as_a_file_that_the_engine_reads() -> None:
    spec = pod(endpoint={"apiKeySecret": {"name": "keys", "key": "all"}})
    (volume,) = (each for each in spec["volumes"] if each["name"] == "api-keys")
    assert (volume["secret"]["secretName"], volume["secret"]["items"]) == ("keys", [{"key": "all", "path": "keys"}])
    (container,) = spec["containers"]
    (mount,) = (each for each in container["volumeMounts"] if each["name"] == "api-keys")
    assert f"--api-key-file={mount['mountPath']}/keys" in container["args"]


def test_variables_reach_the_engine_and_what_pulls_the_model() -> None:
    reference = {"secretKeyRef": {"name": "proxy", "key": "url"}}
    env = [{"name": "HF_ENDPOINT", "value": "https://hub.example"}, {"name": "HTTPS_PROXY", "valueFrom": reference}]
    spec = pod(model={"source": "hf://org/repo:model.gguf"}, pod={"env": env})
    assert [container["env"] for container in (*spec["initContainers"], *spec["containers"])] == [env, env]


def test_the_pods_are_spread_among_themselves() -> None:
    spec = pod(pod={"topologySpreadConstraints": [{"topologyKey": "kubernetes.io/hostname"}]})
    (constraint,) = spec["topologySpreadConstraints"]
    assert constraint["labelSelector"] == rendered()["Deployment"]["spec"]["selector"]
    assert (constraint["maxSkew"], constraint["whenUnsatisfiable"]) == (1, "ScheduleAnyway")


@settings(deadline=None)  # a busy machine is no failure
@given(
    name=st.from_regex(r"[A-Za-z0-9][-A-Za-z0-9._:/]{0,20}", fullmatch=True),
    path=st.from_regex(r"[-a-z._+]{1,9}(/[-a-z._+]{1,9}){0,2}", fullmatch=True),
)
def test_what_users_write_never_becomes_a_flag_of_its_own(name: str, path: str) -> None:
    try:
        args = engine(model={"name": name, "source": f"pvc://models/{path}.gguf"})["args"]
    except ValidationError:
        reject()  # by a rule, before it gets here
    assert args[1] == f"/models/{path}.gguf"
    assert f"--served-model-name={name}" in args
    assert {arg.partition("=")[0] for arg in args[2:]} <= set(OWNED_FLAGS)


def test_the_url_is_what_an_openai_client_takes() -> None:
    assert cluster_service.url(service()) == "http://llama.team-a.svc/v1"
    assert cluster_service.url(service(endpoint={"port": 8080})) == "http://llama.team-a.svc:8080/v1"
