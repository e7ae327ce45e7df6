"""Starts that must fail: at once, in one line, with status 2, and before any model is loaded (I4)."""

import os
import socket
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Timer

import pytest

from tests.engine.process import PROFILE, ROOT, command, environment

QUICK_CPU_S = 20.0
"""Of one processor: the clock on the wall also counts what others do on the machine."""


@dataclass(frozen=True)
class Failure:
    """A start that ended by itself."""

    status: int
    lines: list[str]
    """Of standard error."""
    cpu_s: float


@dataclass(frozen=True)
class Failures:
    taken_port: Failure
    missing: Failure
    wrong_keys: Failure
    damaged: Failure


def start(*settings: str, limit_s: float = 240) -> Failure:
    """Serve until it fails."""
    words = command("serve", "--config", str(PROFILE), *(f"--set={item}" for item in settings))
    with tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=err
        )
        watchdog = Timer(limit_s, process.kill)
        watchdog.start()
        _, status, used = os.wait4(process.pid, 0)
        watchdog.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        err.seek(0)
        return Failure(process.returncode, err.read().decode().splitlines(), used.ru_utime + used.ru_stime)


@pytest.fixture(scope="module")
def failures(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Failures:
    """All of them at once: each spends its time on importing vLLM."""
    folder = tmp_path_factory.mktemp("checkpoints")
    damage(checkpoint, folder / "damaged")
    with socket.socket() as other, ThreadPoolExecutor() as pool:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = pool.submit(start, f"server.port={other.getsockname()[1]}")
        missing = pool.submit(start, "server.port=0", f"model.path={folder / 'nothing'}")
        keys = pool.submit(start, "server.prot=80", "engine.max_model_length=5", "engine.max_num_seqs=many")
        damaged = pool.submit(start, "server.port=0", f"model.path={folder / 'damaged'}")
        return Failures(taken.result(), missing.result(), keys.result(), damaged.result())


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
    """Status 2, and as many lines as expected, each with its words."""
    assert failure.status == 2
    assert len(failure.lines) == len(expected), failure.lines
    for line, words in zip(sorted(failure.lines), expected, strict=True):
        for word in words:
            assert word in line
    assert failure.cpu_s < QUICK_CPU_S


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


def test_startup_refuses_an_engine_that_does_not_give_the_recorded_answer(checkpoint: Path) -> None:
    # An engine that answers fluently and wrongly looks healthy; here a sound one is held to another answer.
    answer = "model.probe.answer=La capitale de la France"
    failure = start("server.port=0", f"model.path={checkpoint}", answer, limit_s=300)
    said = "\n".join(failure.lines)
    assert failure.status == 1
    assert "the probe must be answered 'La capitale de la France', got 'The capital of France is" in said
    assert "ready on" not in said
