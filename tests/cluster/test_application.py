"""What a profile becomes for Ray Serve: bounds from the KV cache, placement, scaling. Starts no cluster."""

import json
from pathlib import Path
from typing import Any

import pytest

from borg_serve.checkpoint import demo
from borg_serve.config import Config, load
from borg_serve.engine import arguments
from tests.cluster.conftest import ROOT, fits


def application(profile: str, *sets: str) -> dict[str, Any]:
    from borg_serve.cluster import app

    found = app.application(config(profile, *sets))
    json.dumps(found)
    return found


def config(profile: str, *sets: str) -> Config:
    return load(ROOT / "configs" / f"{profile}.yaml", sets, arguments.field_problems)


def test_application_scales_by_what_the_kv_cache_holds() -> None:
    sets = (f"model.path={demo.materialise()}", "engine.max_num_seqs=1000", "cluster.max_replicas=2")
    deployment = application("demo-cpu", *sets)["deployment"]
    assert deployment["autoscaling_config"]["target_ongoing_requests"] == round(0.7 * fits(*sets))
    assert deployment["max_queued_requests"] == deployment["max_ongoing_requests"] == 10_000


def test_application_scales_before_a_replica_is_full() -> None:
    deployment = application("7b-h100", "cluster.replicas=1", "cluster.max_replicas=8")["deployment"]
    assert "num_replicas" not in deployment
    scaling = deployment["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (1, 8)
    assert scaling["target_ongoing_requests"] == round(0.7 * 256)


@pytest.mark.parametrize(("stages", "strategy"), [(1, "STRICT_PACK"), (2, "PACK")])
def test_application_keeps_tensor_parallel_workers_on_one_node(stages: int, strategy: str) -> None:
    found = application("7b-tp2", f"engine.pipeline_parallel_size={stages}")
    assert found["placement_group"]["strategy"] == strategy
    assert found["engine"]["tensor_parallel_size"] == 2


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, "1"), (1, "1"), (6, "6")])
def test_application_gives_engines_on_one_machine_cores_of_their_own(cpus: float, threads: str) -> None:
    environment = application("demo-cpu", f"cluster.cpus={cpus}")["environment"]
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert environment["OMP_NUM_THREADS"] == threads


def test_application_leaves_time_to_drain(tmp_path: Path) -> None:
    deployment = application("7b-h100", "server.drain_s=45")["deployment"]
    assert deployment["graceful_shutdown_timeout_s"] > 45
