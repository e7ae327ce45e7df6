"""A name that Ray has moved gives one line that says which, and which Ray to use."""

import subprocess
import sys

import pytest

from borg_serve.upstream import PINS
from tests.engine.process import ROOT, environment

ENGINE = "ray.llm._internal.serve.engines.vllm.vllm_engine"


@pytest.mark.parametrize(
    ("module", "owner", "name", "said"),
    [
        ("ray.serve.context", "", "_get_global_client", "ray.serve.context._get_global_client"),
        (ENGINE, "VLLMEngine.", "_start_async_llm_engine", "VLLMEngine._start_async_llm_engine"),
    ],
)
def test_cluster_says_what_ray_moved(module: str, owner: str, name: str, said: str) -> None:
    code = f"""
from borg_serve.engine.environment import prepare_environment
prepare_environment()
import {module} as module
del module.{owner}{name}
from borg_serve.cluster import build
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    pin = PINS["ray"][1]
    assert line == f"borg_serve.errors.EngineError: cluster: Ray moved {said}, got none. Use the pinned Ray {pin}."
