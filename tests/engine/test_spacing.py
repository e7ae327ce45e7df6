"""`engine.prefill_schedule_interval` on one engine: prompts come in some steps, and in any where nobody decodes."""

import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from tests.engine.process import running
from tests.engine.test_contract import CHAT
from tests.waiting import wait_until

INTERVAL = 16


def test_spacing_admits_prompts_in_one_of_so_many_steps(tmp_path: Path) -> None:
    """A stream counts the engine's steps; short requests behind it, one after another, see when they are admitted."""
    events = 0

    def body(text: str, tokens: int) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "ignore_eos": True}

    with running(tmp_path, f"--set=engine.prefill_schedule_interval={INTERVAL}") as server:

        def decode() -> None:
            nonlocal events
            story = body("Tell me a story.", 5 * INTERVAL) | {"stream": True}
            with httpx.stream("POST", f"{server.base_url}{CHAT}", json=story, timeout=150) as answer:
                for line in answer.iter_lines():
                    events += bool(line)

        with httpx.Client(base_url=server.base_url, timeout=150) as client:
            story = threading.Thread(target=decode)
            story.start()
            wait_until("it is being told", lambda: events > 2, 60)
            at: list[int] = []
            while story.is_alive() and len(at) < 4:
                # another text each time: a prompt that is all in the cache waits for no step
                assert client.post(CHAT, json=body(f"{len(at)} is a number.", 1)).status_code == 200
                at.append(events)
            story.join()
            steps = [after - before for before, after in pairwise(at)]
            assert len(steps) == 3, at
            assert all(step > INTERVAL - 6 for step in steps), steps
            alone = client.post(CHAT, json=body("What is it?", 4))
    assert alone.json()["usage"]["completion_tokens"] == 4, "where nobody decodes, nobody waits"
