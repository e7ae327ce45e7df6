"""The chat page with the real server, and its process: left during an answer, restarted, ended."""

import logging
import os
import re
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from playwright.sync_api import Browser, Page, expect

from borg_serve.chat_page.page import storage_secret
from loadtests.servers import local
from tests.browser.conftest import FIGURES, GREEDY, ChatPage, adjust, answers, bubbles, open_page, send, user
from tests.engine.process import ROOT, Server, environment, free_port, living
from tests.scripted_api import Api
from tests.waiting import wait_until


def test_page_holds_a_conversation_of_three_turns(tab: Page, real: str) -> None:
    open_page(tab, real)
    adjust(tab, GREEDY)
    for number, text in enumerate(("What is the capital of France?", "And of Italy?", "Thank you."), 1):
        send(tab, text)
        expect(tab.get_by_text(FIGURES)).to_have_count(number)
    assert "Paris" in answers(tab)[0]


@pytest.mark.parametrize("how", ["stop", "close"])
def test_page_that_is_left_frees_the_server(
    browser: Browser, real: str, server: Server, how: str, record_property: Callable[[str, object], None]
) -> None:
    """The stop button, or closing the tab, ends the request on the server."""
    idle = "vllm:num_requests_running", "borg_inflight", "vllm:kv_cache_usage_perc"

    def gone() -> float:
        return local.metric(server.base_url, "borg_requests_total", outcome="gone")

    def free() -> bool:
        return not any(local.metric(server.base_url, name) for name in idle)

    wait_until("nobody else is served", free)
    before = gone()
    with user(browser) as tab:
        open_page(tab, real)
        while gone() == before:  # an answer may end before it can be stopped; then another one is asked for
            shown = len(answers(tab))
            send(tab, "Write down all numbers from one to one thousand in words, each on a line of its own.")
            expect(bubbles(tab)).to_have_count(shown + 1)
            expect(bubbles(tab).last).to_have_text(re.compile(r"\S"))
            if not local.metric(server.base_url, "vllm:kv_cache_usage_perc"):
                continue
            if how == "stop":
                tab.locator("#message .stop-button").click()
            else:
                tab.close()
            freed_s = wait_until("all is free", free)
            if how == "close":
                break
        record_property("freed_s", freed_s)
        print(f"{how}: KV cache freed after {freed_s:.2f} s")
        assert gone() == before + 1
        if how == "stop":
            expect(bubbles(tab).last, "what had come is kept").to_have_text(re.compile(r"\S"))
            adjust(tab, GREEDY)
            send(tab, "What is the capital of France?")
            expect(tab.get_by_text(FIGURES).last).to_be_visible()


def test_page_conversation_survives_a_reload_and_a_new_page(tab: Page, scripted_page: ChatPage) -> None:
    open_page(tab, scripted_page.url)
    send(tab, "remember this")
    expect(tab.get_by_text(FIGURES)).to_have_count(1)
    expect(tab.get_by_role("gridcell", name="remember this")).to_be_visible()
    expect(tab.locator("#message textarea")).to_have_attribute("placeholder", re.compile("Enter sends"))
    tab.reload()
    expect(tab.get_by_role("gridcell", name="remember this")).to_be_visible()
    scripted_page.stop()
    scripted_page.start()
    tab.reload()
    tab.get_by_role("gridcell", name="remember this").click()
    expect(bubbles(tab).first).to_contain_text("You said: remember this.")
    send(tab, "and this")
    expect(tab.get_by_text("You said: and this.")).to_be_visible()


def test_page_secret_is_kept_for_its_owner_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "cache" / "page-secret"
    secret = storage_secret(file)
    assert len(secret) == 32
    assert storage_secret(file) == secret
    assert file.stat().st_mode & 0o777 == 0o600
    assert os.listdir(file.parent) == ["page-secret"]
    assert storage_secret(tmp_path / "other") != secret
    (tmp_path / "file").touch()
    # A module that vLLM's server imports leaves every handler of the root logger at ERROR, pytest's too.
    with caplog.at_level(logging.WARNING, "borg_serve.chat_page.page"):
        assert storage_secret(tmp_path / "file" / "page-secret") != secret
    assert "lost at the next start" in caplog.text


def test_make_chat_leaves_no_process_when_it_is_ended(api: Api) -> None:
    if not (ROOT / ".venv/bin/borg-serve").exists():
        pytest.skip("no .venv here: `make setup` builds it")
    port = free_port()
    words = ["make", "-o", "setup", "chat", f"PORT={api.url.rpartition(':')[2]}", f"PAGE_PORT={port}"]
    with subprocess.Popen(words, cwd=ROOT, env=environment(), start_new_session=True) as process:
        page = f"http://127.0.0.1:{port}"
        try:
            wait_until("the page answers", lambda: answers_at(page), 300)
            processes = psutil.Process(process.pid).children(recursive=True)
            assert processes
            process.terminate()
            process.wait(60)
            assert living(processes, within_s=60) == []
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def answers_at(url: str) -> bool:
    try:
        return httpx.get(url, timeout=60).status_code == 200
    except httpx.TransportError:
        return False
