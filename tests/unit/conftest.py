"""Unit tests import neither vLLM nor torch: that takes seconds, and ties them to one version."""

import sys
from collections.abc import Iterator

import pytest

HEAVY = {"torch", "vllm"}


@pytest.fixture(autouse=True)
def imports_nothing_heavy() -> Iterator[None]:
    """Fail the test during which one of them was imported; another tier may have imported it before."""
    before = HEAVY & sys.modules.keys()
    yield
    assert HEAVY & sys.modules.keys() == before
