"""Finding metric names in PromQL."""

import pytest

from tests import promql


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("up", {"up"}),
        ("vllm:kv_cache_usage_perc", {"vllm:kv_cache_usage_perc"}),
        ("sum(rate(a_total[5m]))", {"a_total"}),
        ("sum by (le) (rate(a_bucket[$__rate_interval]))", {"a_bucket"}),
        ("sum(rate(a_bucket[5m])) by (le, model_name)", {"a_bucket"}),
        ("histogram_quantile(0.99, sum without(pod) (rate(a_bucket{b='c'}[5m])))", {"a_bucket"}),
        ('a{b=~"c|d", e!="f{g}"} offset 15m', {"a"}),
        ('a{b="\\"} or c"}', {"a"}),
        ("a unless a offset 1h30m", {"a"}),
        ("a / on (b) group_left (c) d", {"a", "d"}),
        ("a and b or c unless d", {"a", "b", "c", "d"}),
        ("a > bool 0.5", {"a"}),
        ("a * 1e3 + 0x1F - 2.5e-3 + Inf", {"a"}),
        ("max_over_time(rate(a_total[5m])[30m:1m])", {"a_total"}),
        ("a @ start()", {"a"}),
        ("vector(0)", set()),
        ("time() - process_start_time_seconds", {"process_start_time_seconds"}),
        ('{__name__="a:b"}', {"a:b"}),
        ('{"a_total", b="c"}', {"a_total"}),
        ('label_replace(a, "d", "$1", "s", "(.*)")', {"a"}),
        ("a # b\n+ c", {"a", "c"}),
        ("rate_limit", {"rate_limit"}),
        ("sum_total + on_call + by_user", {"sum_total", "on_call", "by_user"}),
        ("a2 + _b + c_5m", {"a2", "_b", "c_5m"}),
        ("\n  sum(\n    a\n  )\n", {"a"}),
    ],
)
def test_promql_finds_the_metrics_of_an_expression(expression: str, names: set[str]) -> None:
    assert promql.metric_names(expression) == names


@pytest.mark.parametrize("expression", ['{__name__=~"a.*"}', 'sum({__name__!~"b"})', '{__name__ != "a"}'])
def test_promql_refuses_to_guess_what_a_pattern_reads(expression: str) -> None:
    with pytest.raises(ValueError, match="Write their names"):
        promql.metric_names(expression)


def test_promql_collects_panels_and_alerts() -> None:
    found = promql.all_expressions()
    assert found["alerts.yml: BorgReplicaNotReady"] == "min(borg_ready) == 0"
    assert found["serving.json: Ready: A"] == "sum(borg_ready) or vector(0)"
    assert {where.partition(":")[0] for where in found} == {
        "alerts.yml",
        "cluster-alerts.yml",
        "cluster.json",
        "serving.json",
    }


def test_promql_collects_every_query_of_every_panel() -> None:
    written = 0
    for file in (promql.DEPLOY / "grafana" / "dashboards").glob("*.json"):
        written += file.read_text(encoding="utf-8").count('"expr":')
    for file in (promql.DEPLOY / "prometheus").glob("*.yml"):
        written += file.read_text(encoding="utf-8").count(" expr:")
    assert len(promql.all_expressions()) == written > 50


def test_promql_finds_panels_in_collapsed_rows() -> None:
    inner = {"title": "inner"}
    assert inner in promql.panels({"panels": [{"title": "row", "panels": [inner]}]})


def test_promql_renames_what_ray_exports_as_the_cluster_s_prometheus_does() -> None:
    exported = {"ray_vllm_time_to_first_token_seconds_bucket", "ray_borg_ready", "ray_serve_deployment_status", "up"}
    exported |= {"ray_gen_ai_client_token_usage_sum"}
    assert promql.scraped(exported) == {
        "vllm:time_to_first_token_seconds_bucket",
        "borg_ready",
        "gen_ai_client_token_usage_sum",
        "ray_serve_deployment_status",
        "up",
    }
