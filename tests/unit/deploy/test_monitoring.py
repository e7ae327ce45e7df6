"""Prometheus, alerts and dashboards in deploy/: they read metrics that exist."""

import json
import re
from pathlib import Path

import pytest

from tests import promql
from tests.unit.deploy.files import DEPLOY, FILES, ROOT, find, name, read


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
    assert {name for name in promql.ANYWHERE if name.startswith(("borg_", "gen_ai_"))} <= ours


def test_deploy_s_refusal_reasons_are_ours() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "borg_serve").rglob("*.py"))
    reasons = set()
    for expression in promql.all_expressions().values():
        for found in re.findall(r"(?:reason|outcome|error_type)=~?\"([\w|]+)\"", expression):
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
    assert set(rows) >= {"Traffic", "Latency", "KV cache and identity", "Refusals", "Health", "Keys", "Replicas"}


def test_deploy_grafana_finds_its_source_and_its_dashboards() -> None:
    (source,) = read("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://127.0.0.1:9090"
    (provider,) = read("grafana/provisioning/dashboards/borg-serve.yaml")["providers"]
    mounts = [volume.split(":") for volume in read("compose.yaml")["services"]["grafana"]["volumes"]]
    assert ["./grafana/dashboards", provider["options"]["path"], "ro"] in mounts
