"""Every script in examples/ runs against the real engine and prints what its table says."""

import re
import subprocess
import sys

import pytest

from tests.engine.process import ROOT, Server, environment

EXAMPLES = ROOT / "examples"
PRINTED = {
    "openai_chat.py": r".*Paris.*\n\d+ prompt tokens, [1-9]\d* of them from the cache\n",
    "openai_stream.py": r".+\n\d+ tokens\n",
    "openai_tools.py": r"get_weather\(\{\s*\"city\":\s*\"(Paris|Rome)\"\s*\}\)\n.+\n",
    "openai_json_schema.py": r"name='\w+' continent='\w+' is_capital=(True|False)\n",
    "openai_responses.py": r".*Paris.*\n.+\n",
    "anthropic_messages.py": r".*Paris.*\n.+\n\d+ tokens\n",
    "langchain_chat.py": r".*Paris.*\n.+\n",
}
"""Script -> what it prints with the demo, whose small model is right about little more than Paris."""


def test_examples_are_all_run_and_in_the_table() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == set(PRINTED)
    table = re.findall(r"^\| \[(\w+\.py)\]\((\w+\.py)\) \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert {name for row in table for name in row} == scripts


@pytest.mark.parametrize("script", sorted(PRINTED))
def test_example_is_short(script: str) -> None:
    assert len((EXAMPLES / script).read_text().splitlines()) <= 40


@pytest.mark.parametrize("script", sorted(PRINTED))
def test_example_prints_what_it_shows(server: Server, script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script)],
        env=environment() | {"BASE_URL": server.base_url},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(PRINTED[script], done.stdout, re.DOTALL), done.stdout
