"""Headless Chromium, and the two chat pages that the tests of this folder share.

One page is a client of the real server, the other of a scripted API that gives the answers that are rare.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tests import npm, scripted_api
from tests.engine.process import ROOT, Server, command, environment, free_port
from tests.scripted_api import Api

AXE = "axe-core@4.11.0"
AXE_SHA256 = "39bed7d72308f6d620789c169d699bfd7e8da80f65b545821a6b2215c3e83107"
PATIENT_MS = 120_000
FIGURES = re.compile(r"\d+ tokens? · first after")
"""The line under an answer that has ended."""
expect.set_options(timeout=PATIENT_MS)
GREEDY = {"temperature": "0"}
"""The demo then answers simple questions in a few words. A sampled answer may take minutes."""
KEY = "borg-key-that-no-browser-may-see"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium from the machine's own packages."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium: `make system` as root installs it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(tab: Page, url: str) -> None:
    tab.goto(url)
    expect(tab.locator("#message textarea")).to_be_editable()
    expect(tab.locator("#chat .example").first.or_(tab.locator("#chat .message").first)).to_be_visible()


def send(tab: Page, text: str) -> None:
    expect(tab.locator("#message textarea")).to_be_editable()
    tab.fill("#message textarea", text)
    tab.press("#message textarea", "Enter")


def adjust(tab: Page, numbers: Mapping[str, str]) -> None:
    """Open the settings and put these numbers in, by the field's id."""
    tab.get_by_text("Settings", exact=True).click()
    for name, value in numbers.items():
        tab.locator(f"#{name} input[type=number]").fill(value)
        tab.locator(f"#{name} input[type=number]").blur()


def bubbles(tab: Page) -> Locator:
    """Return the answers on the page, the unfinished one included."""
    return tab.locator("#chat [data-testid=bot]")


def answers(tab: Page) -> list[str]:
    return bubbles(tab).all_inner_texts()


@dataclass
class ChatPage:
    """The chat page's process. It can be stopped and started again at the same address."""

    api: str
    more: Sequence[str]
    cache: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.process = subprocess.Popen(
            command("ui", "--api", self.api, "--port", str(self.port), *self.more),
            cwd=ROOT,
            env=environment() | {"XDG_CACHE_HOME": str(self.cache)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"API   {self.api}\n"
        assert self.process.stdout.readline() == f"page  {self.url}\n"
        while True:
            assert self.process.poll() is None, "the page ended"
            try:
                httpx.get(self.url, timeout=60)
                return
            except httpx.TransportError:
                pass

    def stop(self) -> None:
        """End it as a supervisor does."""
        assert self.process is not None
        with self.process as process:
            process.terminate()
            assert process.wait(60) in (0, -15)


@contextmanager
def page_before(api: str, cache: Path, *more: str) -> Iterator[ChatPage]:
    """Run the chat page before an API."""
    page = ChatPage(api, more, cache)
    try:
        page.start()
        yield page
        page.stop()
    finally:
        if page.process is not None:
            page.process.kill()
            page.process.wait()


@pytest.fixture(scope="session")
def api() -> Iterator[Api]:
    """The scripted API."""
    with scripted_api.running() as api:
        yield api


@pytest.fixture(scope="session")
def scripted_page(api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatPage]:
    """The page before the scripted API, with a key."""
    folder = tmp_path_factory.mktemp("page")
    file = folder / "key"
    file.write_text(KEY + "\n")
    with page_before(api.url, folder, "--key-file", str(file)) as page:
        yield page


@pytest.fixture(scope="session")
def scripted(scripted_page: ChatPage) -> str:
    """Address of the page before the scripted API."""
    return scripted_page.url


@pytest.fixture(scope="session")
def real(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the page before the real server."""
    with page_before(server.base_url, tmp_path_factory.mktemp("real")) as page:
        yield page.url


@pytest.fixture
def tab(browser: Browser) -> Iterator[Page]:
    """A browser's tab of one user."""
    with user(browser) as page:
        yield page


@contextmanager
def user(browser: Browser, **options: object) -> Iterator[Page]:
    """A tab of a user of their own, with what their browser has stored."""
    context = browser.new_context(**options)  # type: ignore[arg-type]
    context.set_default_timeout(PATIENT_MS)
    try:
        yield context.new_page()
    finally:
        context.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core, which checks a page for accessibility."""
    directory = npm.fetch(AXE, AXE_SHA256, ["axe.min.js"], "axe-core-4.11.0")
    return (directory / "axe.min.js").read_text(encoding="utf-8")
