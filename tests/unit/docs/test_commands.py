"""Every command of the documents has a test, and could be typed: its target, options and files exist."""

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import typer.main

from borg_serve import cli
from tests.documents import DOCUMENTS, EXERCISED, ROOT, Covered, Run, commands, spans

COMMANDS = [command for document in DOCUMENTS for command in commands(document)]
TYPED = sorted({*(command.text for command in COMMANDS), *(span for name in DOCUMENTS for span in spans(name))})
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^(?:async )?def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
SETTINGS = {
    word
    for line in re.findall(r"^(?:ENV|CLUSTER :=) (.*)$", DOCKERFILE + MAKEFILE, re.MULTILINE)
    for word in shlex.split(line)
}


def test_documents_have_commands() -> None:
    assert len(COMMANDS) > 10
    assert {command.document for command in COMMANDS} >= {"README.md", "docs/cluster.md", "docs/load.md"}


def test_every_command_has_a_test_and_every_entry_a_command() -> None:
    typed = {command.text for command in COMMANDS}
    assert sorted(typed - set(EXERCISED)) == [], "commands of the documents without an entry in tests/documents.py"
    assert sorted(set(EXERCISED) - typed) == [], "entries in tests/documents.py without a command"


@pytest.mark.parametrize("test", sorted({how.test for how in EXERCISED.values() if isinstance(how, Covered)}))
def test_command_names_a_test_that_exists(test: str) -> None:
    assert test in TESTS


def test_command_that_is_run_is_shown_with_its_output() -> None:
    run = {text for text, how in EXERCISED.items() if isinstance(how, Run)}
    assert [command.text for command in COMMANDS if command.text in run and not command.output] == []


@pytest.mark.parametrize("text", TYPED)
def test_command_is_one_of_this_project(text: str) -> None:
    for words in simple_commands(text):
        check(words)


@pytest.mark.parametrize(
    "text",
    [
        "make srve",
        "make serve PROT=1",
        "borg-serve sevre",
        "borg-serve check --confg x",
        "borg-serve check --config configs/no.yaml",
        "python -m loadtests.no_such_module",
        ".venv/bin/python examples/no.py",
        "serve run deploy/no.yaml",
        "pip install 'borg-serve[gpus]'",
        "export RAY_SERVE_ENABLE_HA_PROXY=2",
    ],
)
def test_command_that_is_wrong_is_found(text: str) -> None:
    with pytest.raises(AssertionError):
        check(shlex.split(text))


def test_ci_runs_the_tests_as_a_user_does() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[-1].startswith("exec make test ")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_document_links_to_files_that_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / document).parent.joinpath(link).exists()] == []


# ------------------------------------------------------------------------------------------------ what can be typed


def simple_commands(text: str) -> Iterator[list[str]]:
    """Split a line at `&&`, and leave redirections and variables before a command out."""
    for part in text.split(" && "):
        words = shlex.split(part.partition(" >")[0])
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        yield words


def check(words: list[str]) -> None:
    """Assert that the parts of a command that are ours exist."""
    program, *arguments = words
    name = program.rpartition("/")[2]
    if name == "make":
        check_make(arguments)
    elif name == "borg-serve":
        check_borg_serve(arguments)
    elif name.startswith("python") and arguments[0] == "-m":
        assert is_module(arguments[1]), f"no module {arguments[1]}"
    elif name.startswith("python"):
        assert (ROOT / arguments[0]).is_file()
    elif name in ("serve", "kubectl", "pytest"):
        assert [word for word in arguments if "/" in word and not (ROOT / word).exists()] == []
    elif name == "pip":
        extras = re.findall(r"borg-serve\[(.*)\]", " ".join(arguments))
        assert {extra for some in extras for extra in some.split(",")} <= set(
            PROJECT["project"]["optional-dependencies"]
        )
    elif name == "export":
        assert set(arguments) <= SETTINGS, "as in deploy/Dockerfile or Makefile"
    else:
        assert name in ("curl", "ray"), f"no check for {name}"


def is_module(name: str) -> bool:
    """Whether Python can run the module. pip is not looked for: vLLM could not be imported after that."""
    return name == "pip" or find_spec(name) is not None


def check_make(arguments: list[str]) -> None:
    """Assert that the target and its variables exist, and the module that it runs."""
    variables = {word.partition("=")[0] for word in arguments if "=" in word}
    assert [name for name in sorted(variables) if f"$({name})" not in MAKEFILE] == []
    done = subprocess.run(
        ["make", "--dry-run", "-o", "setup", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for module in re.findall(r"python3? -m (\S+)", done.stdout):
        assert is_module(module), f"no module {module}"


def check_borg_serve(arguments: list[str]) -> None:
    """Parse the arguments as the command line does, without running the command."""
    command: Any = typer.main.get_command(cli.app)
    words = ["-" if word.endswith(".json") else word for word in arguments if word != "--help"]  # a user's own file
    while words and hasattr(command, "commands"):
        name = words.pop(0)
        assert name in command.commands, f"no command {name}"
        command = command.commands[name]
    if words:
        try:
            config = command.make_context("borg-serve", words).params.get("config")
        except Exception as error:
            raise AssertionError(f"borg-serve does not take {words}") from error
        assert config is None or (ROOT / config).is_file(), f"no profile {config}"
