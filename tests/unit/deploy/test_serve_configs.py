"""The Ray Serve applications in deploy/: Ray's own schema and our model take them as they are."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from borg_serve.config import load
from loadtests.servers import clusters
from tests.unit.deploy.files import KEYS, ROOT, SERVE, profile, read, serve_configs

RAY_WARNS = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # its schemas are older than its pydantic
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


@RAY_WARNS
@pytest.mark.parametrize("where", WHERE)
def test_deploy_serve_config_is_what_ray_and_we_take(where: str, tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    given = yaml.safe_load(serve_configs()[where])
    schema = ServeDeploySchema.model_validate(given)
    assert unknown_keys(schema, given) == []
    (application,) = schema.applications
    assert application.import_path == "borg_serve.cluster:build"
    assert application.route_prefix == "/", "the gate knows absolute paths"
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


@pytest.mark.parametrize("where", ["Makefile", "loadtests/gpu/multi_gpu.sh", "docs/cluster.md"])
def test_deploy_commands_set_the_request_path_s_variables_as_measured(where: str) -> None:
    words = (ROOT / where).read_text(encoding="utf-8").split()
    assert {f"{name}={value}" for name, value in clusters.TUNED.items()} <= set(words)
