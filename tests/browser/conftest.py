"""Real headless Chromium, and the two pages that the tests of this folder share: before the real server, and before a
scripted one that says what the real one says rarely.
"""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from borg_serve import demo
from tests import npm, scripted_api
from tests.engine.process import ROOT, Server, command, environment, free_port, running
from tests.scripted_api import Api

AXE = "axe-core@4.11.0"
AXE_SHA256 = "39bed7d72308f6d620789c169d699bfd7e8da80f65b545821a6b2215c3e83107"
PATIENT_MS = 60_000
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


@contextmanager
def page_before(api: str, *more: str) -> Iterator[str]:
    """Run the chat page before an API; its address."""
    port = free_port()
    process = subprocess.Popen(
        command("ui", "--api", api, "--port", str(port), *more),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"API   {api}\n"
        assert process.stdout.readline() == f"page  {url}\n"
        while True:
            assert process.poll() is None, "the page ended"
            try:
                httpx.get(url, timeout=60)
                break
            except httpx.TransportError:
                pass
        yield url
        process.terminate()
        assert process.wait(60) in (0, -15)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def api() -> Iterator[Api]:
    """The scripted API."""
    with scripted_api.running() as api:
        yield api


@pytest.fixture(scope="session")
def scripted(api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the page before the scripted API, with a key."""
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text(KEY + "\n")
    with page_before(api.url, "--key-file", str(file)) as url:
        yield url


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The real server with the demo model."""
    with running(tmp_path_factory.mktemp("server"), f"--set=model.path={demo.materialise()}") as server:
        yield server


@pytest.fixture(scope="session")
def real(server: Server) -> Iterator[str]:
    """Address of the page before the real server."""
    with page_before(server.base_url) as url:
        yield url


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
    """The source of axe-core, which finds what keeps people from using a page."""
    directory = npm.fetch(AXE, AXE_SHA256, ["axe.min.js"], "axe-core-4.11.0")
    return (directory / "axe.min.js").read_text(encoding="utf-8")
