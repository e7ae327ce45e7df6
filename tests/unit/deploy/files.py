"""The files in deploy/ by kind, and what several tests read out of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from borg_serve.config import Config, Limits, load

ROOT = Path(__file__).parents[3]
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
}


def name(path: Path) -> str:
    return str(path.relative_to(DEPLOY))


def read(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text(encoding="utf-8"))


def find(tree: Any, key: str) -> Iterator[Any]:
    """Every value under this key, at any depth."""
    for at, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        if at == key:
            yield value
        yield from find(value, key)


def serve_configs() -> dict[str, str]:
    """Where -> text, of every Serve config, the one inside the Kubernetes manifest included."""
    found = {p.name: p.read_text(encoding="utf-8") for p in SERVE}
    return found | {"rayservice.yaml": ray_service()["spec"]["serveConfigV2"]}


def ray_service() -> dict[str, Any]:
    found: dict[str, Any] = read("kubernetes/rayservice.yaml")
    return found


def profile(args: dict[str, Any], tmp_path: Path) -> Config:
    """The profile that an application's arguments come to, with an empty key file where they name one."""
    keys = tmp_path / "keys.yaml"
    keys.touch()
    values = {key: str(keys) if value == KEYS else value for key, value in args["set"].items()}
    path = ROOT / args["profile"].removeprefix(IN_IMAGE)
    return load(path, [f"{key}={json.dumps(value)}" for key, value in values.items()])


def manifests(*, examples: bool = True) -> list[dict[str, Any]]:
    skipped = {"kustomization.yaml"} | (set() if examples else {"secrets.example.yaml"})
    paths = [p for p in FILES["kubernetes"] if p.name not in skipped]
    return [document for p in paths for document in yaml.safe_load_all(p.read_text(encoding="utf-8"))]


def pod_templates() -> dict[str, dict[str, Any]]:
    cluster = ray_service()["spec"]["rayClusterConfig"]
    (redis,) = [document for document in manifests() if document["kind"] == "StatefulSet"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **workers, "redis": redis["spec"]["template"]}
