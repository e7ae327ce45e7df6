"""The Kubernetes manifests in deploy/, as far as can be told without a cluster."""

import re
from pathlib import Path

import pytest
import yaml

from tests import promql
from tests.unit.deploy.files import (
    FILES,
    KEYS,
    STACK_ENVIRONMENT,
    find,
    manifests,
    pod_templates,
    profile,
    ray_service,
    read,
    serve_configs,
)

PODS = ["head", "gpu", "redis"]


def named(kind: str) -> set[str]:
    return {document["metadata"]["name"] for document in manifests() if document["kind"] == kind}


def test_deploy_manifests_are_of_known_kinds_in_one_namespace() -> None:
    versions = {
        "Namespace": "v1",
        "PersistentVolumeClaim": "v1",
        "Secret": "v1",
        "Service": "v1",
        "StatefulSet": "apps/v1",
        "PodDisruptionBudget": "policy/v1",
        "NetworkPolicy": "networking.k8s.io/v1",
        "PodMonitor": "monitoring.coreos.com/v1",
        "RayService": "ray.io/v1",
    }
    assert {document["kind"]: document["apiVersion"] for document in manifests()} == versions
    for document in manifests():
        metadata = document["metadata"]
        assert metadata["name"].startswith("borg-serve")
        assert metadata.get("namespace", metadata["name"]) == "borg-serve"
    identities = [(document["kind"], document["metadata"]["name"]) for document in manifests()]
    assert len(identities) == len(set(identities))


def test_deploy_kustomization_lists_what_may_be_applied_as_it_is() -> None:
    given = read("kubernetes/kustomization.yaml")
    left_out = {"kustomization.yaml", "secrets.example.yaml", "podmonitor.yaml"}
    assert set(given["resources"]) == {p.name for p in FILES["kubernetes"]} - left_out
    assert set(given) == {"apiVersion", "kind", "namespace", "resources"}
    assert given["namespace"] == "borg-serve"


def test_deploy_secrets_are_an_example_and_hold_what_is_asked_of_them() -> None:
    kinds = [document["kind"] for document in manifests(examples=False)]
    assert "Secret" not in kinds
    secrets = {d["metadata"]["name"]: d["stringData"] for d in manifests() if d["kind"] == "Secret"}
    for reference in find([ray_service(), *manifests()], "secretKeyRef"):
        assert reference["key"] in secrets[reference["name"]]
    asked = set(find(manifests(), "secretName"))
    assert asked == {"borg-serve-ray-token", "borg-serve-keys"}
    assert asked <= set(secrets)
    assert "auth_token" in secrets["borg-serve-ray-token"], "the key that KubeRay reads"
    assert Path(KEYS).name in secrets["borg-serve-keys"]
    assert all(value.startswith(("<", "#")) for data in secrets.values() for value in data.values())


def test_deploy_manifests_name_what_exists() -> None:
    assert set(find(manifests(), "claimName")) <= named("PersistentVolumeClaim")
    service, _, port = next(find(ray_service(), "redisAddress")).partition(":")
    (redis,) = [document for document in manifests() if document["kind"] == "Service"]
    assert (service, int(port)) == (redis["metadata"]["name"], redis["spec"]["ports"][0]["port"])
    labels = [template["metadata"]["labels"].items() for template in pod_templates().values()]
    selectors = [*find(manifests(), "podSelector"), *find(manifests(), "labelSelector"), *find(manifests(), "selector")]
    own = [selector.get("matchLabels", selector) for selector in selectors]
    assert len(own) > 8
    for selector in own:
        assert any(selector.items() <= found for found in labels), selector


