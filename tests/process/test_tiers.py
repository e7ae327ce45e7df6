"""What the unit tier is: it imports neither vLLM nor torch."""

import subprocess
import sys
from pathlib import Path

from tests.unit.conftest import HEAVY

LOOK = """
import sys, pytest
status = pytest.main(["tests/unit", "--collect-only", "-q", "-p", "no:cacheprovider"])
print("imported:", *sorted(sys.modules.keys() & set(sys.argv[1:])))
sys.exit(status)
"""


def test_unit_tests_are_collected_without_vllm_and_torch() -> None:
    command = [sys.executable, "-c", LOOK, *HEAVY]
    found = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    assert found.stdout.splitlines()[-1] == "imported:"
