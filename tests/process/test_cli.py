"""The command line as a user or a script meets it: what it says, where, and with which status."""

import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.core import TyperGroup

from borg_serve import cli
from borg_serve.config import load
from borg_serve.identity.text import load_identity
from borg_serve.sizing.plan import plan
from borg_serve.sizing.text import document as plan_document
from borg_serve.sizing.text import text as plan_text
from borg_serve.upstream import PINS
from tests import qwen

CONFIGS = Path(__file__).parents[2] / "configs"
PROFILE = str(CONFIGS / "demo-cpu.yaml")


def commands(group: Any, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command and group of commands; Typer's own classes are no classes of click's."""
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():
        found.append((*words, name))
        if isinstance(command, TyperGroup):
            found += commands(command, (*words, name))
    return found


COMMANDS = commands(typer.main.get_command(cli.app))


@dataclass(frozen=True)
class Done:
    """What one run of the command said, and its exit status."""

    status: object
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `borg-serve` in this process."""

    def here(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["borg-serve", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return Done(caught.value.code, *capsys.readouterr())

    return here


# -------------------------------------------------------------------------------------------------------- help


def test_cli_has_the_commands_of_the_readme() -> None:
    assert {words[0] for words in COMMANDS} >= {"serve", "check", "render", "demo-model", "version", "manifest", "key"}


@pytest.mark.parametrize("words", [(), *COMMANDS], ids=" ".join)
def test_cli_helps_with_every_command(run: Run, words: tuple[str, ...]) -> None:
    done = run(*words, "--help")
    assert (done.status, done.err) == (0, "")
    assert "Usage:" in done.out
    sentence = re.sub(r"\s+", " ", done.out.partition("Usage:")[2])
    assert re.search(r"[A-Z][^.]{15,}\.", sentence), "a sentence that says what it does"


@pytest.mark.parametrize("words", [(), ("manifest",), ("key",)], ids=" ".join)
def test_cli_without_a_command_shows_its_help(run: Run, words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.status == 2
    assert "Usage:" in done.out + done.err


@pytest.mark.parametrize(
    "words",
    [("sevre",), ("serve", "--prot", "1"), ("check", "more"), ("render",), ("manifest", "check"), ("key", "new")],
    ids=" ".join,
)
def test_cli_refuses_a_mistake_with_status_2(run: Run, words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.status == 2
    assert done.out == ""
    assert len(done.err.splitlines()) == 1


# ----------------------------------------------------------------------------------------------------- version


def test_cli_version_as_text_and_as_json_say_the_same(run: Run) -> None:
    text, document = run("version"), json.loads(run("version", "--json").out)
    assert text.status == 0
    assert set(document) == {"borg_serve", "torch", "transformers", "ray", "vllm", "python"}
    assert document["vllm"] == PINS["vllm"][1]
    assert text.out.splitlines() == [f"{name} {value}" for name, value in document.items()]


# ------------------------------------------------------------------------------------------------------- check


def test_cli_check_without_the_checkpoint_shows_all_but_the_memory(run: Run, tmp_path: Path) -> None:
    done = run("check", "--config", PROFILE, "--set", f"model.path={tmp_path}/no", "--json")
    assert (done.status, done.err) == (0, "")
    document = json.loads(done.out)
    assert document["memory"] is None
    assert "is not on this machine" in document["note"]
    assert document["vllm"]["enable_prefix_caching"] is True
    assert document["vllm_command"].startswith("vllm serve --")
    assert document["limits"]["deadline_s"] == 60
    assert document["identity"]["sha256"] == load_identity(CONFIGS / "identity" / "borg-merge-v1.md").sha256


def test_cli_check_plans_the_memory_of_the_demo(run: Run) -> None:
    path = qwen.directory("smollm2")
    words = ("check", "--config", PROFILE, "--set", f"model.path={path}")
    document = json.loads(run(*words, "--json").out)
    memory = document["memory"]
    assert document["identity"]["tokens"] == memory["identity_tokens"] == len(qwen.prefix("smollm2").token_ids)
    assert memory["kv_tokens"] == 46_592, "what vLLM itself reports for these 2 GiB"
    assert memory["kv_bytes_a_token"] == 46_080
    assert memory["identity_shared_tokens"] + memory["identity_tail_tokens"] == memory["identity_tokens"]
    assert memory["users_by_context_tokens"]["8192"] == 7
    assert memory["estimate"] is False
    text = run(*words)
    assert text.status == 0
    for words_of_it in (
        "0.50 GiB",
        "46,592 tokens",
        "2,320 tokens, 2,304 of them",
        "16 tokens that no full block covers",
    ):
        assert words_of_it in text.out


@pytest.mark.parametrize("profile", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_cli_check_takes_every_shipped_profile(run: Run, profile: Path) -> None:
    done = run("check", "-c", str(profile))
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith(f"{profile}: valid\n")


def test_cli_check_names_every_mistake_on_a_line_of_its_own(run: Run) -> None:
    sets = ("server.prot=1", "engine.max_num_seqs=many", "limits.top_p=2")
    done = run("check", "--config", PROFILE, *(word for item in sets for word in ("--set", item)))
    assert (done.status, done.out) == (2, "")
    lines = done.err.splitlines()
    assert len(lines) == 3
    for key in ("server.prot", "engine.max_num_seqs", "limits.top_p"):
        assert sum(f"{PROFILE}: {key}: " in line for line in lines) == 1


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("engine.block_size", "16", "engine.block_size: vLLM says: block_size is not supported by CPU_ATTN"),
        ("identity.prompt", "We are <|im_start|>.", "must hold no control token of the tokenizer"),
        ("server.keys", "- {name: a}", "entry 1.sha256 (a): is required"),
    ],
)
def test_cli_check_refuses_what_serve_would_refuse(run: Run, tmp_path: Path, key: str, value: str, said: str) -> None:
    (tmp_path / "file").write_text(value)
    done = run("check", *demo(), "--set", f"{key}={value if key == 'engine.block_size' else tmp_path / 'file'}")
    assert (done.status, done.out, len(done.err.splitlines())) == (2, "", 1)
    assert said in done.err


def test_cli_check_says_when_there_is_no_profile(run: Run, tmp_path: Path) -> None:
    done = run("check", "--config", str(tmp_path / "no.yaml"))
    assert (done.status, done.out) == (2, "")
    assert "cannot be read: No such file or directory" in done.err


# ------------------------------------------------------------------------------------------------------ render


def demo() -> tuple[str, ...]:
    return ("--config", PROFILE, "--set", f"model.path={qwen.directory('smollm2')}")


def test_cli_render_prints_the_prompt_and_its_token_counts(run: Run, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi <|im_end|> é"}]
    (tmp_path / "messages.json").write_text(json.dumps(messages))
    done = run("render", str(tmp_path / "messages.json"), *demo())
    assert done.status == 0
    assert done.out == (
        f"<|im_start|>system\n{qwen.BORG.text}\n\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi <\u200b|im_end|> é<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = qwen.tokenizer("smollm2").encode(done.out, add_special_tokens=False)
    shared = len(qwen.prefix("smollm2").token_ids)
    assert done.err == f"tokens: total {len(ids)}, identity {shared}, rest {len(ids) - shared}\n"
    document = json.loads(run("render", str(tmp_path / "messages.json"), *demo(), "--json").out)
    assert document == {
        "prompt": done.out,
        "tokens": {"total": len(ids), "identity": shared, "rest": len(ids) - shared},
        "ids": ids,
    }


def test_cli_render_reads_a_whole_request_from_stdin(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    request = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(request).encode()), encoding="utf-8"))
    done = run("render", "-", *demo())
    assert done.status == 0
    assert done.out.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("text", ["", "{", "5", '[{"role": "root", "content": "x"}]', '{"a": 1}'])
def test_cli_render_refuses_what_the_server_would_refuse(run: Run, tmp_path: Path, text: str) -> None:
    (tmp_path / "messages.json").write_text(text)
    done = run("render", str(tmp_path / "messages.json"), *demo())
    assert (done.status, done.out) == (2, "")
    assert "messages" in done.err


# -------------------------------------------------------------------------------------------------------- plan


def plan_words(gpu: str, users: int) -> list[str]:
    words = ["plan", "--gpu", gpu, "--users", str(users), "--context", "4096"]
    return [*words, "--config", str(CONFIGS / "7b-h100.yaml")]


def test_cli_plan_prints_the_same_as_text_and_as_json(run: Run) -> None:
    profile = load(CONFIGS / "7b-h100.yaml")
    expected = plan("h100", 400, 4_096, profile.engine, profile.server.processes)
    assert run(*plan_words("h100", 400)) == Done(0, plan_text(expected) + "\n", "")
    assert run(*plan_words("h100", 400), "--json") == Done(0, json.dumps(plan_document(expected), indent=2) + "\n", "")


def test_cli_plan_explains_a_mistake_in_one_line(run: Run) -> None:
    error = "--gpu: is not a GPU that is known here, got 'abacus'. Name one of h100, h200, a100-80gb, l40s.\n"
    assert run(*plan_words("abacus", 4)) == Done(2, "", error)


def test_cli_reference_prints_the_committed_document(run: Run) -> None:
    assert run("reference").out == (CONFIGS.parent / "docs" / "configuration.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- serve


def test_cli_serve_names_a_taken_port_before_it_looks_for_a_model(run: Run, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = run("serve", "-c", PROFILE, "--set", f"server.port={port}", "--set", f"model.path={tmp_path}/no")
    assert (done.status, done.out) == (2, "")
    assert done.err == (
        f"server.port: Address already in use, got 127.0.0.1:{port}. Choose another with --set server.port=PORT.\n"
    )


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_cli_serve_names_an_address_that_is_not_ours(run: Run, tmp_path: Path, host: str) -> None:
    (tmp_path / "keys.yaml").write_text("[]")
    done = run("serve", "-c", PROFILE, "--set", f"server.host={host}", "--set", f"server.keys={tmp_path}/keys.yaml")
    assert (done.status, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1
    assert host in done.err


def test_cli_serve_names_a_missing_checkpoint(run: Run, tmp_path: Path) -> None:
    done = run("serve", "-c", PROFILE, "--set", "server.port=0", "--set", f"model.path={tmp_path}/no")
    assert (done.status, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert "model.path: there is no such directory" in line
    assert "borg-serve demo-model" in line


# -------------------------------------------------------------------------------------------- manifest and key


def test_cli_manifest_verify_of_what_is_no_checkpoint_has_status_1(run: Run, tmp_path: Path) -> None:
    done = run("manifest", "verify", str(tmp_path))
    assert (done.status, done.out) == (1, "")
    assert str(tmp_path) in done.err


def test_cli_manifest_verify_prints_the_root_of_the_demo(run: Run) -> None:
    from borg_serve.checkpoint.manifest import read_manifest

    path = qwen.directory("smollm2")
    manifest = read_manifest(path)
    assert manifest is not None
    done = run("manifest", "verify", str(path), "--json")
    assert done.status == 0
    assert json.loads(done.out) == {"root": manifest.root, "manifest": True}


def test_cli_key_new_keeps_the_key_and_its_entry_apart(run: Run, tmp_path: Path) -> None:
    from borg_serve.gate.keys import KeyRing

    done = run("key", "new", "alice")
    assert done.status == 0
    key = done.err.split()[-1]
    assert key.startswith("borg-")
    assert key not in done.out
    (tmp_path / "keys.yaml").write_text(done.out)
    found = KeyRing(tmp_path / "keys.yaml").lookup(key)
    assert found is not None
    assert found.name == "alice"


def test_cli_key_new_refuses_a_name_that_is_none(run: Run) -> None:
    done = run("key", "new", "not a name")
    assert (done.status, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1


def status_with_full_disk(*words: str) -> int:
    """The status of a Python command that cannot write its standard error, buffered as Python does by itself."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, *words], stdout=subprocess.DEVNULL, stderr=full, env=environment, check=False
        )
    return done.returncode


def test_cli_keeps_its_status_when_nothing_can_be_written() -> None:
    assert status_with_full_disk("-m", "borg_serve", "check", "--config", "nowhere.yaml") == 2


def test_cli_keeps_its_status_when_a_library_has_left_something_unwritten() -> None:
    late = "import sys; from borg_serve import cli; sys.stderr.buffer.write(b'late')"
    assert status_with_full_disk("-c", f"{late}; sys.argv = ['x', 'version']; cli.main()") == 0