@pytest.mark.parametrize("pod", PODS)
def test_deploy_pod_mounts_what_it_has(pod: str) -> None:
    template = pod_templates()[pod]["spec"]
    volumes = {volume["name"] for volume in template.get("volumes", [])} | ({"data"} if pod == "redis" else set())
    (container,) = template["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    if pod != "redis":
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert mounts[str(Path(KEYS).parent)]["readOnly"] is True
        model = yaml.safe_load(serve_configs()["rayservice.yaml"])["applications"][0]["args"]["set"]["model.path"]
        assert mounts[str(Path(model).parent)]["readOnly"] is True


@pytest.mark.parametrize("pod", PODS)
def test_deploy_pod_is_nobody_with_no_way_up(pod: str) -> None:
    template = pod_templates()[pod]["spec"]
    security = template["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in template["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not set(template) & {"hostNetwork", "hostPID", "hostIPC"}
    assert not any("hostPath" in volume for volume in template.get("volumes", []))
    assert template.get("automountServiceAccountToken", True) is (pod == "head")


@pytest.mark.parametrize("pod", PODS)
def test_deploy_pod_asks_for_resources_and_is_probed(pod: str) -> None:
    (container,) = pod_templates()[pod]["spec"]["containers"]
    asked, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert {"cpu", "memory"} <= set(asked)
    assert "memory" in limits
    assert ("nvidia.com/gpu" in limits) is (pod == "gpu")
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for probe in (container["readinessProbe"], container["livenessProbe"]):
        if pod == "redis":
            assert probe["tcpSocket"]["port"] in ports
            continue
        path, port = probe["httpGet"]["path"], probe["httpGet"]["port"]
        # HAProxy's own route, and the node agent's, which asks for no token.
        assert (path, ports.get(port, port)) in {("/-/healthz", 8000), ("/api/healthz", 52365)}


def test_deploy_probed_routes_are_ray_s() -> None:
    import ray

    package = Path(ray.__file__).parent
    agent = (package / "dashboard" / "http_server_agent.py").read_text(encoding="utf-8")
    assert re.search(r'PUBLIC_EXACT_PATHS = \[[^\]]*"/api/healthz"', agent), "a probe sends no token"
    haproxy = (package / "serve" / "_private" / "haproxy.py").read_text(encoding="utf-8")
    assert 'health_check_endpoint: str = "/-/healthz"' in haproxy


def test_deploy_ray_service_is_upgraded_in_steps_that_its_requests_survive(tmp_path: Path) -> None:
    spec = ray_service()["spec"]
    assert spec["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade"
    options = spec["upgradeStrategy"]["clusterUpgradeOptions"]
    assert set(options) == {"gatewayClassName", "maxSurgePercent", "stepSizePercent", "intervalSeconds"}
    assert 0 < options["stepSizePercent"] <= options["maxSurgePercent"] <= 100
    config = profile(yaml.safe_load(spec["serveConfigV2"])["applications"][0]["args"], tmp_path)
    assert options["intervalSeconds"] > config.limits.deadline_s
    assert spec["rayClusterDeletionDelaySeconds"] > config.limits.deadline_s
    assert spec["rayClusterConfig"]["enableInTreeAutoscaling"] is True, "KubeRay refuses this strategy without it"


def test_deploy_ray_service_has_room_for_its_replicas(tmp_path: Path) -> None:
    cluster = ray_service()["spec"]["rayClusterConfig"]
    config = profile(yaml.safe_load(serve_configs()["rayservice.yaml"])["applications"][0]["args"], tmp_path)
    (group,) = cluster["workerGroupSpecs"]
    settings = config.cluster.model_dump()
    assert group["maxReplicas"] == settings["max_replicas"]
    assert group["minReplicas"] == group["replicas"] == settings["replicas"]
    asked = group["template"]["spec"]["containers"][0]["resources"]["requests"]
    assert int(asked["cpu"]) > settings["cpus"], "the router needs a CPU too"
    assert int(asked["nvidia.com/gpu"]) == config.engine.get("tensor_parallel_size", 1)
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


def test_deploy_ray_service_keeps_strangers_out_of_ray() -> None:
    cluster = ray_service()["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "borg-serve-ray-token"}
    assert "redisPassword" in cluster["gcsFaultToleranceOptions"]
    assert "secretKeyRef" in cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]


@pytest.mark.parametrize("pod", ["head", "gpu"])
def test_deploy_ray_pod_has_the_environment_of_direct_streaming(pod: str) -> None:
    (container,) = pod_templates()[pod]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment.items() >= STACK_ENVIRONMENT.items()
    assert environment["HF_HUB_OFFLINE"] == "1", "the checkpoint is on a volume"
    assert container["image"] == "borg-serve:0.1.0-cuda"


def test_deploy_network_opens_only_haproxy_to_all() -> None:
    policies = {d["metadata"]["name"]: d["spec"] for d in manifests() if d["kind"] == "NetworkPolicy"}
    for spec in policies.values():
        assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
    rules = [rule for spec in policies.values() for rule in spec["ingress"]]
    to_all = [port["port"] for rule in rules if "from" not in rule for port in rule["ports"]]
    assert to_all == [8000]
    metrics = [rule for rule in rules if "monitoring" in str(rule.get("from"))]
    assert [port["port"] for rule in metrics for port in rule["ports"]] == [8080, 9101]
    (redis,) = policies["borg-serve-redis"]["ingress"]
    assert redis["from"] == [{"podSelector": {"matchLabels": {"app": "borg-serve"}}}]
    assert policies["borg-serve-redis"]["egress"] == []


def test_deploy_pod_monitor_scrapes_named_ports_and_renames_as_prometheus_does() -> None:
    (monitor,) = [document for document in manifests() if document["kind"] == "PodMonitor"]
    endpoints = monitor["spec"]["podMetricsEndpoints"]
    ports = {port["name"] for port in pod_templates()["gpu"]["spec"]["containers"][0]["ports"]}
    assert {endpoint["port"] for endpoint in endpoints} <= ports
    rules = [rule for endpoint in endpoints for rule in endpoint.get("metricRelabelings", [])]
    snake = {"sourceLabels": "source_labels", "targetLabel": "target_label"}
    assert [{snake.get(key, key): rule[key] for key in rule} for rule in rules] == promql.cluster_relabelling()
