"""Commands of the documents that need no engine: they are run as they are, and print what the documents show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import DOCUMENTS, EXERCISED, LONG, MODULES, ROOT, Command, Covered, Run, commands
from tests.engine.process import environment

COMMANDS = [command for document in DOCUMENTS for command in commands(document)]
RUN = [command for command in COMMANDS if isinstance(EXERCISED.get(command.text), Run)]
MEASURE = [text for text, how in EXERCISED.items() if how == Covered(MODULES, LONG)]
RAY = [command for command in COMMANDS if command.words[0] == "ray"]


@pytest.mark.parametrize("command", RUN, ids=lambda command: command.text)
def test_document_command_prints_what_the_document_shows(command: Command, tmp_path: Path) -> None:
    program = tmp_path / "borg-serve"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m borg_serve "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", command.text],
        cwd=ROOT,
        env=environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    how = EXERCISED[command.text]
    assert isinstance(how, Run)
    assert done.returncode == how.status, done.stdout
    shown = "".join(r"(.*\n)*" if line == "..." else re.escape(f"{line}\n") for line in command.output.splitlines())
    assert re.fullmatch(shown, done.stdout), done.stdout


@pytest.mark.parametrize("text", MEASURE)
def test_document_measurement_explains_its_options(text: str) -> None:
    """A measurement takes minutes to an hour. Its module must start, and take the options that the target gives it."""
    recipe = subprocess.run(
        ["bash", "-c", text.replace("make ", "make --dry-run -o setup ")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (module, options) = re.findall(r"python -m (loadtests\S*)(.*)", recipe)[-1]
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [option for option in re.findall(r"--[\w-]+", options) if option not in done.stdout] == []


@pytest.mark.parametrize("command", RAY, ids=lambda command: command.text)
def test_document_ray_command_takes_its_options(command: Command) -> None:
    ray = Path(sys.executable).with_name("ray")
    _, name, *options = command.words
    done = subprocess.run([str(ray), name, "--help"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [option for option in options if option.partition("=")[0] not in done.stdout] == []
