"""The guard without an engine; `tests/engine/test_guard.py` has one."""

import pytest

from borg_serve.engine.guard import Guard, GuardedCore
from borg_serve.errors import EngineError


def test_guard_needs_an_identity() -> None:
    with pytest.raises(EngineError, match="the identity has no tokens"):
        Guard([])


def test_guarded_core_says_that_vllm_moved() -> None:
    core = type("Core", (), {"__module__": "vllm.v1.engine.core_client"})()
    with pytest.raises(EngineError, match=r"guard: vLLM moved Core\.add_request_async, got none\. Use the pinned vLLM"):
        GuardedCore(core, Guard([1, 2]))
