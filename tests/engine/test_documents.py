"""README's first commands, as a user types them: `make serve`, then the question to it."""

import json
import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from loadtests.servers.local import LOOK
from tests.documents import commands
from tests.engine.process import READY_S, ROOT, environment, free_port, living
from tests.waiting import wait_until


def test_readme_server_starts_and_answers_its_question(tmp_path: Path) -> None:
    if not (ROOT / ".venv/bin/borg-serve").exists():
        pytest.skip("no .venv here: `make setup` builds it")
    typed = [command.text for command in commands("README.md")]
    assert "make serve" in typed
    question = next(text for text in typed if text.startswith("curl ") and "/v1/chat/completions" in text)
    port = free_port()
    log = tmp_path / "log"
    words = ["make", "-o", "setup", "serve", f"PORT={port}"]
    with (
        log.open("wb") as out,
        subprocess.Popen(
            words, cwd=ROOT, env=environment(), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        try:

            def ready() -> bool:
                assert process.poll() is None, log.read_text()[-4000:]
                with suppress(httpx.TransportError):
                    return LOOK.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == 200
                return False

            wait_until("the server is ready", ready, READY_S)
            assert f"ready on http://127.0.0.1:{port}" in log.read_text()
            assert "http://127.0.0.1:8000/" in question
            here = question.replace(":8000/", f":{port}/")
            asked = subprocess.run(["bash", "-c", here], capture_output=True, text=True, timeout=300, check=True)
            answer = json.loads(asked.stdout)
            assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
            usage = answer["usage"]
            counts = f"{usage['prompt_tokens_details']['cached_tokens']:,}", f"{usage['prompt_tokens']:,}"
            claims = re.findall(r"([\d,]+) of ([\d,]+) prompt tokens", (ROOT / "README.md").read_text(encoding="utf-8"))
            assert [claim for claim in claims if claim != counts] == []
            processes = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.wait(120)
            assert living(processes, within_s=60) == []
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
