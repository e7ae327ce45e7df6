"""Starts that must fail: before any model is loaded, in one line, with status 2 (I4), or for a wrong answer of it."""

import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engine.process import PROFILE, ROOT, command, environment

LIMIT_S = 400.0


@dataclass(frozen=True)
class Failure:
    """A start that ended by itself."""

    status: int
    lines: list[str]
    """Of standard error."""


@dataclass(frozen=True)
class Failures:
    taken_port: Failure
    missing: Failure
    wrong_keys: Failure
    damaged: Failure
    answers_otherwise: Failure


def start(*settings: str) -> Failure:
    """Serve until it fails."""
    words = command("serve", "--config", str(PROFILE), *(f"--set={item}" for item in settings))
    ended = subprocess.run(
        words,
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=LIMIT_S,
    )
    return Failure(ended.returncode, ended.stderr.splitlines())


@pytest.fixture(scope="module")
def failures(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Failures:
    """All of them at once: each spends its time on importing vLLM."""
    # An engine that answers fluently and wrongly looks healthy; here a sound one is held to another answer.
    answer = "model.probe.answer=La capitale de la France"
    folder = tmp_path_factory.mktemp("checkpoints")
    damage(checkpoint, folder / "damaged")
    with socket.socket() as other, ThreadPoolExecutor() as pool:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = pool.submit(start, f"server.port={other.getsockname()[1]}")
        missing = pool.submit(start, "server.port=0", f"model.path={folder / 'nothing'}")
        keys = pool.submit(start, "server.prot=80", "engine.max_model_length=5", "engine.max_num_seqs=many")
        damaged = pool.submit(start, "server.port=0", f"model.path={folder / 'damaged'}")
        otherwise = pool.submit(start, "server.port=0", f"model.path={checkpoint}", answer)
        return Failures(taken.result(), missing.result(), keys.result(), damaged.result(), otherwise.result())


def damage(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint with one bit of one tensor flipped."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).symlink_to(file)
    (weights,) = checkpoint.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1000] ^= 0x01
    (folder / weights.name).write_bytes(data)


def check(failure: Failure, *expected: tuple[str, ...]) -> None:
    """Status 2, and as many lines as expected, each with its words; an engine that loads has more."""
    assert failure.status == 2
    assert len(failure.lines) == len(expected), failure.lines
    for line, words in zip(sorted(failure.lines), expected, strict=True):
        for word in words:
            assert word in line


def test_startup_names_a_taken_port(failures: Failures) -> None:
    check(failures.taken_port, ("server.port: Address already in use, got 127.0.0.1:", "--set server.port="))


def test_startup_names_a_missing_checkpoint(failures: Failures) -> None:
    check(failures.missing, ("model.path: there is no such directory", "nothing", "borg-serve demo-model"))


def test_startup_names_every_unknown_key_and_wrong_value(failures: Failures) -> None:
    length = (f"{PROFILE}: engine.max_model_length: ", "`max_model_len`", "got 5")
    seqs = (f"{PROFILE}: engine.max_num_seqs: ", "got 'many'")
    port = (f"{PROFILE}: server.prot: ", "`port`", "got 80")
    check(failures.wrong_keys, length, seqs, port)


def test_startup_refuses_a_damaged_checkpoint_by_the_tensors_name(failures: Failures) -> None:
    check(failures.damaged, ("/damaged", "model."))


def test_startup_refuses_an_engine_that_does_not_give_the_recorded_answer(failures: Failures) -> None:
    failure = failures.answers_otherwise
    said = "\n".join(failure.lines)
    assert failure.status == 1
    assert "the probe must be answered 'La capitale de la France', got 'The capital of France is" in said
    assert "ready on" not in said
